"""What rounding activations to a grid is in standard operators, bit for bit as ``qtensor.fake_quantize`` does it.

::

    FakeQuantizeDynamic_<format>[_<scale kind>](x)           scales of the last axis: a token's, or a group's
    FakeQuantize_<format>(x, scale[, zero_point])            one scale that is given
    FakeQuantizeEach_<format>(x, scale[, zero_point])        scales that are given, as they broadcast over x
    FakeQuantizeEach_<format>_e4m3(x, scale, tensor_scale)   NVFP4

A row of x is what shares a scale. ``found_scale`` finds it, ``rounded`` the nearest value of a grid, by the first of:

    a Cast            E4M3, E5M2 and their fnuz forms, up to opset 25 (onnxruntime's Cast to FP8 is scalar code)
    Round             integers
    binary search     tables, and exponent biases that are not whole
    compared          formats without mantissa: a Where for each boundary
    |x| + c - c       other floats: c is 2^23 steps of the binade of x, from the bits of x (BitCast, opset 26);
                      before opset 26 steps are counted by Round, a Where for each binade
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_bodies import Body
from fxquant.codegen.onnx_builder import Builder, T
from fxquant.formats import Format, IntFormat
from fxquant.grids import CodebookFormat, FloatFormat, midpoints
from fxquant.scheme import SCALES

CASTS = {
    "e4m3": T.FLOAT8E4M3FN, "e5m2": T.FLOAT8E5M2, "e4m3fnuz": T.FLOAT8E4M3FNUZ, "e5m2fnuz": T.FLOAT8E5M2FNUZ,
}  # fmt: skip
"""Formats that the runtime rounds to with a Cast: every tie and every saturation as ours."""
_TINY = {"fp32": T.FLOAT, "fp16": T.FLOAT16, "bf16": T.BFLOAT16}
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_LOWEST = -149
"""Exponent of the smallest float32."""


# --- bodies ---------------------------------------------------------------------------------------------------------
def fake_quantize_dynamic(f: Body, x: ir.Value) -> ir.Value:
    """x rounded with scales found from its last axis."""
    f.step("round")
    wide = f.op("Cast", x, to=int(T.FLOAT), dtype=T.FLOAT)
    kind = f.operator
    if isinstance(f.format, IntFormat) and not f.format.signed:
        return f.op("CastLike", _with_zero_point(f, wide), x)
    if kind.scale == "e4m3":
        return f.op("CastLike", _under_tensor_scale(f, wide, *_e4m3_scales(f, wide)), x)
    f.step("scale")
    scale = found_scale(f, wide, f.format, kind.scale, kind.rounding)
    f.step("round")
    return f.op("CastLike", restored(f, wide, scale, f.format), x)


def fake_quantize(f: Body, x: ir.Value, scale: ir.Value, *above: ir.Value) -> ir.Value:
    """x rounded with given scales; ``above`` is a zero point (UINT), or the scale of the scales (NVFP4)."""
    f.step("round")
    wide = f.op("Cast", x, to=int(T.FLOAT), dtype=T.FLOAT)
    if f.operator.scale == "e4m3":
        return f.op("CastLike", _under_tensor_scale(f, wide, scale, above[0]), x)
    if above:
        zero = f.op("Cast", above[0], to=int(T.FLOAT), dtype=T.FLOAT)
        return f.op("CastLike", _around(f, wide, scale, zero), x)
    return f.op("CastLike", restored(f, wide, scale, f.format), x)


def restored(f: Builder, x: ir.Value, scale: ir.Value, format: Format) -> ir.Value:
    """x (FLOAT) rounded to multiples of the grid's values by ``scale``."""
    return f.op("Mul", rounded(f, f.op("Div", x, scale, shape=x.shape), format), scale, shape=x.shape)


