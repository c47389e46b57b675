"""QDQ form: what a ``dequantize`` node stands for and new codes for it, and nodes that round activations.

``dequantize(codes, scale, zero_point, spec, shape)`` reads its tensors from the module, where the float weight stays
too until lowering (``WeightQuant.weight``). Methods that refine codes read it here and write here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxquant import scales
from fxquant.graph import NodeInfo, TensorType, WeightQuant, info, set_info, update_info
from fxquant.lazy import Lazy, real
from fxquant.ops import operators as ops
from fxquant.qtensor import QuantizedTensor, error_squares, relative_error, to_matrix
from fxquant.rewrite import aten, attach, detach, fetch, free_name, get_attr, write
from fxquant.scheme import PerChannel, QuantSpec, parse_spec

PARTS = ("codes", "scale", "zero_point", "tensor_scale", "exponent_bias")
"""The tensors of a quantized weight; the first three are arguments of the operator by position, the others by name."""

_VIEWS = (
    aten.to.dtype, aten.t.default, aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.index.Tensor,
    aten.index_select.default, ops.with_outliers.default,
)  # fmt: skip


def quantized_weights(gm: fx.GraphModule) -> list[fx.Node]:
    """The dequantize nodes of the graph, in graph order."""
    return [n for n in gm.graph.find_nodes(op="call_function", target=ops.dequantize.default) if info(n).weight]


def quant_of(node: fx.Node) -> WeightQuant:
    """The WeightQuant of a dequantize node."""
    quant = info(node).weight
    assert quant is not None, f"node {node.name} has no WeightQuant"
    return quant


def task_name(rule: str, node: fx.Node) -> str:
    """The name of the task of pass ``rule`` for the weight of a dequantize node: no two nodes have the same."""
    quant = quant_of(node)
    return f"{rule}/{quant.weight}{'_t' if quant.transposed else ''}"


def float_weight(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The float weight that a dequantize node stands for, seen as the node gives it: ``[..., out, in]``."""
    quant = quant_of(node)
    value: Tensor = real(fetch(gm, quant.weight))
    return value.transpose(-1, -2) if quant.transposed else value


def replace_weight(gm: fx.GraphModule, node: fx.Node, q: QuantizedTensor, method: str) -> None:
    """Write the codes and scales of ``q``, of the same spec, over those the node reads; ``method`` made them."""
    operands = (*node.args[:3], *(node.kwargs.get(part) for part in PARTS[3:]))
    for operand, part in zip(operands, PARTS, strict=True):
        if isinstance(operand, fx.Node):
            write(gm, str(operand.target), getattr(q, part))
    value = float_weight(gm, node)
    update_info(node, weight=replace(quant_of(node), method=method, error=weight_error(value, q)))


def requantize(gm: fx.GraphModule, node: fx.Node, q: QuantizedTensor, method: str) -> None:
    """Give the node the tensors and the spec of ``q`` in place of its own; ``method`` made them."""
    for at, part in enumerate(PARTS):
        value, old = getattr(q, part), node.args[at] if at < 3 else node.kwargs.get(part)
        if value is None:
            new = None
        elif isinstance(old, fx.Node):
            new = put(gm, old, value)
        else:
            new = place(gm, node, f"{quant_of(node).weight}_{part}", value)
        if at < 3:
            node.update_arg(at, new)
        elif new is not None or part in node.kwargs:
            node.update_kwarg(part, new)
        if new is None and isinstance(old, fx.Node) and not old.users:
            detach(gm, str(old.target))
            gm.graph.erase_node(old)
    node.update_arg(3, str(q.spec))
    error = weight_error(float_weight(gm, node), q)
    update_info(node, weight=replace(quant_of(node), spec=q.spec, method=method, error=error, nbytes=q.nbytes))


def quantized_of(gm: fx.GraphModule, node: fx.Node) -> QuantizedTensor:
    """The quantized tensor that a dequantize node reads."""
    operands = (*node.args[:3], *(node.kwargs.get(part) for part in PARTS[3:]))
    codes, scale, zero, outer, bias = (
        real(fetch(gm, str(a.target))) if isinstance(a, fx.Node) else None for a in operands
    )
    assert codes is not None
    assert scale is not None
    shape = tuple(node.args[4])  # type: ignore[arg-type]
    return QuantizedTensor(codes, scale, zero, parse_spec(str(node.args[3])), shape, outer, bias)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that use a dequantized weight, behind casts, views and selections of it; itself where none does."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user) if user.target in _VIEWS and user.args[0] is node else [user]
    return found or [node]


