"""A safetensors file whose tensors are known by type before any has values: written part by part, in any order.

Tensors lie in the order that safetensors itself gives them, so that it does not show how a file came about, and begin
at a multiple of 64 bytes, as torch's own do: such a file is used as it is mapped, without copying a tensor of it.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import SaveError
from fxquant.graph import TensorType
from fxquant.headers import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Types in safetensors' own order; tensors of the last come first in a file."""
ALIGNMENT = 64
"""Bytes. Where the sizes of tensors are not multiples of it, the smaller ones after them do not lie so."""
FLUSH = 1 << 27
"""Bytes that are written before the disk is told to take them: it works while the next ones are computed."""
BEHIND = 1 << 30
"""Bytes by which the disk may fall behind."""


class WeightFile:
    """The file at ``path`` with room for ``types``. Raises SaveError where it cannot be written.

    ``resumed``: the file is there already, of the same types, and some of its tensors have their values.
    """

    def __init__(self, path: Path, types: Mapping[str, TensorType], *, resumed: bool = False) -> None:
        self.path = path
        header, self._places = layout(types)
        self.nbytes = len(header) + sum(end - begin for begin, end, _ in self._places.values())
        try:
            self._file = os.open(path, os.O_RDWR if resumed else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if resumed and (
                os.fstat(self._file).st_size != self.nbytes or os.pread(self._file, len(header), 0) != header
            ):
                raise SaveError(f"{path} is not the unfinished file of these weights; start the job anew")
            if not resumed:
                os.pwrite(self._file, header, 0)
                os.posix_fallocate(self._file, 0, self.nbytes)  # a disk that is too small says so now
        except OSError as error:
            raise _cannot(path, error, self.nbytes) from error
        self._flusher = _Flusher(self._file)

    def write(self, name: str, value: Tensor, row: int = 0) -> None:
        """The values of tensor ``name`` from its row ``row`` on; ``value`` has as many rows as are written."""
        begin, end, type_ = self._places[name]
        assert value.dtype == type_.dtype, f"{name} is {value.dtype}, not {type_.dtype}"
        raw = memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = begin + row * (end - begin) // max(int(type_.shape[0]) if type_.shape else 1, 1)
        assert at + len(raw) <= end, f"{name} has no such rows"
        try:
            while raw:
                count = os.pwrite(self._file, raw, at)
                raw, at = raw[count:], at + count
                self._flusher.wrote(count)
        except OSError as error:
            raise _cannot(self.path, error, self.nbytes) from error

    def close(self, *, finished: bool = True) -> None:
        """Stop writing; ``finished``: have everything on the disk first."""
        try:
            self._flusher.stop()
            if finished:
                os.fsync(self._file)
        except OSError as error:
            raise _cannot(self.path, error, self.nbytes) from error
        finally:
            os.close(self._file)

    def sync(self) -> None:
        """Have what is written so far on the disk."""
        os.fdatasync(self._file)


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


class _Flusher:
    """A thread that has the disk take what was written, while more is computed."""

    def __init__(self, file: int) -> None:
        self._file, self._pending, self._stopped = file, 0, False
        self._changed = threading.Condition()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def wrote(self, count: int) -> None:
        with self._changed:
            self._pending += count
            if self._pending >= FLUSH:
                self._changed.notify_all()
            while self._pending >= BEHIND and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._pending < FLUSH and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                taken = self._pending
            try:
                os.fdatasync(self._file)
            except OSError as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._pending -= taken
                self._changed.notify_all()


def _cannot(path: Path, error: OSError, nbytes: int) -> SaveError:
    return SaveError(
        f"cannot write {path}, which takes {nbytes} bytes: {error}. Free some space or choose another place"
    )
