"""What is written is whole or not there, wherever the writing fails, and whoever else writes the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import compiled, llama
from torch import nn

import fxquant
from fxquant import export_folder, outputs, store
from fxquant.compiled import CompiledModel
from fxquant.errors import FxquantError, LoadError, SaveError
from fxquant.headers import safetensors_header
from fxquant.weight_file import WeightFile


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("outputs") / "source"
    llama(folder)
    return folder


@pytest.fixture(scope="module")
def models(source: Path) -> list[CompiledModel]:
    """Two compiled models, which differ in every file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weight": "int8/group32:fp16"}]
    first = compiled(model, "", rules=rules)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.25)
    return [first, compiled(model, "", rules=rules)]


@pytest.fixture(scope="module")
def packed(source: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    fxquant.quantize_(model)
    return model  # type: ignore[no-any-return]


Write = Callable[[Path], None]


@pytest.fixture
def writers(models: list[CompiledModel], packed: nn.Module, source: Path) -> dict[str, tuple[Write, Write]]:
    """Everything that writes an output, to be called with a folder: what writes the old one, and the new one."""

    def hf(target: Path, words: str) -> None:
        from fxquant.hf import save

        packed.config.words = words
        save(packed, target / "hf")

    def each(write: Callable[[CompiledModel, Path], Any]) -> tuple[Write, Write]:
        return (lambda folder: write(models[0], folder), lambda folder: write(models[1], folder))

    def pair(q: CompiledModel, folder: Path) -> None:
        q.export_onnx(folder / "m.onnx", external_data=True)

    return {
        "save": each(lambda q, d: q.save(d / "m", overwrite=True)),
        "onnx": each(lambda q, d: q.export_onnx(d / "m.onnx")),
        "onnx and data": each(pair),
        "report": each(lambda q, d: q.report(d / "r.html", title=str(id(q)))),
        "gguf": each(lambda q, d: fxquant.export_gguf(q, d / "m.gguf", model=source, overwrite=True)),
        "compressed": each(
            lambda q, d: fxquant.export_compressed_tensors(q, d / "ct", model=source, overwrite=True)
        ),
        "hf": (lambda d: hf(d, "one"), lambda d: hf(d, "other")),
    }  # fmt: skip


NAMES = ("save", "onnx", "onnx and data", "report", "gguf", "compressed", "hf")
STEPS = (
    (os, "open"), (os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "link"), (outputs, "exchange"),
    (Path, "write_bytes"), (Path, "write_text"), (WeightFile, "write"), (export_folder, "save_file"),
)  # fmt: skip


@contextmanager
def failing(patch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """The ``at``-th step of writing raises that the disk is full; yields the steps so far."""
    steps: list[str] = []

    def guarded(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def step(*args: Any, **more: Any) -> Any:
            steps.append(name)
            if len(steps) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **more)

        return step

    with patch.context() as inside:
        for owner, name in STEPS:
            inside.setattr(owner, name, guarded(owner, name))
        yield steps


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_times(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if not name.endswith("timings.json")}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("name", NAMES)
def test_wherever_writing_fails_the_old_output_stays_or_the_new_one_is_whole(
    name: str, exchange: bool, writers: dict[str, tuple[Write, Write]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        if name not in ("save", "compressed", "hf"):
            pytest.skip("one file")
        monkeypatch.setattr(outputs, "exchange", lambda a, b: False)
    write_old, write_new = writers[name]
    write_new(tmp_path)
    new = without_times(files(tmp_path))
    write_old(tmp_path)
    old = without_times(files(tmp_path))
    assert old.keys() == new.keys()
    assert old != new
    outcomes = []
    for at in range(1, 100):
        with failing(monkeypatch, at) as steps:
            outcomes.append(outcome(lambda: write_new(tmp_path)))
        if steps[at - 1 : at] == ["open"]:  # it may have been the removal of a temporary folder
            clear_hidden(tmp_path)
        found = without_times(files(tmp_path))
        assert found in (old, new), (at, steps)
        if len(steps) < at:
            break
        if found == new:
            write_old(tmp_path)
    assert found == new
    assert outcomes[-1] == ""
    errors = [text for text in outcomes if text]
    assert len(errors) > 3
    assert all("No space left" in text for text in errors)


def outcome(write: Callable[[], None]) -> str:
    """The error's text, or nothing."""
    try:
        write()
    except FxquantError as error:
        return str(error)
    return ""


def clear_hidden(folder: Path) -> None:
    for path in folder.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_up_is_an_error_and_the_old_output_stays(
    name: str, writers: dict[str, tuple[Write, Write]], tmp_path: Path
) -> None:
    """The system itself refuses to write more: at the first byte, in the middle of a file, near its end."""
    write_old, write_new = writers[name]
    write_new(tmp_path)
    largest = max(len(content) for content in without_times(files(tmp_path)).values())
    write_old(tmp_path)
    old = without_times(files(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 100, largest // 2, largest - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(FxquantError, match=r"File too large|os error 27|requested and \d+ written"):
                write_new(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert without_times(files(tmp_path)) == old
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["save", "onnx and data"])
def test_of_several_that_write_one_output_the_last_wins_whole(
    name: str, writers: dict[str, tuple[Write, Write]], tmp_path: Path
) -> None:
    each = []
    for write in writers[name]:
        write(tmp_path)
        each.append(without_times(files(tmp_path)))
    for _ in range(4):
        threads = [threading.Thread(target=write, args=(tmp_path,)) for write in writers[name] * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert without_times(files(tmp_path)) in each


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_read_only_is_an_error(
    name: str, writers: dict[str, tuple[Write, Write]], tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FxquantError):
            writers[name][0](tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_hf_keeps_what_is_not_the_models(writers: dict[str, tuple[Write, Write]], tmp_path: Path) -> None:
    target = tmp_path / "hf"
    (target / ".git").mkdir(parents=True)
    (target / ".git" / "config").write_text("mine")
    (target / "README.md").write_text("my own words")
    (target / "adapter.safetensors").write_bytes(b"mine too")
    (target / "model-00001-of-00002.safetensors").write_bytes(b"an earlier model's")
    (target / "link").symlink_to("README.md")
    writers["hf"][0](tmp_path)
    assert (target / ".git" / "config").read_text() == "mine"
    assert (target / "README.md").read_text() == "my own words"
    assert (target / "adapter.safetensors").read_bytes() == b"mine too"
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert os.readlink(target / "link") == "README.md"
    assert (target / "model.safetensors").stat().st_size > 1000


# --- the functions themselves -----------------------------------------------------------------------------------------
def test_what_the_block_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), outputs.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
    outputs.write(path, b"secret", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OSError, match="not empty"), outputs.replacing_folder(path, overwrite=False) as temporary:  # noqa: PT012
        (temporary / "new").write_text("new")
        path.mkdir()
        (path / "theirs").write_text("theirs")
    assert files(tmp_path) == {"a/theirs": b"theirs"}


def test_the_longest_names_have_room_for_a_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    outputs.write(path, b"1")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    handle = outputs.lock(tmp_path / "lock")
    with pytest.raises(outputs.HeldError) as told:
        outputs.lock(tmp_path / "lock")
    assert told.value.pid == os.getpid()
    os.close(handle)
    os.close(outputs.lock(tmp_path / "lock"))


def test_a_file_system_without_locks_can_be_written(
    models: list[CompiledModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    models[0].export_onnx(tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# --- the manifest -----------------------------------------------------------------------------------------------------
def test_a_saved_model_says_what_it_was_made_from(models: list[CompiledModel], tmp_path: Path) -> None:
    for name, q in zip("ab", models, strict=True):
        q.save(tmp_path / name)
    a, b = (store.read_manifest(tmp_path / name) for name in "ab")
    assert a is not None
    assert b is not None
    assert a["origin"]["config"] == b["origin"]["config"]
    assert a["origin"]["model"]["graph"] == b["origin"]["model"]["graph"]
    assert a["origin"]["model"]["weights"] != b["origin"]["model"]["weights"]
    assert a["origin"]["versions"]["torch"] == torch.__version__
    again = fxquant.load(tmp_path / "a")
    again.save(tmp_path / "c")
    assert (tmp_path / "c" / "manifest.json").read_bytes() == (tmp_path / "a" / "manifest.json").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_another_file_under_the_same_name_is_found(models: list[CompiledModel], tmp_path: Path) -> None:
    for name, q in zip("ab", models, strict=True):
        q.save(tmp_path / name)
    assert store.verify(tmp_path / "a")
    for name in (store.WEIGHTS, store.GRAPH):
        kept = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(LoadError, match=f"{name} is not the file that was saved"):
            store.verify(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(kept)
    (tmp_path / "a" / "manifest.json").unlink()
    assert not store.verify(tmp_path / "a")
    fxquant.load(tmp_path / "a")


def test_a_manifest_of_version_1_is_read(models: list[CompiledModel], tmp_path: Path) -> None:
    """It has one checksum for the whole of the weights."""
    models[0].save(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["fxquant manifest"] = 1
    manifest["sha256"][store.WEIGHTS] = store.sha256(tmp_path / "a" / store.WEIGHTS)
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert fxquant.load(tmp_path / "a").origin == manifest["origin"]
    assert store.verify(tmp_path / "a")
    with (tmp_path / "a" / store.WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(LoadError, match="not the file that was saved"):
        store.verify(tmp_path / "a")


def test_what_is_damaged_is_named(models: list[CompiledModel], tmp_path: Path) -> None:
    models[0].save(tmp_path / "a")
    file = tmp_path / "a" / store.WEIGHTS
    kept = file.read_bytes()
    stored = safetensors_header(file)
    for name, place in stored.items():
        damaged = bytearray(kept)
        damaged[place.end - 1] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(LoadError, match=f"the sha256 of tensor '{re.escape(name)}' is not the one"):
            store.verify(tmp_path / "a")
    begin = min(place.begin for place in stored.values())
    file.write_bytes(kept[:begin].replace(b"  ", b" \n", 1) + kept[begin:])  # the same to whoever reads it
    with pytest.raises(LoadError, match="the sha256 of its header is not"):
        store.verify(tmp_path / "a")


@pytest.mark.parametrize("tensors", [[], {"a": 1}, {"a": "b" * 65}, None])
def test_a_manifest_with_other_checksums_is_an_error(
    tensors: object, models: list[CompiledModel], tmp_path: Path
) -> None:
    models[0].save(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["sha256"][store.WEIGHTS]["tensors"] = tensors
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match="checksum"):
        fxquant.load(tmp_path / "a")


def test_a_model_can_be_saved_where_its_manifest_is(models: list[CompiledModel], tmp_path: Path) -> None:
    models[0].save(tmp_path / "a")
    models[1].save(tmp_path / "a", overwrite=True)
    with pytest.raises(SaveError, match="exists already"):
        models[1].save(tmp_path / "a")
