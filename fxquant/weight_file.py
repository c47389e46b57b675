"""A safetensors file whose tensors are known by type before any has values: written part by part, in any order.

Tensors lie in the order that safetensors itself gives them, so that it does not show how a file came about, and begin
at a multiple of 64 bytes, as torch's own do: such a file is used as it is mapped, without copying a tensor of it.

What tells two such files apart is the sha256 of the header and of every tensor: it is known when the last part of a
tensor is written, in whatever order tensors are, and says later which one is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.direct import let_go
from fxquant.errors import SaveError
from fxquant.graph import TensorType
from fxquant.headers import DTYPES, safetensors_header
from fxquant.tasks import ALIGNMENT

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Types in safetensors' own order; tensors of the last come first in a file."""
_PART = 1 << 22


@dataclass(frozen=True)
class Digests:
    """sha256, as hexadecimal digits, of a file's header (all before its first tensor) and of each tensor's bytes."""

    header: str
    tensors: dict[str, str]


@dataclass
class _Running:
    """The sha256 of a tensor's bytes from its first to the one before ``at``."""

    at: int
    hash: Any = field(default_factory=hashlib.sha256)


class WeightFile:
    """The file at ``path`` with room for ``types``; a context that closes it. Raises SaveError where it cannot be
    written.

    ``resumed``: the file is there already, of the same types, and some of its tensors have their values. Several
    threads may write at a time.
    """

    def __init__(self, path: Path, types: Mapping[str, TensorType], *, resumed: bool = False) -> None:
        self.path = path
        header, self._places = layout(types)
        self._header = hashlib.sha256(header).hexdigest()
        self._running: dict[str, _Running] = {}
        self.nbytes = max([len(header), *(end for _, end, _ in self._places.values())])
        self._guard, self._unsynced = threading.Lock(), 0
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if resumed else os.O_CREAT | os.O_EXCL)
        with self._refused():
            self._file = os.open(path, flags, 0o666)
            try:
                if not resumed:
                    os.pwrite(self._file, header, 0)
                    _reserve(self._file, self.nbytes)  # a disk that is too small says so now
                elif os.fstat(self._file).st_size != self.nbytes or os.pread(self._file, len(header), 0) != header:
                    raise SaveError(f"{path} is not the unfinished file of these weights; start the job anew")
            except BaseException:
                os.close(self._file)
                raise

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            os.close(self._file)

    @property
    def unsynced(self) -> int:
        """Bytes that were written since the last ``sync``."""
        return self._unsynced

    def write(self, name: str, value: Tensor, row: int = 0) -> None:
        """The values of tensor ``name`` from its row ``row`` on; ``value`` has as many rows as are written."""
        begin, end, type_ = self._places[name]
        assert value.dtype == type_.dtype, f"{name} is {value.dtype}, not {type_.dtype}"
        rest = memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = begin + row * (end - begin) // max(int(type_.shape[0]) if type_.shape else 1, 1)
        assert at + len(rest) <= end, f"{name} has no such rows"
        running = _Running(begin) if at == begin else self._running.get(name)
        if running is not None and running.at == at:
            running.hash.update(rest)
            running.at += len(rest)
            self._running[name] = running
        else:
            self._running.pop(name, None)  # not in order: the file is read when the digest is asked for
        with self._refused():
            while rest:
                count = os.pwrite(self._file, rest, at)
                rest, at = rest[count:], at + count
        with self._guard:
            self._unsynced += value.nbytes

    def digest(self, name: str) -> str:
        """sha256 of the bytes of a tensor: of those that were written in order, else of those that are in the file."""
        begin, end, _ = self._places[name]
        running = self._running.get(name)
        if running is None or running.at != end:
            with self._refused():
                running = self._running[name] = _read(self._file, begin, end)
        return str(running.hash.hexdigest())

    def digests(self) -> Digests:
        return Digests(self._header, {name: self.digest(name) for name in self._places})

    def sync(self, *, forget: bool = False) -> None:
        """Have all that is written so far on the disk; ``forget``: and no longer in memory that the system may need."""
        with self._guard:
            self._unsynced = 0
        with self._refused():
            os.fsync(self._file)
            if forget:
                let_go(self._file)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, SaveError):
                raise
            raise SaveError(
                f"cannot write {self.path}, which takes {self.nbytes} bytes: {error}. Free some space or choose "
                f"another place"
            ) from error


def _read(file: int, begin: int, end: int) -> _Running:
    running = _Running(begin)
    while running.at < end and (part := os.pread(file, min(_PART, end - running.at), running.at)):
        running.hash.update(part)
        running.at += len(part)
    return running


def digests_of(path: Path) -> Digests:
    """The digests of a file that is there. Raises ModelError for one that is not safetensors, OSError."""
    stored = safetensors_header(path)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(os.cpu_count()) as pool:  # sha256 lets others run
        begin = min((place.begin for place in stored.values()), default=os.fstat(file.fileno()).st_size)
        header = pool.submit(_read, file.fileno(), 0, begin)
        found = {n: pool.submit(_read, file.fileno(), place.begin, place.end) for n, place in stored.items()}
        tensors = {name: future.result().hash.hexdigest() for name, future in found.items()}
        return Digests(header.result().hash.hexdigest(), tensors)


def _reserve(file: int, nbytes: int) -> None:
    """Make the file so long, with its place on the disk where the system can promise that."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise
        os.ftruncate(file, nbytes)


def layout(types: Mapping[str, TensorType]) -> tuple[bytes, dict[str, tuple[int, int, TensorType]]]:
    """The first bytes of the file, and where each tensor lies: first byte, the one after its last, type."""
    header: dict[str, object] = {}
    places: dict[str, tuple[int, int, TensorType]] = {}
    at = 0
    for name in sorted(types, key=lambda n: (-_RANKS.index(_NAMES[types[n].dtype]), n)):
        shape, dtype = types[name].shape, types[name].dtype
        end = at + math.prod(int(size) for size in shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        places[name] = at, end, types[name]
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    found = {name: (begin + start, end + start, type_) for name, (begin, end, type_) in places.items()}
    return len(text).to_bytes(8, "little") + text, found
