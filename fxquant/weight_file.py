"""A safetensors file whose tensors are known by type before any has values: written part by part, in any order.

Tensors lie in the order that safetensors itself gives them, so that it does not show how a file came about, and begin
at a multiple of 64 bytes, as torch's own do: such a file is used as it is mapped, without copying a tensor of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import SaveError
from fxquant.graph import TensorType
from fxquant.headers import DTYPES
from fxquant.tasks import ALIGNMENT

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Types in safetensors' own order; tensors of the last come first in a file."""
_PART = 1 << 22


class WeightFile:
    """The file at ``path`` with room for ``types``; a context that closes it. Raises SaveError where it cannot be
    written.

    ``resumed``: the file is there already, of the same types, and some of its tensors have their values. Several
    threads may write at a time.
    """

    def __init__(self, path: Path, types: Mapping[str, TensorType], *, resumed: bool = False) -> None:
        self.path = path
        header, self._places = layout(types)
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
        with self._refused():
            while rest:
                count = os.pwrite(self._file, rest, at)
                rest, at = rest[count:], at + count
        with self._guard:
            self._unsynced += value.nbytes

    def checksum(self, names: Iterable[str]) -> int:
        """CRC-32 of the bytes of these tensors as they are in the file, one after the other."""
        found = 0
        with self._refused():
            for name in names:
                begin, end, _ = self._places[name]
                for at in range(begin, end, _PART):
                    found = zlib.crc32(os.pread(self._file, min(_PART, end - at), at), found)
        return found

    def sync(self) -> None:
        """Have all that is written so far on the disk."""
        with self._guard:
            self._unsynced = 0
        with self._refused():
            os.fsync(self._file)

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
