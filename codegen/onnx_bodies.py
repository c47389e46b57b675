"""Operators on packed weights of the ``fxquant`` domain in standard operators: the bodies of their functions.

A body decodes planar bytes by table look-ups, one for each byte of the first plane, and multiplies by the scales. It is
exact: values equal ``qtensor.dequantize``. ``onnx_functions`` makes functions of these bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant.codegen.onnx_builder import Builder, Operator, T
from fxquant.formats import Format
from fxquant.packing import planes

INT, INTS = ir.AttributeType.INT, ir.AttributeType.INTS
MATRIX = {"cols": INT, "group_size": INT}
SHAPED = {**MATRIX, "weight_shape": INTS}
WINDOW = {"strides": INTS, "pads": INTS, "dilations": INTS, "group": INT}

Weight = Sequence[ir.Value]
"""packed (or codes), scale, and a zero point where the format has one."""


class Body(Builder):
    """The body of one function under construction. ``needs`` is what the model's nodes ask of it::

    grouped   a row has several scales            ragged   rows do not fill bytes of every plane, or groups
    cast      x is not float32                    scale    scales are not float32
    unfolded  weights stay packed in memory
    """

    def __init__(self, operator: Operator, needs: frozenset[str], opset: int) -> None:
        super().__init__(opset)
        self.operator, self.format, self.needs = operator, operator.format, needs

    def step(self, name: str) -> None:
        """Name the nodes that follow: errors of onnxruntime name a node in a function, and no layer."""
        self._scope = name

    def attribute(self, name: str) -> ir.Value:
        """The function's INT (INTS) attribute as a rank 0 (rank 1) constant."""
        if name not in self.memo:
            kind = {**SHAPED, **WINDOW}[name]
            field = "value_int" if kind == INT else "value_ints"
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
    f.step("decode")
    widths = planes(f.format.bits)
    codes = 8 // widths[0]
    parts: tuple[ir.Value, ...] = (packed := _read(f, packed),)
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


def _read(f: Body, packed: ir.Value) -> ir.Value:
    """Packed bytes, as INT32 where they are to stay packed in memory.

    onnxruntime computes what depends on constants alone when it loads a file, but for DequantizeLinear: one here, by a
    scale of 1, and the weight is decoded in every run.
    """
    if "unfolded" not in f.needs:
        return packed
    number = f.op("DequantizeLinear", packed, f.const(1.0, T.FLOAT), dtype=T.FLOAT)
    return f.op("Cast", number, to=int(T.INT32), dtype=T.INT32)


def apply_scale(f: Body, values: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    """(values - zero_point) * scale, each spread over the last dimension of ``values``."""
    f.step("scale")
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


def linear(f: Body, x: ir.Value, *weight: ir.Value) -> ir.Value:
    W = f.op("Transpose", _like(f, matrix(f, weight), x), perm=[1, 0])
    f.step("multiply")
    return f.op("MatMul", x, W)


def linear_bias(f: Body, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    return f.op("Add", linear(f, x, *weight_and_bias[:-1]), weight_and_bias[-1])


def conv2d(f: Body, x: ir.Value, *weight_and_bias: ir.Value) -> ir.Value:
    kernel = _like(f, dequantize(f, *weight_and_bias[:-1]), x)
    window = {key: ir.RefAttr(key, key, kind) for key, kind in WINDOW.items()}
    return f.op("Conv", x, kernel, weight_and_bias[-1], **window)


def dequantize(f: Body, *weight: ir.Value) -> ir.Value:
    return f.op("Reshape", matrix(f, weight), f.attribute("weight_shape"))


def dequantize_codes(f: Body, *weight: ir.Value) -> ir.Value:
    return f.op("Reshape", matrix(f, weight, packed=False), f.attribute("weight_shape"))


def embedding(f: Body, indices: ir.Value, packed: ir.Value, *scales: ir.Value) -> ir.Value:
    """Only the rows that are asked for are decoded; one scale for the whole tensor is repeated for every row."""
    f.step("rows_of_indices")
    flat = f.op("Reshape", indices, f.axes(-1))
    every = f.op("Concat", f.op("Shape", packed, start=0, end=1), f.axes(1), axis=0)
    chosen = [f.op("Gather", f.op("Expand", s, every), flat, axis=0) for s in scales]
    values = matrix(f, [f.op("Gather", packed, flat, axis=0), *chosen])
    f.step("shape")
    shape = f.op("Concat", f.op("Shape", indices), f.op("Reshape", f.attribute("cols"), f.axes(1)), axis=0)
    return f.op("Reshape", values, shape)
