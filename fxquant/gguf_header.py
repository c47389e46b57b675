"""What a GGUF file claims, checked against its length before any library reads it.

    "GGUF" | version u32 | tensors u64 | settings u64 | settings: key, type u32, value | tensors: name, dims u32,
    sizes u64 each, type u32, offset u64 | padding to the alignment | data            a text is u64 length, bytes

The parsers of gguf and transformers believe every count: a few bytes that say 2^60 make them allocate, or read for
ever. Here no count is believed before the file is found long enough for it, and nothing is kept but small settings.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fxquant import files
from fxquant.errors import ModelError

_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_SETTINGS, _MAX_TENSORS, _MAX_ITEMS, _MAX_KEY, _MAX_DIMS = 1 << 12, 1 << 17, 1 << 20, 1 << 16, 4
_COUNTS = ("block_count", "expert_count", "head_count", "head_count_kv")
_MAX_COUNT = 100_000
_MAX_NUMBER = 2**31
Setting = bool | int | float | str
"""The value of a setting; an array is not kept."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: sizes outermost first, the number of its ggml type, and where its bytes begin."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufClaims:
    """The settings of a GGUF file, arrays by their length alone, and its tensors."""

    settings: Mapping[str, Setting]
    arrays: Mapping[str, int]
    tensors: tuple[GgufTensor, ...]


def check_gguf(path: str | Path, blocks: Mapping[int, tuple[int, int]]) -> GgufClaims:
    """What the file claims. ``blocks`` are the elements and bytes in a block of each ggml type.

    ModelError for counts, lengths and offsets that the file cannot hold, types and versions that are not known, tensors
    that overlap or lie outside, names given twice or not printable, and sizes that no model has.
    """
    path = Path(path)
    try:
        with files.regular(path) as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise ValueError("it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(mapped).claims(blocks)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give a .gguf file that is there") from None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {str(error)[:300]}; fetch the file again, or convert the "
                         f"original model's folder instead") from None  # fmt: skip


