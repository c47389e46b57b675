"""ONNX converters of rounded activations: nodes of the ``fxquant`` domain, or standard operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import UNKNOWN, Arg, Builder, T, UnsupportedError, dims, product, rank
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.codegen.onnx_functions import on_activation
from fxquant.codegen.onnx_rounding import CASTS, found_scale, restored
from fxquant.grids import CodebookFormat
from fxquant.ops import operators as ops
from fxquant.qtensor import load_scale
from fxquant.scales import Scales, power_of_two, spread
from fxquant.scheme import PerGroup, PerTensor, PerToken, QuantSpec, parse_spec

Rounding = Callable[[ir.Value], ir.Value]


def fake_quantize_dynamic(
    b: Builder, x: ir.Value, spec: str, exponent_bias: ir.Value | None = None, shifted: bool = False
) -> ir.Value:
    """x rounded with scales that are found when it runs: of every token, or of every group of its channels."""
    parsed = parse_spec(spec)
    if parsed.kind.outer == "row":
        raise UnsupportedError(f"activations in {spec}; scales of activations are fp32, fp16, bf16, e8m0, e5m3 or m1")
    if not isinstance(parsed.granularity, (PerToken, PerGroup)):
        raise UnsupportedError(f"activations in {spec} with scales that are found when they run; expected token, group")

    def by_row(y: ir.Value) -> ir.Value:
        if _is_standard(b, parsed) and isinstance(dims(y)[-1], int):
            return _standard_dynamic(b, y, parsed)
        return on_activation(b, "FakeQuantizeDynamic", parsed, y)

    return _shifted(b, x, exponent_bias, shifted, lambda y: _by_group(b, y, parsed, by_row))


def _by_group(b: Builder, x: ir.Value, spec: QuantSpec, call: Rounding) -> ir.Value:
    """``call`` on x seen as ``[..., groups, size]``; a last group that is shorter is filled with zeros for the time."""
    width = dims(x)[-1]
    if not isinstance(spec.granularity, PerGroup):
        return call(x)
    if not isinstance(width, int):
        raise UnsupportedError(f"activations in {spec} with a number of channels that is not fixed")
    size = min(spec.granularity.size, width)
    groups, lead = -(-width // size), list(dims(x)[:-1])
    missing = groups * size - width
    if missing and isinstance(spec.format, CodebookFormat):
        raise UnsupportedError(f"activations in {spec} with {width} channels, which are not whole groups of a table")
    if missing:
        pads = b.const([*[0] * (2 * rank(x) - 1), missing])
        x = b.op("Pad", x, pads, dtype=x.dtype, shape=[*lead, groups * size])
    split = b.const([*[0] * (rank(x) - 1), groups, size])
    done = call(b.op("Reshape", x, split, dtype=x.dtype, shape=[*lead, groups, size]))
    whole = b.const([*[0] * (rank(x) - 1), groups * size])
    done = b.op("Reshape", done, whole, dtype=x.dtype, shape=[*lead, groups * size])
    if not missing:
        return done
    return b.op("Slice", done, b.axes(0), b.axes(width), b.axes(-1), dtype=x.dtype, shape=[*lead, width])


def fake_quantize(
    b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, spec: str, tensor_scale: Arg = None,
    exponent_bias: ir.Value | None = None, shifted: bool = False,
) -> ir.Value:  # fmt: skip
    """x rounded with scales that are given: one, or as many as the blocks of the matrix view of x."""
    parsed = parse_spec(spec)
    stored, outer, zero = (constant_tensor(v) for v in (scale, tensor_scale, zero_point))
    if stored is None:
        raise UnsupportedError(f"activations in {spec} with scales that are computed in the graph")
    values = Scales(load_scale(stored, parsed), zero, outer)
    if parsed.kind.outer == "tensor" and outer is not None:
        given = [values.scale.float(), outer.float()]
    elif isinstance(parsed.granularity, PerTensor) and _is_standard(b, parsed):
        one = b.const(float(values.effective), T.FLOAT)
        return _shifted(b, x, exponent_bias, shifted, lambda y: _standard_static(b, y, parsed, one))
    else:
        given = [values.effective.float(), *([] if zero is None else [zero])]
    return _shifted(b, x, exponent_bias, shifted, lambda y: _rounded_by(b, y, parsed, given))


def _rounded_by(b: Builder, x: ir.Value, spec: QuantSpec, given: list[torch.Tensor]) -> ir.Value:
    """FakeQuantize with scales (and what comes after them) as they broadcast over x, or over its matrix view."""
    width, tall = dims(x)[-1] if rank(x) else 1, max(value.shape[0] for value in given)
    if all(value.numel() == 1 for value in given):
        kind = "FakeQuantize" if spec.kind.outer is None else "FakeQuantizeEach"
        return on_activation(b, kind, spec, x, *(_constant(b, value.reshape(())) for value in given))
    count = product(dims(x)[:-1]) if tall > 1 else 1
    if count is None and spec.block(tall, 1)[0] == 1:
        count = tall  # a row of scales for every row of x: only that many will do
    if not isinstance(width, int) or count is None:
        raise UnsupportedError(
            f"activations in {spec} with scales given for blocks of x {list(dims(x))}, not all fixed"
        )
    block = spec.block(count, width)
    if tall not in (1, -(-count // block[0])):
        raise UnsupportedError(f"activations in {spec} with {tall} rows of given scales for {count} rows")
    placed = [_constant(b, spread(value, block, (count, width))) for value in given]
    if tall == 1:
        return on_activation(b, "FakeQuantizeEach", spec, x, *placed)
    flat = b.op("Reshape", x, b.const([count, width]), dtype=x.dtype, shape=[count, width])
    done = on_activation(b, "FakeQuantizeEach", spec, flat, *placed)
    return b.reshape(done, [b.size(x, i) for i in range(rank(x))], dims(x))


def _constant(b: Builder, value: torch.Tensor) -> ir.Value:
    return b.const(value.numpy(), T.UINT8 if value.dtype == torch.uint8 else T.FLOAT)


# --- standard operators -----------------------------------------------------------------------------------------------
def _is_standard(b: Builder, spec: QuantSpec) -> bool:
    """Whether x is to be rounded by standard operators, and they round to this format as the reference does.

    INT8 goes by QuantizeLinear and DequantizeLinear. FP8 goes by Casts: onnxruntime makes an invalid operator of a
    product of two values that come from DequantizeLinear in FP8.
    """
    return b.options.operators == "standard" and (str(spec.format) in CASTS or str(spec.format) == "int8")


def _standard_static(b: Builder, x: ir.Value, spec: QuantSpec, scale: ir.Value) -> ir.Value:
    wide = b.cast(x, T.FLOAT)
    assert x.dtype is not None
    if str(spec.format) in CASTS:
        return b.cast(restored(b, wide, scale, spec.format), x.dtype)
    return b.cast(_by_codes(b, wide, spec, scale, None), x.dtype)


def _standard_dynamic(b: Builder, x: ir.Value, spec: QuantSpec) -> ir.Value:
    """INT8: every row of x is a channel of ``[rows, size]``, since the operators take one scale for each of them."""
    wide, size = b.cast(x, T.FLOAT), dims(x)[-1]
    scale = found_scale(b, wide, spec.format, spec.scale, spec.rounding)
    assert x.dtype is not None
    if str(spec.format) in CASTS:
        return b.cast(restored(b, wide, scale, spec.format), x.dtype)
    flat = b.op("Reshape", wide, b.const([-1, size]), dtype=T.FLOAT, shape=[UNKNOWN, size])
    own = b.op("Reshape", scale, b.const([-1, 1]), dtype=T.FLOAT, shape=[UNKNOWN, 1])
    done = _by_codes(b, flat, spec, own, 0)
    back = b.op("Reshape", done, b.op("Shape", x, dtype=T.INT64), dtype=T.FLOAT, shape=dims(x))
    return b.cast(back, x.dtype)


def _by_codes(b: Builder, x: ir.Value, spec: QuantSpec, scale: ir.Value, axis: int | None) -> ir.Value:
    """x by way of its INT8 codes. QuantizeLinear saturates at -128, which is no code of ours: x is limited before."""
    lowest = b.op("Mul", scale, b.const(-spec.format.max, T.FLOAT), dtype=T.FLOAT)
    limited = b.op("Max", x, lowest, dtype=T.FLOAT, shape=x.shape)
    if axis is not None:
        scale = b.op("Reshape", scale, b.axes(-1), dtype=T.FLOAT, shape=[UNKNOWN])
    kind = T.INT8
    code = b.op("QuantizeLinear", limited, scale, axis=axis, output_dtype=int(kind), dtype=kind, shape=x.shape)
    return b.op("DequantizeLinear", code, scale, axis=axis, dtype=T.FLOAT, shape=x.shape)


# --- exponent biases --------------------------------------------------------------------------------------------------
def _shifted(b: Builder, x: ir.Value, exponent_bias: ir.Value | None, shifted: bool, call: Rounding) -> ir.Value:
    """``call`` on x 2^bias in float32; what it gives times 2^-bias, unless it is to stay ``shifted``."""
    if exponent_bias is None:
        return call(x)
    up, down = (b.const(powers(exponent_bias, sign).numpy(), T.FLOAT) for sign in (1, -1))
    found = call(b.op("Mul", b.cast(x, T.FLOAT), up, shape=x.shape))
    return b.cast(found if shifted else b.op("Mul", found, down, shape=x.shape), b.dtype)


def powers(exponent: ir.Value, sign: int) -> torch.Tensor:
    """2^(sign * exponent) of constant exponents, float32."""
    if exponent.const_value is None:
        raise UnsupportedError("exponent biases that are computed in the graph")
    exponents = torch.from_numpy(exponent.const_value.numpy().astype(np.int32))
    return power_of_two(exponents * sign)


def constant_tensor(value: ir.Value | None) -> torch.Tensor | None:
    """A constant as a tensor: uint8 as it is, all else float32."""
    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    return torch.from_numpy(array.astype(np.uint8 if array.dtype == np.uint8 else np.float32))


ACTIVATIONS: dict[Any, Converter] = rows(
    (fake_quantize, (ops.fake_quantize.default,)),
    (fake_quantize_dynamic, (ops.fake_quantize_dynamic.default,)),
)
