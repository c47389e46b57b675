"""Files read once: the same bytes whether they are read directly, from memory, or where neither can be asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fxquant.direct import Opened, let_go

SIZE = 3 * 4096 + 1234
PARTS = [(0, SIZE), (0, 1), (4096, 4096), (4095, 2), (5, 0), (SIZE - 1, 1), (8191, 4098), (100, SIZE - 100)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(i * 7 % 251 for i in range(SIZE)))
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return path


def forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    let_go(handle)
    os.close(handle)


@pytest.mark.parametrize("way", ["direct", "in memory", "no O_DIRECT", "direct reading fails"])
def test_every_part_is_what_is_in_the_file(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = path.read_bytes()
    if way == "no O_DIRECT":
        monkeypatch.delattr(os, "O_DIRECT")
    file, real = Opened(path), os.preadv

    def fails(handle: int, *rest: object) -> int:
        if handle == file._direct:
            raise OSError(22, "Invalid argument")
        return real(handle, *rest)  # type: ignore[arg-type]

    if way == "direct reading fails":
        monkeypatch.setattr(os, "preadv", fails)
    for begin, nbytes in PARTS:
        if way != "in memory":
            forget(path)
        assert file.read(begin, nbytes).numpy().tobytes() == whole[begin : begin + nbytes]
    assert file._works == (way in ("direct", "in memory") and file._direct >= 0)


def test_a_file_system_that_cannot_be_asked_is_read_as_usual(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def unable(handle: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags:
            raise OSError(95, "Operation not supported")
        return real(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", unable)
    file = Opened(path)
    assert not file._works
    assert file.read(5, 100).numpy().tobytes() == path.read_bytes()[5:105]


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_that_ends_before_is_an_error(cached: bool, path: Path) -> None:
    file = Opened(path)
    for begin, nbytes in [(0, SIZE + 1), (SIZE, 1), (SIZE + 9000, 5), (SIZE - 5, 6)]:
        if not cached:
            forget(path)
        with pytest.raises(OSError, match="shorter"):
            file.read(begin, nbytes)


def test_what_was_in_memory_stays_there_and_what_was_not_does_not_come(path: Path) -> None:
    file = Opened(path)
    if not file._works:
        pytest.skip("this file system cannot be read directly")
    forget(path)
    file.read(0, SIZE)
    assert not file._has(8192)
    path.read_bytes()
    file.read(0, SIZE)
    assert file._has(8192)
