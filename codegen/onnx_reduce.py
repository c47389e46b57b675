"""ONNX converters of reductions, scans, sorting and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from fxquant.codegen.onnx_builder import FLOATS, NARROW, Arg, Builder, T, UnsupportedError, rank
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.rewrite import aten

Axes = int | Sequence[int] | None


def _axes(b: Builder, axes: Axes) -> ir.Value | None:
    """The axes input of a reduction; None reduces all dimensions."""
    if axes is None or (not isinstance(axes, int) and not axes):
        return None
    return b.axes(axes) if isinstance(axes, int) else b.axes(*axes)


def _countable(dtype: ir.DataType) -> ir.DataType:
    return T.INT64 if dtype in (*NARROW, T.BOOL) else dtype


def reduced(op_type: str) -> Converter:
    """sum, mean, amax, ...: over all dimensions, or ``axes``, in the result's dtype."""

    def convert(b: Builder, x: ir.Value, axes: Axes = None, keep: bool = False, **_: Any) -> ir.Value:
        inner = _countable(b.dtype)
        value = b.cast(x, inner)
        if not rank(x):
            return b.cast(value, b.dtype)
        return b.cast(b.op(op_type, value, _axes(b, axes), keepdims=int(keep), dtype=inner), b.dtype)

    return convert


def extreme(op_type: str, position: str) -> Converter:
    """max, min along a dimension: values and indices."""

    def convert(b: Builder, x: ir.Value, dim: int, keep: bool = False) -> tuple[ir.Value, ir.Value]:
        inner = _sortable(x.dtype)
        value = b.cast(x, inner)
        values = b.op(op_type, value, b.axes(dim), keepdims=int(keep), dtype=inner)
        return b.cast(values, x.dtype or inner), b.op(position, value, axis=dim, keepdims=int(keep), dtype=T.INT64)

    return convert


def _sortable(dtype: ir.DataType | None) -> ir.DataType:
    return dtype if dtype in (T.FLOAT, T.DOUBLE, T.INT32) else T.FLOAT if dtype in FLOATS else T.INT32


def arg_extreme(op_type: str) -> Converter:
    def convert(b: Builder, x: ir.Value, dim: int | None = None, keep: bool = False) -> ir.Value:
        if dim is None and keep and rank(x) != 1:
            raise UnsupportedError("argmax over all dimensions with keepdim")
        value = b.cast(x, _sortable(x.dtype))
        if dim is None:
            value, dim = b.op("Reshape", value, b.axes(-1), dtype=value.dtype), 0
        return b.op(op_type, value, axis=dim, keepdims=int(keep), dtype=T.INT64)

    return convert


def logical_reduced(op_type: str) -> Converter:
    """any, all: the maximum or minimum of 0 and 1."""

    def convert(b: Builder, x: ir.Value, axes: Axes = None, keep: bool = False) -> ir.Value:
        bits = b.cast(b.cast(x, T.BOOL), T.INT32)
        return b.cast(b.op(op_type, bits, _axes(b, axes), keepdims=int(keep), dtype=T.INT32), T.BOOL)

    return convert


def variance(b: Builder, x: ir.Value, axes: Axes = None, correction: Arg = 1, keep: bool = False) -> ir.Value:
    """sum((x - mean)^2) / (n - correction)."""
    over = _axes(b, axes)
    centred = b.op("Sub", x, b.op("ReduceMean", x, over, keepdims=1))
    if not correction:
        return b.op("ReduceMean", b.op("Mul", centred, centred), over, keepdims=int(keep))
    total = b.op("ReduceSumSquare", centred, over, keepdims=int(keep))
    return b.op("Div", total, _degrees(b, x, axes, correction))


def _degrees(b: Builder, x: ir.Value, axes: Axes, correction: Arg) -> ir.Value:
    """max(n - correction, 0), n the number of elements that are reduced."""
    wanted = range(rank(x)) if _axes(b, axes) is None else [axes] if isinstance(axes, int) else axes or ()
    count = b.op("ReduceProd", b.sizes([b.size(x, a) for a in wanted]), keepdims=0, dtype=T.INT64)
    return b.op("Max", b.op("Sub", b.cast(count, b.dtype), b.const(correction, b.dtype)), b.const(0, b.dtype))


