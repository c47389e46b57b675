"""Memory that runs out, as an error that says how much was wanted, how much there is, and what to do.

Where the system kills a process instead (the out-of-memory killer of Linux, a container's limit), nothing can be said;
what a job had finished is kept (``journal``).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant import files
from fxquant.errors import MemoryLimitError

_WANTED = re.compile(r"tried to allocate (\d+) bytes|unable to mmap (\d+) bytes|Unable to allocate ([\d.]+ \w+)")
_SAID = ("can't allocate memory", "Cannot allocate memory", "unable to mmap", "Unable to allocate")


@contextmanager
def limited(what: str) -> Iterator[None]:
    """What fails inside for lack of memory, in Python, numpy, torch or safetensors, raises MemoryLimitError.

    ``what`` continues "there is not enough memory to".
    """
    try:
        yield
    except MemoryLimitError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        raise MemoryLimitError(f"there is not enough memory to {what}: {_told(error)}. {_ADVICE}") from error


_ADVICE = (
    "What to do: compile with --stream, which holds one layer at a time; give fewer or shorter calibration windows; or "
    "take a machine with more memory"
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the system gave no memory; a GPU's is another matter."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def _told(error: BaseException) -> str:
    """What was asked for and what there is, as far as anyone can tell."""
    found = _WANTED.search(str(error))
    asked = next((text for text in found.groups() if text), "") if found else ""
    wanted = f"{_size(int(asked))} more were asked for" if asked.isdigit() else f"{asked or 'more'} was asked for"
    parts = [wanted]
    held, limit = _proc("/proc/self/status", "VmSize"), _limit()
    if limit >= 0:
        parts.append(f"this process has {_size(held)} and may have {_size(limit)} (ulimit -v)")
    elif (free := _proc("/proc/meminfo", "MemAvailable")) >= 0:
        parts.append(f"{_size(free)} are free on this machine")
    return ", ".join(parts)


def _limit() -> int:
    """Bytes of addresses that this process may have, -1 without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return -1
    return resource.getrlimit(resource.RLIMIT_AS)[0]


def _proc(path: str, field: str) -> int:
    """Bytes of a field in a file of Linux, -1 where it is not told."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return -1
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "")
    return int(found) * 1024 if found.isdigit() else -1


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def total() -> int:
    """Bytes of memory of this machine, or that this process's control group may use."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(files.text(file, 64)))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found)
