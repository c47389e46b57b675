"""Weights in QDQ form: what a ``dequantize`` node stands for, and new codes for it.

``dequantize(codes, scale, zero_point, spec, shape)`` reads its tensors from the module, where the float weight stays
too until lowering (``WeightQuant.weight``). Methods that refine codes read it here and write here.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from fxquant.graph import WeightQuant, info, update_info
from fxquant.ops import operators as ops
from fxquant.qtensor import QuantizedTensor
from fxquant.rewrite import fetch

PARTS = ("codes", "scale", "zero_point", "tensor_scale")
"""The tensors of a quantized weight, in the order of the operator's arguments."""


def quantized_weights(gm: fx.GraphModule) -> list[fx.Node]:
    """The dequantize nodes of the graph, in graph order."""
    return [n for n in gm.graph.find_nodes(op="call_function", target=ops.dequantize.default) if info(n).weight]


def quant_of(node: fx.Node) -> WeightQuant:
    """The WeightQuant of a dequantize node."""
    quant = info(node).weight
    assert quant is not None, f"node {node.name} has no WeightQuant"
    return quant


def float_weight(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The float weight that a dequantize node stands for, seen as the node gives it: ``[..., out, in]``."""
    quant = quant_of(node)
    value = fetch(gm, quant.weight)
    return value.transpose(-1, -2) if quant.transposed else value


def replace_weight(gm: fx.GraphModule, node: fx.Node, q: QuantizedTensor, method: str) -> None:
    """Write the codes and scales of ``q``, of the same spec, over those the node reads; ``method`` made them."""
    operands = (*node.args[:3], node.kwargs.get("tensor_scale"))
    for operand, part in zip(operands, PARTS, strict=True):
        if isinstance(operand, fx.Node):
            fetch(gm, str(operand.target)).copy_(getattr(q, part))
    value = float_weight(gm, node)
    update_info(node, weight=replace(quant_of(node), method=method, error=weight_error(value, q)))


def weight_error(value: Tensor, q: QuantizedTensor) -> float:
    """||W - W'|| / ||W||, 0 for a weight of zeros."""
    norm = float(value.float().norm())
    return float((q.dequantize() - value.float()).norm()) / norm if norm else 0.0
