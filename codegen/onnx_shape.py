"""ONNX converters of operators that move, select or create values without computing with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant.codegen.onnx_builder import (
    FLOATS,
    UNKNOWN,
    Arg,
    Builder,
    T,
    UnsupportedError,
    as_number,
    dims,
    is_number,
    rank,
)  # fmt: skip
from fxquant.codegen.onnx_elementwise import Converter, arithmetic, rows
from fxquant.dims import Dim
from fxquant.graph import TensorType
from fxquant.rewrite import aten

END = 2**63 - 1


# --- the same values in another shape -------------------------------------------------------------------------------
def view(b: Builder, x: ir.Value, sizes: Sequence[Arg] = (), *_: Any) -> ir.Value:
    return b.reshape(x, sizes, b.shape)


def flatten(b: Builder, x: ir.Value, start: int, end: int) -> ir.Value:
    """Reshape to the result's shape; the flattened dimension is left to ONNX to infer."""
    n = rank(x)
    start, end = start % max(n, 1), end % max(n, 1)
    sizes = [b.size(x, i) for i in range(start)] + [-1] + [b.size(x, i) for i in range(end + 1, n)]
    return b.reshape(x, sizes, b.shape)


def unflatten(b: Builder, x: ir.Value, dim: int, sizes: Sequence[Arg]) -> ir.Value:
    dim %= rank(x)
    around = [b.size(x, i) for i in range(rank(x))]
    return b.reshape(x, [*around[:dim], *sizes, *around[dim + 1 :]], b.shape)


def unsqueeze(b: Builder, x: ir.Value, dim: int) -> ir.Value:
    return b.unsqueeze(x, dim)


def squeeze(b: Builder, x: ir.Value, axes: int | Sequence[int] | None = None) -> ir.Value:
    """Drop dimensions of size 1: all of them, or those named which are of size 1."""
    shape = dims(x)
    wanted = range(len(shape)) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = sorted({a % max(len(shape), 1) for a in wanted if shape and shape[a] == 1})
    return b.op("Squeeze", x, b.axes(*gone)) if gone else x


def transpose(b: Builder, x: ir.Value, first: int, second: int) -> ir.Value:
    perm = list(range(rank(x)))
    if perm:
        perm[first], perm[second] = perm[second], perm[first]
    return b.transpose(x, perm)


def matrix_transpose(b: Builder, x: ir.Value) -> ir.Value:
    return transpose(b, x, -2, -1) if rank(x) > 1 else x


def permute(b: Builder, x: ir.Value, order: Sequence[int]) -> ir.Value:
    return b.transpose(x, [d % rank(x) for d in order])


def move_dim(b: Builder, x: ir.Value, source: Sequence[int] | int, target: Sequence[int] | int) -> ir.Value:
    froms = [d % rank(x) for d in ([source] if isinstance(source, int) else source)]
    tos = [d % rank(x) for d in ([target] if isinstance(target, int) else target)]
    perm = [d for d in range(rank(x)) if d not in froms]
    for to, start in sorted(zip(tos, froms, strict=True)):
        perm.insert(to, start)
    return b.transpose(x, perm)


def expand(b: Builder, x: ir.Value, sizes: Sequence[Arg], **_: Any) -> ir.Value:
    """Broadcast to ``sizes``; 1 stands for "as it is" in ONNX, which needs no size at run time."""
    before = [1] * (len(sizes) - rank(x)) + list(dims(x))
    target = [
        1 if (isinstance(s, int) and s == -1) or old == new else s
        for s, old, new in zip(sizes, before, b.shape, strict=True)
    ]
    if all(isinstance(t, int) and t == 1 for t in target) and len(sizes) == rank(x):
        return x
    return b.op("Expand", x, b.sizes(target))


def expand_as(b: Builder, x: ir.Value, other: ir.Value) -> ir.Value:
    return expand(b, x, [b.size(other, i) for i in range(rank(other))])


def repeat(b: Builder, x: ir.Value, times: Sequence[Arg]) -> ir.Value:
    missing = len(times) - rank(x)  # below 0 for tile, which may name the last dimensions alone
    wide = b.unsqueeze(x, *range(missing)) if missing > 0 else x
    return b.op("Tile", wide, b.sizes([*[1] * -missing, *times]))


