"""ONNX converters of layers: products, convolutions, attention, normalisation, pooling, resizing, embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import FLOATS, UNKNOWN, Arg, Builder, T, UnsupportedError, dims, rank
from fxquant.codegen.onnx_elementwise import Converter, arithmetic, rows
from fxquant.rewrite import aten

Ints = Sequence[int]


def _each(values: Ints | int, n: int) -> list[int]:
    """One value for each of ``n`` dimensions; a single one stands for all."""
    found = [values] if isinstance(values, int) else list(values)
    return found * n if len(found) == 1 else found


# --- products -------------------------------------------------------------------------------------------------------
def matmul(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    if b.dtype in FLOATS or b.dtype in (T.INT32, T.INT64):
        return b.op("MatMul", b.cast(x, b.dtype), b.cast(y, b.dtype))
    return b.cast(b.op("MatMul", b.cast(x, T.INT32), b.cast(y, T.INT32), dtype=T.INT32), b.dtype)


def linear(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """x @ weight^T + bias."""
    product = b.op("MatMul", x, b.transpose(weight, [1, 0]) if rank(weight) == 2 else weight)
    return product if bias is None else b.op("Add", product, bias)


def product_plus(b: Builder, bias: ir.Value, x: ir.Value, y: ir.Value, *, beta: Arg = 1, alpha: Arg = 1) -> ir.Value:
    """addmm, baddbmm: beta * bias + alpha * (x @ y)."""
    product = b.op("MatMul", x, y)
    if alpha != 1:
        product = arithmetic(b, "Mul", product, alpha, dtype=b.dtype)
    return b.op("Add", product, bias if beta == 1 else arithmetic(b, "Mul", bias, beta, dtype=b.dtype))


def outer(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("Mul", b.unsqueeze(x, 1), y)


def einsum(b: Builder, equation: str, operands: Sequence[ir.Value], **_: Any) -> ir.Value:
    return b.op("Einsum", *(b.cast(o, b.dtype) for o in operands), equation=equation)


def embedding(b: Builder, weight: ir.Value, indices: ir.Value, *_: Any) -> ir.Value:
    return b.op("Gather", weight, indices, axis=0)


# --- attention ------------------------------------------------------------------------------------------------------
def attention(b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None, dropout: float = 0.0,
              causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> ir.Value:  # fmt: skip
    """softmax(q k^T scale + mask) v; a query whose mask admits no key gives 0, as in torch."""
    if enable_gqa and _packs(q, k, mask, causal):
        return _packed_attention(b, q, k, v, mask, scale)
    if enable_gqa:
        k, v = _repeat_heads(b, k, q), _repeat_heads(b, v, q)
    width = dims(q)[-1]
    if scale is None and not isinstance(width, int):
        raise UnsupportedError("attention over a dynamic head size without a scale")
    factor = 1 / math.sqrt(width) if scale is None else scale  # type: ignore[arg-type]
    order = [*range(rank(k) - 2), rank(k) - 1, rank(k) - 2]
    scores = b.op("MatMul", q, b.transpose(k, order))
    scores = b.op("Mul", scores, b.const(factor, b.dtype))
    admits = None
    if causal:
        mask = _causal(b, q, k)
    if mask is not None:
        bias, admits = _additive(b, mask)
        scores = b.op("Add", scores, bias)
    result = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    if admits is None or causal:
        return result
    return b.op("Where", admits, result, b.const(0, b.dtype), dtype=b.dtype)


def _packs(q: ir.Value, k: ir.Value, mask: ir.Value | None, causal: bool) -> bool:
    """Whether the queries of a group may be the rows of one product: all heads have the same mask."""
    sizes = [*dims(q)[1:2], *dims(k)[1:2], *dims(q)[3:], *(() if mask is None else dims(mask)[1:2])]
    return not causal and rank(q) == 4 and all(isinstance(n, int) for n in sizes) and (
        mask is None or (rank(mask) == 4 and dims(mask)[1] == 1)
    )  # fmt: skip


def _packed_attention(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float | None
) -> ir.Value:
    """Grouped queries ``[b, heads * group, s, d]`` as ``[b, heads, group * s, d]``: no key and no value is repeated."""
    (batch, _, s, width), heads = dims(q), dims(k)[1]
    group = int(dims(q)[1]) // int(heads)
    rows = s * group if isinstance(s, int) else UNKNOWN
    sizes = b.const([0, heads, -1, width])
    packed = b.op("Reshape", q, sizes, dtype=q.dtype, shape=[batch, heads, rows, width])
    if mask is not None and dims(mask)[2] != 1:
        if ("group", group, id(mask)) not in b.memo:
            shape = [*dims(mask)[:2], rows, dims(mask)[3]]
            b.memo["group", group, id(mask)] = b.op("Concat", *[mask] * group, axis=2, dtype=mask.dtype, shape=shape)
        mask = b.memo["group", group, id(mask)]
    y = attention(b, packed, k, v, mask, scale=scale)
    return b.op("Reshape", y, b.const([0, dims(q)[1], -1, dims(v)[3]]), dtype=q.dtype, shape=[*dims(q)[:3], dims(v)[3]])


def _additive(b: Builder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``mask`` as a term of the scores, and which queries see a key: BOOL ``[..., queries, 1]``. Once for each mask."""
    if ("bias", id(mask)) not in b.memo:
        lowest = float(torch.finfo(torch.float32 if b.dtype in (T.FLOAT, T.DOUBLE, T.BFLOAT16) else torch.float16).min)
        if mask.dtype == T.BOOL:
            bias = b.op("Where", mask, b.const(0, b.dtype), b.const(lowest, b.dtype), dtype=b.dtype)
            seen = b.op("ReduceMax", b.cast(mask, T.INT32), b.axes(-1), keepdims=1, dtype=T.INT32)
            admits = b.cast(seen, T.BOOL)
        else:
            bias = b.cast(mask, b.dtype)
            highest = b.op("ReduceMax", bias, b.axes(-1), keepdims=1)
            admits = b.op("Greater", highest, b.const(-math.inf, b.dtype), dtype=T.BOOL)
        b.memo["mask", id(mask)] = mask  # its id stays taken
        b.memo["bias", id(mask)], b.memo["admits", id(mask)] = bias, admits
    return b.memo["bias", id(mask)], b.memo["admits", id(mask)]


