"""Hugging Face folders whose files lie."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import Change, CommandError, Row, check, command, damaged
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxquant
from fxquant import claims
from fxquant.errors import ModelError

pytest.importorskip("transformers")

from tiny_language import save_tiny

from fxquant.checkpoints import empty_model, load_model, read_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DROP = object()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("hostile") / "tiny")
    load_model(folder)  # imports what takes long
    return folder


# --- how a folder is changed ------------------------------------------------------------------------------------------
def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not DROP}))

    return change


def content(name: str, data: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def sparse(name: str, size: int) -> Change:
    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return change


def tensors(change_: Callable[[dict[str, Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change_(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def index(shard: str) -> Change:
    """The weights in a shard of their own, and an index that says another of one of them."""

    def change(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        found = dict.fromkeys(names, "a.safetensors") | {"lm_head.weight": shard}
        (folder / INDEX).write_text(json.dumps({"weight_map": found}))

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def code(folder: Path) -> None:
    """Python code beside the model, which leaves a trace if it is run."""
    text = f"import os\nos.mkdir({str(folder / 'owned')!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(text)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(text)


AUTO_MAP = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}


def bomb(name: str) -> Change:
    """A zip of 64 MB of zeros, where a model is expected, and nothing else."""

    def change(folder: Path) -> None:
        for file in (WEIGHTS, "config.json"):
            (folder / file).unlink()
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 26))

    return change


FEW = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
"""A config without sizes: transformers takes those of a model of seven billion weights."""
FOLDERS: dict[str, tuple[Change, str]] = {
    "config without sizes": (content("config.json", json.dumps(FEW)), "asks for a model of .* weights, and its files"),
    "2^40 layers": (config(num_hidden_layers=2**40), "num_hidden_layers is 1099511627776; no setting"),
    "2^30 layers": (config(num_hidden_layers=2**30), "expected a count from 0 to 100000"),
    "99999 layers": (config(num_hidden_layers=99_999), "a model of more than 1024 weights, and 12 are there"),
    "-1 layers": (config(num_hidden_layers=-5), "expected a count"),
    "2^60 tokens": (config(vocab_size=2**60), "vocab_size is 1152921504606846976; no setting"),
    "2^30 tokens": (config(vocab_size=2**30), "asks for a model of .* weights"),
    "negative width": (config(hidden_size=-32), "makes no model"),
    "width of 32.5": (config(hidden_size=32.5), "makes no model"),
    "width in words": (config(hidden_size="32"), "makes no model"),
    "width is a list": (config(hidden_size=[32]), "makes no model"),
    "10^9 labels": (config(num_labels=10**9), "num_labels is 1000000000; expected a count"),
    "NaN": (content("config.json", '{"hidden_size": NaN}'), "holds NaN, which is not a JSON number"),
    "a number of 5000 digits": (content("config.json", '{"hidden_size": ' + "9" * 5000 + "}"), "cannot be read"),
    "key twice": (content("config.json", '{"a": 1, "a": 2}'), "key twice"),
    "deep config": (content("config.json", nested(100_000)), "nested too deep"),
    "config nested 100 deep": (content("config.json", nested(100)), "nested too deep"),
    "config of 1 GB": (sparse("config.json", 1 << 30), "at most 8388608 are read"),
    "config is a list": (content("config.json", "[]"), "not a JSON object"),
    "binary config": (content("config.json", bytes(range(256))), r"config\.json cannot be read"),
    "config elsewhere": (link("config.json", "/etc/hostname"), "out of the folder; copy the file itself"),
    "config is a FIFO": (fifo("config.json"), r"has no config\.json; expected"),
    "generation config is a FIFO": (fifo("generation_config.json"), "not a regular file"),
    "weights are a FIFO": (fifo(WEIGHTS), "not a regular file"),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), "out of the folder"),
    "weights elsewhere": (link(WEIGHTS, "/etc/hostname"), "out of the folder; copy the file itself"),
    "weights in a circle": (link(WEIGHTS, WEIGHTS), "is a link to model.safetensors, which is not there"),
    "header of 2^63 bytes": (content(WEIGHTS, struct.pack("<Q", 2**63)), "its header claims 9223372036854775808"),
    "escape codes in a name": (tensors(lambda t: t.update({"\x1b[2J": torch.zeros(1)})), "not printable"),
    "shard above": (index("../../etc/x.safetensors"), r"names the shard '\.\./\.\./etc/x\.safetensors'"),
    "shard with a root": (index("/etc/x.safetensors"), r"names the shard '/etc/x\.safetensors'"),
    "shard that is no tensors": (index("config.json"), r"names the shard 'config\.json'"),
    "shard that is missing": (index("b.safetensors"), "lacks b.safetensors of 2 files of weights"),
    "index of 1 GB": (both(index("a.safetensors"), sparse(INDEX, 1 << 30)), "at most 33554432 are read"),
    "tensor twice": (
        both(index("b.safetensors"), lambda f: shutil.copy(f / "a.safetensors", f / "b.safetensors") and None),
        "is in '[ab].safetensors' and in '[ab].safetensors'",
    ),
    "weight missing": (tensors(lambda t: t.pop("model.norm.weight")), "lacks 1 weights"),
    "weight of another shape": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(33)})), "cannot be loaded"),
    "whole numbers for floats": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)})),
        "holds int64, where the model has floats",
    ),
    "code of its own": (
        both(code, config(architectures=["EvilForCausalLM"], model_type="evil", auto_map=AUTO_MAP)),
        "needs Python code of its own .*which fxquant never runs",
    ),
    "code for the config": (both(code, config(model_type="evil", auto_map=AUTO_MAP)), "makes no model"),
    "attention from the hub": (config(attn_implementation="me/attention"), "may name code to be fetched"),
    "attention of a part": (config(text_config={"_attn_implementation": "me/attention"}), "may name code"),
    "weights by another name": (config(transformers_weights="../x.safetensors"), "names another file"),
    "adapter": (content("adapter_config.json", '{"base_model_name_or_path": "/"}'), "merge the adapter"),
    "class is a tokenizer": (config(architectures=["AutoTokenizer"]), "does not have"),
    "class is a function": (config(architectures=["pipeline"]), "does not have"),
    "class is a number": (config(architectures=[7]), "expected a list with the name"),
    "class is an object": (config(architectures={"0": "x"}), "expected a list with the name"),
    "class is a path": (config(architectures=["os.system"]), "expected a list with the name"),
    "unknown quantization": (config(quantization_config=["x"]), "already quantized"),
    "element type": (config(dtype="float33"), "makes no model|cannot be loaded"),
    "pickles": (both(bomb("x.zip"), content("config.json", "{}"), content("pytorch_model.bin", b"x")), "may run code"),
    "packed, and no table": (config(quantization_config={"quant_method": "fxquant"}), "was quantized by fxquant"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_lies(case: str, tiny: Path, tmp_path: Path) -> None:
    change, message = FOLDERS[case]
    check(Row(damaged(change, tiny), load_model, ModelError, message), tmp_path)
    assert not list(tmp_path.rglob("owned"))


STREAMED = ("2^30 tokens", "whole numbers for floats", "weights elsewhere", "tensor twice", "code of its own")


@pytest.mark.parametrize("case", STREAMED)
def test_streaming_checks_the_same(case: str, tiny: Path, tmp_path: Path) -> None:
    change, message = FOLDERS[case]
    check(Row(damaged(change, tiny), lambda path: load_model(path, lazy=True), ModelError, message), tmp_path)


@pytest.mark.parametrize("name", ["m.pt2", "m.npz", "m.pt", "m.bin"])
def test_archives_are_not_opened(name: str, tiny: Path, tmp_path: Path) -> None:
    make = damaged(bomb(name), tiny)
    row = Row(lambda place: make(place) / name, load_model, ModelError, "refused|load it yourself|not a model that can")
    check(row, tmp_path)


def test_a_model_that_no_memory_holds(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and weights agree: 32 GiB, in a file that takes no room on the disk."""

    def grow(folder: Path) -> None:
        config(vocab_size=2**27)(folder)
        found = {name: list(t.shape) for name, t in load_file(folder / WEIGHTS).items()}
        found |= {name: [2**27, 32] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        rows, end = {}, 0
        for name, shape in found.items():
            size = 4 * torch.Size(shape).numel()
            rows[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        header = json.dumps(rows).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(folder / WEIGHTS, 8 + len(header) + end)

    monkeypatch.setattr(claims, "memory", lambda: 1 << 34)
    check(Row(damaged(grow, tiny), load_model, ModelError, "and this machine has 17,179,869,184 of memory"), tmp_path)


def test_code_that_is_not_needed_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder = damaged(both(code, config(auto_map=AUTO_MAP)), tiny)(tmp_path)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["auto_map"] = {"AutoTokenizer": ["tokenization_evil.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert load_model(folder).tokenizer is not None
    assert not (folder / "owned").exists()


def test_honest_configs_are_taken(tiny: Path, tmp_path: Path) -> None:
    """LLaVA counts a layer from the end, Mamba has an infinite limit, a model of a million positions a large theta."""
    honest = {"vision_feature_layer": -2, "rope_theta": 2**33, "time_step_limit": [0.0, float("inf")]}
    folder = damaged(config(**honest), tiny)(tmp_path)
    assert claims.read_config(folder)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("read", [load_model, empty_model])
def test_a_name_from_a_config_is_not_run(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """X-MOD names its adapters by the languages that its config lists, and torch.fx writes names into code."""
    from transformers import XmodConfig, XmodForMaskedLM

    folder = tmp_path / "m"
    evil = f'en", getattr(__import__("os"), "mkdir")("{tmp_path}/owned")) or ("'.replace(".", "\u2024")
    settings = XmodConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, languages=[evil], default_language=evil,
    )  # fmt: skip
    XmodForMaskedLM(settings).save_pretrained(folder)
    check(Row(lambda _: folder, read, ModelError, "gives a module the name .* which may be code"), tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_config_is_checked_without_its_weights(tiny: Path, tmp_path: Path) -> None:
    folder = damaged(both(content(WEIGHTS, b"none"), config(num_hidden_layers=99_999)), tiny)(tmp_path)
    check(Row(lambda _: folder, empty_model, ModelError, "a model of more than"), tmp_path)


def test_an_export_copies_no_file_from_elsewhere(tiny: Path, tmp_path: Path) -> None:
    """A link in a downloaded folder must not bring a private file into one that is published."""
    out = tmp_path / "out"
    fxquant.compile(load_model(tiny).model, load_model(tiny).example_inputs, "W8A16-INT").save(tmp_path / "c")
    read = command("export", str(tmp_path / "c"), "--format", "compressed-tensors", "--model", "FILE", "-o", str(out))
    make = damaged(link("merges.txt", "/etc/hostname"), tiny)
    check(Row(make, read, CommandError, "out of the folder; copy the file itself"), tmp_path)
    assert not out.exists()


def test_weights_that_are_not_numbers(tiny: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    make = damaged(tensors(lambda t: t[name][0].fill_(float("nan"))), tiny)
    read = command("compile", "FILE", "-c", "W6A16-E3M2", "-o", str(tmp_path / "out"))
    check(Row(make, read, CommandError, "NaN"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_card_quotes_a_config_as_text(tiny: Path) -> None:
    from fxquant.hf import model_card

    model = load_model(tiny).model
    rules = [{"match": "```\n<script>alert(1)</script>", "keep": True}, {"match": "*", "weight": "e2m1/channel"}]
    fxquant.quantize_(model, {"rules": rules[1:]})
    config: Any = model.config
    config.quantization_config.config = fxquant.load_config({"rules": rules})
    config.name_or_path = "a](javascript:alert(1))/b"
    card = model_card(model)
    fence = "````"
    assert card.count(fence) == 2
    assert "<script>" in card.split(fence)[1]
    assert "javascript" not in card


# --- tokenizers -------------------------------------------------------------------------------------------------------
TOKENIZERS: dict[str, tuple[Change, str]] = {
    "2 GB": (sparse("tokenizer.json", 1 << 31), "at most 67108864 are read"),
    "deep": (content("tokenizer.json", nested(100_000)), "cannot be read"),
    "deep settings": (content("tokenizer_config.json", nested(100_000)), "cannot be read"),
    "settings are a list": (content("tokenizer_config.json", "[]"), "cannot be read"),
    "compressed": (content("tokenizer.json", b"\x1f\x8b\x08\x00" + bytes(100)), "cannot be read"),
    "merges elsewhere": (link("merges.txt", "/etc/hostname"), "out of the folder"),
    "FIFO": (fifo("tokenizer.json"), "not a regular file"),
    "vocabulary is a FIFO": (fifo("vocab.json"), "not a regular file"),
    "template is a FIFO": (fifo("chat_template.jinja"), "not a regular file"),
    "token 2^63": (content("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 9223372036854775808}, '
                                             '"merges": []}}'), "cannot be read"),
    "unknown class": (content("tokenizer.json", '{"model": {"type": "Evil"}}'), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_lies(case: str, tiny: Path, tmp_path: Path) -> None:
    change, message = TOKENIZERS[case]
    make = damaged(change, tiny)
    check(Row(make, read_tokenizer, ModelError, message), tmp_path)
    with pytest.warns(UserWarning, match=message):
        assert load_model(tmp_path / "m").tokenizer is None


def test_tokens_that_the_model_has_not(tiny: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())
        found["model"]["vocab"] |= {"T": 5000}
        (folder / "tokenizer.json").write_text(json.dumps(found))

    check(Row(damaged(change, tiny), load_model, ModelError, "gives token 5000, and the model has 98"), tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered: (SecurityError|UndefinedError)"),
        ("{% for i in range(999999999) %}x{% endfor %}", "cannot be rendered: OverflowError"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{% for %}", "cannot be rendered: TemplateSyntaxError"),
    ],
)
def test_a_template_is_rendered_in_a_sandbox(template: str, message: str, tiny: Path, tmp_path: Path) -> None:
    from fxquant.errors import InputError
    from fxquant.generate import prompt_ids

    folder = damaged(content("chat_template.jinja", template), tiny)(tmp_path)
    words = read_tokenizer(folder)
    check(Row(lambda _: folder, lambda _: prompt_ids(words, "hello"), InputError, message), tmp_path)
