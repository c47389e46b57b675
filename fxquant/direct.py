"""direct: reading once what is larger than memory, past the system's page cache.

The system keeps what it reads, at the cost of finding memory for it, of a copy, and of what it kept for others. So what
it does not have yet is read directly (O_DIRECT), and what it has is taken from there. Where it cannot read directly, it
is told afterwards that it need not keep the bytes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_PAGE = 4096
"""What places, lengths and addresses are multiples of in a direct read; disks want 512 or 4096."""


class Opened:
    """A file to be read part by part, each part once. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._direct, self._works = -1, False
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not hasattr(os, "O_DIRECT") or not hasattr(os, "RWF_NOWAIT"):
            return
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # to look for a page does not read its neighbours
        try:
            self._has(0)
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            self._works = True
        except OSError:  # a file system in memory, or one that cannot be asked what it has
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_NORMAL)

    def __del__(self) -> None:
        for file in (getattr(self, "_file", -1), self._direct):
            if file >= 0:
                os.close(file)

    def read(self, begin: int, nbytes: int) -> Tensor:
        """The bytes from ``begin`` on, uint8. Raises OSError where the file ends before."""
        first, end = begin - begin % _PAGE, begin + nbytes
        room = torch.empty(end - first + 2 * _PAGE, dtype=torch.uint8)
        lead = -room.data_ptr() % _PAGE
        found = room[lead + begin - first :][:nbytes]
        if self._works and nbytes and not self._has(begin):
            whole = memoryview(room[lead : lead + (end - first + _PAGE - 1) // _PAGE * _PAGE].numpy())  # type: ignore[arg-type]
            try:
                if self._read(self._direct, whole, first, end - first) >= end - first:
                    return found
            except OSError:
                self._works = False  # what else is wrong with the file, reading it as usual will tell
        if self._read(self._file, memoryview(found.numpy()), begin, nbytes) < nbytes:  # type: ignore[arg-type]
            raise OSError("it is shorter than it was")
        if not self._works:
            let_go(self._file, begin, nbytes)
        return found

    def _has(self, at: int) -> bool:
        """Whether the system has the page of this byte in memory. Raises OSError where it does not say."""
        try:
            return os.preadv(self._file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False

    @staticmethod
    def _read(file: int, to: memoryview, at: int, wanted: int) -> int:
        """How many bytes there were, ``wanted`` of them or less than a page more."""
        count = 0
        while count < wanted and (more := os.preadv(file, [to[count:]], at + count)):
            count += more
        return count


def let_go(file: int, begin: int = 0, nbytes: int = 0) -> None:
    """Tell the system that bytes of a file, 0 for all from ``begin`` on, are not needed again, if it can be told."""
    with suppress(OSError, AttributeError):
        os.posix_fadvise(file, begin, nbytes, os.POSIX_FADV_DONTNEED)
