"""The ``fxquant`` domain of an exported model: one node an operator, and what it means in standard operators.

Every operator on packed weights is a single node, so that a native library can take it over, and a model-local
function of the same name, so that any ONNX runtime executes the file as it is::

    Linear_<format>(x, packed, scale[, zero_point])             x @ W^T               cols, group_size
    LinearBias_<format>(x, packed, scale[, zero_point], bias)   x @ W^T + bias        cols, group_size
    Conv2d_<format>(x, packed, scale[, zero_point][, bias])     convolution with W    + weight_shape, strides, ...
    Embedding_<format>(indices, packed, scale[, zero_point])    rows of W             cols, group_size
    Dequantize_<format>(packed, scale[, zero_point])            W                     + weight_shape
    FakeQuantizeDynamic_<format>(x)                             x rounded row by row
    DequantizeCodes_<format>(codes, scale[, zero_point])        W from unpacked codes + weight_shape

``packed`` are the planar bytes of ``packing``, ``cols`` the columns of the matrix view, ``group_size`` how many of
them share a scale; formats with a zero point take one. The bodies are exact: values equal ``qtensor.dequantize``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import Arg, Builder, T, UnsupportedError, dims, rank
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.formats import Format, IntFormat
from fxquant.grids import FloatFormat, midpoints
from fxquant.ops import matrix_shape
from fxquant.ops import operators as ops
from fxquant.packing import planes
from fxquant.qtensor import load_scale
from fxquant.scales import Scales, power_of_two
from fxquant.scheme import PerGroup, PerTensor, QuantSpec, parse_spec

DOMAIN, VERSION = "fxquant", 1

_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS
_MATRIX = {"cols": _INT, "group_size": _INT}
_SHAPED = {**_MATRIX, "weight_shape": _INTS}
_WINDOW = {"strides": _INTS, "pads": _INTS, "dilations": _INTS, "group": _INT}

Weight = Sequence[ir.Value]
"""packed (or codes), scale, and a zero point where the format has one."""


# --- function bodies ------------------------------------------------------------------------------------------------
class Body(Builder):
    """The body of one function under construction. ``needs`` is what the model's nodes ask of it::

    grouped   a row has several scales            ragged   rows do not fill bytes of every plane, or groups
    cast      x is not float32                    scale    scales are not float32
    """

    def __init__(self, format: Format, needs: frozenset[str], opset: int) -> None:
        super().__init__(opset)
        self.format, self.needs = format, needs

    def attribute(self, name: str) -> ir.Value:
        """The function's INT (INTS) attribute as a rank 0 (rank 1) constant."""
        if name not in self.memo:
            kind = {**_SHAPED, **_WINDOW}[name]
            field = "value_int" if kind == _INT else "value_ints"
            self.memo[name] = self.op("Constant", dtype=T.INT64, **{field: ir.RefAttr(field, name, kind)})
        return self.memo[name]


def pair_table(format: Format) -> np.ndarray[Any, Any]:
    """Values of all codes whose low planes share one byte: float32 ``[2**(codes * bits), codes]``.

    A byte of the first plane holds the low ``width`` bits of ``codes = 8 / width`` codes; the other planes' bits for
    the same codes are put above it, plane by plane::

        6 bits, planes 4 + 2:   index = | h1 h0 | l1 l1 l1 l1 l0 l0 l0 l0 |      code_i = h_i l_i
    """
    widths = planes(format.bits)
    count = 8 // widths[0]
    index = np.arange(2 ** (count * format.bits))
    codes = np.zeros((len(index), count), dtype=np.int64)
    at, low = 0, 0
    for width in widths:
        for i in range(count):
            codes[:, i] |= (index >> (at + i * width) & (2**width - 1)) << low
        at, low = at + count * width, low + width
    return np.asarray(format.table().numpy()[codes], dtype=np.float32)


def high_table(width: int, *, codes: int, at: int) -> np.ndarray[Any, Any]:
    """What a byte of an upper plane adds to the index of each unit of ``codes`` codes: int32 ``[256, units]``."""
    units = 8 // (codes * width)
    shifts = np.arange(units) * codes * width
    pieces = (np.arange(256)[:, None] >> shifts) & (2 ** (codes * width) - 1)
    return np.asarray(pieces << at, dtype=np.int32)