def _under_tensor_scale(f: Body, x: ir.Value, scale: ir.Value, outer: ir.Value) -> ir.Value:
    """x times (1 / outer) / scale, as the tools of NVFP4 have it; back, times the product of scale and outer."""
    inverse = f.op("Div", f.op("Reciprocal", outer), scale)
    return f.op("Mul", rounded(f, f.op("Mul", x, inverse), f.format), f.op("Mul", scale, outer))


def _with_zero_point(f: Body, x: ir.Value) -> ir.Value:
    """scale = (high - low) / (2^bits - 1), zero_point = round(-low / scale); the range is widened to hold 0."""
    zero, limit = f.const(0.0, T.FLOAT), f.const(f.format.max, T.FLOAT)
    low = f.op("Min", f.op("ReduceMin", x, f.axes(-1), keepdims=1), zero)
    high = f.op("Max", f.op("ReduceMax", x, f.axes(-1), keepdims=1), zero)
    scale = _stored(f, f.op("Div", f.op("Sub", high, low), limit), f.operator.scale)
    point = f.op("Clip", f.op("Round", f.op("Div", f.op("Neg", low), scale)), zero, limit)
    return _around(f, x, scale, point)


def _around(f: Body, x: ir.Value, scale: ir.Value, zero_point: ir.Value) -> ir.Value:
    code = f.op("Add", f.op("Round", f.op("Div", x, scale)), zero_point)
    code = f.op("Clip", code, f.const(0.0, T.FLOAT), f.const(f.format.max, T.FLOAT))
    return f.op("Mul", f.op("Sub", code, zero_point), scale)


# --- scales ---------------------------------------------------------------------------------------------------------
def found_scale(f: Builder, x: ir.Value, format: Format, kind: str, rounding: str) -> ir.Value:
    """The scale of every row of x (FLOAT), ``[..., 1]``, as ``scales.choose`` finds it, already decoded."""
    absmax = f.op("ReduceMax", f.op("Abs", x, dtype=T.FLOAT), f.axes(-1), keepdims=1, dtype=T.FLOAT)
    if isinstance(format, CodebookFormat) and format.unit == "rms":
        mean = f.op("ReduceMean", f.op("Mul", x, x), f.axes(-1), keepdims=1, dtype=T.FLOAT)
        ideal = f.op("Sqrt", mean, dtype=T.FLOAT)
    else:
        ideal = f.op("Div", absmax, f.const(format.max, T.FLOAT), dtype=T.FLOAT)
    if not SCALES[kind].roundings:
        return _stored(f, ideal, kind)
    zero_block = 2.0**-127 if kind == "e8m0" else 1.0
    if rounding == "mse":
        return _better_power(f, x, absmax, ideal, format, zero_block)
    if kind == "e8m0" and rounding in ("floor", "even"):
        top = math.frexp(format.max)[1] - 1
        return _power(f, absmax, absmax, rounding, zero_block, format=format, lower=top)
    return _power(f, ideal, absmax, rounding, zero_block, format=format)


def _stored(f: Builder, ideal: ir.Value, kind: str) -> ir.Value:
    """``ideal`` rounded to how scales are stored, at least the smallest one; 1 where it is 0."""
    if kind == "e5m3":
        grid = SCALES[kind].format
        assert grid is not None
        scale = f.op("Max", rounded(f, ideal, grid), f.const(grid.smallest, T.FLOAT), dtype=T.FLOAT)
    else:
        scale = ideal
        if kind != "fp32":
            narrow = f.op("Cast", ideal, to=int(_TINY[kind]), dtype=_TINY[kind])
            scale = f.op("Cast", narrow, to=int(T.FLOAT), dtype=T.FLOAT)
        tiny = torch.finfo({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]).tiny
        scale = f.op("Max", scale, f.const(tiny, T.FLOAT), dtype=T.FLOAT)
    return _or_one(f, scale, ideal)


