"""bind: the graph as a CompiledModel runs it on a CPU, with what is known beforehand taken out of every call.

    get_attr model.layers.0.self_attn.q_proj.weight_packed   ->  an attribute of the module itself, not a walk to it
    linear_wq(x, packed, scale, zero_point, bias, ...)       ->  a function of x
    aten.mul.Tensor(x, y)                                    ->  torch.mul(x, y), half the way to the same kernel

One token of a decoder is hundreds of products of some ten microseconds each, and a thousand smaller operations; the
dispatch of an operator written in Python costs more than a product, and so do six attributes on the way to a constant.
The bound graph computes the same in every bit. It is neither saved nor exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant.codegen import cpu
from fxquant.codegen.prepack import Operands
from fxquant.ops import operators as ops
from fxquant.program import Program, copied
from fxquant.rewrite import aten, fetch, get_attrs, identity

DIRECT: dict[Any, Any] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.pow.Tensor_Scalar: torch.pow, aten.neg.default: torch.neg, aten.rsqrt.default: torch.rsqrt,
    aten.tanh.default: torch.tanh, aten.relu.default: torch.relu, aten.silu.default: F.silu, aten.gelu.default: F.gelu,
    aten.mean.dim: torch.mean, aten.softmax.int: torch.softmax, aten.cat.default: torch.cat,
    aten.transpose.int: torch.transpose, aten.unsqueeze.default: torch.unsqueeze, aten.reshape.default: torch.reshape,
    aten.view.default: torch.Tensor.view, aten.matmul.default: torch.matmul, aten.linear.default: F.linear,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
}  # fmt: skip
"""Operators that Python's own functions of torch call directly, with the same arguments."""


def bound(program: Program) -> Program:
    """A program that shares the tensors of ``program``, for running; ``program`` stays as it is."""
    copy = copied(program)
    graph = copy.gm.graph
    values = {node: fetch(copy.gm, str(node.target)) for node in get_attrs(graph)}
    for node in graph.find_nodes(op="call_function", target=ops.linear_wq.default):
        if isinstance(node.args[0], fx.Node) and all(a in values for a in node.all_input_nodes[1:]):
            _bind(graph, node, values)
    for node in graph.nodes:
        node.target = DIRECT.get(node.target, node.target)
    names = {identity(value): f"constant_{i}" for i, value in enumerate(values.values())}
    left = {node: values[node] for node in get_attrs(graph)}
    for node, value in left.items():
        node.target = names[identity(value)]
    gm = fx.GraphModule({str(node.target): value for node, value in left.items()}, graph)
    for table in (gm._buffers, gm._parameters):  # attributes of Python's own kind, found without asking these tables
        vars(gm).update(table)
        table.clear()
    return Program(gm, program.signature, program.trace)


def _bind(graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, Tensor]) -> None:
    def value(a: Any) -> Any:
        return values[a] if isinstance(a, fx.Node) else a

    linear = BoundLinear([value(a) for a in node.args[1:]], {k: value(a) for k, a in node.kwargs.items()})
    with graph.inserting_before(node):
        new = graph.call_function(linear, (node.args[0],))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    constants = node.all_input_nodes[1:]
    graph.erase_node(node)
    for constant in constants:
        if not constant.users:
            graph.erase_node(constant)


class BoundLinear:
    """``linear_wq`` on a weight that is known: called with x alone. ``operands`` follow x in the operator's order."""

    __name__ = "linear"  # what fx writes into the code that it makes of the graph

    def __init__(self, operands: Sequence[Any], named: Mapping[str, Any]) -> None:
        self._operands, self._named = tuple(operands), dict(named)
        packed, scale, zero_point, self._bias, spec, shape = self._operands[:6]
        above = dict(zip(("tensor_scale", "exponent_bias"), self._operands[6:], strict=False)) | self._named
        self._known = Operands(packed, scale, zero_point, spec, tuple(shape), **above)

    def __call__(self, x: Tensor) -> Tensor:
        kernels = cpu.kernels_here()
        if kernels is None or x.dtype != torch.float32 or not x.numel() or (weight := self._weight) is None:
            return cpu.linear_wq(x, *self._operands, **self._named)
        return cpu.linear(x, weight, self._bias, kernels)

    @cached_property
    def _weight(self) -> cpu.PackedWeight | None:
        found = cpu.packed_weight(self._known) if len(self._known.shape) == 2 else None
        return found if found is not None and cpu.works(found.format) else None