def decode(f: Body, packed: ir.Value, *, width: ir.Value) -> ir.Value:
    """Values FLOAT of planar bytes, in the shape ``width``: a table look-up for each byte of the first plane.

    Rows have the columns that their bytes hold, which may be a few more than ``cols``.
    """
    widths = planes(f.format.bits)
    codes = 8 // widths[0]
    parts: tuple[ir.Value, ...] = (packed,)
    if len(widths) > 1:  # ceil(cols * width / 8) bytes a plane
        sizes = f.op("Div", f.op("Add", f.op("Mul", f.attribute("cols"), f.const(widths)), f.const(7)), f.const(8))
        parts = f.multi(len(widths), "Split", packed, sizes, axis=1)
    index, at = f.cast(parts[0], T.INT32), 8
    for plane_width, plane in zip(widths[1:], parts[1:], strict=True):
        table = f.const(high_table(plane_width, codes=codes, at=at), T.INT32)
        high = f.op("Reshape", f.op("Gather", table, f.cast(plane, T.INT32), axis=0, dtype=T.INT32), f.axes(0, -1))
        if "ragged" in f.needs:
            units = f.op("Div", f.op("Add", f.attribute("cols"), f.const([codes - 1])), f.const([codes]))
            high = f.op("Slice", high, f.axes(0), units, f.axes(1))
        index, at = f.op("Add", index, high, dtype=T.INT32), at + codes * plane_width
    return f.op("Reshape", f.op("Gather", f.const(pair_table(f.format), T.FLOAT), index, axis=0), width)


