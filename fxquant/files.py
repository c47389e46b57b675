"""Files that someone else may have made: regular files only, of a bounded size, and no link out of their folder.

A FIFO or a device would block its reader or never end; a file of gigabytes in the place of a config would fill memory;
a link in a folder that was downloaded may point anywhere. Everything here raises an OSError or a ValueError that says
which of these it was; callers make it an error of their own.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON = 1 << 25
"""32 MiB: the most JSON that is parsed. As Python objects the worst of it takes 20 times that."""
MAX_CONTAINERS = 1 << 22
"""Objects and lists in it: an empty one is 3 bytes of JSON, and 64 in memory. SmolLM2's graph has 26 000."""
MAX_TEXT = 1 << 28
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@contextmanager
def regular(path: str | Path) -> Iterator[BinaryIO]:
    """``path`` opened for reading; OSError where it is not a regular file. Does not wait for a FIFO's writer."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(str(error)) from None
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield stream


def read(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. OSError for any other."""
    with regular(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > limit:
            raise OSError(f"it has {size} bytes; at most {limit} are read")
        content = stream.read(limit + 1)  # a file of /proc claims 0
    if len(content) > limit:
        raise OSError(f"it has more than {limit} bytes")
    return content


def text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """The UTF-8 text of a regular file, lines ended by ``\\n``. OSError or UnicodeDecodeError, a ValueError."""
    return read(path, limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def shown(text: str) -> str:
    """The text with what a terminal obeys as escapes: control characters, but for ends of lines and tabs, and those
    that turn the direction of writing; halves of characters too, which cannot be written."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_shown(value: Any) -> None:
    """Raise ValueError where a text in plain data holds what ``shown`` would escape."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if _OBEYED.search(item):
                raise ValueError(f"a text in it holds control characters: {shown(item)[:100]!r}")
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item


def strict_json(content: bytes, *, infinite: bool = False) -> Any:
    """What JSON says, without keys given twice, NaN or infinities (which ``infinite`` allows). ValueError for all else,
    however deep it nests."""
    if (containers := content.count(b"[") + content.count(b"{")) > MAX_CONTAINERS:
        raise ValueError(f"its JSON holds {containers} brackets; at most {MAX_CONTAINERS} are read")
    constant = _infinite if infinite else _no_constant
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def read_json(path: str | Path, limit: int = MAX_JSON) -> Any:
    """``strict_json`` of a file. OSError or ValueError."""
    return strict_json(read(path, limit))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object of its JSON has a key twice")
    return found


def _infinite(name: str) -> float:
    return float("-inf" if name == "-Infinity" else "inf") if name != "NaN" else _no_constant(name)


def _no_constant(name: str) -> Any:
    raise ValueError(f"its JSON holds {name}, which is not a JSON number")


def check_inside(folder: Path, file: Path) -> None:
    """Raise OSError unless ``file`` is a regular file that lies in ``folder``, also once its links are followed.

    The cache of the Hugging Face hub keeps a model's files as links, ``models--NAME/snapshots/REVISION/FILE`` to
    ``models--NAME/blobs/HASH``; these are followed.
    """
    try:
        real, home = file.resolve(strict=True), folder.resolve(strict=True)
    except FileNotFoundError:
        raise OSError(f"{file.name!r} is not there, or links to nothing; fetch it too") from None
    except (RuntimeError, ValueError) as error:  # links in a circle; a NUL byte
        raise OSError(f"{file.name!r} cannot be followed: {error}; put the file itself in its place") from None
    roots = [home, *(p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots")]
    if not any(real.is_relative_to(root) for root in roots):
        raise OSError(f"{file.name!r} is a link to {str(real)!r}, out of the folder; copy the file itself into it")
    if not real.is_file():
        raise OSError(f"{file.name!r} is not a regular file; take it out, or put the file itself in its place")
