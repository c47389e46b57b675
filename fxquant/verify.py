"""verify: what must hold of a quantized graph, as a table of rules, checked after every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import packing
from fxquant.errors import FormatError, VerifyError
from fxquant.graph import TensorType, info, tensor_type
from fxquant.lazy import Lazy
from fxquant.ops import ROUNDINGS, is_op, matrix_shape, outliers_problem
from fxquant.ops import operators as ops
from fxquant.qtensor import QuantizedTensor, check_exponent_bias, check_scale
from fxquant.rewrite import fetch
from fxquant.scheme import QuantSpec, parse_spec

Invariant = Callable[[fx.GraphModule, fx.Node], "str | None"]


def verify(gm: fx.GraphModule) -> None:
    """Raise a VerifyError that names the first node that breaks an invariant, and which."""
    for node in gm.graph.nodes:
        for invariant in INVARIANTS:
            if broken := invariant(gm, node):
                raise VerifyError(f"node {node.name!r} ({info(node).path or node.op}): {broken}")


def is_known_operation(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Graphs hold inputs, constants, calls of functions and one output; no modules, no methods."""
    known = ("placeholder", "get_attr", "call_function", "output")
    return None if node.op in known else f"operation {node.op!r} is not one of {known}"


def constant_exists(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """A get_attr node reads a tensor of the module, of the node's type."""
    if node.op != "get_attr":
        return None
    try:
        value = fetch(gm, str(node.target))
    except (AttributeError, AssertionError):
        return f"the module has no tensor {node.target!r}"
    want = info(node).type
    got = TensorType(value.dtype, tuple(value.shape))
    return None if want is None or got == want else f"{node.target} is {got}, its node says {want}"


def name_is_identifier(gm: fx.GraphModule, node: fx.Node) -> str | None:
    return None if node.name.isidentifier() else "its name is not an identifier"


def weight_is_consistent(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Codes, scale and zero point of a quantized weight fit its spec and shape; codes are in range."""
    at = _WEIGHT_AT.get(node.target)
    if node.op != "call_function" or at is None:
        return None
    bytes_, scale, zero_point = (_value(gm, a) for a in node.args[at : at + 3])
    outer, bias = (_value(gm, node.kwargs.get(k)) for k in ("tensor_scale", "exponent_bias"))
    spec, shape = _spec_and_shape(node)
    if bytes_ is None or scale is None:
        return None  # computed in the graph
    if isinstance(bytes_, Lazy) or isinstance(scale, Lazy):
        return None  # made when they are written, by what checks them
    if node.target is ops.dequantize.default:
        return _problem(QuantizedTensor(bytes_, scale, zero_point, spec, tuple(shape), outer, bias).check)
    rows, cols = matrix_shape(shape, bytes_.shape[0])
    want = packing.packed_shape((rows, cols), packing.planar(spec.format.bits))
    if bytes_.dtype != torch.uint8 or tuple(bytes_.shape) != want:
        return f"packed weight is {bytes_.dtype} {tuple(bytes_.shape)}; {spec} of {shape} wants uint8 {want}"
    return _problem(lambda: check_exponent_bias(bias, cols)) or _problem(
        lambda: check_scale(scale, zero_point, spec, rows=rows, cols=cols, tensor_scale=outer)
    )


def outliers_are_consistent(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Positions of outliers are increasing and inside the weight, with a value for each."""
    if node.target is not ops.with_outliers.default:
        return None
    weight, places, values = node.args[:3]
    index = _value(gm, places)
    if index is None:
        return "the positions of its outliers are not a tensor of the module"
    sizes = [math.prod(tensor_type(n).shape) for n in (weight, values)]  # type: ignore[arg-type]
    return outliers_problem(index, *sizes)


_WEIGHT_AT: dict[Any, int] = {
    ops.dequantize.default: 0,
    ops.dequantize_packed.default: 0,
    ops.linear_wq.default: 1,
    ops.linear_wq_fused.default: 1,
    ops.conv2d_wq.default: 1,
    ops.embedding_wq.default: 1,
}  # operator -> position of its codes, followed by scale and zero point


def _spec_and_shape(node: fx.Node) -> tuple[QuantSpec, Sequence[int]]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    by_name = dict(zip(names, node.args, strict=False))
    return parse_spec(str(by_name["spec"])), by_name["shape"]


def _value(gm: fx.GraphModule, argument: Any) -> Tensor | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return fetch(gm, str(argument.target))
    return None


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except FormatError as error:
        return str(error)
    return None


def operands_are_typed(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """An operator of ours says its type and its layer, so that a report can."""
    if is_op(node.target) and info(node).type is None:
        return "an fxquant operator has no type"
    return None


def rounding_is_consistent(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """A rounded activation has a positive scale where it is static, and an exponent bias a channel where it has any."""
    if node.op != "call_function" or node.target not in ROUNDINGS:
        return None
    bias, x = _value(gm, node.kwargs.get("exponent_bias")), info(node).type
    width = x.shape[-1] if isinstance(x, TensorType) and x.shape else None
    if bias is not None and isinstance(width, int) and (broken := _problem(lambda: check_exponent_bias(bias, width))):
        return broken
    scale = _value(gm, node.args[1]) if node.target is ops.fake_quantize.default else None
    if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
        return "a scale is not a positive finite number"
    return None


INVARIANTS: tuple[Invariant, ...] = (
    is_known_operation,
    name_is_identifier,
    constant_exists,
    weight_is_consistent,
    rounding_is_consistent,
    outliers_are_consistent,
    operands_are_typed,
)
