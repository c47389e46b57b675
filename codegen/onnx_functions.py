"""The ``fxquant`` domain of an exported model: one node an operator, and what it means in standard operators.

Every operator on packed weights is a single node, so that a native library can take it over, and a model-local
function of the same name, so that any ONNX runtime executes the file as it is::

    Linear_<format>(x, packed, scale[, zero_point])             x @ W^T               cols, group_size
    LinearBias_<format>(x, packed, scale[, zero_point], bias)   x @ W^T + bias        cols, group_size
    Conv2d_<format>(x, packed, scale[, zero_point][, bias])     convolution with W    + weight_shape, strides, pads, dilations, group
    Embedding_<format>(indices, packed, scale[, zero_point])    rows of W             cols, group_size
    Dequantize_<format>(packed, scale[, zero_point])            W                     + weight_shape
    DequantizeCodes_<format>(codes, scale[, zero_point])        W from unpacked codes + weight_shape

``packed`` are the planar bytes of ``packing``, ``cols`` the columns of the matrix view, ``group_size`` how many of
them share a scale; formats with a zero point take one. The bodies are exact: values equal ``qtensor.dequantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import Arg, Builder, T, Unsupported
from fxquant.codegen.onnx_elementwise import Converter, rows
from fxquant.formats import Format, IntFormat
from fxquant.ops import matrix_shape
from fxquant.packing import planes
from fxquant.scheme import QuantSpec, parse_spec

DOMAIN, VERSION = "fxquant", 1
ops: Any = torch.ops.fxquant

_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS
_MATRIX = {"cols": _INT, "group_size": _INT}
_SHAPED = {**_MATRIX, "weight_shape": _INTS}
_WINDOW = {"strides": _INTS, "pads": _INTS, "dilations": _INTS, "group": _INT}

Weight = Sequence[ir.Value]
"""packed (or codes), scale, and a zero point where the format has one."""


# --- function bodies -----------------------------------------------------------------------------------------------------
def ref(name: str, source: str, kind: ir.AttributeType) -> dict[str, Any]:
    """A node's attribute ``name`` that takes the value of the function's attribute ``source``."""
    return {name: ir.RefAttr(name, source, kind)}


def _attribute(f: Builder, name: str) -> ir.Value:
    """The function's INT (INTS) attribute as a rank 0 (rank 1) constant."""
    if name not in f.memo:
        kind = {**_SHAPED, **_WINDOW}[name]
        f.memo[name] = f.op("Constant", dtype=T.INT64, **ref("value_int" if kind == _INT else "value_ints", name, kind))
    return f.memo[name]


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


def decode(f: Builder, packed: ir.Value, format: Format) -> ir.Value:
    """Values FLOAT ``[rows, >= cols]`` of planar bytes: one table look-up for every byte of the first plane."""
    widths = planes(format.bits)
    count = 8 // widths[0]
    cols = _attribute(f, "cols")
    parts: tuple[ir.Value, ...] = (packed,)
    if len(widths) > 1:
        sizes = f.op("Div", f.op("Add", f.op("Mul", cols, f.const(widths)), f.const(7)), f.const(8))
        parts = f.multi(len(widths), "Split", packed, sizes, axis=1)
    index, at = f.cast(parts[0], T.INT32), 8
    for width, plane in zip(widths[1:], parts[1:], strict=True):
        piece = _pieces(f, plane, bits=count * width)
        units = f.op("Div", f.op("Add", cols, f.const([count - 1])), f.const([count]))
        piece = f.op("Slice", piece, f.axes(0), units, f.axes(1), dtype=T.UINT8)
        high = f.op("Mul", f.cast(piece, T.INT32), f.const(2**at, T.INT32))
        index, at = f.op("Add", index, high), at + count * width
    values = f.op("Gather", f.const(pair_table(format), T.FLOAT), index, axis=0)
    return f.op("Reshape", values, f.axes(0, -1))


def _pieces(f: Builder, plane: ir.Value, *, bits: int) -> ir.Value:
    """Bytes ``[rows, n]`` cut into pieces of ``bits``, low first: UINT8 ``[rows, n * 8 / bits]``."""
    pieces = []
    for shift in range(0, 8, bits):
        moved = f.op("BitShift", plane, f.const(shift, T.UINT8), direction="RIGHT") if shift else plane
        kept = f.op("BitwiseAnd", moved, f.const(2**bits - 1, T.UINT8)) if shift + bits < 8 else moved
        pieces.append(f.op("Unsqueeze", kept, f.axes(2)))
    return f.op("Reshape", f.op("Concat", *pieces, axis=2), f.axes(0, -1), dtype=T.UINT8)


