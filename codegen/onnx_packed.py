"""ONNX converters of layers on packed weights: nodes of the ``fxquant`` domain, or operators of onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from fxquant.codegen import onnx_standard as standard
from fxquant.codegen.onnx_activations import constant_tensor, powers
from fxquant.codegen.onnx_builder import Arg, Builder, T, UnsupportedError, dims
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.codegen.onnx_functions import on_weight
from fxquant.codegen.onnx_standard import Weight
from fxquant.ops import matrix_shape
from fxquant.ops import operators as ops
from fxquant.packing import packed_shape, planar
from fxquant.qtensor import load_scale
from fxquant.scales import Scales
from fxquant.scheme import QuantSpec, parse_spec


def linear_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int], tensor_scale: ir.Value | None = None,
              exponent_bias: ir.Value | None = None) -> ir.Value:  # fmt: skip
    weight = _weight(b, packed, scale, zero_point, spec, shape, tensor_scale)
    if isinstance(width := dims(x)[-1], int) and width != weight.cols:
        raise UnsupportedError(f"x has {width} columns, its weight {weight.cols}")
    if exponent_bias is not None:  # x (W 2^-b)^T = (x 2^-b) W^T, exactly
        x = b.op("Mul", x, b.const(powers(exponent_bias, -1).numpy(), b.dtype), shape=x.shape)
    if standard.takes_matmul(b, x, weight):
        return standard.matmul(b, x, weight, bias)
    if standard.takes_dequantize(b, weight):
        W = b.transpose(b.cast(standard.dequantize(b, weight), b.dtype), [1, 0])
        y = b.op("MatMul", x, W, dtype=b.dtype)
        return y if bias is None else b.op("Add", y, bias, dtype=b.dtype)
    kind, inputs = ("Linear", [x, *weight.inputs]) if bias is None else ("LinearBias", [x, *weight.inputs, bias])
    bits = b.options.activation_bits
    return on_weight(b, kind, weight.spec, inputs, weight.cols, activation_bits=bits)


def conv2d_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], groups: int, tensor_scale: ir.Value | None = None) -> ir.Value:  # fmt: skip
    pads = [*padding, *padding] if len(padding) == 2 else list(padding) * 4
    strides, dilations = list(stride) * (2 // len(stride)), list(dilation) * (2 // len(dilation))
    window = {"strides": strides, "pads": pads, "dilations": dilations, "group": groups}
    weight = _weight(b, packed, scale, zero_point, spec, shape, tensor_scale)
    if standard.takes_dequantize(b, weight):
        kernel = b.cast(_shaped(b, standard.dequantize(b, weight), shape), b.dtype)
        return b.op("Conv", x, kernel, bias, dtype=b.dtype, **window)
    inputs = [x, *weight.inputs, bias]
    return on_weight(b, "Conv2d", weight.spec, inputs, weight.cols, **window, weight_shape=list(shape))


def embedding_wq(b: Builder, indices: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
                 spec: str, shape: Sequence[int], tensor_scale: ir.Value | None = None, **_: Any,
                 ) -> ir.Value:  # fmt: skip
    weight = _weight(b, packed, scale, zero_point, spec, shape, tensor_scale)
    if standard.takes_gather(b, weight):
        return b.cast(standard.gather(b, indices, weight), b.dtype)
    return b.cast(on_weight(b, "Embedding", weight.spec, [indices, *weight.inputs], weight.cols), b.dtype)


def dequantize_packed(b: Builder, packed: ir.Value, scale: Arg, zero_point: Arg, spec: str, shape: Sequence[int],
                      tensor_scale: Arg = None, exponent_bias: Arg = None, **_: Any) -> ir.Value:  # fmt: skip
    weight = _weight(b, packed, scale, zero_point, spec, shape, tensor_scale)
    if standard.takes_dequantize(b, weight):
        return _shifted_back(b, _shaped(b, standard.dequantize(b, weight), shape), exponent_bias)
    value = on_weight(b, "Dequantize", weight.spec, weight.inputs, weight.cols, weight_shape=list(shape))
    return _shifted_back(b, value, exponent_bias)


def dequantize(b: Builder, codes: ir.Value, scale: Arg, zero_point: Arg, spec: str, shape: Sequence[int],
               tensor_scale: Arg = None, exponent_bias: Arg = None, **_: Any) -> ir.Value:  # fmt: skip
    """QDQ form: codes that are not packed."""
    weight = _weight(b, codes, scale, zero_point, spec, shape, tensor_scale, packed_codes=False)
    value = on_weight(b, "DequantizeCodes", weight.spec, weight.inputs, weight.cols, weight_shape=list(shape))
    return _shifted_back(b, value, exponent_bias)


def with_outliers(b: Builder, weight: ir.Value, index: ir.Value, values: ir.Value) -> ir.Value:
    """Scattered over the flattened weight."""
    shape = [int(d) for d in b.shape]
    flat = b.op("Reshape", weight, b.axes(-1), dtype=b.dtype, shape=[math.prod(shape)])
    given = b.cast(b.op("Reshape", values, b.axes(-1), dtype=values.dtype, shape=index.shape), b.dtype)
    return b.op("Reshape", b.op("ScatterElements", flat, index, given, axis=0, shape=flat.shape), b.const(shape))


def _shaped(b: Builder, matrix: ir.Value, shape: Sequence[int]) -> ir.Value:
    return b.op("Reshape", matrix, b.const(list(shape)), dtype=matrix.dtype, shape=list(shape))


def _shifted_back(b: Builder, value: ir.Value, exponent_bias: Arg) -> ir.Value:
    if exponent_bias is not None:
        value = b.op("Mul", value, b.const(powers(exponent_bias, -1).numpy(), T.FLOAT))
    return b.cast(value, b.dtype)


# --- weights --------------------------------------------------------------------------------------------------------
def _weight(
    b: Builder, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None, spec: str, shape: Sequence[int],
    outer: ir.Value | None, *, packed_codes: bool = True,
) -> Weight:  # fmt: skip
    """The weight with plain scales. UnsupportedError where its bytes are not those of its shape."""
    parsed = parse_spec(spec)
    held = dims(packed)
    if len(held) != 2 or not isinstance(held[0], int):
        raise UnsupportedError(f"packed weights of shape {list(held)}; expected a matrix with a fixed number of rows")
    count, cols = matrix_shape(shape, held[0])
    want = packed_shape((count, cols), planar(parsed.format.bits)) if packed_codes else (count, cols)
    if held != want or count * cols != math.prod(shape):
        raise UnsupportedError(
            f"a weight of shape {list(shape)} in {spec} has {list(held)} bytes; expected {list(want)}"
        )
    plain = _plain_scale(b, count, scale, parsed, outer)
    return Weight(packed, plain, _each_row(b, count, zero_point, parsed), parsed, count, cols)


def _plain_scale(b: Builder, count: int, scale: ir.Value, spec: QuantSpec, outer: ir.Value | None) -> ir.Value:
    """Scales as the functions take them: floats of one row or a row each. Coded ones, those of blocks of rows and
    bfloat16 are decoded here, at export."""
    held = dims(scale)[0]
    if spec.kind.format is None and spec.scale != "bf16" and held in (1, count):  # the runtime has no bfloat16 kernels
        return scale
    key = ("scale", id(scale))
    if key not in b.memo:
        stored, above = (constant_tensor(v) for v in (scale, outer))
        if stored is None:
            raise UnsupportedError(f"scales of {spec} that are computed in the graph")
        wide = Scales(load_scale(stored, spec), None, above).effective
        if wide.shape[0] not in (1, count):
            wide = wide.repeat_interleave(spec.block(count, 1)[0], dim=0)[:count]
        b.memo["scale of", id(scale)] = scale  # its id stays taken
        b.memo[key] = b.initializer(f"{scale.name}_float", ir.tensor(wide.contiguous().numpy()))
    return b.memo[key]


def _each_row(b: Builder, count: int, zero_point: ir.Value | None, spec: QuantSpec) -> ir.Value | None:
    """Zero points of one row or a row each; those of blocks of rows are repeated."""
    if zero_point is None or dims(zero_point)[0] in (1, count):
        return zero_point
    key = ("zero point", id(zero_point))
    if key not in b.memo:
        stored = constant_tensor(zero_point)
        if stored is None:
            raise UnsupportedError(f"zero points of {spec} that are computed in the graph")
        wide = stored.repeat_interleave(spec.block(count, 1)[0], dim=0)[:count]
        b.memo["zero point of", id(zero_point)] = zero_point
        b.memo[key] = b.initializer(f"{zero_point.name}_rows", ir.tensor(wide.contiguous().numpy()))
    return b.memo[key]


PACKED: dict[Any, Converter] = rows(
    (linear_wq, (ops.linear_wq.default,)),
    (conv2d_wq, (ops.conv2d_wq.default,)),
    (embedding_wq, (ops.embedding_wq.default,)),
    (with_outliers, (ops.with_outliers.default,)),
    (dequantize_packed, (ops.dequantize_packed.default,)),
    (dequantize, (ops.dequantize.default,)),
)
