"""The private cache: a folder that belongs to this user alone, in which generated kernels are kept.

``$XDG_CACHE_HOME/fxquant/kernels``, or ``~/.cache/fxquant/kernels``, mode 0700. What lies in it is never trusted: a
module is imported only if its file holds, byte for byte, the text that was generated for it in this process. Files are
named by a hash of their content, written under a temporary name and renamed, so processes may race.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from fxquant import outputs
from fxquant.errors import CacheError

_HASH = 16  # hex digits in a file's name


def folder() -> Path:
    """The cache folder, made where there is none.

    Raises CacheError where it is a link, is not a folder, belongs to another user, may be written by others, or cannot
    be made.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_base(base)
        for path in (base / "fxquant", base / "fxquant" / "kernels"):
            path.mkdir(mode=0o700, exist_ok=True)
            _check_own(path)
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"no cache folder for kernels under {base}: {error}. Set XDG_CACHE_HOME to a folder that you can write"
        ) from error
    return path


def write(name: str, text: str) -> Path:
    """The file ``<name>_<hash of text>.py`` of the cache, holding ``text``; written unless it holds that already."""
    content = text.encode()
    return write_bytes(f"{name}_{hashlib.sha256(content).hexdigest()[:_HASH]}.py", content)


def write_bytes(name: str, content: bytes) -> Path:
    """The file ``name`` of the cache, holding ``content``; replaced at once, never seen half written."""
    path = folder() / name
    if _holds(path, content):
        return path
    try:
        outputs.write(path, content, mode=0o600)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error}. Free some space, or set XDG_CACHE_HOME") from error
    return path


def read_bytes(name: str) -> bytes | None:
    """What the cache's file ``name`` holds; None where there is no file of ours that only we can write."""
    path = folder() / name
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
            return file.read() if own else None
    except OSError:
        return None


def load(name: str, text: str) -> ModuleType:
    """The module ``text``, imported from a file of the cache (Triton reads the source of its kernels)."""
    path = write(name, text)
    loader = _TextLoader(path.stem, str(path))
    loader.text = text
    module = importlib.util.module_from_spec(ModuleSpec(path.stem, loader, origin=str(path)))
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


class _TextLoader(SourceFileLoader):
    """Runs the text that was generated: no bytecode that lies beside the file is looked at."""

    text: str

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text.encode(), self.path)


def _holds(path: Path, content: bytes) -> bool:
    return read_bytes(path.name) == content


def _check_base(base: Path) -> None:
    """Raise CacheError where others could exchange the folders in ``base``."""
    mode = base.stat().st_mode
    if mode & 0o002 and not mode & stat.S_ISVTX:
        raise CacheError(f"{base} may be written by everyone; set XDG_CACHE_HOME to a folder of your own")


def _check_own(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a folder"
        raise CacheError(
            f"{path} is {kind}; kernels are kept in a folder of your own: remove it, or set XDG_CACHE_HOME"
        )
    if found.st_uid != os.getuid():
        raise CacheError(f"{path} belongs to user {found.st_uid}, not to you ({os.getuid()}); set XDG_CACHE_HOME")
    if found.st_mode & 0o022:
        raise CacheError(f"{path} may be written by others (mode {found.st_mode & 0o777:o}); run chmod 700 {path}")