def apply_scale(f: Builder, values: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    """(values - zero_point) * scale, each spread over its group: FLOAT ``[rows, cols]``.

    Rows are cut or filled to whole groups, seen as ``[rows, groups, group_size]``, and cut to ``cols`` again.
    """
    cols, group = _attribute(f, "cols"), _attribute(f, "group_size")
    groups = f.op("Div", f.op("Add", cols, f.op("Sub", group, f.const(1))), group)
    have = f.op("Shape", values, start=1, end=2, dtype=T.INT64)
    missing = f.op("Sub", f.op("Mul", groups, group), have)
    whole = f.op("Pad", values, f.op("Concat", f.axes(0), missing, axis=0), None, f.axes(1))
    grouped = f.op("Reshape", whole, f.op("Concat", f.axes(0, -1), f.op("Reshape", group, f.axes(1)), axis=0))
    if zero_point is not None:
        grouped = f.op("Sub", grouped, f.op("Unsqueeze", f.op("Cast", zero_point, to=int(T.FLOAT)), f.axes(2)))
    wide = f.op("Unsqueeze", f.op("Cast", scale, to=int(T.FLOAT)), f.axes(2))
    flat = f.op("Reshape", f.op("Mul", grouped, wide), f.axes(0, -1))
    return f.op("Slice", flat, f.axes(0), f.op("Reshape", cols, f.axes(1)), f.axes(1))


def _matrix(f: Builder, weight: Weight, format: Format) -> ir.Value:
    return apply_scale(f, decode(f, weight[0], format), weight[1], weight[2] if len(weight) > 2 else None)


def _linear(f: Builder, format: Format, x: ir.Value, *weight: ir.Value) -> ir.Value:
    matrix = f.op("CastLike", _matrix(f, weight, format), x)
    return f.op("MatMul", x, f.op("Transpose", matrix, perm=[1, 0]))


def _linear_bias(f: Builder, format: Format, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    return f.op("Add", _linear(f, format, x, *weight_and_bias[:-1]), weight_and_bias[-1])


def _conv2d(f: Builder, format: Format, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    kernel = _dequantize(f, format, *weight_and_bias[:-1])
    window = {name: value for key, kind in _WINDOW.items() for name, value in ref(key, key, kind).items()}
    return f.op("Conv", x, f.op("CastLike", kernel, x), weight_and_bias[-1], **window)


def _dequantize(f: Builder, format: Format, *weight: ir.Value) -> ir.Value:
    return f.op("Reshape", _matrix(f, weight, format), _attribute(f, "weight_shape"))


def _dequantize_codes(f: Builder, format: Format, codes: ir.Value, scale: ir.Value, *zero_point: ir.Value) -> ir.Value:
    values = f.op("Gather", f.const(format.table().numpy(), T.FLOAT), f.op("Cast", codes, to=int(T.INT32), dtype=T.INT32))
    return f.op("Reshape", apply_scale(f, values, scale, *(zero_point or (None,))), _attribute(f, "weight_shape"))


def _embedding(f: Builder, format: Format, indices: ir.Value, packed: ir.Value, *scales: ir.Value) -> ir.Value:
    """Only the rows that are asked for are decoded; one scale for the whole tensor is repeated for every row."""
    flat = f.op("Reshape", indices, f.axes(-1))
    all_rows = f.op("Concat", f.op("Shape", packed, start=0, end=1), f.axes(1), axis=0)
    chosen = [f.op("Gather", f.op("Expand", s, all_rows), flat, axis=0) for s in scales]
    values = _matrix(f, [f.op("Gather", packed, flat, axis=0), *chosen], format)
    shape = f.op("Concat", f.op("Shape", indices), f.op("Reshape", _attribute(f, "cols"), f.axes(1)), axis=0)
    return f.op("Reshape", values, shape)


Body = Callable[..., ir.Value]
_BODIES: dict[str, tuple[Body, tuple[str, ...], dict[str, ir.AttributeType]]] = {
    "Linear": (_linear, ("x", "packed", "scale", "zero_point"), _MATRIX),
    "LinearBias": (_linear_bias, ("x", "packed", "scale", "zero_point", "bias"), _MATRIX),
    "Conv2d": (_conv2d, ("x", "packed", "scale", "zero_point", "bias"), {**_SHAPED, **_WINDOW}),
    "Embedding": (_embedding, ("indices", "packed", "scale", "zero_point"), _MATRIX),
    "Dequantize": (_dequantize, ("packed", "scale", "zero_point"), _SHAPED),
    "DequantizeCodes": (_dequantize_codes, ("codes", "scale", "zero_point"), _SHAPED),
}


def function(op: str, format: Format, opset: int) -> ir.Function:
    """The model-local function of operator ``op`` on ``format``."""
    body, names, attributes = _BODIES[op]
    f = Builder(opset)
    unsigned = isinstance(format, IntFormat) and not format.signed
    inputs = [ir.Value(name=n) for n in names if n != "zero_point" or unsigned]
    out = body(f, format, *inputs)
    graph = ir.Graph(inputs, [out], nodes=f.nodes, opset_imports={"": opset}, name=op_type(op, format))
    declared = [ir.Attr(name, kind, None) for name, kind in attributes.items()]
    return ir.Function(DOMAIN, op_type(op, format), graph=graph, attributes=declared)


def op_type(op: str, format: Format) -> str:
    """``Linear_e3m2``; a negative exponent bias is written with ``n``, since a name has no minus."""
    return f"{op}_{str(format).replace('-', 'n')}"


# --- converters ------------------------------------------------------------------------------------------------------------
def _call(b: Builder, op: str, spec: QuantSpec, inputs: Sequence[ir.Value | None], cols: int, **attributes: Any) -> ir.Value:
    """The node of ``op``, whose function the model then defines."""
    name = op_type(op, spec.format)
    if name not in b.functions:
        b.functions[name] = function(op, spec.format, b.opset)
    size = spec.group_size(cols)
    return b.op(name, *inputs, domain=DOMAIN, dtype=b.dtype, cols=cols, group_size=size, **attributes)


def _weight(packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> list[ir.Value]:
    return [packed, scale] if zero_point is None else [packed, scale, zero_point]


def _cols(packed: ir.Value, shape: Sequence[int]) -> int:
    if packed.shape is None or not isinstance(rows := packed.shape[0], int):
        raise Unsupported("packed weights with a dynamic number of rows")
    return matrix_shape(shape, rows)[1]


def linear_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int]) -> ir.Value:  # fmt: skip
    inputs = [x, *_weight(packed, scale, zero_point)]
    if bias is None:
        return _call(b, "Linear", parse_spec(spec), inputs, _cols(packed, shape))
    return _call(b, "LinearBias", parse_spec(spec), [*inputs, bias], _cols(packed, shape))


def conv2d_wq(b: Builder, x: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
              bias: ir.Value | None, spec: str, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], groups: int) -> ir.Value:  # fmt: skip
    pads = [*padding, *padding] if len(padding) == 2 else list(padding) * 4
    window = {"strides": list(stride) * (2 // len(stride)), "pads": pads, "dilations": list(dilation) * (2 // len(dilation)),
              "group": groups, "weight_shape": list(shape)}  # fmt: skip
    inputs = [x, *_weight(packed, scale, zero_point), bias]
    return _call(b, "Conv2d", parse_spec(spec), inputs, _cols(packed, shape), **window)


def embedding_wq(b: Builder, indices: ir.Value, packed: ir.Value, scale: ir.Value, zero_point: ir.Value | None,
                 spec: str, shape: Sequence[int]) -> ir.Value:  # fmt: skip
    return _call(b, "Embedding", parse_spec(spec), [indices, *_weight(packed, scale, zero_point)], _cols(packed, shape))


def _dequantized(op: str) -> Converter:
    def convert(b: Builder, packed: ir.Value, scale: Arg, zero_point: Arg, spec: str, shape: Sequence[int]) -> ir.Value:
        inputs = _weight(packed, scale, zero_point)
        return _call(b, op, parse_spec(spec), inputs, _cols(packed, shape), weight_shape=list(shape))

    return convert


PACKED: dict[Any, Converter] = rows(
    (linear_wq, (ops.linear_wq.default,)),
    (conv2d_wq, (ops.conv2d_wq.default,)),
    (embedding_wq, (ops.embedding_wq.default,)),
    (_dequantized("Dequantize"), (ops.dequantize_packed.default,)),
    (_dequantized("DequantizeCodes"), (ops.dequantize.default,)),
)
