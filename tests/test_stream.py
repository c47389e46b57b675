"""Models that are never in memory as a whole become, bit for bit, what they become in memory."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import llama
from typer.testing import CliRunner

import fxquant
from fxquant import checkpoints, spool, store, stream, weight_writer
from fxquant.cli import app
from fxquant.config import ConfigLike, load_config
from fxquant.errors import ModelError, SaveError, WeightError
from fxquant.lazy import FromFile, Lazy
from fxquant.program import quiet
from fxquant.tasks import IN_PROCESS
from fxquant.units import Unit

WINDOWS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    llama(path, num_hidden_layers=2).to(torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def both(folder: Path, tmp_path: Path, config: ConfigLike, **more: Any) -> tuple[Path, Path]:
    """What streaming and what compiling in memory write."""
    lazy = checkpoints.load_model(folder, lazy=True)
    stream.compile_to(tmp_path / "streamed", lazy.model, lazy.example_inputs, config, **more)
    loaded = checkpoints.load_model(folder)
    fxquant.compile(loaded.model, loaded.example_inputs, config, **more).save(tmp_path / "in_memory")
    return tmp_path / "streamed", tmp_path / "in_memory"


CONFIGS: dict[str, ConfigLike] = {
    "fp6": "W6A16-E3M2",
    "mxfp4": {"rules": [{"match": "*", "weight": "e2m1/group32:e8m0"}]},
    "nvfp4": {"rules": [{"match": "*", "weight": "e2m1/group16:e4m3"}]},
    "m2": {"rules": [{"match": "*", "weight": "e2m1/group32:m2", "activation": "e4m3/token"}]},
    "int4": {"rules": [{"match": "*", "weight": "uint4/group32"},
                       {"match": "model.embed_tokens", "weight": "int8/channel"}]},
    "gptq": {"rules": [{"match": "*", "weight": "e2m1/group32"}], "passes": ["gptq"]},
    "search": {"rules": [{"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}],
               "passes": [{"search_formats": {"steps": 4, "rounds": 1}}]},
    "lorc": {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": [{"lorc": {"rank": 4}}]},
    "zq_local": {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": [{"zq_local": {"iterations": 2}}]},
    "smooth": {"rules": [{"match": "*", "weight": "int8/channel", "activation": "int8/token"}], "passes": ["smooth"]},
    "rotate": {"rules": [{"match": "*", "weight": "e2m1/group32"}], "passes": ["rotate"]},
    "zq_global": {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": [{"zq_global": {"iterations": 4}}]},
    "fpq": "W4A4-FPQ",
    "gwq": {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": ["gwq"]},
    "pb_llm": {"rules": [{"match": "*", "weight": "int4/channel"}], "passes": ["pb_llm"]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_those_of_compiling_in_memory(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.spool.LARGE", 1)  # what is kept between layers goes through files
    monkeypatch.setattr("fxquant.units.ELEMENTS", 1000)
    streamed, in_memory = both(folder, tmp_path, CONFIGS[name], calibration=WINDOWS)
    assert (streamed / "model.safetensors").read_bytes() == (in_memory / "model.safetensors").read_bytes()
    a, b = (json.loads((path / "graph.json").read_text()) for path in (streamed, in_memory))
    for key in ("nodes", "tensors", "signature", "config"):
        assert a[key] == b[key], key
    assert store.verify(streamed), "the digests of what was written in parts"
    assert [step["name"] for step in a["trace"]["steps"]] == [step["name"] for step in b["trace"]["steps"]]
    ids = torch.arange(20).reshape(2, 10)
    got, want = (fxquant.load(path)(ids) for path in (streamed, in_memory))
    assert torch.equal(got["logits"], want["logits"])


def test_no_weight_is_read_before_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = checkpoints.load_model(folder, lazy=True)
    read: list[str] = []
    monkeypatch.setattr(Lazy, "read", lambda self: read.append(repr(self)))
    program = stream.capture(lazy.model, lazy.example_inputs)
    given = {"calibration": [], "progress": quiet, "executor": IN_PROCESS}
    stream.rewrite(program, load_config("W6A16-E3M2"), given, IN_PROCESS)
    assert not read
    assert all(isinstance(p, Lazy) for p in lazy.model.parameters()), "the model is as it was"


def test_no_copy_of_the_packed_weights_is_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the new file holds is mapped when the model is decoded from it, not kept in files of its own."""
    monkeypatch.setattr("fxquant.spool.LARGE", 1)
    kept: list[int] = []
    real = spool._written
    monkeypatch.setattr(spool, "_written", lambda value, to: (kept.append(value.nbytes), real(value, to))[1])
    lazy = checkpoints.load_model(folder, lazy=True)
    stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs)
    assert sum(kept) < 1000  # constants of the graph


