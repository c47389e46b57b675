"""Packing: codes to bytes and back, in any layout of ``fxquant.layouts``.

``pack(codes, "planar6")``, ``unpack(packed, "planar6", cols)`` and ``packed_shape(shape, "planar6")`` take a layout or
its name. Neither direction is written for any layout: both come from its bit map. Up to eight neighbouring codes are
read as one integer, a byte each, the *source*; the stored words are *pieces*, and all bits that keep their distance, a
*run*, go from one to the other with a shift and a mask. Many runs at equal distances are first folded, two into one::

    planar6: 4 codes, int32             00ss3333 00ss2222 00ss1111 00ss0000   source
    x = source      & 0x000F000F                 00002222          00000000
      | source >> 4 & 0x00F000F0                 33332222          11110000   fold
    piece = x & 0x00FF | x >> 8 & 0xFF00                  33332222 11110000   two runs, 16 bits of plane 4

Unpacking is the same steps backwards. Rows are done a few at a time, so that what is in flight stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import bulk
from fxquant.errors import FormatError
from fxquant.layouts import LAYOUTS, Block, Layout, Stream, parse_layout, planar, planes

__all__ = ["LAYOUTS", "Block", "Layout", "pack", "packed_shape", "planar", "planes", "unpack"]

CHUNK = 1 << 21
"""Codes that are packed or unpacked at a time."""

Scaled = tuple[Tensor, Tensor]


def packed_shape(shape: tuple[int, int], layout: Layout | Block | str) -> tuple[int, int]:
    """The shape of ``pack(codes, layout)`` for codes of ``shape`` [rows, cols]: bits / 8 bytes a code, and for codes
    that do not fill a tile the padding that the layout states."""
    return _row(layout).packed_shape(shape)


def pack(codes: Tensor, layout: Layout | Block | str, *, scales: Tensor | None = None) -> Tensor:
    """Codes uint8 ``[rows, cols]``, each below ``2**bits``, to bytes uint8 of ``packed_shape``.

    A layout of blocks takes their scales, uint8 ``[rows, groups]``. Raises FormatError for a code that does not fit,
    another dtype or shape, an unknown layout, or scales where none belong.
    """
    row = _row(layout)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"pack takes a uint8 matrix of codes, got {codes.dtype} of shape {tuple(codes.shape)}")
    if isinstance(row, Block):
        return _pack_blocks(codes, scales, row)
    if scales is not None:
        raise FormatError(f"layout {row.name} has no place for scales; store them beside the codes")
    if codes.numel() >= bulk.LARGE and row is planar(row.bits):
        return _PACK(codes, row.bits)  # type: ignore[no-any-return]
    return _pack(codes, row)


@overload
def unpack(packed: Tensor, layout: Layout, shape: int | tuple[int, int]) -> Tensor: ...
@overload
def unpack(packed: Tensor, layout: Block, shape: int | tuple[int, int]) -> Scaled: ...
@overload
def unpack(packed: Tensor, layout: str, shape: int | tuple[int, int]) -> Tensor | Scaled: ...
def unpack(packed: Tensor, layout: Layout | Block | str, shape: int | tuple[int, int]) -> Tensor | Scaled:
    """The inverse of ``pack``: codes uint8 of ``shape`` [rows, cols], for blocks ``(codes, scales)``.

    ``shape`` may be the columns alone: then there are as many rows as ``packed`` has. Padding is not looked at. Raises
    FormatError unless ``packed`` is uint8 of ``packed_shape``.
    """
    row = _row(layout)
    rows, cols = (packed.shape[0] if packed.dim() else 0, shape) if isinstance(shape, int) else shape
    want = row.packed_shape((rows, cols))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != want:
        lead = "rows" if isinstance(shape, int) else want[0]
        raise FormatError(
            f"unpack of {cols} columns from {row.name} takes uint8 [{lead}, {want[1]}], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if isinstance(row, Block):
        return _unpack_blocks(packed, row, cols)
    if rows * cols >= bulk.LARGE and row is planar(row.bits):
        return _UNPACK(packed, row.bits, cols)  # type: ignore[no-any-return]
    return _unpack(packed, row, (rows, cols))


def pack_planar(codes: Tensor, bits: int) -> Tensor:
    """The reference of ``fxquant::pack_planar``, which is ``pack(codes, planar(bits))`` for many codes."""
    return _pack(codes, planar(bits))


def unpack_planar(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The reference of ``fxquant::unpack_planar``, the inverse."""
    return _unpack(packed, planar(bits), (packed.shape[0], cols))


