"""Layouts: where the bits of n-bit codes lie in memory. Each is a row of ``LAYOUTS``; nothing here packs or unpacks.

A matrix of codes is cut into tiles, a tile into units, and a unit is a few words that hold a few codes, its slots. A
layout says how codes come out of words, in ``fxquant.bitops``; how they got in is the inverse, derived from the bits::

    split42, one unit            T0..T3 = decode(a0, a1, b)            one byte of T_g is one code
    a0 a1   e1 e0 m1 m0 of 8     T_g = a[g/2] >> 4*(g%2) & 0x0F0F0F0F  [s 0 0 e2 | e1 e0 m1 m0]
            codes, each          | rotl(b, 2g) & 0x90909090            which is the high byte of the float16
    b       s and e2 of 16                                             2^-12 * value

Axes have names of a letter, and sizes: ``cols="g4 q2 r16 j2"`` reads a tile's 256 columns as [4, 2, 16, 2],
``units="r"`` numbers its units, ``slots="g j q"`` the 16 codes of each. ``Stream(words, "w r")`` puts the words of all
units of a tile in memory: first by ``w``, which of the words, then by ``r``. Every word is little-endian. Tiles follow
each other along the row, and streams lie one after the other: in every row where a tile is of one row, else once for
the whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fxquant.bitops import DTYPES, Array, Expr, evaluate, rotl, trace, word
from fxquant.errors import FormatError, near

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Stream:
    """Words of one size that lie together, in the ``order`` of unit axes and ``w``, which of ``words`` it is."""

    words: tuple[Expr, ...]
    order: str

    @property
    def word_bytes(self) -> int:
        return self.words[0].bits // 8

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return len(self.words) * self.word_bytes


@dataclass(frozen=True)
class Layout:
    """Where the bits of codes lie. Invariants (a FormatError when one is broken)::

    slot k             byte, nibble ... of decode[k // len(lanes)], at bit lanes[k % len(lanes)]
    bit i of a code    at bit lane + field[i] of the decoded word; all other bits of a decoded word are 0
    bijection          each bit of each word of the unit is exactly one bit of one code
    padding "tile"     codes are filled up with zeros to whole tiles
            "byte"     bits of a stream are in the order of columns; bytes after the last code are left out
    """

    name: str
    bits: int
    decode: tuple[Expr, ...]
    streams: tuple[Stream, ...]
    cols: str
    slots: str
    lanes: tuple[int, ...] = (0,)
    field: tuple[int, ...] = ()
    rows: str = ""
    units: str = ""
    padding: Literal["tile", "byte"] = "tile"

    def __post_init__(self) -> None:
        if sorted(self.units.split() + self.slots.split()) != sorted(self.sizes):
            raise FormatError(f"layout {self.name}: units and slots are not the axes {' '.join(self.sizes)}")
        if any(sorted(stream.order.split()) != sorted(["w", *self.units.split()]) for stream in self.streams):
            raise FormatError(f"layout {self.name}: a stream is not ordered by the unit axes and w")
        if self.unit_slots != len(self.decode) * len(self.lanes):
            raise FormatError(f"layout {self.name} decodes {len(self.decode) * len(self.lanes)} slots of a unit")
        _check_bits(self)

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of a tile, rows first."""
        return _sizes(self.rows) | _sizes(self.cols)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return math.prod(_sizes(self.rows).values()), math.prod(_sizes(self.cols).values())

    @property
    def places(self) -> tuple[int, ...]:
        """Where the bits of a code are in its lane, lowest first."""
        return self.field or tuple(range(self.bits))

    @cached_property
    def unit_slots(self) -> int:
        """Codes of a unit."""
        return math.prod(self.sizes[axis] for axis in self.slots.split())

    @cached_property
    def units_per_tile(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.units.split())

    @cached_property
    def bit_map(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """For each slot and each bit of its code, lowest first: (word, position) of the stored bit."""
        traced = [trace(expr) for expr in self.decode]
        slots = [tuple(bits[lane + at] for at in self.places) for bits in traced for lane in self.lanes]
        for k, slot in enumerate(slots):
            if None in slot:
                raise FormatError(f"layout {self.name}: bit {slot.index(None)} of slot {k} is always 0")
        return tuple(tuple(bit for bit in slot if bit) for slot in slots)

    def stream_bytes(self, cols: int) -> tuple[int, ...]:
        """Bytes that each stream takes for ``cols`` columns of one row of tiles."""
        if self.padding == "byte":
            return tuple(-(-cols * stream.unit_bytes // self.unit_slots) for stream in self.streams)
        units = -(-cols // self.tile[1]) * self.units_per_tile
        return tuple(units * stream.unit_bytes for stream in self.streams)

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the packed bytes: a row of tiles of one row is a row; else rows are filled up to whole tiles
        and share the bytes of all streams evenly."""
        high = self.tile[0]
        return -(-shape[0] // high) * high, sum(self.stream_bytes(shape[1])) // high


@dataclass(frozen=True, slots=True)
class Block:
    """A format with its scales inside: ``size`` codes of a row, preceded by their scale byte.

    The codes of a block are laid out as ``codes`` says; a shorter last block of a row is filled up with zeros.
    """

    name: str
    codes: Layout
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return 1 + sum(self.codes.stream_bytes(self.size))

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the packed bytes of codes of ``shape``."""
        return shape[0], self.groups(shape[1]) * self.nbytes

    def groups(self, cols: int) -> int:
        """Blocks, that is scales, of a row."""
        return -(-cols // self.size)


def _sizes(axes: str) -> dict[str, int]:
    return {axis[0]: int(axis[1:]) for axis in axes.split()}


def _check_bits(layout: Layout) -> None:
    """Raise a FormatError unless the bits of the codes of a unit and the bits of its words are in bijection."""
    seen: dict[tuple[str, int], int] = {}
    for k, slot in enumerate(layout.bit_map):
        for bit in slot:
            if bit in seen:
                raise FormatError(f"layout {layout.name}: {bit[0]}[{bit[1]}] is in slots {seen[bit]} and {k}")
            seen[bit] = k
    stored = [(w.name, i) for stream in layout.streams for w in stream.words for i in range(w.bits)]
    if unused := sorted(set(stored) ^ set(seen)):
        raise FormatError(f"layout {layout.name}: {unused[0][0]}[{unused[0][1]}] is not a stored bit of one code")
    decoded = sum(bit is not None for expr in layout.decode for bit in trace(expr))
    if decoded != len(seen):
        raise FormatError(f"layout {layout.name}: {decoded - len(seen)} bits outside the fields are not 0")
    if layout.padding == "byte":
        _check_order(layout, seen)


def _check_order(layout: Layout, slot_of: Mapping[tuple[str, int], int]) -> None:
    """Raise a FormatError unless the bits of each stream are those of slot 0, then of slot 1, ..., as many of each."""
    for stream in layout.streams:
        slots = [slot_of[w.name, i] for w in stream.words for i in range(w.bits)]
        if layout.units or slots != [i * layout.unit_slots // len(slots) for i in range(len(slots))]:
            raise FormatError(f"layout {layout.name}: a stream is not in the order of columns, so it has no short end")


# --- the reference ---------------------------------------------------------------------------------------------------
def reference_unpack(packed: Codes, layout: Layout, shape: tuple[int, int]) -> Codes:
    """Codes ``[rows, cols]`` of packed bytes: the decode expressions, evaluated word by word in numpy."""
    (rows, cols), (high, wide) = shape, layout.tile
    bands, tiles = -(-rows // high), -(-cols // wide)
    words: dict[str, Array] = {}
    start = 0
    for stream, size in zip(layout.streams, layout.stream_bytes(cols), strict=True):
        if high == 1:
            raw = packed[:, start : start + size]
        else:
            raw = packed.reshape(-1)[bands * start : bands * (start + size)].reshape(bands, size)
        words |= _read_words(raw, layout, stream, tiles)
        start += size
    decoded = [evaluate(expr, words) for expr in layout.decode]
    slots = [_read_code(value, lane, layout.places) for value in decoded for lane in layout.lanes]
    names = ["B", "T", *layout.units.split(), *layout.slots.split()]
    codes = np.stack(slots, -1).reshape(bands, tiles, *(layout.sizes[n] for n in names[2:]))
    order = ["B", *_sizes(layout.rows), "T", *_sizes(layout.cols)]
    return codes.transpose([names.index(n) for n in order]).reshape(bands * high, tiles * wide)[:rows, :cols]


def _read_code(value: Array, lane: int, places: tuple[int, ...]) -> Codes:
    """The code in one lane of decoded words, bit by bit."""
    code = np.zeros(value.shape, np.uint8)
    for i, at in enumerate(places):
        code |= (value >> value.dtype.type(lane + at) & value.dtype.type(1)).astype(np.uint8) << np.uint8(i)
    return code


def _read_words(raw: Codes, layout: Layout, stream: Stream, tiles: int) -> dict[str, Array]:
    """The words of one stream by name, each ``[bands, tiles, *units]``, from its bytes ``[bands, bytes]``."""
    full = tiles * layout.units_per_tile * stream.unit_bytes
    raw = np.pad(raw, ((0, 0), (0, full - raw.shape[1])))
    order = stream.order.split()
    sizes = {**layout.sizes, "w": len(stream.words)}
    dtype: Any = np.dtype(DTYPES[stream.words[0].bits]).newbyteorder("<")
    axes = np.ascontiguousarray(raw).view(dtype).reshape(raw.shape[0], tiles, *(sizes[n] for n in order))
    at = axes.transpose(0, 1, *(2 + order.index(n) for n in ["w", *layout.units.split()]))
    return {w.name: at[:, :, i].astype(DTYPES[w.bits]) for i, w in enumerate(stream.words)}


# --- the table -------------------------------------------------------------------------------------------------------
def planes(bits: int) -> tuple[int, ...]:
    """The widths of the planes of an n-bit code, low bits first: 6 -> (4, 2)."""
    if not 1 <= bits <= 8:
        raise FormatError(f"cannot pack codes of {bits} bits; expected 1 to 8")
    return tuple(width for width in (4, 2, 1, 8) if bits & width)


def _planar(bits: int) -> Layout:
    """Planes of 4, 2 and 1 bits, low bits first; in each, the first column in the lowest bits::

    bits  planes         6-bit code (FP6 E3M2)                     ZeroQuant(4+2), section "4+2 bit split"
    8     8              s e2 | e1 e0 m1 m0
    7     4 + 2 + 1      \\_2_/  \\____4____/
    6     4 + 2
    5     4 + 1          plane 4: e1 e0 m1 m0, two codes a byte, the even column in the low nibble
    4     4              plane 2: s e2, four codes a byte, the first column in the lowest bits
    3     2 + 1
    2     2
    1     1
    """
    widths = planes(bits)
    count = 8 // min(widths)
    decode: list[Expr | None] = [None] * count
    streams, low = [], 0
    for width in widths:
        plane = tuple(word(f"p{width}_{i}", 8) for i in range(count * width // 8))
        streams.append(Stream(plane, "w"))
        for k in range(count):
            part = _cut(plane[k * width // 8], k * width % 8, width) << low
            decode[k] = _merge(decode[k], part)
        low += width
    return Layout(f"planar{bits}", bits, tuple(e for e in decode if e), tuple(streams), cols=f"s{count}", slots="s",
                  padding="byte")  # fmt: skip


def _dense(bits: int) -> Layout:
    """A stream of bits, lowest first, as in a little-endian integer: code k is bits ``k * n .. k * n + n - 1``.

    Four 6-bit codes: bytes ``c1 c1 c0 c0 c0 c0 c0 c0 | c2 c2 c2 c2 c1 c1 c1 c1 | c3 c3 c3 c3 c3 c3 c2 c2``, each from
    bit 7 to bit 0: what amd-quark 0.10 stores, and what AMD's f8f6f4 matrix instructions read.
    """
    shared = math.gcd(bits, 8)
    stored = tuple(word(f"d{i}", 8) for i in range(bits // shared))
    decode = []
    for k in range(8 // shared):
        byte, at = divmod(k * bits, 8)
        code = _cut(stored[byte], at, min(bits, 8 - at))
        if (rest := bits - (8 - at)) > 0:  # the code's high bits are the low bits of the next byte
            code = code | _cut(stored[byte + 1], 0, rest) << 8 - at
        decode.append(code)
    return Layout(f"bits{bits}", bits, tuple(decode), (Stream(stored, "w"),), cols=f"s{8 // shared}", slots="s",
                  padding="byte")  # fmt: skip


def _cut(x: Expr, at: int, width: int) -> Expr:
    """Bits ``at .. at + width - 1`` of a byte, moved to bit 0."""
    shifted = x >> at
    return shifted if at + width == 8 else shifted & 2**width - 1


def _merge(one: Expr | None, other: Expr) -> Expr:
    return other if one is None else one | other


def _split42(name: str, triples: int) -> Layout:
    """The 4+2 split for kernels that decode four codes with two operations; the module's picture.

    A row is cut into blocks of 16R columns, R triples of words. Byte ``2j + q`` of ``T_g`` of triple r is column
    ``k = 2R * p + 2r + j`` of the block, p = 2g + q: two bytes that become a register pair are neighbours, and pair p
    of all triples is one run of columns. Memory of a row: a as int32 [block][2][R], then b as int32 [block][R].
    """
    a, b = (word("a0", 32), word("a1", 32)), word("b", 32)
    decode = tuple(a[g // 2] >> 4 * (g % 2) & 0x0F0F0F0F | rotl(b, 2 * g) & 0x90909090 for g in range(4))
    return Layout(name, 6, decode, (Stream(a, "w r"), Stream((b,), "w r")), cols=f"g4 q2 r{triples} j2", units="r",
                  slots="g j q", lanes=(0, 8, 16, 24), field=(0, 1, 2, 3, 4, 7))  # fmt: skip


def _tensor_core() -> Layout:
    """FP6-LLM's order for ``mma.m16n8k16`` (2401.14112; weight_prepacking.h): a thread's fragment is its word.

    Row ``64 I + 32a + 16b + 8h + l``, column ``64 J + 16n + 8s + 2t + c``; thread ``4l + t``, step i = (b, s). Memory
    of the matrix: 2-bit segments (sign, e2), then 4-bit segments, int32 [I][J][n][a] (4 bits: [b]) [thread].
    ``T_i`` has four codes, left-aligned in bytes, from the highest: (h, c) = (0, 1), (1, 1), (0, 0), (1, 0).
    """
    w4, w2 = (word("a0", 32), word("a1", 32)), word("b", 32)
    decode = tuple((w2 << 2 * i) & 0xC0C0C0C0 | ((w4[i // 2] << 4 * (i % 2)) & 0xF0F0F0F0) >> 2 for i in range(4))
    return Layout("tc", 6, decode, (Stream((w2,), "n a w l t"), Stream(w4, "n a w l t")), rows="a2 b2 h2 l8",
                  cols="n4 s2 t4 c2", units="n a l t", slots="b s c h", lanes=(8, 0, 24, 16),
                  field=(2, 3, 4, 5, 6, 7))  # fmt: skip


def _halves() -> Layout:
    """32 4-bit codes in 16 bytes, the first half of them in the low nibbles: GGUF's order."""
    x = word("d", 8)
    return Layout("halves", 4, (x & 0x0F, x >> 4), (Stream((x,), "i w"),), cols="h2 i16", units="i", slots="h")


_DENSE = {bits: _dense(bits) for bits in range(1, 9)}
_ROWS: tuple[Layout | Block, ...] = (
    *(_planar(bits) for bits in range(1, 9)),  # disk, ONNX, the reference operators
    *_DENSE.values(),
    _split42("split42", 16),
    _split42("split42r8", 8),
    _tensor_core(),
    Block("mxfp4", _halves(), 32),  # = GGUF's MXFP4 block
    Block("mxfp6", _DENSE[6], 32),
    Block("mxfp8", _DENSE[8], 32),
    Block("nvfp4", _DENSE[4], 16),
)
LAYOUTS: dict[str, Layout | Block] = {row.name: row for row in _ROWS}


def parse_layout(name: str) -> Layout | Block:
    """The row of ``LAYOUTS`` called ``name``."""
    if found := LAYOUTS.get(name):
        return found
    raise FormatError(f"unknown layout {name!r}{near(name, LAYOUTS)}; expected one of {', '.join(LAYOUTS)}")


def planar(bits: int) -> Layout:
    """The ``planar<n>`` layout of n-bit codes, the one on disk."""
    planes(bits)
    row = LAYOUTS[f"planar{bits}"]
    assert isinstance(row, Layout)
    return row
