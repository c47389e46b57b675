"""The codes of a KV cache in standard ONNX operators: what ``ops.quantize_kv``, ``dequantize_kv`` and ``kv_scale`` are.

A code is found by arithmetic that float32 does exactly. In units of the steps of its binade k (0: the subnormals and
the first normals, of the same step) a magnitude of the grid is a whole number, and its code::

    code = round(magnitude / step_k) + k 2^mbits,   step_k = smallest 2^k,   k = how many binades begin below it

Codes become values by a table of 256 bytes, each one code or two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import Builder, T, UnsupportedError, dims, onnx_dtype
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.formats import Format, IntFormat
from fxquant.grids import FloatFormat
from fxquant.ops import operators as ops
from fxquant.ops import two_a_byte
from fxquant.scheme import parse_spec


def kv_scale(b: Builder, x: ir.Value, spec: str) -> ir.Value:
    parsed = parse_spec(spec)
    most, dtype = torch.finfo(parsed.scale_dtype), onnx_dtype(parsed.scale_dtype)
    absmax = b.op("ReduceMax", b.op("Abs", b.cast(x, T.FLOAT)), b.axes(-1), keepdims=1, dtype=T.FLOAT, shape=b.shape)
    ideal = b.like("Div", absmax, b.const(parsed.format.max, T.FLOAT))
    held = b.cast(b.like("Min", ideal, b.const(most.max, T.FLOAT)), dtype)
    held = b.like("Max", held, b.const(most.tiny, dtype))
    zero = b.op("Equal", ideal, b.const(0.0, T.FLOAT), dtype=T.BOOL, shape=b.shape)
    return b.op("Where", zero, b.const(1.0, dtype), held, dtype=dtype, shape=b.shape)


def quantize_kv(b: Builder, x: ir.Value, scale: ir.Value, spec: str) -> ir.Value:
    parsed, width = parse_spec(spec), dims(x)[-1]
    ratio = b.op("Div", b.cast(x, T.FLOAT), b.cast(scale, T.FLOAT), dtype=T.FLOAT, shape=x.shape)
    codes = _encode(b, parsed.format, ratio)
    if not isinstance(width, int):
        raise UnsupportedError("a KV cache of a dynamic width")
    if two_a_byte(parsed, width):  # hhhhllll, l the even channel
        low, high = (
            b.op("Slice", codes, b.axes(at), b.axes(width), b.axes(-1), b.axes(2), dtype=T.FLOAT, shape=b.shape)
            for at in (0, 1)
        )
        codes = b.like("Add", low, b.like("Mul", high, b.const(16.0, T.FLOAT)))
    return b.op("Cast", codes, to=int(T.UINT8), dtype=T.UINT8, shape=b.shape)


def _encode(b: Builder, format: Format, ratio: ir.Value) -> ir.Value:
    """Codes of the nearest values of the grid, ties to the even code, as FLOAT."""
    negative = b.op("Less", ratio, b.const(0.0, T.FLOAT), dtype=T.BOOL, shape=ratio.shape)
    limit = b.const(format.max, T.FLOAT)
    if isinstance(format, IntFormat) and format.signed:  # two's complement; what rounds to 0 is 0 and not 2^bits
        whole = b.like("Clip", b.like("Round", ratio), b.const(-format.max, T.FLOAT), limit)
        below = b.op("Less", whole, b.const(0.0, T.FLOAT), dtype=T.BOOL, shape=ratio.shape)
        wrapped = b.like("Add", whole, b.const(float(2**format.bits), T.FLOAT))
        return b.op("Where", below, wrapped, whole, dtype=T.FLOAT, shape=ratio.shape)
    plain = isinstance(format, FloatFormat) and isinstance(format.bias, int) and format.mbits > 0
    if not isinstance(format, FloatFormat) or not plain or not (format.specials == "none" or str(format) in _WITH_NAN):
        raise UnsupportedError(
            f"a KV cache in {format}; this exporter has int<N>, e4m3, e5m2 and floats with a mantissa and without NaN"
        )
    magnitude = b.like("Min", b.like("Abs", ratio), limit)
    borders = [2 * format.min_normal]
    while borders[-1] * 2 <= format.max:
        borders.append(borders[-1] * 2)
    shape = [*dims(ratio), len(borders)]
    begun = b.op("GreaterOrEqual", b.unsqueeze(magnitude, -1), b.const(borders, T.FLOAT), dtype=T.BOOL, shape=shape)
    binade = b.op("ReduceSum", b.cast(begun, T.FLOAT), b.axes(-1), keepdims=0, dtype=T.FLOAT, shape=ratio.shape)
    steps = b.const(format.smallest * 2.0 ** np.arange(len(borders) + 1), T.FLOAT)
    step = b.op("Gather", steps, b.cast(binade, T.INT32), axis=0, dtype=T.FLOAT, shape=ratio.shape)
    code = b.like("Round", b.like("Div", magnitude, step))
    code = b.like("Add", code, b.like("Mul", binade, b.const(float(2**format.mbits), T.FLOAT)))
    sign = b.like("Mul", b.cast(negative, T.FLOAT), b.const(float(2 ** (format.bits - 1)), T.FLOAT))
    return b.like("Add", code, sign)


def dequantize_kv(
    b: Builder, codes: ir.Value, scale: ir.Value, spec: str, width: int, *, dtype: torch.dtype | None = None
) -> ir.Value:
    parsed = parse_spec(spec)
    table = parsed.format.table().float().numpy()
    bytes_ = np.arange(256)
    index = b.cast(codes, T.INT32)
    if two_a_byte(parsed, width):
        pairs = b.const(
            np.stack([table[bytes_ & 15 & len(table) - 1], table[bytes_ >> 4 & len(table) - 1]], 1), T.FLOAT
        )
        found = b.op("Gather", pairs, index, axis=0, dtype=T.FLOAT, shape=[*dims(codes), 2])
        values = b.op("Reshape", found, b.const([0, 0, 0, width]), dtype=T.FLOAT, shape=b.shape)
    else:
        values = b.op("Gather", b.const(table, T.FLOAT), index, axis=0, dtype=T.FLOAT, shape=b.shape)
    return b.cast(b.like("Mul", values, b.cast(scale, T.FLOAT)), b.dtype)


_WITH_NAN = ("e4m3", "e5m2")
"""Formats with NaN whose finite codes are those of the formula."""

KV: dict[Any, Converter] = rows(
    (kv_scale, (ops.kv_scale.default,)),
    (quantize_kv, (ops.quantize_kv.default,)),
    (dequantize_kv, (ops.dequantize_kv.default,)),
)
