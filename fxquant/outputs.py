"""What is written is there as a whole or not at all: a temporary name beside the place, synced, renamed into it.

A process that is killed leaves at most a hidden file or folder ``.NAME.<32 hex digits>`` beside what it wrote, which
may be removed. Of several processes that write one output the last wins, whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_LONGEST = 128  # characters of a name that its temporary one repeats


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file beside ``path``, new and empty; what the block made of it becomes ``path`` when the block ends.

    Where the block raises, or the move does (OSError), ``path`` is what it was before.
    """
    temporary = beside(path)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """``path`` with ``content``; OSError, and what was there before, where it cannot be written."""
    with replacing(path, mode=mode) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``path``; with what the block put into it it becomes ``path`` when the block ends.

    With ``overwrite`` it takes the place of the folder that is there, which is removed; on Linux the two are exchanged
    at once, elsewhere by two renames. Where the block raises, or the move does (OSError), ``path`` is what it was.
    """
    temporary = beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if overwrite and os.path.lexists(path):
            _put_in_place(temporary, path)
        else:
            os.rename(temporary, path)  # fails where another process has made a folder with something in it
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def beside(path: Path) -> Path:
    """A name for what is to become ``path``, in the same folder, that nothing else has."""
    return path.with_name(f".{path.name[:_LONGEST]}.{uuid.uuid4().hex}")


def sync(path: Path) -> None:
    """Have the file system write ``path``, a file or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, path: Path) -> None:
    """``temporary`` becomes ``path``; the folder that was there is ``temporary`` afterwards, or removed."""
    if exchange(temporary, path):
        return
    aside = beside(path)
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot. OSError for what else fails."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    if function(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(b))


# --- locks ------------------------------------------------------------------------------------------------------------
class HeldError(OSError):
    """Another process holds a lock; ``pid`` is its number, 0 where it cannot be told."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"{path} is locked by process {pid}")
        self.pid = pid


def lock(path: Path, *, wait: bool = False) -> int:
    """A handle that holds the lock file ``path`` until it is closed; a process that died holds nothing.

    With ``wait`` it waits until the lock is free, else it raises HeldError where another holds it. The system keeps
    the lock (flock); where it or the file system has none, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(handle, 20, 0)
            os.close(handle)
            raise HeldError(path, int(holder) if holder.isdigit() else 0) from None
        except OSError as error:
            if error.errno not in (*_UNABLE, errno.ENOLCK):
                os.close(handle)
                raise
        except BaseException:
            os.close(handle)
            raise
        if _is_at(handle, path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # its holder removed it meanwhile


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one called ``path``."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """One process at a time runs the block for the output ``path``; the others wait."""
    name = path.with_name(f".{path.name[:_LONGEST]}.lock")
    handle = lock(name, wait=True)
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(handle)