def test_what_is_needed_soon_is_read_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as may be; a file that is gone is an error where it is needed, not here."""
    (tmp_path / "there").write_bytes(bytes(5000))
    places = [("gone", 0, 10), ("there", 0, 2000), ("there", 2000, 3000)]
    sources = [FromFile(tmp_path / name, begin, torch.uint8, (count,)) for name, begin, count in places]
    read: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(handle: int, buffers: list[memoryview], at: int) -> int:
        read.append((at, len(buffers[0])))
        return real(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    with stream._read_meanwhile(sources, 4010):
        for thread in [t for t in threading.enumerate() if t.name == "read meanwhile"]:
            thread.join(10)
    assert read == [(0, 2000), (2000, 2000)]


def test_a_compiler_is_started_for_large_models_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    monkeypatch.setattr(stream.cpu_library, "library", lambda: None)
    monkeypatch.setattr(stream.cpu, "available", started.set)
    for name, least, wanted in (("small", stream.COMPILED, False), ("large", 1, True)):
        monkeypatch.setattr(stream, "COMPILED", least)
        lazy = checkpoints.load_model(folder, lazy=True)
        stream.compile_to(tmp_path / name, lazy.model, lazy.example_inputs)
        assert started.wait(5 if wanted else 0) == wanted


def test_layers_are_observed_as_in_memory(folder: Path, tmp_path: Path) -> None:
    streamed, in_memory = both(folder, tmp_path, "W6A16-E3M2")
    a, b = (fxquant.load(path).program.observations for path in (streamed, in_memory))
    assert a is not None
    assert b is not None
    by_name = {layer.name: layer for layer in b}
    assert {layer.name for layer in a} == set(by_name)
    for layer in a:
        assert layer.input is None
        assert layer.weight == by_name[layer.name].weight
        assert layer.scale == by_name[layer.name].scale


def test_workers_write_the_same(folder: Path, tmp_path: Path) -> None:
    lazy = checkpoints.load_model(folder, lazy=True)
    config = {"rules": [{"match": "*", "weight": "e2m1/group32:e8m0"}]}
    stream.compile_to(tmp_path / "here", lazy.model, lazy.example_inputs, config)
    with fxquant.executor("processes", workers=2) as executor:
        stream.compile_to(tmp_path / "there", lazy.model, lazy.example_inputs, config, executor=executor)
    for name in ("model.safetensors", "graph.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_a_bad_weight_is_named_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    model = llama(tmp_path / "broken", num_hidden_layers=2)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    lazy = checkpoints.load_model(tmp_path / "broken", lazy=True)
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_what_is_there_stays_until_the_new_is_complete(folder: Path, tmp_path: Path) -> None:
    lazy = checkpoints.load_model(folder, lazy=True)
    stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs)
    before = (tmp_path / "out" / "graph.json").read_bytes()
    with pytest.raises(SaveError, match="exists already"):
        stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs)
    stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs, "W4A16-RTN", overwrite=True)
    assert (tmp_path / "out" / "graph.json").read_bytes() != before


def test_gguf_files_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="only folders of safetensors can"):
        checkpoints.load_model(tmp_path / "model.gguf", lazy=True)


def test_a_job_that_was_stopped_goes_on_and_writes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.weight_writer.FLUSH", 1)
    lazy = checkpoints.load_model(folder, lazy=True)
    stream.compile_to(tmp_path / "whole", lazy.model, lazy.example_inputs)
    rounded: list[str] = []
    real = weight_writer.pack_unit

    def until(stop: int) -> Any:
        def call(unit: Unit, *rest: Any) -> Any:
            if len(rounded) == stop:
                raise KeyboardInterrupt
            rounded.append(unit.name)
            return real(unit, *rest)

        return call

    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr(weight_writer, "UNITS_AHEAD", 1)
    for stop in (4, 9):
        monkeypatch.setattr(weight_writer, "pack_unit", until(stop))
        with pytest.raises(KeyboardInterrupt):
            stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs, job=tmp_path / "job")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(weight_writer, "pack_unit", until(-1))
    stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs, job=tmp_path / "job")
    for name in ("model.safetensors", "graph.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    on_their_way = weight_writer.UNITS_AHEAD + 2  # of one worker
    assert len(rounded) <= len(set(rounded)) + 2 * on_their_way


def test_weights_that_are_damaged_in_a_job_are_written_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.weight_writer.FLUSH", 1)
    lazy = checkpoints.load_model(folder, lazy=True)
    stream.compile_to(tmp_path / "whole", lazy.model, lazy.example_inputs, job=tmp_path / "job")
    file = tmp_path / "job" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged; it is written again"):
        stream.compile_to(tmp_path / "out", lazy.model, lazy.example_inputs, job=tmp_path / "job")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == file.read_bytes() != bytes(content)


# --- what may be streamed, and from the command line ------------------------------------------------------------------
def test_a_decoder_with_a_kv_cache_is_streamed_as_well(folder: Path, tmp_path: Path) -> None:
    lazy = checkpoints.load_model(folder, kv_cache=True, lazy=True)
    stream.compile_to(tmp_path / "streamed", lazy.model, lazy.example_inputs)
    loaded = checkpoints.load_model(folder, kv_cache=True)
    fxquant.compile(loaded.model, loaded.example_inputs).save(tmp_path / "in_memory")
    a, b = (json.loads((tmp_path / name / "graph.json").read_text()) for name in ("streamed", "in_memory"))
    assert a["nodes"] == b["nodes"]
    assert a["signature"] == b["signature"]
    assert (tmp_path / "streamed" / "model.safetensors").read_bytes() == (
        tmp_path / "in_memory" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "bert", "vit"])
def test_other_architectures_are_streamed_as_well(name: str, tmp_path: Path) -> None:
    """Mixtral: experts that transformers joins from many tensors. GPT-2: weights ``[in, out]``, and tied ones."""
    import transformers

    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 64, "max_position_embeddings": 64, "intermediate_size": 48}
    made = {
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **small, **text, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**small, **text)),
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
            **small, intermediate_size=48, image_size=16, patch_size=4)),
    }  # fmt: skip
    torch.manual_seed(0)
    model = made[name]()
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_(-0.5, 0.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    streamed, in_memory = both(tmp_path / name, tmp_path, {"rules": [{"match": "*", "weight": "e3m2/channel"}]})
    assert (streamed / "model.safetensors").read_bytes() == (in_memory / "model.safetensors").read_bytes()
    assert (
        json.loads((streamed / "graph.json").read_text())["nodes"]
        == (json.loads((in_memory / "graph.json").read_text())["nodes"])
    )


def test_the_command_streams_where_it_is_told_to(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    for option in ("--stream", "--no-stream"):
        done = runner.invoke(app, ["compile", str(folder), "-o", str(tmp_path / option), option])
        assert done.exit_code == 0, done.output
    assert "saved to" in done.stdout
    files = [(tmp_path / option / "model.safetensors").read_bytes() for option in ("--stream", "--no-stream")]
    assert files[0] == files[1]
    again = runner.invoke(app, ["compile", str(folder), "-o", str(tmp_path / "x"), "--stream", "--format", "hf"])
    assert again.exit_code == 1
    assert "do not go with --format hf" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["--no-stream", "--stream"]


def test_the_command_streams_what_would_not_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.claims.memory", lambda: 100_000)
    monkeypatch.setattr("fxquant.memory.total", lambda: 100_000)
    done = CliRunner().invoke(app, ["compile", str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "its weights are streamed" in done.stderr.replace("\n", " ")
    refused = CliRunner().invoke(app, ["compile", str(folder), "-o", str(tmp_path / "x"), "--no-stream"])
    assert refused.exit_code == 1
    assert "fxquant compile --stream" in refused.stderr.replace("\n", " ")