_PACK = bulk.define(
    "pack_planar",
    "(Tensor codes, int bits) -> Tensor",
    pack_planar,
    lambda codes, bits: codes.new_empty(planar(bits).packed_shape(tuple(codes.shape))),
)
_UNPACK = bulk.define(
    "unpack_planar",
    "(Tensor packed, int bits, int cols) -> Tensor",
    unpack_planar,
    lambda packed, bits, cols: packed.new_empty(packed.shape[0], cols),
)


def _row(layout: Layout | Block | str) -> Layout | Block:
    return parse_layout(layout) if isinstance(layout, str) else layout


def _pack_blocks(codes: Tensor, scales: Tensor | None, block: Block) -> Tensor:
    rows, groups = codes.shape[0], block.groups(codes.shape[1])
    if scales is None or scales.dtype != torch.uint8 or tuple(scales.shape) != (rows, groups):
        got = "none" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise FormatError(f"layout {block.name} takes scales, uint8 {(rows, groups)} for these codes, got {got}")
    whole = F.pad(codes, (0, groups * block.size - codes.shape[1]))
    packed = _pack(whole.reshape(rows * groups, block.size), block.codes)
    return torch.cat([scales.reshape(-1, 1), packed], dim=1).reshape(rows, groups * block.nbytes)


def _unpack_blocks(packed: Tensor, block: Block, cols: int) -> Scaled:
    rows, groups = packed.shape[0], block.groups(cols)
    blocks = packed.reshape(rows * groups, block.nbytes)
    codes = _unpack(blocks[:, 1:], block.codes, (rows * groups, block.size))
    return codes.reshape(rows, groups * block.size)[:, :cols].contiguous(), blocks[:, 0].reshape(rows, groups).clone()


# --- the plan of a layout --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Run:
    """Bits that keep their distance: ``piece |= source >> shift & put``, back ``source |= piece << shift & take``."""

    shift: int
    take: int
    put: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Halves the runs of a path: ``x & stay | x >> by & move``; back, ``x & stay | (x & move) << by``."""

    by: int
    stay: int
    move: int


@dataclass(frozen=True, slots=True)
class Path:
    """The way of the bits that a source and a piece share: folds of the source, then runs."""

    source: int
    piece: int
    folds: tuple[Fold, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of a stream, or all words of a unit where those are neighbours in memory: ``nbytes`` in an integer."""

    stream: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the codes of a unit and its stored words are shifted into each other.

    ``lanes`` codes make a source, ``dtype`` is the smallest integer that holds a source and any piece. ``sizes`` are
    the axes ``[bands, *rows, tiles, *cols]`` of codes (a band is a row of tiles; both counts are -1 here), ``order``
    puts them as ``[source, bands, tiles, units, lane]``.
    """

    lanes: int
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes -> the integer that torch shifts fastest."""