def _or_one(f: Builder, scale: ir.Value, ideal: ir.Value) -> ir.Value:
    """``scale``, and 1 for rows of zeros."""
    zero = f.op("Equal", ideal, f.const(0.0, T.FLOAT), dtype=T.BOOL)
    return f.op("Where", zero, f.const(1.0, T.FLOAT), scale, dtype=T.FLOAT)


def _e4m3_scales(f: Body, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """NVFP4: outer = absmax(x) / (448 * max), scale = E4M3(ideal / outer), at least 2^-6."""
    grid = SCALES["e4m3"].format
    assert grid is not None
    absmax = f.op("ReduceMax", f.op("Abs", x), f.axes(-1), keepdims=1, dtype=T.FLOAT)
    ideal = f.op("Div", absmax, f.const(f.format.max, T.FLOAT), dtype=T.FLOAT)
    largest = f.op("ReduceMax", ideal, keepdims=0, dtype=T.FLOAT)
    outer = f.op("Div", largest, f.const(grid.max, T.FLOAT), dtype=T.FLOAT)
    if f.operator.rounding == "ceil":
        outer = _power(f, outer, largest, "ceil", 1.0, format=f.format)
    outer = _or_one(f, outer, largest)
    ratio = f.op("Clip", f.op("Div", ideal, outer), f.const(2.0**-6, T.FLOAT), f.const(grid.max, T.FLOAT))
    return rounded(f, ratio, grid), outer


def _better_power(
    f: Builder, x: ir.Value, absmax: ir.Value, ideal: ir.Value, format: Format, zero_block: float
) -> ir.Value:
    """Of the two powers of two around ``ideal`` the one with the smaller squared error, the lower one of equals."""
    scales, errors = [], []
    for up in (0, 1):
        scale = _power(f, ideal, absmax, "floor", zero_block, format=format, lower=-up)
        off = f.op("Sub", x, restored(f, x, scale, format), dtype=T.FLOAT)
        scales.append(scale)
        errors.append(f.op("ReduceSum", f.op("Mul", off, off), f.axes(-1), keepdims=1, dtype=T.FLOAT))
    better = f.op("Less", errors[1], errors[0], dtype=T.BOOL)
    return f.op("Where", better, scales[1], scales[0], dtype=T.FLOAT)


def _power(
    f: Builder, value: ir.Value, absmax: ir.Value, rounding: str, zero_block: float, *, format: Format, lower: int = 0
) -> ir.Value:
    """2^(rounding of log2 value, less ``lower``), of exponents -127..127; NaN where absmax is not finite.

    k = floor(log2 value) is guessed by a logarithm and put right by comparing with 2^k and 2^(k + 1), so it is exact.
    """
    finite = f.op("Less", absmax, f.const(math.inf, T.FLOAT), dtype=T.BOOL)
    some = f.op("Greater", value, f.const(0.0, T.FLOAT), dtype=T.BOOL)
    y = f.op("Where", f.op("And", finite, some, dtype=T.BOOL), value, f.const(1.0, T.FLOAT), dtype=T.FLOAT)
    low, high = f.const(_LOWEST, T.FLOAT), f.const(127, T.FLOAT)
    guess = f.op("Mul", f.op("Log", y, dtype=T.FLOAT), f.const(1 / math.log(2), T.FLOAT))
    k = f.op("Clip", f.op("Floor", guess), low, high, dtype=T.FLOAT)
    k = f.op("Sub", k, _number(f, f.op("Greater", _two_to(f, k), y, dtype=T.BOOL)))
    below = _two_to(f, k)
    k = f.op("Add", k, _number(f, f.op("LessOrEqual", f.op("Add", below, below), y, dtype=T.BOOL)))
    below = _two_to(f, k)
    if rounding == "ceil":
        k = f.op("Add", k, _number(f, f.op("Less", below, y, dtype=T.BOOL)))
    elif rounding in ("round", "even"):
        mantissa = f.op("Div", y, below, dtype=T.FLOAT)  # in [1, 2)
        if rounding == "round":
            limit = 2 * float(np.float32(math.sqrt(0.5)))
        else:
            mbits = format.mbits if isinstance(format, FloatFormat) else format.bits - 2
            limit = 2 - 2.0 ** -(mbits + 1)
        k = f.op("Add", k, _number(f, f.op("GreaterOrEqual", mantissa, f.const(limit, T.FLOAT), dtype=T.BOOL)))
    exponent = f.op("Clip", f.op("Sub", k, f.const(lower, T.FLOAT)), f.const(-127, T.FLOAT), high, dtype=T.FLOAT)
    empty = f.op("Equal", absmax, f.const(0.0, T.FLOAT), dtype=T.BOOL)
    scale = f.op("Where", empty, f.const(zero_block, T.FLOAT), _two_to(f, exponent), dtype=T.FLOAT)
    return f.op("Where", finite, scale, f.const(math.nan, T.FLOAT), dtype=T.FLOAT)


def _number(f: Builder, condition: ir.Value) -> ir.Value:
    return f.op("Cast", condition, to=int(T.FLOAT), dtype=T.FLOAT)


def _two_to(f: Builder, exponent: ir.Value) -> ir.Value:
    """2^exponent, exact, of whole exponents from -149 to 127: looked up."""
    table = np.ldexp(np.float64(1), np.arange(_LOWEST, 128)).astype(np.float32)
    at = f.op("Sub", exponent, f.const(_LOWEST, T.FLOAT))
    return f.op("Gather", f.const(table, T.FLOAT), f.op("Cast", at, to=int(T.INT64), dtype=T.INT64), dtype=T.FLOAT)


# --- the nearest value ----------------------------------------------------------------------------------------------
def rounded(f: Builder, ratio: ir.Value, format: Format) -> ir.Value:
    """The nearest values of the grid, ties to the even code, saturating."""
    limit = f.const(format.max, T.FLOAT)
    if str(format) in CASTS and f.opset < 26:
        code = f.op("Cast", ratio, to=int(CASTS[str(format)]), dtype=CASTS[str(format)])
        return f.op("Cast", code, to=int(T.FLOAT), dtype=T.FLOAT)
    if isinstance(format, IntFormat):
        return f.op("Clip", f.op("Round", ratio), f.const(-format.max, T.FLOAT), limit, dtype=T.FLOAT)
    if not isinstance(format, FloatFormat) or not isinstance(format.bias, int):
        return _searched(f, ratio, format)
    if not format.signed:
        ratio = f.op("Max", ratio, f.const(0.0, T.FLOAT), dtype=T.FLOAT)
    magnitude = f.op("Min", f.op("Abs", ratio), limit, dtype=T.FLOAT)
    if format.mbits == 0:
        found = _nearest_power(f, format, magnitude)
    else:
        found = _by_bits(f, format, magnitude) if f.opset >= 26 else _by_steps(f, format, magnitude)
    return f.op("Mul", found, f.op("Sign", ratio), dtype=T.FLOAT) if format.signed else found


def _by_bits(f: Builder, format: FloatFormat, magnitude: ir.Value) -> ir.Value:
    """|x| + c - c, where c is 2^23 steps of the binade that |x| lies in: adding it rounds to a step, ties to even.

    ::

        bits of |x|   0 eeeeeeee mmm...       & 0x7F800000, at least those of the smallest normal, + (23 - M) << 23
        bits of c     0 eeeeeeee 000...
    """
    up, lowest = 23 - format.mbits, (128 - int(format.bias)) << 23
    bits = f.op("BitCast", magnitude, to=int(T.INT32), dtype=T.INT32)
    binade = f.op("BitwiseAnd", bits, f.const(0x7F800000, T.INT32), dtype=T.INT32)
    binade = f.op("Max", binade, f.const(lowest, T.INT32), dtype=T.INT32)
    c = f.op("BitCast", f.op("Add", binade, f.const(up << 23, T.INT32)), to=int(T.FLOAT), dtype=T.FLOAT)
    return f.op("Sub", f.op("Add", magnitude, c), c, dtype=T.FLOAT)


def _by_steps(f: Builder, format: FloatFormat, magnitude: ir.Value) -> ir.Value:
    """Steps of the binade that |x| lies in, counted by Round; a Where for each binade."""
    step, binade = f.const(format.smallest, T.FLOAT), 2 * format.min_normal
    while binade <= format.max:
        inside = f.op("Less", magnitude, f.const(binade, T.FLOAT), dtype=T.BOOL)
        step = f.op("Where", inside, step, f.const(binade * 2.0**-format.mbits, T.FLOAT), dtype=T.FLOAT)
        binade *= 2
    return f.op("Mul", f.op("Round", f.op("Div", magnitude, step)), step, dtype=T.FLOAT)


def _nearest_power(f: Builder, format: FloatFormat, magnitude: ir.Value) -> ir.Value:
    """The same without a mantissa: one Where for each boundary between two magnitudes, ties to the even code."""
    grid = format.table()[: format.magnitudes]
    grid = grid[grid.isfinite()]
    even = torch.arange(1, len(grid)) % 2 == 0
    found = f.const(0.0, T.FLOAT)
    for boundary, value in zip(
        midpoints(grid, upper_wins_tie=even, dtype=torch.float32).tolist(), grid[1:].tolist(), strict=True
    ):
        above = f.op("Greater", magnitude, f.const(boundary, T.FLOAT), dtype=T.BOOL)
        found = f.op("Where", above, f.const(value, T.FLOAT), found, dtype=T.FLOAT)
    return found


def _searched(f: Builder, ratio: ir.Value, format: Format) -> ir.Value:
    """Binary search of ratio among the boundaries between the values of a table, log2 of their number steps."""
    boundaries, values = sorted_values(format)
    size = 1 << (len(values) - 1).bit_length()
    bounds = np.concatenate([boundaries, np.full(size - len(boundaries), np.inf, dtype=np.float32)])
    table = f.const(bounds, T.FLOAT)
    at, step = f.const(0, T.INT32), size // 2
    while step:
        above = f.op("Greater", ratio, f.op("Gather", table, f.op("Add", at, f.const(step - 1, T.INT32))), dtype=T.BOOL)
        move = f.op("Mul", f.op("Cast", above, to=int(T.INT32), dtype=T.INT32), f.const(step, T.INT32))
        at, step = f.op("Add", at, move, dtype=T.INT32), step // 2
    found = f.op("Gather", f.const(values, T.FLOAT), at, dtype=T.FLOAT)
    # a NaN is greater than nothing, so it would become the lowest value
    return f.op("Where", f.op("IsNaN", ratio, dtype=T.BOOL), ratio, found, dtype=T.FLOAT)


def sorted_values(format: Format) -> tuple[Floats, Floats]:
    """Boundaries ``[n - 1]`` between the increasing finite values ``[n]`` of a format, float32: x above boundary i is
    nearer to value i + 1. As ``grids`` has them for tables, and by magnitude for floats."""
    if isinstance(format, FloatFormat):
        grid = format.table()[: format.magnitudes]
        grid = grid[grid.isfinite()]
        even = torch.arange(1, len(grid)) % 2 == 0
        up = midpoints(grid, upper_wins_tie=even, dtype=torch.float32)
        down = -torch.nextafter(up, torch.full_like(up, torch.inf))  # -x at or above this one goes to the lower one
        return torch.cat([down.flip(0), up]).numpy(), torch.cat([-grid[1:].flip(0), grid]).float().numpy()
    table = format.table()
    finite = table.isfinite().nonzero().squeeze(1)
    values, order = table[finite].sort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    grid, codes = values[first], finite[order][first]
    wins = (codes[1:] % 2 == 0) & (codes[:-1] % 2 == 1)
    return midpoints(grid, upper_wins_tie=wins, dtype=torch.float32).numpy(), grid.float().numpy()
