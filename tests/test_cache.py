"""The private cache: nothing is imported that this process did not generate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant import cache
from fxquant.errors import CacheError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fxquant" / "kernels"


def test_the_folder_is_private_and_where_xdg_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() == home
    assert home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", str(home.parent))
    assert cache.folder() == home.parent / ".cache" / "fxquant" / "kernels"


@pytest.mark.parametrize("part", ["fxquant", "fxquant/kernels"])
def test_folders_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = cache.folder().parent.parent / part
    path.chmod(0o720)
    with pytest.raises(CacheError, match="chmod 700"):
        cache.folder()
    path.chmod(0o700)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="symbolic link"):
        cache.folder()
    path.unlink()
    path.write_text("")
    with pytest.raises(CacheError, match=r"not a folder|File exists|Not a directory"):
        cache.folder()


def test_another_owner_and_an_open_base_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder()
    uid = os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: uid + 1)
        with pytest.raises(CacheError, match=f"belongs to user {uid}"):
            cache.folder()
    home.parent.parent.chmod(0o777)
    with pytest.raises(CacheError, match="by everyone"):
        cache.folder()
    home.parent.parent.chmod(0o1777)  # sticky, as /tmp: others cannot exchange our folder
    assert cache.folder() == home


def test_what_lies_in_the_cache_is_imported_only_if_it_is_what_was_generated(home: Path) -> None:
    text = "VALUE = 1\n"
    assert cache.load("kernel", text).VALUE == 1
    (path,) = home.glob("kernel_*.py")
    path.write_text("VALUE = 2\n")
    assert cache.load("kernel", text).VALUE == 1
    assert path.read_text() == text
    path.unlink()
    (home / "planted.py").write_text("VALUE = 3\n")
    path.symlink_to(home / "planted.py")
    assert cache.load("kernel", text).VALUE == 1
    assert not path.is_symlink()
    assert (home / "planted.py").read_text() == "VALUE = 3\n"


def test_bytecode_beside_a_module_is_not_looked_at(home: Path) -> None:
    import importlib.util
    import py_compile

    path = cache.write("kernel", "VALUE = 1\n")
    other = home / "other.py"
    other.write_text("VALUE = 2\n")
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    py_compile.compile(str(other), cfile=importlib.util.cache_from_source(str(path)), dfile=str(path))
    assert cache.load("kernel", "VALUE = 1\n").VALUE == 1


def test_other_content_has_another_name(home: Path) -> None:
    assert cache.write("kernel", "A = 1\n") != cache.write("kernel", "A = 2\n")
    assert cache.read_bytes("nothing") is None


def test_processes_may_race(home: Path) -> None:
    code = (
        "from fxquant import cache\n"
        "for i in range(200):\n"
        "    text = f'VALUE = {i % 7}\\n' + '#' * 5000\n"
        "    assert cache.load('kernel', text).VALUE == i % 7\n"
        "    (cache.folder() / cache.write('kernel', text).name).unlink(missing_ok=True)\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
    assert not [p for p in home.iterdir() if p.name.startswith(".")]
