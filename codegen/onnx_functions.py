"""The ``fxquant`` domain of an exported model: one node an operator, and what it means in standard operators.

Every operator on packed weights is a single node, so that a native library can take it over, and a model-local
function of the same name, so that any ONNX runtime executes the file as it is::

    Linear_<format>(x, packed, scale[, zero_point])             x @ W^T               cols, group_size, activation_bits
    LinearBias_<format>(x, packed, scale[, zero_point], bias)   x @ W^T + bias        cols, group_size, activation_bits
    Conv2d_<format>(x, packed, scale[, zero_point][, bias])     convolution with W    + weight_shape, strides, ...
    Embedding_<format>(indices, packed, scale[, zero_point])    rows of W             cols, group_size
    Dequantize_<format>(packed, scale[, zero_point])            W                     + weight_shape
    FakeQuantizeDynamic_<format>[_<scale kind>](x)              x rounded row by row
    FakeQuantize_<format>(x, scale[, zero_point])               x rounded with one scale
    FakeQuantizeEach_<format>(x, scale[, zero_point])           x rounded with scales that broadcast over it
    FakeQuantizeEach_<format>_e4m3(x, scale, tensor_scale)      the same in NVFP4
    DequantizeCodes_<format>(codes, scale[, zero_point])        W from unpacked codes + weight_shape

``packed`` are the planar bytes of ``packing``, ``cols`` the columns of the matrix view, ``group_size`` how many of
them share a scale; formats with a zero point take one. ``activation_bits`` (INT, 32 where it is not given) is to how
many bits a kernel may round x by itself, a scale for each token and block of it; the function never rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from fxquant.codegen import onnx_bodies as bodies
from fxquant.codegen import onnx_rounding as roundings
from fxquant.codegen.onnx_bodies import INT, MATRIX, SHAPED, WINDOW, Body
from fxquant.codegen.onnx_builder import Builder, Operator, T
from fxquant.codegen.onnx_words import function_doc
from fxquant.formats import Format, IntFormat
from fxquant.packing import planes
from fxquant.scheme import SCALES, QuantSpec

DOMAIN, VERSION = "fxquant", 1

_LINEAR = {**MATRIX, "activation_bits": INT}
_BODIES: dict[str, tuple[Callable[..., ir.Value], tuple[str, ...], dict[str, ir.AttributeType]]] = {
    "Linear": (bodies.linear, ("x", "packed", "scale", "zero_point"), _LINEAR),
    "LinearBias": (bodies.linear_bias, ("x", "packed", "scale", "zero_point", "bias"), _LINEAR),
    "Conv2d": (bodies.conv2d, ("x", "packed", "scale", "zero_point", "bias"), {**SHAPED, **WINDOW}),
    "Embedding": (bodies.embedding, ("indices", "packed", "scale", "zero_point"), MATRIX),
    "Dequantize": (bodies.dequantize, ("packed", "scale", "zero_point"), SHAPED),
    "DequantizeCodes": (bodies.dequantize_codes, ("codes", "scale", "zero_point"), SHAPED),
    "FakeQuantizeDynamic": (roundings.fake_quantize_dynamic, ("x",), {}),
    "FakeQuantize": (roundings.fake_quantize, ("x", "scale", "zero_point"), {}),
    "FakeQuantizeEach": (roundings.fake_quantize, ("x", "scale", "tensor_scale", "zero_point"), {}),
}
_LAYERS = ("Linear", "LinearBias", "Conv2d")
"""Operators that compute in the dtype of x; the others give float32."""
_DEFAULTS = {"activation_bits": 32}


def op_type(kind: str, format: Format) -> str:
    """The name of the operator ``kind`` on ``format``: ``Linear_e3m2``."""
    return Operator(kind, format).name


def function(
    kind: str, format: Format, needs: frozenset[str], opset: int, *, scale: str = "fp32", rounding: str = ""
) -> ir.Function:
    """The model-local function of an operator, as simple as ``needs`` allows; ``scale``: the kind that it finds."""
    operator = Operator(kind, format, scale, rounding)
    body, names, attributes = _BODIES[operator.kind]
    absent = set() if isinstance(format, IntFormat) and not format.signed else {"zero_point"}
    if SCALES[scale].outer is None:
        absent.add("tensor_scale")
    inputs = [ir.Value(name=n) for n in names if n not in absent]
    f = Body(operator, needs, opset)
    out = body(f, *inputs)
    graph = ir.Graph(inputs, [out], nodes=f.nodes, opset_imports={"": opset}, name=operator.name)
    declared = [ir.Attr(name, kind, _DEFAULTS.get(name)) for name, kind in attributes.items()]
    found = ir.Function(DOMAIN, operator.name, graph=graph, attributes=declared)
    found.doc_string = function_doc(kind, str(format))
    return found


def functions(b: Builder) -> list[ir.Function]:
    """The functions of all operators that ``b`` has called."""
    return [
        function(o.kind, o.format, needs, b.opset, scale=o.scale, rounding=o.rounding) for o, needs in b.calls.items()
    ]


def on_weight(
    b: Builder, kind: str, spec: QuantSpec, inputs: Sequence[ir.Value | None], cols: int, **attributes: Any
) -> ir.Value:
    """The node of an operator on a packed weight; what it asks of the operator's function is noted."""
    size = spec.group_size(cols)
    unit = 8 // min(planes(spec.format.bits))
    asks = {
        "grouped": size < cols,
        "ragged": bool(cols % unit or cols % size),
        "cast": kind in _LAYERS and b.dtype != T.FLOAT,
        "scale": spec.scale == "fp16",
        "unfolded": b.options.optimize_for == "memory",
    }
    operator = Operator(kind, spec.format)
    b.calls[operator] = b.calls.get(operator, frozenset()) | {name for name, asked in asks.items() if asked}
    dtype = b.dtype if kind in _LAYERS else T.FLOAT
    return b.op(operator.name, *inputs, domain=DOMAIN, dtype=dtype, cols=cols, group_size=size, **attributes)


def on_activation(b: Builder, kind: str, spec: QuantSpec, x: ir.Value, *given: ir.Value) -> ir.Value:
    """The node of an operator that rounds x; the kind of its scales is part of its name where it finds them."""
    finds = kind == "FakeQuantizeDynamic" or spec.kind.outer is not None
    operator = Operator(kind, spec.format, *((spec.scale, spec.rounding) if finds else ()))
    b.calls[operator] = frozenset()
    return b.op(operator.name, x, *given, domain=DOMAIN, dtype=x.dtype, shape=x.shape)