def repeat_interleave(b: Builder, x: ir.Value, times: int, dim: int | None = None, **_: Any) -> ir.Value:
    """Repeat every slice ``times`` times: gather index j // times."""
    if dim is None:
        x, dim = b.op("Reshape", x, b.axes(-1), dtype=x.dtype, shape=[b.shape[0]]), 0
    size = b.size(x, dim)
    count = size * times if isinstance(size, int) else b.op("Mul", size, b.const(times))
    index = b.op("Div", _range(b, 0, count, 1, dtype=T.INT64), b.const(times))
    return b.op("Gather", x, index, axis=dim)


def roll(b: Builder, x: ir.Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> ir.Value:
    if not axes:
        raise UnsupportedError("roll without dims")
    for shift, axis in zip(shifts, axes, strict=True):
        tail = b.op("Slice", x, b.axes(-shift), b.axes(END), b.axes(axis))
        head = b.op("Slice", x, b.axes(0), b.axes(-shift), b.axes(axis))
        x = b.op("Concat", tail, head, axis=axis, dtype=x.dtype, shape=dims(x))
    return x


def flip(b: Builder, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    n = len(axes)
    return b.op("Slice", x, b.axes(*[-1] * n), b.axes(*[-END] * n), b.axes(*axes), b.axes(*[-1] * n)) if n else x


# --- parts and joins ------------------------------------------------------------------------------------------------
def slice_(b: Builder, x: ir.Value, dim: int, start: Arg, end: Arg, step: int) -> ir.Value:
    start, end = 0 if start is None else start, END if end is None else end
    if start == 0 and end == END and step == 1:
        return x
    return b.op("Slice", x, b.sizes([start]), b.sizes([end]), b.axes(dim), b.axes(step) if step != 1 else None)


def narrow(b: Builder, x: ir.Value, dim: int, start: Arg, length: Arg) -> ir.Value:
    end = start + length if is_static(start, length) else arithmetic(b, "Add", start, length, dtype=T.INT64)
    return b.op("Slice", x, b.sizes([start]), b.sizes([end]), b.axes(dim))


def is_static(*values: Arg) -> bool:
    return not any(isinstance(v, ir.Value) for v in values)


def select(b: Builder, x: ir.Value, dim: int, index: Arg) -> ir.Value:
    return b.op("Gather", x, b.cast(index, T.INT64), axis=dim)


def concatenate(b: Builder, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    """Join along ``dim`` in the result's dtype; torch skips 1-D tensors of size 0."""
    kept = [b.cast(p, b.dtype) for p in parts if dims(p) != (0,) or len(b.shape) == 1]
    return b.op("Concat", *kept, axis=dim)


def join(axis: int) -> Converter:
    """hstack, vstack: along the second (first) dimension, vectors along their only one (as rows)."""

    def convert(b: Builder, parts: Sequence[ir.Value]) -> ir.Value:
        parts = [p if rank(p) > 1 or axis else b.unsqueeze(p, 0) for p in parts]
        return concatenate(b, parts, min(axis, rank(parts[0]) - 1))

    return convert


def stack(b: Builder, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    return b.op("Concat", *(b.unsqueeze(b.cast(p, b.dtype), dim) for p in parts), axis=dim)


def split(b: Builder, x: ir.Value, *args: Any) -> tuple[ir.Value, ...]:
    """split, chunk, tensor_split: as many parts as the result has, of the sizes it has."""
    dim = int(args[-1]) % rank(x)
    types: tuple[TensorType, ...] = b.result
    if len(types) == 1:
        return (x,)
    sizes: list[Dim] = [t.shape[dim] for t in types]
    if all(isinstance(s, int) for s in sizes):
        given = b.const(sizes)
    elif isinstance(args[0], (list, tuple)):
        given = b.sizes(args[0])
    elif len(set(sizes)) == 1:  # equal parts of a size known at run time
        return b.multi(len(types), "Split", x, axis=dim, num_outputs=len(types))
    else:
        raise UnsupportedError(f"a split of a dynamic dimension into parts of {sizes}")
    return b.multi(len(types), "Split", x, given, axis=dim)


def unbind(b: Builder, x: ir.Value, dim: int = 0) -> tuple[ir.Value, ...]:
    count = len(b.result)
    dim %= rank(x)
    if count == 1:
        return (b.op("Squeeze", x, b.axes(dim)),)
    parts = b.multi(count, "Split", x, b.const([1] * count), axis=dim)
    return tuple(b.op("Squeeze", p, b.axes(dim)) for p in parts)


# --- indexing -------------------------------------------------------------------------------------------------------
def index(b: Builder, x: ir.Value, indices: Sequence[ir.Value | None]) -> ir.Value:
    """``x[i, j, ...]`` with index tensors that broadcast together; None takes a whole dimension."""
    used = _index_tensors(b, indices)
    if len(used) == 1:
        ((axis, only),) = used.items()
        return b.op("Gather", x, b.cast(only, T.INT64), axis=axis)
    axes = list(used)
    rest = [d for d in range(rank(x)) if d not in used]
    moved = b.transpose(x, axes + rest)
    picked = b.op("GatherND", moved, _joint_index(b, list(used.values())))
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    if not adjacent or axes[0] == 0:
        return picked
    joint = max(rank(i) for i in used.values())  # [joint..., rest...] -> the joint dimensions where the indices stood
    order = [*range(joint, joint + axes[0]), *range(joint), *range(joint + axes[0], joint + len(rest))]
    return b.op("Transpose", picked, perm=order)


def _index_tensors(b: Builder, indices: Sequence[ir.Value | None]) -> dict[int, ir.Value]:
    """Dimension -> integer index; a mask counts as the indices of its true elements."""
    used: dict[int, ir.Value] = {}
    axis = 0
    for item in indices:
        if item is not None and item.dtype == T.BOOL:
            positions = b.op("NonZero", item, dtype=T.INT64)
            for d in range(rank(item)):
                used[axis + d] = b.op("Gather", positions, b.const(d), axis=0, shape=[UNKNOWN])
            axis += rank(item)
            continue
        if item is not None:
            used[axis] = item
        axis += 1
    return used


def _joint_index(b: Builder, items: list[ir.Value]) -> ir.Value:
    """Index tensors broadcast to one shape and stacked along a last dimension, as GatherND wants them."""
    n = max(rank(i) for i in items)
    sizes: list[Arg] = [1] * n
    for item in items:
        for d, dim in enumerate(dims(item), start=n - rank(item)):
            if dim != 1:
                sizes[d] = b.size(item, d - n) if dim != UNKNOWN else -1
    wide = [b.cast(i, T.INT64) for i in items]
    if -1 not in [s for s in sizes if isinstance(s, int)] and any(dims(i) != dims(items[0]) for i in items):
        target = b.sizes(sizes)
        wide = [b.op("Expand", i, target, dtype=T.INT64) for i in wide]
    return b.op("Concat", *(b.op("Unsqueeze", i, b.axes(-1)) for i in wide), axis=-1, dtype=T.INT64)


def index_put(b: Builder, x: ir.Value, indices: Sequence[ir.Value | None], values: ir.Value, accumulate: bool = False,
              *_: Any) -> ir.Value:  # fmt: skip
    """A copy of ``x`` with ``values`` at the indexed places, which must be the leading dimensions."""
    used = _index_tensors(b, indices)
    if list(used) != list(range(len(used))):
        raise UnsupportedError("index_put that skips a leading dimension")
    where = _joint_index(b, list(used.values()))
    gathered = b.op("Shape", b.op("GatherND", x, where), dtype=T.INT64)
    updates = b.op("Expand", b.cast(values, b.dtype), gathered, dtype=b.dtype)
    return b.op("ScatterND", x, where, updates, reduction="add" if accumulate else None)


def gather(b: Builder, x: ir.Value, dim: int, positions: ir.Value, *_: Any, **__: Any) -> ir.Value:
    return b.op("GatherElements", x, b.cast(positions, T.INT64), axis=dim)


def index_select(b: Builder, x: ir.Value, dim: int, positions: ir.Value) -> ir.Value:
    return b.op("Gather", x, b.cast(positions, T.INT64), axis=dim)


def scatter(b: Builder, x: ir.Value, dim: int, positions: ir.Value, source: Arg) -> ir.Value:
    if not isinstance(source, ir.Value):
        source = b.op("Expand", b.const(source, b.dtype), b.op("Shape", positions, dtype=T.INT64), dtype=b.dtype)
    return b.op("ScatterElements", x, positions, source, axis=dim)


def scatter_add(b: Builder, x: ir.Value, dim: int, positions: ir.Value, source: ir.Value) -> ir.Value:
    return b.op("ScatterElements", x, positions, source, axis=dim, reduction="add")


def slice_scatter(b: Builder, x: ir.Value, source: ir.Value, dim: int = 0, start: Arg = None, end: Arg = None,
                  step: int = 1) -> ir.Value:  # fmt: skip
    """``x`` with ``source`` in place of a slice: the indices of the slice, then a scatter."""
    every = _range(b, 0, b.size(x, dim), 1, dtype=T.INT64)
    stop = END if end is None else end
    picked = b.op("Slice", every, b.sizes([start or 0]), b.sizes([stop]), b.axes(0), b.axes(step))
    return _scattered(b, x, dim, picked, source)


def _scattered(b: Builder, x: ir.Value, dim: int, picked: ir.Value, source: ir.Value, **how: str) -> ir.Value:
    """``x`` with the slices of ``source`` at those indices of one dimension."""
    ones = [1] * rank(x)
    ones[dim] = -1
    shape = b.op("Shape", source, dtype=T.INT64)
    positions = b.op("Expand", b.op("Reshape", picked, b.const(ones)), shape, dtype=T.INT64)
    return b.op("ScatterElements", x, positions, source, axis=dim, **how)


def index_add(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value, *, alpha: float = 1) -> ir.Value:
    added = source if alpha == 1 else b.op("Mul", source, b.const(alpha, b.dtype))
    return _scattered(b, x, dim, b.cast(index, T.INT64), added, reduction="add")


def select_scatter(b: Builder, x: ir.Value, source: ir.Value, dim: int, position: int) -> ir.Value:
    part = b.op("Unsqueeze", source, b.axes(dim), dtype=x.dtype)
    return slice_scatter(b, x, part, dim, position, END if position == -1 else position + 1)


def triangle(upper: int) -> Converter:
    def convert(b: Builder, x: ir.Value, diagonal: int = 0) -> ir.Value:
        inner = x.dtype if x.dtype in (T.FLOAT, T.DOUBLE, T.INT64) else T.INT64 if x.dtype not in FLOATS else T.FLOAT
        return b.cast(b.op("Trilu", b.cast(x, inner), b.const(diagonal), upper=upper, dtype=inner), b.dtype)

    return convert


def pad(b: Builder, x: ir.Value, widths: Sequence[Arg], value: Arg = 0) -> ir.Value:
    return _pad(b, x, widths, "constant", value)


def pad_mode(b: Builder, x: ir.Value, widths: Sequence[Arg], mode: str = "constant", value: Arg = None) -> ir.Value:
    return _pad(b, x, widths, mode, value)


def pad_as(mode: str) -> Converter:
    return lambda b, x, widths: _pad(b, x, widths, mode, None)


def _pad(b: Builder, x: ir.Value, widths: Sequence[Arg], mode: str, value: Arg) -> ir.Value:
    """torch lists (before, after) pairs from the last dimension; ONNX all befores, then all afters."""
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    n = len(widths) // 2
    fill = b.cast(0 if value is None else value, b.dtype) if mode == "constant" else None
    axes = b.axes(*(-1 - i for i in range(n)))
    return b.op("Pad", x, b.sizes([*widths[0::2], *widths[1::2]]), fill, axes, mode=modes[mode]) if n else x


# --- new values -----------------------------------------------------------------------------------------------------
def _range(b: Builder, start: Arg, end: Arg, step: Arg, *, dtype: ir.DataType) -> ir.Value:
    return b.op("Range", b.cast(start, dtype), b.cast(end, dtype), b.cast(step, dtype), dtype=dtype)


def arange(b: Builder, *args: Arg, **_: Any) -> ir.Value:
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    inner = b.dtype if b.dtype in (T.INT64, T.INT32, T.FLOAT, T.DOUBLE) else T.FLOAT if b.dtype in FLOATS else T.INT64
    if inner in (T.INT64, T.INT32) and any(_is_float(v) for v in (start, end, step)):
        raise UnsupportedError("arange of an integer dtype with floating point bounds")
    return b.cast(_range(b, start, end, step, dtype=inner), b.dtype)


def _is_float(x: Arg) -> bool:
    return isinstance(x, float) or (isinstance(x, ir.Value) and x.dtype in FLOATS)


def linspace(b: Builder, start: Arg, end: Arg, steps: int, **_: Any) -> ir.Value:
    if not is_static(start, end, steps):
        raise UnsupportedError("linspace with bounds known only at run time")
    return b.const(np.linspace(start, end, steps), b.dtype)


def fill(b: Builder, sizes: Sequence[Arg], value: Arg) -> ir.Value:
    """A tensor of ``sizes`` filled with ``value`` in the result's dtype."""
    if isinstance(value, ir.Value):
        return b.op("Expand", b.cast(value, b.dtype), b.sizes(sizes)) if sizes else b.cast(value, b.dtype)
    one = ir.tensor(np.asarray([value]).astype(b.dtype.numpy()), dtype=b.dtype)
    return b.op("ConstantOfShape", b.sizes(sizes), value=one, dtype=b.dtype) if sizes else b.const(value, b.dtype)


def full(b: Builder, sizes: Sequence[Arg], value: Arg, **_: Any) -> ir.Value:
    return fill(b, sizes, value)


def new_full(b: Builder, x: ir.Value, sizes: Sequence[Arg], value: Arg, **_: Any) -> ir.Value:
    return fill(b, sizes, value)


def filled(value: int) -> Converter:
    """zeros, ones, empty."""
    return lambda b, sizes, **_: fill(b, sizes, value)


def new_filled(value: int) -> Converter:
    """new_zeros, new_ones, new_empty."""
    return lambda b, x, sizes, **_: fill(b, sizes, value)


def full_like(b: Builder, x: ir.Value, value: Arg, **_: Any) -> ir.Value:
    return fill(b, [b.size(x, i) for i in range(rank(x))], value)


def filled_like(value: int) -> Converter:
    """zeros_like, ones_like, empty_like."""
    return lambda b, x, **_: full_like(b, x, value)


def scalar_tensor(b: Builder, value: Arg, **_: Any) -> ir.Value:
    return b.cast(value, b.dtype)


def eye(b: Builder, n: Arg, m: Arg = None, **_: Any) -> ir.Value:
    rows_, cols = _range(b, 0, n, 1, dtype=T.INT64), _range(b, 0, n if m is None else m, 1, dtype=T.INT64)
    return b.cast(b.op("Equal", b.op("Unsqueeze", rows_, b.axes(1)), cols, dtype=T.BOOL), b.dtype)


def one_hot(b: Builder, x: ir.Value, classes: int = -1) -> ir.Value:
    if classes < 0:
        raise UnsupportedError("one_hot without num_classes")
    every = b.const(np.arange(classes))
    return b.cast(b.op("Equal", b.op("Unsqueeze", x, b.axes(-1), dtype=x.dtype), every, dtype=T.BOOL), b.dtype)


def meshgrid(b: Builder, tensors: Sequence[ir.Value], *, indexing: str = "ij") -> tuple[ir.Value, ...]:
    if indexing != "ij" and len(tensors) > 1:
        raise UnsupportedError("meshgrid with indexing='xy'")
    n = len(tensors)
    sizes = b.sizes([b.size(t, 0) for t in tensors])
    return tuple(
        b.op("Expand", b.unsqueeze(t, *(d for d in range(n) if d != i)), sizes) for i, t in enumerate(tensors)
    )  # fmt: skip


# --- sizes ----------------------------------------------------------------------------------------------------------
def size_of(b: Builder, x: ir.Value, dim: int) -> Arg:
    return b.size(x, dim)


def count_of(b: Builder, x: ir.Value) -> Arg:
    shape = dims(x)
    if all(isinstance(d, int) for d in shape):
        return math.prod(d for d in shape if isinstance(d, int))
    return as_number(b.op("Size", x, dtype=T.INT64, shape=[]))


def item(b: Builder, x: ir.Value) -> Arg:
    return x if is_number(x) else as_number(b.op("Reshape", x, b.const(np.zeros(0)), dtype=x.dtype, shape=[]))


SHAPE: dict[Any, Converter] = rows(
    (view, (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default,
            aten.reshape_as.default)),
    (flatten, (aten.flatten.using_ints,)),
    (unflatten, (aten.unflatten.int,)),
    (unsqueeze, (aten.unsqueeze.default,)),
    (squeeze, (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)),
    (transpose, (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)),
    (matrix_transpose, (aten.t.default, aten.numpy_T.default, aten.mT.default)),
    (permute, (aten.permute.default,)),
    (move_dim, (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)),
    (expand, (aten.expand.default,)),
    (expand_as, (aten.expand_as.default,)),
    (repeat, (aten.repeat.default, aten.tile.default)),
    (repeat_interleave, (aten.repeat_interleave.self_int,)),
    (roll, (aten.roll.default,)),
    (flip, (aten.flip.default,)),
    (slice_, (aten.slice.Tensor,)),
    (narrow, (aten.narrow.default,)),
    (select, (aten.select.int,)),
    (concatenate, (aten.cat.default, aten.concat.default, aten.concatenate.default)),
    (join(0), (aten.vstack.default,)),
    (join(1), (aten.hstack.default,)),
    (stack, (aten.stack.default,)),
    (split, (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
             aten.tensor_split.sections)),
    (unbind, (aten.unbind.int,)),
    (index, (aten.index.Tensor,)),
    (index_put, (aten.index_put.default,)),
    (gather, (aten.gather.default,)),
    (index_select, (aten.index_select.default,)),
    (scatter, (aten.scatter.src, aten.scatter.value)),
    (scatter_add, (aten.scatter_add.default,)),
    (index_add, (aten.index_add.default,)),
    (slice_scatter, (aten.slice_scatter.default,)),
    (select_scatter, (aten.select_scatter.default,)),
    (triangle(1), (aten.triu.default,)),
    (triangle(0), (aten.tril.default,)),
    (pad, (aten.constant_pad_nd.default,)),
    (pad_mode, (aten.pad.default,)),
    (pad_as("reflect"), (aten.reflection_pad1d.default, aten.reflection_pad2d.default)),
    (pad_as("replicate"), (aten.replication_pad1d.default, aten.replication_pad2d.default)),
    (arange, (aten.arange.default, aten.arange.start, aten.arange.start_step)),
    (linspace, (aten.linspace.default,)),
    (full, (aten.full.default,)),
    (new_full, (aten.new_full.default,)),
    (full_like, (aten.full_like.default,)),
    (filled(0), (aten.zeros.default, aten.empty.memory_format)),
    (filled(1), (aten.ones.default,)),
    (new_filled(0), (aten.new_zeros.default, aten.new_empty.default)),
    (new_filled(1), (aten.new_ones.default,)),
    (filled_like(0), (aten.zeros_like.default, aten.empty_like.default)),
    (filled_like(1), (aten.ones_like.default,)),
    (scalar_tensor, (aten.scalar_tensor.default,)),
    (eye, (aten.eye.default, aten.eye.m)),
    (one_hot, (aten.one_hot.default,)),
    (meshgrid, (aten.meshgrid.default, aten.meshgrid.indexing)),
    (size_of, (aten.sym_size.int,)),
    (count_of, (aten.sym_numel.default, aten.numel.default)),
    (item, (aten.item.default, aten._local_scalar_dense.default)),
)  # fmt: skip