def _var(root: bool) -> dict[str, Converter]:
    def done(b: Builder, value: ir.Value) -> ir.Value:
        return b.op("Sqrt", value) if root else value

    def correction(
        b: Builder, x: ir.Value, axes: Axes = None, *, correction: Arg = None, keepdim: bool = False
    ) -> ir.Value:
        return done(b, variance(b, x, axes, 1 if correction is None else correction, keepdim))

    def unbiased(b: Builder, x: ir.Value, unbiased: bool = True) -> ir.Value:
        return done(b, variance(b, x, None, int(unbiased)))

    def along(b: Builder, x: ir.Value, axes: Axes, unbiased: bool = True, keep: bool = False) -> ir.Value:
        return done(b, variance(b, x, axes, int(unbiased), keep))

    return {"correction": correction, "default": unbiased, "dim": along}


def and_mean(convert: Converter) -> Converter:
    """var_mean, std_mean: the same with the mean beside it."""

    def both(b: Builder, x: ir.Value, *args: Any, **options: Any) -> tuple[ir.Value, ir.Value]:
        b.result = b.result[0]
        axes = args[0] if args and not isinstance(args[0], bool) else None
        keep = options.get("keepdim", len(args) > 2 and args[2])
        return convert(b, x, *args, **options), b.op("ReduceMean", x, _axes(b, axes), keepdims=int(keep))

    return both


def vector_norm(b: Builder, x: ir.Value, order: Arg = 2, axes: Axes = None, keep: bool = False, **_: Any) -> ir.Value:
    names = {1: "ReduceL1", 2: "ReduceL2", float("inf"): "ReduceMax"}
    if order is not None and order not in names:
        raise UnsupportedError(f"a norm of order {order}")
    value = b.cast(x, b.dtype)
    if order == float("inf"):
        value = b.like("Abs", value)
    return b.op(names[2 if order is None else order], value, _axes(b, axes), keepdims=int(keep))


def cumulative_sum(b: Builder, x: ir.Value, dim: int, **_: Any) -> ir.Value:
    inner = _countable(b.dtype)
    return (
        b.cast(b.op("CumSum", b.cast(x, inner), b.const(dim), dtype=inner), b.dtype) if rank(x) else b.cast(x, b.dtype)
    )


def difference(b: Builder, x: ir.Value, n: int = 1, dim: int = -1, before: ir.Value | None = None,
               after: ir.Value | None = None) -> ir.Value:  # fmt: skip
    """x[1:] - x[:-1], n times, with ``before`` and ``after`` joined on first."""
    if x.dtype == T.BOOL:
        raise UnsupportedError("diff of booleans")
    parts = [p for p in (before, x, after) if p is not None]
    value = b.op("Concat", *parts, axis=dim) if len(parts) > 1 else x
    for _ in range(n):
        high = b.op("Slice", value, b.axes(1), b.axes(2**63 - 1), b.axes(dim))
        low = b.op("Slice", value, b.axes(0), b.axes(-1), b.axes(dim))
        value = b.op("Sub", high, low)
    return value


def histogram(b: Builder, x: ir.Value, bins: int = 100, low: Arg = 0, high: Arg = 0) -> ir.Value:
    """How many elements lie in each of ``bins`` parts of ``low..high``, whose upper end is part of the last."""
    if not low < high:
        raise UnsupportedError("histc over the range of the data; give it min and max")
    flat = b.op("Reshape", b.cast(x, T.FLOAT), b.axes(-1), dtype=T.FLOAT)
    least, most = b.const(low, T.FLOAT), b.const(high, T.FLOAT)
    part = b.op("Mul", b.op("Sub", flat, least), b.const(bins, T.FLOAT))
    part = b.op("Floor", b.op("Div", part, b.const(high - low, T.FLOAT)))
    part = b.op("Min", part, b.const(bins - 1, T.FLOAT))
    outside = b.op("Or", b.op("Less", flat, least, dtype=T.BOOL), b.op("Greater", flat, most, dtype=T.BOOL))
    part = b.op("Where", outside, b.const(bins, T.FLOAT), part, dtype=T.FLOAT)  # a bin that is cut off
    hits = b.op("OneHot", b.cast(part, T.INT64), b.const(bins + 1), b.const([0, 1], T.FLOAT), axis=0, dtype=T.FLOAT)
    counts = b.op("ReduceSum", hits, b.axes(1), keepdims=0, dtype=T.FLOAT)
    return b.cast(b.op("Slice", counts, b.axes(0), b.axes(bins), b.axes(0), dtype=T.FLOAT, shape=[bins]), b.dtype)