def _causal(b: Builder, q: ir.Value, k: ir.Value) -> ir.Value:
    """Query i sees the keys 0..i: BOOL ``[queries, keys]``, one for each pair of sizes."""
    key = ("causal", dims(q)[-2], dims(k)[-2])
    if key not in b.memo:
        rows_, cols = (
            b.op("Range", b.const(0), b.cast(b.size(t, -2), T.INT64), b.const(1), dtype=T.INT64, shape=[dims(t)[-2]])
            for t in (q, k)
        )
        b.memo[key] = b.op(
            "GreaterOrEqual", b.unsqueeze(rows_, 1), cols, dtype=T.BOOL, shape=[dims(q)[-2], dims(k)[-2]]
        )
    return b.memo[key]


def _repeat_heads(b: Builder, x: ir.Value, q: ir.Value) -> ir.Value:
    """Grouped-query attention: every key (value) head ``[..., heads, n, d]`` repeated for the queries of its group."""
    have, want = dims(x)[-3], dims(q)[-3]
    if not isinstance(have, int) or not isinstance(want, int):
        raise UnsupportedError("grouped-query attention with a dynamic number of heads")
    if have == want:
        return x
    n = rank(x)
    wide = b.op("Expand", b.unsqueeze(x, n - 2), b.const([*[1] * (n - 2), want // have, 1, 1]), dtype=x.dtype)
    sizes = b.const([*[0] * (n - 3), want, -1, dims(x)[-1]])
    shape = [*dims(x)[:-3], want, *dims(x)[-2:]]
    if n != 4:
        raise UnsupportedError(f"grouped-query attention on tensors of {n} dimensions")
    return b.op("Reshape", wide, sizes, dtype=x.dtype, shape=shape)


def grouped_product(b: Builder, x: ir.Value, weight: ir.Value, ends: ir.Value) -> ir.Value:
    """Rows of x, sorted by expert, each times its expert's matrix: ``y[ends[e-1]:ends[e]] = x[...] @ weight[e]``."""
    experts = dims(weight)[0]
    if not isinstance(experts, int):
        raise UnsupportedError("a grouped product with a number of experts that is not known")
    at = b.cast(ends, T.INT64)
    stops = [b.op("Slice", at, b.axes(e), b.axes(e + 1), b.axes(0), dtype=T.INT64, shape=[1]) for e in range(experts)]
    parts = []
    for e, (start, stop) in enumerate(zip([b.axes(0), *stops], stops, strict=False)):
        rows = b.op("Slice", x, start, stop, b.axes(0), dtype=x.dtype)
        parts.append(b.op("MatMul", rows, b.op("Gather", weight, b.const(e), axis=0), dtype=x.dtype))
    return b.op("Concat", *parts, axis=0, dtype=x.dtype, shape=[dims(x)[0], dims(weight)[2]])


# --- convolution ----------------------------------------------------------------------------------------------------
def convolution(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None, stride: Ints, padding: Ints | str,
                dilation: Ints, groups: int = 1) -> ir.Value:  # fmt: skip
    n = rank(weight) - 2
    window: dict[str, Any] = {"strides": _each(stride, n), "dilations": _each(dilation, n), "group": groups}
    if padding == "same":  # the odd one goes behind
        total = [d * (int(k) - 1) for d, k in zip(window["dilations"], dims(weight)[2:], strict=True)]
        window["pads"] = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        window["pads"] = [0] * 2 * n if isinstance(padding, str) else _each(padding, n) * 2
    return _batched(b, x, n, lambda x: b.op("Conv", x, weight, bias, **window))


def transposed_convolution(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None, stride: Ints,
                           padding: Ints, output_padding: Ints, groups: int, dilation: Ints) -> ir.Value:  # fmt: skip
    n = rank(weight) - 2
    window = {"strides": _each(stride, n), "pads": _each(padding, n) * 2, "dilations": _each(dilation, n),
              "output_padding": _each(output_padding, n), "group": groups}  # fmt: skip
    return _batched(b, x, n, lambda x: b.op("ConvTranspose", x, weight, bias, **window))


def any_convolution(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None, stride: Ints, padding: Ints,
                    dilation: Ints, transposed: bool, output_padding: Ints, groups: int,
                    *_: Any) -> ir.Value:  # fmt: skip
    if transposed:
        return transposed_convolution(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return convolution(b, x, weight, bias, stride, padding, dilation, groups)


def _batched(b: Builder, x: ir.Value, n: int, call: Converter) -> ir.Value:
    """``call`` on ``[batch, channels, n sizes]``; an input without a batch dimension gets one for the time."""
    if rank(x) == n + 2:
        found: ir.Value = call(x)
        return found
    return b.op("Squeeze", call(b.unsqueeze(x, 0)), b.axes(0), dtype=b.dtype)


# --- normalisation --------------------------------------------------------------------------------------------------
def layer_norm(b: Builder, x: ir.Value, shape: Ints, weight: ir.Value | None = None, bias: ir.Value | None = None,
               eps: float = 1e-5, *_: Any) -> ir.Value:  # fmt: skip
    scale = b.const(np.ones(list(shape)), b.dtype) if weight is None else weight
    return b.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=eps)


def native_layer_norm(b: Builder, x: ir.Value, shape: Ints, weight: ir.Value | None, bias: ir.Value | None,
                      eps: float) -> tuple[Any, ...]:  # fmt: skip
    b.result = b.result[0]
    return layer_norm(b, x, shape, weight, bias, eps), None, None


def rms_norm(
    b: Builder, x: ir.Value, shape: Ints, weight: ir.Value | None = None, eps: float | None = None
) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * weight."""
    eps = float(torch.finfo(torch.float32).eps) if eps is None else eps
    over = b.axes(*range(-len(shape), 0))
    mean = b.op("ReduceMean", b.op("Mul", x, x), over, keepdims=1)
    normed = b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.const(eps, b.dtype))))
    return normed if weight is None else b.op("Mul", normed, weight)


def batch_norm(b: Builder, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, mean: ir.Value | None,
               var: ir.Value | None, training: bool, momentum: float, eps: float, *_: Any) -> ir.Value:  # fmt: skip
    if training or mean is None or var is None:
        raise UnsupportedError("batch_norm on statistics of the batch; call model.eval() before capture")
    channels = list(dims(mean))
    scale = b.const(np.ones(channels), b.dtype) if weight is None else weight
    shift = b.const(np.zeros(channels), b.dtype) if bias is None else bias
    return b.op("BatchNormalization", x, scale, shift, mean, var, epsilon=eps)


def native_batch_norm(b: Builder, x: ir.Value, weight: Arg, bias: Arg, mean: Arg, var: Arg, momentum: float,
                      eps: float) -> tuple[Any, ...]:  # fmt: skip
    b.result = b.result[0]
    return batch_norm(b, x, weight, bias, mean, var, False, momentum, eps), None, None


def group_norm(b: Builder, x: ir.Value, groups: int, weight: ir.Value | None = None, bias: ir.Value | None = None,
               eps: float = 1e-5, *_: Any) -> ir.Value:  # fmt: skip
    channels = dims(x)[1]
    assert isinstance(channels, int)
    scale = b.const(np.ones(channels), b.dtype) if weight is None else weight
    shift = b.const(np.zeros(channels), b.dtype) if bias is None else bias
    return b.op("GroupNormalization", x, scale, shift, num_groups=groups, epsilon=eps)


def instance_norm(b: Builder, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, mean: Arg, var: Arg,
                  use_input_stats: bool, momentum: float, eps: float, *_: Any) -> ir.Value:  # fmt: skip
    if not use_input_stats:
        return batch_norm(b, x, weight, bias, mean, var, False, momentum, eps)
    channels = dims(x)[1]
    scale = b.const(np.ones([channels]), b.dtype) if weight is None else weight
    shift = b.const(np.zeros([channels]), b.dtype) if bias is None else bias
    return b.op("InstanceNormalization", x, scale, shift, epsilon=eps)


# --- pooling and resizing -------------------------------------------------------------------------------------------
def max_pool(n: int, outputs: int = 1) -> Converter:
    def convert(b: Builder, x: ir.Value, kernel: Ints, stride: Ints = (), padding: Ints = (0,), dilation: Ints = (1,),
                ceil: bool = False) -> Any:  # fmt: skip
        if outputs > 1:
            b.result = b.result[0]
        window = {"kernel_shape": _each(kernel, n), "strides": _each(stride or kernel, n),
                  "pads": _each(padding, n) * 2, "dilations": _each(dilation, n), "ceil_mode": int(ceil)}  # fmt: skip
        pooled = _batched(b, x, n, lambda x: b.op("MaxPool", x, **window))
        return pooled if outputs == 1 else (pooled, None)

    return convert


def avg_pool(n: int) -> Converter:
    def convert(b: Builder, x: ir.Value, kernel: Ints, stride: Ints = (), padding: Ints = (0,), ceil: bool = False,
                count_padding: bool = True, divisor: int | None = None) -> ir.Value:  # fmt: skip
        if divisor is not None:
            raise UnsupportedError("avg_pool with divisor_override")
        window = {"kernel_shape": _each(kernel, n), "strides": _each(stride or kernel, n),
                  "pads": _each(padding, n) * 2, "ceil_mode": int(ceil),
                  "count_include_pad": int(count_padding)}  # fmt: skip
        return _batched(b, x, n, lambda x: b.op("AveragePool", x, **window))

    return convert


def adaptive_avg_pool(n: int) -> Converter:
    """To 1: the mean. To a divisor of a static size: pooling. Else a product with the averaging matrix of each axis."""

    def convert(b: Builder, x: ir.Value, sizes: Ints) -> ir.Value:
        sizes = _each(sizes, n)
        if all(s == 1 for s in sizes):
            return b.op("ReduceMean", x, b.axes(*range(-n, 0)), keepdims=1)
        before = _static(x, n)
        if all(a % s == 0 for a, s in zip(before, sizes, strict=True)):
            steps = [a // s for a, s in zip(before, sizes, strict=True)]
            return _batched(b, x, n, lambda x: b.op("AveragePool", x, kernel_shape=steps, strides=steps))
        total = rank(x)
        for axis, (have, want) in enumerate(zip(before, sizes, strict=True), start=total - n):
            last = [*(d for d in range(total) if d != axis), axis]
            moved = b.op("MatMul", b.op("Transpose", x, perm=last), b.const(_averages(have, want), b.dtype))
            x = b.op("Transpose", moved, perm=[int(i) for i in np.argsort(last)])
        return x

    return convert


def _averages(have: int, want: int) -> Any:
    """Column i averages the positions floor(i have / want) .. ceil((i + 1) have / want): ``[have, want]``."""
    matrix = np.zeros((have, want))
    for i in range(want):
        start, end = i * have // want, -(-(i + 1) * have // want)
        matrix[start:end, i] = 1 / (end - start)
    return matrix


def adaptive_max_pool(n: int) -> Converter:
    def convert(b: Builder, x: ir.Value, sizes: Ints) -> Any:
        b.result = b.result[0]
        before, sizes = _static(x, n), _each(sizes, n)
        if any(a % s for a, s in zip(before, sizes, strict=True)):
            raise UnsupportedError(f"adaptive_max_pool of {before} to {sizes}, which does not divide it")
        steps = [a // s for a, s in zip(before, sizes, strict=True)]
        return _batched(b, x, n, lambda x: b.op("MaxPool", x, kernel_shape=steps, strides=steps)), None

    return convert


def _static(x: ir.Value, n: int) -> list[int]:
    sizes = [d for d in dims(x)[-n:] if isinstance(d, int)]
    if len(sizes) < n:
        raise UnsupportedError(f"adaptive pooling of dynamic sizes {dims(x)[-n:]}")
    return sizes


def resize(mode: str) -> Converter:
    """upsample_<mode>.vec(x, output_size, [align_corners], scale_factors)."""

    def convert(b: Builder, x: ir.Value, sizes: Sequence[Arg] | None, *rest: Any) -> ir.Value:
        corners, factors = (rest[0], rest[1]) if len(rest) == 2 else (False, rest[0])
        frame = "align_corners" if corners else "asymmetric" if mode == "nearest" else "half_pixel"
        n = rank(x) - 2
        scales = b.const(list(factors), T.FLOAT) if factors else None
        target = None if factors else b.sizes(list(sizes or ()))
        return b.op(
            "Resize", x, None, scales, target, mode=mode, coordinate_transformation_mode=frame,
            axes=list(range(2, 2 + n)), nearest_mode="floor" if mode == "nearest" else None,
            cubic_coeff_a=-0.75 if mode == "cubic" else None,
        )  # fmt: skip

    return convert


def pixel_shuffle(b: Builder, x: ir.Value, factor: int) -> ir.Value:
    return b.op("DepthToSpace", x, blocksize=factor, mode="CRD")


def nothing(b: Builder, x: Arg, *_: Any, **__: Any) -> Arg:
    return x


LAYERS: dict[Any, Converter] = rows(
    (matmul, (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)),
    (linear, (aten.linear.default,)),
    (product_plus, (aten.addmm.default, aten.baddbmm.default, aten.addbmm.default)),
    (outer, (aten.outer.default,)),
    (einsum, (aten.einsum.default,)),
    (embedding, (aten.embedding.default,)),
    (attention, (aten.scaled_dot_product_attention.default,)),
    (convolution, (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
                   aten.conv2d.padding, aten.conv3d.padding)),
    (transposed_convolution, (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)),
    (any_convolution, (aten.convolution.default,)),
    (layer_norm, (aten.layer_norm.default,)),
    (native_layer_norm, (aten.native_layer_norm.default,)),
    (rms_norm, (aten.rms_norm.default,)),
    (batch_norm, (aten.batch_norm.default,)),
    (native_batch_norm, (aten._native_batch_norm_legit_no_training.default,)),
    (group_norm, (aten.group_norm.default,)),
    (instance_norm, (aten.instance_norm.default,)),
    (max_pool(1), (aten.max_pool1d.default,)),
    (max_pool(2), (aten.max_pool2d.default,)),
    (max_pool(3), (aten.max_pool3d.default,)),
    (max_pool(2, outputs=2), (aten.max_pool2d_with_indices.default,)),
    (avg_pool(1), (aten.avg_pool1d.default,)),
    (avg_pool(2), (aten.avg_pool2d.default,)),
    (avg_pool(3), (aten.avg_pool3d.default,)),
    (adaptive_avg_pool(1), (aten.adaptive_avg_pool1d.default,)),
    (adaptive_avg_pool(2), (aten.adaptive_avg_pool2d.default,)),
    (adaptive_avg_pool(3), (aten.adaptive_avg_pool3d.default,)),
    (adaptive_max_pool(1), (aten.adaptive_max_pool1d.default,)),
    (adaptive_max_pool(2), (aten.adaptive_max_pool2d.default,)),
    (resize("nearest"), (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)),
    (resize("linear"), (aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec)),
    (resize("cubic"), (aten.upsample_bicubic2d.vec,)),
    (pixel_shuffle, (aten.pixel_shuffle.default,)),
    (nothing, (aten.dropout.default, aten.feature_dropout.default)),
)  # fmt: skip