class _Reader:
    """A place in the mapped file, which moves on with every value read. ValueError at the file's end."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.data, self.size, self.at = mapped, len(mapped), 0

    def claims(self, blocks: Mapping[int, tuple[int, int]]) -> GgufClaims:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"it is version {version}; known are 2 and 3")
        tensors = self.count("Q", _MAX_TENSORS, 24, "tensors")
        settings, arrays = self.settings(self.count("Q", _MAX_SETTINGS, 13, "settings"))
        found = tuple(self.tensor() for _ in range(tensors))
        if len({tensor.name for tensor in found}) != len(found):
            raise ValueError("two tensors have one name")
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {str(alignment)[:40]}; expected a power of two")
        self.check_places(found, -(-self.at // alignment) * alignment, alignment, blocks)
        _check_settings(settings, len(found))
        return GgufClaims(settings, arrays, found)

    # --- values
    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise ValueError(f"it claims {n} bytes at {self.at} of {self.size}: it is truncated, or made up")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def count(self, code: str, most: int, each: int, what: str) -> int:
        """A number of things that take at least ``each`` bytes of what is left."""
        n = self.number(code)
        if n > most or n * each > self.size - self.at:
            raise ValueError(f"it claims {n} {what} in {self.size - self.at} bytes; at most {most} are read")
        return n

    def text(self, most: int) -> str:
        if (length := self.number("Q")) > most:
            raise ValueError(f"it claims a text of {length} bytes; at most {most} are read")
        return self.take(length).decode("utf-8")

    # --- settings
    def settings(self, n: int) -> tuple[dict[str, Setting], dict[str, int]]:
        found: dict[str, Setting] = {}
        arrays: dict[str, int] = {}
        for _ in range(n):
            key, kind = self.text(_MAX_KEY), self.number("I")
            if not key.isprintable() or key in found or key in arrays:
                raise ValueError(f"setting {key[:60]!r} is there twice, or its name is not printable")
            if kind == _ARRAY:
                arrays[key] = self.array(key)
            elif kind == _TEXT:
                found[key] = self.text(files.MAX_JSON)
            elif kind in _WIDTH:
                found[key] = struct.unpack(f"<{_CODES[kind]}", self.take(_WIDTH[kind]))[0]
            else:
                raise ValueError(f"setting {key[:60]!r} has type {kind}, which is not known")
        return found, arrays

    def array(self, key: str) -> int:
        """The length of an array, which is passed over; one of arrays is refused."""
        kind = self.number("I")
        if kind != _TEXT and kind not in _WIDTH:
            raise ValueError(f"setting {key[:60]!r} is an array of type {kind}; expected numbers or texts")
        n = self.count("Q", _MAX_ITEMS, _WIDTH.get(kind, 8), f"items of {key[:60]!r}")
        if kind != _TEXT:
            self.take(n * _WIDTH[kind])
            return n
        at, size, unpack = self.at, self.size, struct.Struct("<Q").unpack_from
        for _ in range(n):
            at += 8 + (unpack(self.data, at)[0] if at + 8 <= size else size)
            if at > size:
                raise ValueError(f"a text of {key[:60]!r} goes beyond the end of the file: it is truncated, or made up")
        self.at = at
        return n

    # --- tensors
    def tensor(self) -> GgufTensor:
        name, dims = self.text(_MAX_KEY), self.number("I")
        if not name or not name.isprintable():
            raise ValueError(f"tensor name {name[:60]!r} is empty or not printable")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name[:60]!r} has {dims} dimensions; expected 1 to {_MAX_DIMS}")
        sizes = struct.unpack(f"<{dims}Q", self.take(8 * dims))
        kind, offset = struct.unpack("<IQ", self.take(12))
        return GgufTensor(name, sizes[::-1], kind, offset)

    def check_places(
        self, tensors: tuple[GgufTensor, ...], start: int, alignment: int, blocks: Mapping[int, tuple[int, int]]
    ) -> None:
        """Raise ValueError unless every tensor is whole blocks inside the file, and none lies in another."""
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda t: t.offset):
            where = f"tensor {tensor.name[:60]!r}"
            if tensor.type not in blocks:
                raise ValueError(f"{where} has ggml type {tensor.type}, which is not known")
            elements, nbytes = blocks[tensor.type]
            if not all(0 < n < 2**40 for n in tensor.shape) or tensor.shape[-1] % elements:
                raise ValueError(f"{where} has shape {list(tensor.shape)}; expected rows of whole blocks of {elements}")
            if tensor.offset % alignment or tensor.offset < end:
                raise ValueError(f"{where} lies at {tensor.offset}, not at a multiple of {alignment} behind {before!r}")
            end = tensor.offset + math.prod(tensor.shape) // elements * nbytes
            if start + end > self.size:
                raise ValueError(f"it is truncated, or made up: {where} ends at byte {start + end}, the file at "
                                 f"{self.size}")  # fmt: skip
            before = tensor.name[:60]


def _check_settings(settings: Mapping[str, Setting], tensors: int) -> None:
    """Raise ValueError for sizes that no model has: each layer has a tensor of its own."""
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it does not say which architecture it is (general.architecture)")
    if f"{architecture}.block_count" not in settings:
        raise ValueError(f"it does not say how many layers it has ({architecture[:40]}.block_count)")
    for key, value in settings.items():
        if type(value) is int and abs(value) >= _MAX_NUMBER and not key.startswith(("tokenizer.", "general.")):
            raise ValueError(f"{key[:60]!r} is {value}; no setting of a model has {_MAX_NUMBER} or more")
        least = int(key.endswith((".block_count", ".head_count")))
        if key.endswith(_COUNTS) and type(value) is int and not least <= value <= _MAX_COUNT:
            raise ValueError(f"{key[:60]!r} is {value}; expected a count from {least} to {_MAX_COUNT}")
        if key.endswith(".block_count") and (type(value) is not int or value > tensors):
            raise ValueError(f"{key[:60]!r} is {str(value)[:40]}, and it holds {tensors} tensors")
        if isinstance(value, float) and not math.isfinite(value) and not key.startswith(("tokenizer.", "general.")):
            raise ValueError(f"{key[:60]!r} is {value}; expected a finite number")