def normalized(op_type: str) -> Converter:
    """softmax, log_softmax in the result's dtype."""

    def convert(b: Builder, x: ir.Value, dim: int, *_: Any) -> ir.Value:
        return b.like(op_type, b.cast(x, b.dtype), axis=dim) if rank(x) else b.like("Sub", x, x)

    return convert


def safe_softmax(b: Builder, x: ir.Value, dim: int, *_: Any) -> ir.Value:
    """softmax that gives 0 where every element is -inf."""
    p = b.like("Softmax", b.cast(x, b.dtype), axis=dim)
    return b.op("Where", b.op("IsNaN", p, dtype=T.BOOL), b.const(0, b.dtype), p, dtype=b.dtype)


def top_k(b: Builder, x: ir.Value, k: Arg, dim: int = -1, largest: bool = True, in_order: bool = True) -> Any:
    values, positions = b.multi(2, "TopK", x, b.sizes([k]), axis=dim, largest=int(largest), sorted=int(in_order))
    positions.type = ir.TensorType(T.INT64)
    return values, positions


def sort(b: Builder, x: ir.Value, dim: int = -1, descending: bool = False) -> Any:
    return top_k(b, x, b.size(x, dim), dim, descending)


def stable_sort(b: Builder, x: ir.Value, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return sort(b, x, dim, descending)


def argsort(b: Builder, x: ir.Value, dim: int = -1, descending: bool = False) -> ir.Value:
    return sort(b, x, dim, descending)[1]  # type: ignore[no-any-return]


def glu(b: Builder, x: ir.Value, dim: int = -1) -> ir.Value:
    """First half times the sigmoid of the second."""
    left, right = b.multi(2, "Split", x, axis=dim, num_outputs=2)
    return b.op("Mul", left, b.op("Sigmoid", right))


REDUCE: dict[Any, Converter] = {
    **{getattr(aten.var, overload): convert for overload, convert in _var(root=False).items()},
    **{getattr(aten.std, overload): convert for overload, convert in _var(root=True).items()},
    **{getattr(aten.var_mean, overload): and_mean(convert) for overload, convert in _var(root=False).items()},
    **{getattr(aten.std_mean, overload): and_mean(convert) for overload, convert in _var(root=True).items()},
    **rows(
        (reduced("ReduceSum"), (aten.sum.default, aten.sum.dim_IntList)),
        (reduced("ReduceMean"), (aten.mean.default, aten.mean.dim)),
        (reduced("ReduceProd"), (aten.prod.default, aten.prod.dim_int)),
        (reduced("ReduceMax"), (aten.amax.default, aten.max.default)),
        (reduced("ReduceMin"), (aten.amin.default, aten.min.default)),
        (reduced("ReduceLogSumExp"), (aten.logsumexp.default,)),
        (extreme("ReduceMax", "ArgMax"), (aten.max.dim,)),
        (extreme("ReduceMin", "ArgMin"), (aten.min.dim,)),
        (arg_extreme("ArgMax"), (aten.argmax.default,)),
        (arg_extreme("ArgMin"), (aten.argmin.default,)),
        (logical_reduced("ReduceMax"), (aten.any.default, aten.any.dim, aten.any.dims)),
        (logical_reduced("ReduceMin"), (aten.all.default, aten.all.dim, aten.all.dims)),
        (vector_norm, (aten.linalg_vector_norm.default,)),
        (vector_norm, (aten.norm.ScalarOpt_dim, aten.norm.Scalar)),
        (cumulative_sum, (aten.cumsum.default,)),
        (difference, (aten.diff.default,)),
        (histogram, (aten.histc.default,)),
        (normalized("Softmax"), (aten.softmax.int, aten._softmax.default)),
        (safe_softmax, (aten._safe_softmax.default,)),
        (normalized("LogSoftmax"), (aten.log_softmax.int, aten._log_softmax.default)),
        (top_k, (aten.topk.default,)),
        (sort, (aten.sort.default,)),
        (stable_sort, (aten.sort.stable,)),
        (argsort, (aten.argsort.default,)),
        (glu, (aten.glu.default,)),
    ),
}  # fmt: skip