@cache
def _plan(layout: Layout) -> Plan:
    lanes = _lanes(layout)
    pieces, place = _pieces(layout)
    size = next(size for size in _INTEGERS if size >= max(lanes, *(piece.nbytes for piece in pieces)))
    runs: dict[tuple[int, int], dict[int, int]] = {}  # (source, piece) -> shift -> bits of the source
    for k, slot in enumerate(layout.bit_map):
        for i, (name, position) in enumerate(slot):
            piece, base = place[name]
            at = 8 * (k % lanes) + i
            masks = runs.setdefault((k // lanes, piece), {})
            masks[at - base - position] = masks.get(at - base - position, 0) | 1 << at
    paths = tuple(_path(source, piece, masks, size) for (source, piece), masks in runs.items())
    sizes, order = _axes(layout, lanes)
    return Plan(lanes, _INTEGERS[size], pieces, paths, sizes, order)


def _lanes(layout: Layout) -> int:
    """Codes of a source: all slots of a unit, or those of its last axes, up to four."""
    if layout.unit_slots <= 8:
        return layout.unit_slots
    lanes = 1
    for axis in reversed(layout.slots.split()):
        if lanes * layout.sizes[axis] > 4:
            break
        lanes *= layout.sizes[axis]
    return lanes


def _path(source: int, piece: int, runs: dict[int, int], size: int) -> Path:
    """The path for ``runs``, shift -> bits of the source, in integers of ``size`` bytes."""
    folds = []
    while halved := _fold(runs):
        fold, runs = halved
        folds.append(Fold(fold.by, _signed(fold.stay, size), _signed(fold.move, size)))
    moved = ((by, mask, mask >> by if by >= 0 else mask << -by) for by, mask in runs.items())
    return Path(source, piece, tuple(folds), tuple(Run(by, _signed(m, size), _signed(p, size)) for by, m, p in moved))


def _fold(runs: dict[int, int]) -> tuple[Fold, dict[int, int]] | None:
    """Four or more runs as one move of every other one next to the one before, and half of the runs; four operations
    in place of six or more. None where distances differ, or the moved bits would not be free or would fall out."""
    shifts = sorted(runs)
    if len(shifts) < 4 or len(shifts) % 2:
        return None
    by = shifts[1] - shifts[0]
    stay = sum(runs[shift] for shift in shifts[::2])
    moving = sum(runs[shift] for shift in shifts[1::2])
    move = moving >> by
    if stay & move or move << by != moving or any(b - a != by for a, b in zip(shifts[::2], shifts[1::2], strict=True)):
        return None
    return Fold(by, stay, move), {a: runs[a] | runs[a + by] >> by for a in shifts[::2]}


def _pieces(layout: Layout) -> tuple[tuple[Piece, ...], dict[str, tuple[int, int]]]:
    """The pieces of a unit, and for each word its piece and the bit of it where the word begins."""
    pieces: list[Piece] = []
    place: dict[str, tuple[int, int]] = {}
    for i, stream in enumerate(layout.streams):
        joined = stream.order.split()[-1] == "w" and stream.unit_bytes <= 8
        for k, w in enumerate(stream.words):
            place[w.name] = (len(pieces), w.bits * k) if joined else (len(pieces) + k, 0)
        pieces += [Piece(i, stream.unit_bytes)] if joined else [Piece(i, stream.word_bytes)] * len(stream.words)
    return tuple(pieces), place


def _axes(layout: Layout, lanes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and order of a ``Plan``."""
    rows = [axis[0] for axis in layout.rows.split()]
    names = ["B", *rows, "T", *(axis for axis in layout.sizes if axis not in rows)]
    outer, inner = [], layout.slots.split()
    while math.prod(layout.sizes[axis] for axis in inner) > lanes:
        outer.append(inner.pop(0))
    order = tuple(names.index(axis) for axis in [*outer, "B", "T", *layout.units.split(), *inner])
    return tuple(layout.sizes.get(name, -1) for name in names), order


def _signed(mask: int, size: int) -> int:
    """``mask`` as a number of the signed integer of ``size`` bytes (one byte is unsigned)."""
    return mask - (1 << 8 * size) if size > 1 and mask >> 8 * size - 1 else mask


# --- the work --------------------------------------------------------------------------------------------------------
def _pack(codes: Tensor, layout: Layout) -> Tensor:
    rows, cols = codes.shape
    packed = codes.new_empty(layout.packed_shape((rows, cols)))
    if not codes.numel():
        return packed
    if layout.bits < 8 and (highest := int(codes.max())) >= 2**layout.bits:
        raise FormatError(f"code {highest} does not fit in {layout.bits} bits")
    plan, high = _plan(layout), layout.tile[0]
    views = _stream_views(packed, layout, cols)
    for at, end in _chunks(rows, cols, layout):
        sources = _read_sources(codes[at * high : end * high], layout, plan)
        words = _sources_to_pieces(sources, plan)
        pieces = [_to_bytes(x, piece.nbytes) for x, piece in zip(words, plan.pieces, strict=True)]
        for i, (stream, view) in enumerate(zip(layout.streams, views, strict=True)):
            mine = [x for x, piece in zip(pieces, plan.pieces, strict=True) if piece.stream == i]
            view[at:end] = _to_memory(mine, layout, stream)[:, : view.shape[1]]
    return packed


def _unpack(packed: Tensor, layout: Layout, shape: tuple[int, int]) -> Tensor:
    rows, cols = shape
    codes = packed.new_empty(shape)
    if not codes.numel():
        return codes
    plan, high = _plan(layout), layout.tile[0]
    views = _stream_views(packed, layout, cols)
    for at, end in _chunks(rows, cols, layout):
        pieces: list[Tensor] = []
        for i, (stream, view) in enumerate(zip(layout.streams, views, strict=True)):
            sizes = [piece.nbytes for piece in plan.pieces if piece.stream == i]
            pieces += [_from_bytes(x, plan.dtype) for x in _from_memory(view[at:end], layout, stream, sizes)]
        block = _write_sources(_pieces_to_sources(pieces, plan), layout, plan)
        codes[at * high : end * high] = block[: rows - at * high, :cols]
    return codes


def _stream_views(packed: Tensor, layout: Layout, cols: int) -> list[Tensor]:
    """The bytes of each stream, ``[bands, bytes]``, as views of ``packed``."""
    sizes = layout.stream_bytes(cols)
    if layout.tile[0] == 1:
        return list(packed.split(sizes, dim=1))
    bands = packed.shape[0] // layout.tile[0]
    parts = packed.reshape(-1).split([bands * size for size in sizes])
    return [part.view(bands, size) for part, size in zip(parts, sizes, strict=True)]


def _chunks(rows: int, cols: int, layout: Layout) -> Iterator[tuple[int, int]]:
    """First and last + 1 band of each step of about ``CHUNK`` codes."""
    bands = -(-rows // layout.tile[0])
    step = max(1, CHUNK // (layout.tile[0] * cols))
    return ((at, min(at + step, bands)) for at in range(0, bands, step))


def _read_sources(codes: Tensor, layout: Layout, plan: Plan) -> list[Tensor]:
    """Codes of some bands as integers of ``plan.lanes`` codes each, ``[bands, tiles, *units]`` for each source."""
    high, wide = layout.tile
    down, right = -codes.shape[0] % high, -codes.shape[1] % wide
    if down or right:
        codes = F.pad(codes, (0, right, 0, down))
    sizes = _filled(plan, codes.shape[0] // high, codes.shape[1] // wide)
    lanes = codes.reshape(sizes).permute(plan.order)
    units = [layout.sizes[axis] for axis in layout.units.split()]
    lanes = lanes.reshape(-1, codes.shape[0] // high, codes.shape[1] // wide, *units, plan.lanes)
    return list(_as_integers(lanes, _INTEGERS[plan.lanes]).to(plan.dtype).unbind())


def _write_sources(sources: list[Tensor], layout: Layout, plan: Plan) -> Tensor:
    """The inverse of ``_read_sources``: codes of whole tiles."""
    parts = [_to_bytes(x, plan.lanes) for x in sources]
    lanes = torch.stack(parts) if len(parts) > 1 else parts[0]
    bands, tiles = sources[0].shape[:2]
    sizes = _filled(plan, bands, tiles)
    back = sorted(range(len(plan.order)), key=plan.order.__getitem__)
    codes = lanes.view([sizes[axis] for axis in plan.order]).permute(back)
    return codes.reshape(bands * layout.tile[0], tiles * layout.tile[1])


def _filled(plan: Plan, bands: int, tiles: int) -> list[int]:
    counts = iter((bands, tiles))
    return [next(counts) if size < 0 else size for size in plan.sizes]


def _sources_to_pieces(sources: list[Tensor], plan: Plan) -> list[Tensor]:
    pieces: dict[int, Tensor] = {}
    for path in plan.paths:
        x = sources[path.source]
        for fold in path.folds:
            x = (x & fold.stay).bitwise_or_((x >> fold.by).bitwise_and_(fold.move))
        for run in path.runs:
            _merge(pieces, path.piece, _moved(x, run.shift, run.put))
    return [pieces[k] for k in sorted(pieces)]


def _pieces_to_sources(pieces: list[Tensor], plan: Plan) -> list[Tensor]:
    sources: dict[int, Tensor] = {}
    for path in plan.paths:
        parts: dict[int, Tensor] = {}
        for run in path.runs:
            _merge(parts, 0, _moved(pieces[path.piece], -run.shift, run.take))
        x = parts[0]
        for fold in reversed(path.folds):
            x = (x & fold.stay).bitwise_or_(x.bitwise_and_(fold.move).bitwise_left_shift_(fold.by))
        _merge(sources, path.source, x)
    return [sources[k] for k in sorted(sources)]


def _merge(results: dict[int, Tensor], key: int, part: Tensor) -> None:
    results[key] = results[key].bitwise_or_(part) if key in results else part


def _moved(x: Tensor, right: int, mask: int) -> Tensor:
    """``x`` shifted and masked: a new tensor, or ``x`` where a code is a byte and there is nothing to cut."""
    if right == 0:
        return x if x.dtype == torch.uint8 else x & mask
    return (x >> right if right > 0 else x << -right).bitwise_and_(mask)


def _to_bytes(x: Tensor, nbytes: int) -> Tensor:
    """The low ``nbytes`` bytes of integers, lowest first, as a last axis."""
    exact = _INTEGERS.get(nbytes)
    raw = (x if exact is None else x.to(exact)).unsqueeze(-1).view(torch.uint8)
    return raw[..., :nbytes]


def _from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``_to_bytes``, in ``dtype``; what is above the bytes that were given is undefined."""
    exact = _INTEGERS.get(raw.shape[-1])
    if exact is None:
        exact, raw = dtype, F.pad(raw, (0, dtype.itemsize - raw.shape[-1]))
    return _as_integers(raw, exact).to(dtype)


def _as_integers(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The last axis, bytes of one little-endian integer, read as that integer; in place where it is aligned."""
    size = dtype.itemsize
    aligned = raw.stride(-1) == 1 and not any(step % size for step in (*raw.stride()[:-1], raw.storage_offset()))
    whole = raw if aligned else raw.clone(memory_format=torch.contiguous_format)
    return whole.view(dtype).squeeze(-1)


def _to_memory(pieces: list[Tensor], layout: Layout, stream: Stream) -> Tensor:
    """The bytes of a stream, ``[bands, bytes]``, from its pieces ``[bands, tiles, *units, nbytes]``."""
    stacked = torch.stack(pieces, -2) if len(pieces) > 1 else pieces[0].unsqueeze(-2)
    axes, order = [*layout.units.split(), "w"], stream.order.split()
    moved = stacked.permute(0, 1, *(2 + axes.index(axis) for axis in order), -1)
    return moved.reshape(stacked.shape[0], -1)


def _from_memory(raw: Tensor, layout: Layout, stream: Stream, nbytes: list[int]) -> list[Tensor]:
    """The inverse of ``_to_memory``, for a stream of pieces of ``nbytes``; bytes that were left out are 0."""
    band = layout.units_per_tile * stream.unit_bytes
    raw = F.pad(raw, (0, -raw.shape[1] % band)) if raw.shape[1] % band else raw
    axes, order = [*layout.units.split(), "w"], stream.order.split()
    sizes = {**layout.sizes, "w": len(nbytes)}
    split = raw.reshape(raw.shape[0], raw.shape[1] // band, *(sizes[axis] for axis in order), nbytes[0])
    return list(split.permute(0, 1, *(2 + order.index(axis) for axis in axes), -1).unbind(-2))