def apply_scale(f: Body, values: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    """(values - zero_point) * scale, each spread over the last dimension of ``values``."""
    if zero_point is not None:
        values = f.op("Sub", values, _spread(f, f.op("Cast", zero_point, to=int(T.FLOAT))))
    return f.op("Mul", values, _spread(f, f.op("Cast", scale, to=int(T.FLOAT)) if "scale" in f.needs else scale))


def _spread(f: Body, scale: ir.Value) -> ir.Value:
    return f.op("Unsqueeze", scale, f.axes(2)) if "grouped" in f.needs else scale


def matrix(f: Body, weight: Weight, *, packed: bool = True) -> ir.Value:
    """The weight FLOAT ``[rows, cols]``. Groups are seen as ``[rows, groups, group_size]``, ragged rows filled."""
    cols, flat = f.attribute("cols"), f.axes(0, -1)
    shape = flat
    if "grouped" in f.needs:
        shape = f.op("Concat", flat, f.op("Reshape", f.attribute("group_size"), f.axes(1)), axis=0)
    ragged = "ragged" in f.needs
    read = decode if packed else look_up
    values = read(f, weight[0], width=flat if ragged else shape)
    if ragged and "grouped" in f.needs:
        values = f.op("Reshape", _fill_groups(f, values), shape)
    elif ragged:
        values = f.op("Slice", values, f.axes(0), f.op("Reshape", cols, f.axes(1)), f.axes(1))
    values = apply_scale(f, values, weight[1], weight[2] if len(weight) > 2 else None)
    if "grouped" in f.needs:
        values = f.op("Reshape", values, flat)
        return f.op("Slice", values, f.axes(0), f.op("Reshape", cols, f.axes(1)), f.axes(1)) if ragged else values
    return values


def _fill_groups(f: Body, values: ir.Value) -> ir.Value:
    """Rows cut or filled with zeros to ``ceil(cols / group_size)`` whole groups."""
    cols, group = f.attribute("cols"), f.attribute("group_size")
    groups = f.op("Div", f.op("Add", cols, f.op("Sub", group, f.const(1))), group)
    missing = f.op("Sub", f.op("Mul", groups, group), f.op("Shape", values, start=1, end=2, dtype=T.INT64))
    return f.op("Pad", values, f.op("Concat", f.axes(0), missing, axis=0), None, f.axes(1))


def look_up(f: Body, codes: ir.Value, *, width: ir.Value) -> ir.Value:
    """Values of unpacked codes."""
    table = f.const(f.format.table().numpy(), T.FLOAT)
    return f.op("Reshape", f.op("Gather", table, f.op("Cast", codes, to=int(T.INT32), dtype=T.INT32)), width)


def _like(f: Body, weight: ir.Value, x: ir.Value) -> ir.Value:
    return f.op("CastLike", weight, x) if "cast" in f.needs else weight


def _linear(f: Body, x: ir.Value, *weight: ir.Value) -> ir.Value:
    return f.op("MatMul", x, f.op("Transpose", _like(f, matrix(f, weight), x), perm=[1, 0]))


def _linear_bias(f: Body, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    return f.op("Add", _linear(f, x, *weight_and_bias[:-1]), weight_and_bias[-1])


def _conv2d(f: Body, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    kernel = _like(f, _dequantize(f, *weight_and_bias[:-1]), x)
    window = {key: ir.RefAttr(key, key, kind) for key, kind in _WINDOW.items()}
    return f.op("Conv", x, kernel, weight_and_bias[-1], **window)


def _dequantize(f: Body, *weight: ir.Value) -> ir.Value:
    return f.op("Reshape", matrix(f, weight), f.attribute("weight_shape"))


def _dequantize_codes(f: Body, *weight: ir.Value) -> ir.Value:
    return f.op("Reshape", matrix(f, weight, packed=False), f.attribute("weight_shape"))


def _embedding(f: Body, indices: ir.Value, packed: ir.Value, *scales: ir.Value) -> ir.Value:
    """Only the rows that are asked for are decoded; one scale for the whole tensor is repeated for every row."""
    flat = f.op("Reshape", indices, f.axes(-1))
    every = f.op("Concat", f.op("Shape", packed, start=0, end=1), f.axes(1), axis=0)
    chosen = [f.op("Gather", f.op("Expand", s, every), flat, axis=0) for s in scales]
    values = matrix(f, [f.op("Gather", packed, flat, axis=0), *chosen])
    shape = f.op("Concat", f.op("Shape", indices), f.op("Reshape", f.attribute("cols"), f.axes(1)), axis=0)
    return f.op("Reshape", values, shape)


_CASTS = {"e4m3": T.FLOAT8E4M3FN, "e5m2": T.FLOAT8E5M2}
"""Formats that the runtime rounds to with a Cast."""


def _fake_quantize_dynamic(f: Body, x: ir.Value) -> ir.Value:
    """x rounded with the scale absmax / max of its last axis."""
    wide = f.op("Cast", x, to=int(T.FLOAT), dtype=T.FLOAT)
    absmax = f.op("ReduceMax", f.op("Abs", wide), f.axes(-1), keepdims=1)
    ideal = f.op("Div", absmax, f.const(f.format.max, T.FLOAT))
    scale = f.op("Where", f.op("Equal", ideal, f.const(0.0, T.FLOAT)), f.const(1.0, T.FLOAT), ideal)
    return f.op("CastLike", f.op("Mul", _rounded(f, f.op("Div", wide, scale)), scale), x)


def _fake_quantize(f: Body, x: ir.Value, scale: ir.Value) -> ir.Value:
    """x rounded with a given scale."""
    wide = f.op("Cast", x, to=int(T.FLOAT), dtype=T.FLOAT)
    return f.op("CastLike", f.op("Mul", _rounded(f, f.op("Div", wide, scale)), scale), x)


def _rounded(f: Body, ratio: ir.Value) -> ir.Value:
    """The nearest values of the grid, saturating. A Cast does it where the runtime has the format, Round and Clip for
    integers; else Round counts steps of the binade that ratio lies in, a Where for each binade."""
    format, limit = f.format, f.const(f.format.max, T.FLOAT)
    if str(format) in _CASTS:
        code = f.op("Cast", ratio, to=int(_CASTS[str(format)]), dtype=_CASTS[str(format)])
        return f.op("Cast", code, to=int(T.FLOAT), dtype=T.FLOAT)
    if not isinstance(format, FloatFormat):
        return f.op("Clip", f.op("Round", ratio), f.const(-format.max, T.FLOAT), limit)
    magnitude = f.op("Min", f.op("Abs", ratio), limit)
    if format.mbits == 0:
        return f.op("Mul", _nearest_power(f, format, magnitude), f.op("Sign", ratio))
    step, binade = f.const(format.smallest, T.FLOAT), 2 * format.min_normal
    while binade <= format.max:
        inside = f.op("Less", magnitude, f.const(binade, T.FLOAT))
        step = f.op("Where", inside, step, f.const(binade * 2.0**-format.mbits, T.FLOAT))
        binade *= 2
    return f.op("Mul", f.op("Mul", f.op("Round", f.op("Div", magnitude, step)), step), f.op("Sign", ratio))


def _nearest_power(f: Body, format: FloatFormat, magnitude: ir.Value) -> ir.Value:
    """The same without a mantissa: one Where for each boundary between two magnitudes, ties to the even code."""
    grid = format.table()[: format.magnitudes]
    grid = grid[grid.isfinite()]
    even = torch.arange(1, len(grid)) % 2 == 0
    found = f.const(0.0, T.FLOAT)
    for boundary, value in zip(
        midpoints(grid, upper_wins_tie=even, dtype=torch.float32).tolist(), grid[1:].tolist(), strict=True
    ):
        above = f.op("Greater", magnitude, f.const(boundary, T.FLOAT))
        found = f.op("Where", above, f.const(value, T.FLOAT), found)
    return found


_BODIES: dict[str, tuple[Callable[..., ir.Value], tuple[str, ...], dict[str, ir.AttributeType]]] = {
    "Linear": (_linear, ("x", "packed", "scale", "zero_point"), _MATRIX),
    "LinearBias": (_linear_bias, ("x", "packed", "scale", "zero_point", "bias"), _MATRIX),
    "Conv2d": (_conv2d, ("x", "packed", "scale", "zero_point", "bias"), {**_SHAPED, **_WINDOW}),
    "Embedding": (_embedding, ("indices", "packed", "scale", "zero_point"), _MATRIX),
    "Dequantize": (_dequantize, ("packed", "scale", "zero_point"), _SHAPED),
    "DequantizeCodes": (_dequantize_codes, ("codes", "scale", "zero_point"), _SHAPED),
    "FakeQuantizeDynamic": (_fake_quantize_dynamic, ("x",), {}),
    "FakeQuantize": (_fake_quantize, ("x", "scale"), {}),
}


_LAYERS = ("Linear", "LinearBias", "Conv2d")
"""Operators that compute in the dtype of x; the others give float32."""


def function(op: str, format: Format, needs: frozenset[str], opset: int) -> ir.Function:
    """The model-local function of operator ``op`` on ``format``, as simple as ``needs`` allows."""
    body, names, attributes = _BODIES[op]
    unsigned = isinstance(format, IntFormat) and not format.signed
    inputs = [ir.Value(name=n) for n in names if n != "zero_point" or unsigned]
    f = Body(format, needs, opset)
    out = body(f, *inputs)
    graph = ir.Graph(inputs, [out], nodes=f.nodes, opset_imports={"": opset}, name=op_type(op, format))
    declared = [ir.Attr(name, kind, None) for name, kind in attributes.items()]
    return ir.Function(DOMAIN, op_type(op, format), graph=graph, attributes=declared)


def functions(b: Builder) -> list[ir.Function]:
    """The functions of all operators that ``b`` has called."""
    return [function(op, format, needs, b.opset) for (op, format), needs in b.calls.items()]


def op_type(op: str, format: Format) -> str:
    """``Linear_e3m2``; n and p stand for the minus and the point of a bias, a checksum for the values of a table."""
    name = str(format)
    if name.startswith("lut("):
        return f"{op}_lut{format.bits}_{zlib.crc32(name.encode()):08x}"
    return f"{op}_{name.replace('-', 'n').replace('.', 'p')}"


# --- converters -----------------------------------------------------------------------------------------------------
def _call(
    b: Builder, op: str, spec: QuantSpec, inputs: Sequence[ir.Value | None], cols: int, **attributes: Any
) -> ir.Value:
    """The node of ``op``; what it asks of the operator's function is noted."""
    size = spec.group_size(cols)
    unit = 8 // min(planes(spec.format.bits))
    asks = {
        "grouped": size < cols,
        "ragged": bool(cols % unit or cols % size),
        "cast": op in _LAYERS and b.dtype != T.FLOAT,
        "scale": spec.scale == "fp16",
    }
    key = (op, spec.format)
    b.calls[key] = b.calls.get(key, frozenset()) | {name for name, asked in asks.items() if asked}
    name = op_type(op, spec.format)
    dtype = b.dtype if op in _LAYERS else T.FLOAT
    return b.op(name, *inputs, domain=DOMAIN, dtype=dtype, cols=cols, group_size=size, **attributes)


def _weight(
    b: Builder, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None, spec: str, outer: ir.Value | None
) -> list[ir.Value]:
    scale = _plain_scale(b, packed, scale, parse_spec(spec), outer)
    return [packed, scale] if zero_point is None else [packed, scale, zero_point]


def _plain_scale(b: Builder, packed: ir.Value, scale: ir.Value, spec: QuantSpec, outer: ir.Value | None) -> ir.Value:
    """Scales as the functions take them: floats of one row or a row each. Coded ones, those of blocks of rows and
    bfloat16 are decoded here, at export."""
    rows = packed.shape[0] if packed.shape is not None else None
    held = scale.shape[0] if scale.shape is not None else None
    if spec.kind.format is None and spec.scale != "bf16" and held in (1, rows):  # the runtime has no bfloat16 kernels
        return scale
    stored, above = (_constant_tensor(v) for v in (scale, outer))
    if stored is None or not isinstance(rows, int):
        raise UnsupportedError(f"scales of {spec} that are computed in the graph")
    wide = Scales(load_scale(stored, spec), None, above).effective
    if wide.shape[0] not in (1, rows):
        wide = wide.repeat_interleave(spec.block(rows, 1)[0], dim=0)[:rows]
    return b.const(wide.numpy(), T.FLOAT)


def _constant_tensor(value: ir.Value | None) -> torch.Tensor | None:
    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    return torch.from_numpy(array.astype(np.uint8 if array.dtype == np.uint8 else np.float32))


def _powers(exponent: ir.Value, sign: int) -> torch.Tensor:
    """2^(sign * exponent) of constant exponents, float32."""
    if exponent.const_value is None:
        raise UnsupportedError("exponent biases that are computed in the graph")
    exponents = torch.from_numpy(exponent.const_value.numpy().astype(np.int32))
    return power_of_two(exponents * sign)


def _cols(packed: ir.Value, shape: Sequence[int]) -> int:
    if packed.shape is None or not isinstance(rows := packed.shape[0], int):
        raise UnsupportedError("packed weights with a dynamic number of rows")
    return matrix_shape(shape, rows)[1]


def linear_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int], tensor_scale: ir.Value | None = None,
              exponent_bias: ir.Value | None = None) -> ir.Value:  # fmt: skip
    if exponent_bias is not None:  # x (W 2^-b)^T = (x 2^-b) W^T, exactly
        x = b.op("Mul", x, b.const(_powers(exponent_bias, -1).numpy(), b.dtype))
    inputs = [x, *_weight(b, packed, scale, zero_point, spec, tensor_scale)]
    if bias is None:
        return _call(b, "Linear", parse_spec(spec), inputs, _cols(packed, shape))
    return _call(b, "LinearBias", parse_spec(spec), [*inputs, bias], _cols(packed, shape))


def conv2d_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], groups: int, tensor_scale: ir.Value | None = None) -> ir.Value:  # fmt: skip
    pads = [*padding, *padding] if len(padding) == 2 else list(padding) * 4
    strides, dilations = list(stride) * (2 // len(stride)), list(dilation) * (2 // len(dilation))
    window = {"strides": strides, "pads": pads, "dilations": dilations, "group": groups, "weight_shape": list(shape)}
    inputs = [x, *_weight(b, packed, scale, zero_point, spec, tensor_scale), bias]
    return _call(b, "Conv2d", parse_spec(spec), inputs, _cols(packed, shape), **window)


def embedding_wq(b: Builder, indices: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
                 spec: str, shape: Sequence[int], tensor_scale: ir.Value | None = None, **_: Any,
                 ) -> ir.Value:  # fmt: skip
    inputs = [indices, *_weight(b, packed, scale, zero_point, spec, tensor_scale)]
    return b.cast(_call(b, "Embedding", parse_spec(spec), inputs, _cols(packed, shape)), b.dtype)


def _dequantized(op: str) -> Converter:
    def convert(
        b: Builder, packed: ir.Value, scale: Arg, zero_point: Arg, spec: str, shape: Sequence[int],
        tensor_scale: Arg = None, exponent_bias: Arg = None, **_: Any,
    ) -> ir.Value:  # fmt: skip
        inputs = _weight(b, packed, scale, zero_point, spec, tensor_scale)
        value = _call(b, op, parse_spec(spec), inputs, _cols(packed, shape), weight_shape=list(shape))
        if exponent_bias is not None:
            value = b.op("Mul", value, b.const(_powers(exponent_bias, -1).numpy(), T.FLOAT))
        return b.cast(value, b.dtype)

    return convert


def with_outliers(b: Builder, weight: ir.Value, index: ir.Value, values: ir.Value) -> ir.Value:
    """Scattered over the flattened weight."""
    shape = [int(d) for d in b.shape]
    flat = b.op("Reshape", weight, b.axes(-1), dtype=b.dtype, shape=[math.prod(shape)])
    given = b.cast(b.op("Reshape", values, b.axes(-1), dtype=values.dtype, shape=index.shape), b.dtype)
    return b.op("Reshape", b.op("ScatterElements", flat, index, given, axis=0, shape=flat.shape), b.const(shape))


def fake_quantize_dynamic(
    b: Builder, x: ir.Value, spec: str, exponent_bias: ir.Value | None = None, shifted: bool = False
) -> ir.Value:
    parsed = _activation_spec(spec)
    if not isinstance(parsed.granularity, PerGroup):
        return _shifted(b, x, exponent_bias, shifted, lambda y: _rounding(b, "FakeQuantizeDynamic", parsed, y))
    width, size = dims(x)[-1], parsed.granularity.size
    if not isinstance(width, int) or width % size:
        raise UnsupportedError(f"activations in {spec} with {width} channels, which are not whole groups")

    def by_group(y: ir.Value) -> ir.Value:
        split = b.op("Reshape", y, b.const([*[0] * (rank(x) - 1), width // size, size]), dtype=b.dtype,
                     shape=[*dims(x)[:-1], width // size, size])  # fmt: skip
        done = _rounding(b, "FakeQuantizeDynamic", parsed, split)
        return b.op("Reshape", done, b.const([*[0] * (rank(x) - 1), width]), dtype=b.dtype, shape=x.shape)

    return _shifted(b, x, exponent_bias, shifted, by_group)


def fake_quantize(
    b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, spec: str, tensor_scale: Arg = None,
    exponent_bias: ir.Value | None = None, shifted: bool = False,
) -> ir.Value:  # fmt: skip
    parsed = _activation_spec(spec)
    if not isinstance(parsed.granularity, PerTensor):
        raise UnsupportedError(f"activations in {spec} with scales that are given; this exporter has one a tensor")
    return _shifted(b, x, exponent_bias, shifted, lambda y: _rounding(b, "FakeQuantize", parsed, y, scale))


def _activation_spec(spec: str) -> QuantSpec:
    parsed = parse_spec(spec)
    format = parsed.format
    known = isinstance(format, FloatFormat) and isinstance(format.bias, int) and (
        format.specials == "none" or str(format) in _CASTS
    )  # fmt: skip
    if parsed.scale != "fp32" or not (known or (isinstance(format, IntFormat) and format.signed)):
        raise UnsupportedError(
            f"activations in {spec}; this exporter has e4m3, e5m2, floats without NaN and int<N>, with fp32 scales"
        )
    return parsed


def _rounding(b: Builder, op: str, spec: QuantSpec, x: ir.Value, *scale: ir.Value) -> ir.Value:
    b.calls[(op, spec.format)] = frozenset()
    return b.op(op_type(op, spec.format), x, *scale, domain=DOMAIN, dtype=b.dtype, shape=x.shape)


def _shifted(
    b: Builder, x: ir.Value, exponent_bias: ir.Value | None, shifted: bool, call: Callable[[ir.Value], ir.Value]
) -> ir.Value:
    """``call`` on x 2^bias; what it gives times 2^-bias, unless it is to stay ``shifted``."""
    if exponent_bias is None:
        return call(x)
    up, down = (b.const(_powers(exponent_bias, sign).numpy(), b.dtype) for sign in (1, -1))
    found = call(b.op("Mul", x, up))
    return found if shifted else b.op("Mul", found, down)


PACKED: dict[Any, Converter] = rows(
    (fake_quantize, (ops.fake_quantize.default,)),
    (fake_quantize_dynamic, (ops.fake_quantize_dynamic.default,)),
    (linear_wq, (ops.linear_wq.default,)),
    (conv2d_wq, (ops.conv2d_wq.default,)),
    (embedding_wq, (ops.embedding_wq.default,)),
    (with_outliers, (ops.with_outliers.default,)),
    (_dequantized("Dequantize"), (ops.dequantize_packed.default,)),
    (_dequantized("DequantizeCodes"), (ops.dequantize.default,)),
)