def insert_rounding(
    gm: fx.GraphModule, before: fx.Node, x: fx.Node, spec: QuantSpec, absmax: Tensor | None, path: str
) -> fx.Node:
    """A node in front of ``before`` that rounds ``x`` up to ``absmax``; None: its scales are found when it runs."""
    graph = gm.graph
    if absmax is None:
        with graph.inserting_before(before):
            node = graph.call_function(ops.fake_quantize_dynamic.default, (x, str(spec)))
    else:
        scale = scales.choose(absmax.reshape(1, 1), spec, name=f"an input of {path}").scale
        given = place(gm, before, f"{x.name}_scale", scale)
        with graph.inserting_before(before):
            node = graph.call_function(ops.fake_quantize.default, (x, given, None, str(spec)))
    set_info(node, NodeInfo(info(x).type, path))
    return node


def rounding_spec(node: fx.Node) -> QuantSpec:
    """The spec of a node that rounds an activation."""
    return parse_spec(str(node.args[3 if node.target is ops.fake_quantize.default else 1]))


def put(gm: fx.GraphModule, read: fx.Node, value: Tensor) -> fx.Node:
    """The constant that ``read`` reads, replaced by ``value``."""
    detach(gm, str(read.target))
    attach(gm, str(read.target), value)
    set_info(read, replace(info(read), type=TensorType(value.dtype, tuple(value.shape))))
    return read


def place(gm: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A new constant, read in front of a node; ``name`` is made free."""
    name = free_name(gm, name)
    attach(gm, name, value)
    with gm.graph.inserting_before(before):
        return get_attr(gm.graph, name, value)


def quantized_matrix(gm: fx.GraphModule, node: fx.Node) -> QuantizedTensor:
    """The same as a matrix, the form that solvers take: its shape is that of the codes."""
    q = quantized_of(gm, node)
    return replace(q, shape=tuple(q.codes.shape))


def add_outliers(gm: fx.GraphModule, node: fx.Node, index: Tensor, values: Tensor | QuantizedTensor) -> fx.Node:
    """Put ``with_outliers(node, index, values)`` in the place of a dequantize node, and say what it weighs.

    ``index``: int64 [n], increasing positions in the flattened weight as the node gives it; ``values``: what stands
    there, floats [n] as they are stored, or codes [1, n] that are dequantized in the graph.
    """
    graph, quant = gm.graph, quant_of(node)
    stored = index.to(torch.int32)
    with graph.inserting_after(node):
        new = graph.call_function(ops.with_outliers.default)
    set_info(new, replace(info(node), weight=None))
    places = place(gm, new, f"{quant.weight}_outlier_index", stored)
    if isinstance(values, Tensor):
        what, plain = place(gm, new, f"{quant.weight}_outlier_values", values), values
    else:
        what, plain = _dequantized(gm, new, f"{quant.weight}_outlier_values", values), values.dequantize()
    node.replace_all_uses_with(new)
    new.args = (node, places, what)
    restored = ops.with_outliers(quantized_of(gm, node).dequantize(), stored, plain)
    value = float_weight(gm, node).float()
    error = float((restored - value).norm()) / (float(value.norm()) or 1.0)
    update_info(node, weight=replace(quant, error=error, nbytes=quant.nbytes + stored.nbytes + values.nbytes))
    return new


def _dequantized(gm: fx.GraphModule, before: fx.Node, name: str, q: QuantizedTensor) -> fx.Node:
    """``dequantize`` of new constants, in front of a node."""
    parts = {k: place(gm, before, f"{name}_{k}", v) for k in PARTS if (v := getattr(q, k)) is not None}
    first = tuple(parts.pop(k, None) for k in PARTS[:3])
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(ops.dequantize.default, (*first, str(q.spec), list(q.shape)), dict(parts))
    set_info(node, NodeInfo(TensorType(torch.float32, q.shape), info(before).path))
    return node


def weight_error(value: Tensor, q: QuantizedTensor) -> float:
    """||W - W'|| / ||W||, 0 for a weight of zeros; NaN for one that is not read yet."""
    if isinstance(q.codes, Lazy):
        return math.nan
    along = isinstance(q.spec.granularity, PerChannel) and q.spec.granularity.axis
    return relative_error(error_squares(to_matrix(value, q.spec) if along else value.reshape(q.codes.shape), q))
