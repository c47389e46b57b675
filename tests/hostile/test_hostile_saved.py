"""Saved models and folders of packed weights that lie, beyond the graphs of ``test_store_damage``; and what is promised
of those that do not: loading one runs nothing of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import BYTES, Change, CommandError, Row, check, command, damaged, peak, resident
from safetensors.torch import load_file, save_file
from test_store import net

import fxquant
from fxquant import files
from fxquant.errors import FxquantError, LoadError, ModelError
from fxquant.store import load, save

BIG = 2**62


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    save(net("uint4/group8")[0], folder, config={"rules": [{"match": "*", "weight": "uint4/group8"}]})
    load(folder)
    return folder


def document(change: Callable[[Any], Any]) -> Change:
    def changed(folder: Path) -> None:
        found = json.loads((folder / "graph.json").read_text())
        change(found)
        (folder / "graph.json").write_text(json.dumps(found))

    return changed


def node(name: str, **fields: Any) -> Change:
    return document(lambda d: next(n for n in d["nodes"] if n["name"] == name).update(fields))


def sparse(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def fifo(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def link(name: str, target: str) -> Change:
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))


def header(rows: Any) -> Change:
    def change(folder: Path) -> None:
        text = json.dumps(rows).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    return change


SAVED: dict[str, tuple[Change, str]] = {
    "graph of 1 GB": (sparse("graph.json", 1 << 30), "at most 33554432 are read"),
    "graph is a FIFO": (fifo("graph.json"), "not a regular file"),
    "graph is a device": (link("graph.json", "/dev/zero"), "a symbolic link"),
    "tensors are a FIFO": (fifo("model.safetensors"), "not a regular file"),
    "tensors in a circle": (link("model.safetensors", "model.safetensors"), "a symbolic link"),
    "tensors of 1 TB, without a header": (sparse("model.safetensors", 1 << 40), "not a valid safetensors|hold"),
    "header of 1 EB": (header({"mix": {"dtype": "F32", "shape": [BIG], "data_offsets": [0, BIG]}}), "not a valid"),
    "escape codes in the config": (document(lambda d: d["config"].update(x="\x1b[2J")), "holds control characters"),
    "escape codes in the trace": (document(lambda d: d["trace"]["lines"].append("\x1b]0;x\x07")), "control characters"),
    "escape codes in an input's name": (document(lambda d: d["signature"]["inputs"][0].update(name="\x1b")), "control"),
    "text that turns around": (document(lambda d: d["config"].update(x="\u202egpj.exe")), "control characters"),
    "half a character": (document(lambda d: d["config"].update(x="\ud800")), "control characters"),
    "config nested too deep": (document(lambda d: d["config"].update(x=json.loads("[" * 90 + "]" * 90))), "nested"),
    "a pickle for the graph": (lambda folder: (folder / "graph.json").write_bytes(b"\x80\x04N."), "not valid JSON"),
    "file reader": (node("relu", target="aten.from_file.default"), "is not one that a saved graph may call"),
    "operator of a library": (node("relu", target="evil.run.default"), "is not one that a saved graph may call"),
    "shared memory": (node("relu", target="aten._cuda_getCurrentRawStream.default"), "may call"),
    "Python's open": (node("relu", target="builtins.open"), "is not one that a saved graph may call"),
    "import": (node("relu", target="importlib.import_module"), "is not one that a saved graph may call"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_model_that_lies(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = SAVED[case]
    check(Row(damaged(change, saved), fxquant.load, LoadError, message), tmp_path)


@pytest.mark.parametrize("case", ["graph is a FIFO", "escape codes in the trace", "header of 1 EB"])
@pytest.mark.parametrize("words", [("inspect", "FILE"), ("explain", "FILE", "*"), ("generate", "FILE", "hello")])
def test_commands_say_the_same(case: str, words: tuple[str, ...], saved: Path, tmp_path: Path) -> None:
    change, message = SAVED[case]
    message = message if words[0] != "generate" else "no tokenizer|holds|regular file|" + message
    check(Row(damaged(change, saved), command(*words), CommandError, message), tmp_path)


def test_loading_runs_nothing(saved: Path, tmp_path: Path) -> None:
    """A graph that would fill all memory loads, and takes none until it is called; then torch says what it lacks."""
    huge = {"args": [[2**45], 1.0], "target": "aten.full.default", "info": {}}
    folder = damaged(node("relu", **huge), saved)(tmp_path)
    (folder / "manifest.json").unlink()  # or it would say that the graph was changed
    before = resident()
    compiled = fxquant.load(folder)
    assert peak() - before < BYTES
    with pytest.raises(RuntimeError, match=r"memory|shape|size"):
        compiled(torch.zeros(1, 3, 6, 6))


def test_planted_kernels_are_never_imported(saved: Path, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        text = f"# Written by fxquant kernels\nimport os\nos.mkdir({str(tmp_path / 'owned')!r})\n"
        for place in (folder / "kernels", folder / "tokenizer"):
            place.mkdir()
            for name in ("__init__.py", "kernels.py", "linear.py", "sitecustomize.py"):
                (place / name).write_text(text)
        (folder / "__init__.py").write_text(text)

    folder = damaged(plant, saved)(tmp_path)
    summary = str(fxquant.load(folder).summary())
    assert summary
    done = command("inspect", "FILE")
    with pytest.raises(AssertionError, match="exit code 0"):  # it is a good model
        done(folder)
    assert not (tmp_path / "owned").exists()


def test_a_program_with_control_characters_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"cannot be saved: a text in it holds control characters: .*x1b"):
        save(net()[0], tmp_path / "m", config={"name": "\x1b[2J"})


# --- folders of packed weights ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tiny_language import tiny_language_model, tiny_tokenizer

    from fxquant import hf

    model = tiny_language_model()
    fxquant.quantize_(model, {"rules": [{"match": "*", "weight": "e2m1/group16"}]})
    folder = tmp_path_factory.mktemp("packed") / "m"
    hf.save(model, folder, tokenizer=tiny_tokenizer())
    return folder


def weights(change: Callable[[dict[str, Any]], Any]) -> Change:
    """config.json with another table of packed weights."""

    def changed(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        change(found["quantization_config"]["weights"])
        (folder / "config.json").write_text(json.dumps(found))

    return changed


def first(**fields: Any) -> Change:
    return weights(lambda table: next(iter(table.values())).update(fields))


def tensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def scale(found: dict[str, Any]) -> str:
    return next(name for name in found if name.endswith("weight_packed.scale"))


def settings(**changes: Any) -> Change:
    def changed(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(found))

    return changed


PACKED: dict[str, tuple[Change, str]] = {
    "shape of 2^62": (first(shape=[BIG, BIG]), "config.json|2\\^48|whole number"),
    "shape of another": (first(shape=[48, 48]), "is said to be"),
    "rows of another": (first(rows=7), "rows"),
    "spec is code": (first(spec="__import__('os')"), "unknown|spec"),
    "spec of more bits": (first(spec="e4m3/group16"), "is torch|scale|its spec wants"),
    "same as itself": (weights(lambda t: t.update({n: {"same_as": n} for n in list(t)[:1]})), "the same as"),
    "weight that is not there": (weights(lambda t: t.update({"a.b.weight": next(iter(t.values()))})), "no weight"),
    "NaN scale": (tensors(lambda t: t[scale(t)].fill_(float("nan"))), "scale"),
    "scale of 0": (tensors(lambda t: t[scale(t)].zero_()), "scale"),
    "scale that is missing": (tensors(lambda t: t.pop(scale(t))), "missing"),
    "scale of another type": (tensors(lambda t: t.update({scale(t): t[scale(t)].half()})), "is torch.float16"),
    "wide model": (settings(hidden_size=2**20), "asks for a model of|is said to be"),
    "deep model": (settings(num_hidden_layers=90_000), "a model of more than"),
    "unknown key": (weights(lambda t: next(iter(t.values())).update(code="x")), "unknown key 'code'"),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_that_lie(case: str, packed: Path, tmp_path: Path) -> None:
    from fxquant.checkpoints import load_packed

    change, message = PACKED[case]
    row = Row(damaged(change, packed), load_packed, FxquantError, message)
    check(row, tmp_path)


def test_a_folder_that_is_not_packed(packed: Path, tmp_path: Path) -> None:
    from fxquant.checkpoints import load_packed

    row = Row(damaged(settings(quantization_config=None), packed), load_packed, ModelError, "holds no weights that")
    check(row, tmp_path)


@pytest.mark.parametrize(
    ("unit", "count", "message"),
    [
        ("[[[[]]]],", files.MAX_CONTAINERS // 4 - 1, "not the graph of a saved fxquant model"),
        ("[[[[]]]],", files.MAX_CONTAINERS // 4 + 1, "at most 4194304 are read"),
    ],
)
def test_json_as_large_as_it_may_be_takes_less_than_a_gigabyte(
    unit: str, count: int, message: str, saved: Path, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        (folder / "graph.json").write_text("[" + unit * count + "1]")

    folder, before = damaged(change, saved)(tmp_path), resident()
    with pytest.raises(LoadError, match=message):
        fxquant.load(folder)
    assert peak() - before < BYTES
