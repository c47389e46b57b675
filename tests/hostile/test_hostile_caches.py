"""The compiled library in the cache: processes that race for it, and files that others planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant import cache

LOAD = """
from fxquant import cache
from fxquant.codegen import cpu_library
print(cpu_library.library().path)
"""


@pytest.mark.slow
@pytest.mark.kernels
def test_four_processes_race_for_the_library(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = [run.communicate(timeout=540) for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, said
    assert len({out for out, _ in said}) == 1
    assert not [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("how", ["link", "open", "other owner", "folder", "fifo"])
def test_a_planted_library_is_not_taken(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cpu_library`` loads what ``read_bytes`` gives it: nothing that another user could have written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.folder() / "cpu_avx2_0123456789abcdef.so"
    (tmp_path / "evil.so").write_bytes(b"\x7fELF")
    if how == "link":
        path.symlink_to(tmp_path / "evil.so")
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"\x7fELF")
        path.chmod(0o666 if how == "open" else 0o600)
    if how == "other owner":
        uid = os.getuid()
        real = cache.folder()
        monkeypatch.setattr(cache, "folder", lambda: real)
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert cache.read_bytes(path.name) is None
