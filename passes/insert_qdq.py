"""insert_qdq: weights to QDQ form by round-to-nearest, as the scheme's rules say.

``linear(x, w)`` -> ``linear(x, dequantize(codes, scale))``, likewise for convolutions, embeddings and batched
products. The float weight stays on the module until lowering, for the passes that refine the codes. A weight that
several layers share is quantized once, and only if the rules quantize all of its layers the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxquant.choice import choose
from fxquant.deferred import quantize_later
from fxquant.graph import NodeInfo, TensorType, WeightQuant, set_info, update_info
from fxquant.layers import Layer, find_layers, ties
from fxquant.lazy import Lazy
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import PARTS, weight_error
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import Decline, Log, aten, attach, free_name, get_attr
from fxquant.scheme import QuantSpec

RULE = "quantize_weight"


def insert_qdq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules`` (LayerRules in order), ``progress``."""
    gm, log = program.gm, Log()
    progress = settings.get("progress", quiet)
    layers = find_layers(gm)
    shared = ties(layers)
    done: dict[tuple[str, bool], fx.Node] = {}
    for i, layer in enumerate(layers):
        progress("quantize weights", i, len(layers))
        update_info(layer.node, path=layer.name)
        choice = choose(layer, settings["rules"], shared.get(layer.name, [layer]))
        if isinstance(choice, Decline):
            log.declined(RULE, layer.node, choice.reason)
            continue
        if choice.weight is None:
            log.declined(RULE, layer.node, f"rule {choice.match!r} asks for activations only")
            continue
        key = (layer.target, layer.transposed)
        if key not in done:
            done[key] = insert_dequantize(gm, layer, choice.weight)
        _use(layer, done[key])
        log.rewrote(RULE, layer.node, str(choice.weight))
    progress("quantize weights", len(layers), len(layers))
    return log


def insert_dequantize(gm: fx.GraphModule, layer: Layer, spec: QuantSpec) -> fx.Node:
    """Quantize the layer's weight and put ``dequantize(codes, scale, zero_point)`` in front of the layer."""
    value = layer.weight.transpose(-1, -2) if layer.transposed else layer.weight
    about: dict[str, Any] = {"channel_dims": layer.channel_dims, "name": layer.target}
    q = quantize_later(value, spec, **about) if isinstance(value, Lazy) else quantize_tensor(value, spec, **about)
    graph, base = gm.graph, layer.target + ("_t" if layer.transposed else "")
    with graph.inserting_before(_first_use(layer)):
        parts: list[fx.Node | None] = []
        for suffix in PARTS:
            if (tensor := getattr(q, suffix)) is not None:
                name = free_name(gm, f"{base}_{suffix}")
                attach(gm, name, tensor)
            parts.append(None if tensor is None else get_attr(graph, name, tensor))
        options: dict[str, Any] = {} if value.dtype == torch.float32 else {"dtype": value.dtype}
        options |= {name: part for name, part in zip(PARTS[3:], parts[3:], strict=True) if part is not None}
        node = graph.call_function(ops.dequantize.default, (*parts[:3], str(spec), list(q.shape)), options)
    error, before = weight_error(value, q), layer.weight.nbytes
    weight = WeightQuant(layer.target, spec, "rtn", error, q.nbytes, before, layer.transposed)
    set_info(node, NodeInfo(TensorType(value.dtype, q.shape), layer.name, weight=weight))
    return _oriented(graph, node, layer)


def _oriented(graph: fx.Graph, node: fx.Node, layer: Layer) -> fx.Node:
    """The dequantized weight ``[experts, out, in]`` as the batched product wants it, ``[experts, in, out]``."""
    if not (layer.type == "matmul" and layer.transposed):
        return node
    with graph.inserting_after(node):
        swapped = graph.call_function(aten.transpose.int, (node, 1, 2))
    set_info(swapped, NodeInfo(TensorType(layer.weight.dtype, tuple(layer.weight.shape)), layer.name))
    return swapped


def _first_use(layer: Layer) -> fx.Node:
    return next(iter(layer.source.users)) if layer.type == "matmul" else layer.node


def _use(layer: Layer, weight: fx.Node) -> None:
    """Give the layer the dequantized weight in place of its float operand."""
    if layer.type == "matmul":  # the constant itself: whatever lies between it and the product stays
        layer.source.replace_all_uses_with(weight, delete_user_cb=lambda user: user is not weight)
        return
    args = list(layer.node.args)
    args[layer.position] = weight
    layer.node.args = tuple(args)


INSERT_QDQ = Pass(
    "insert_qdq", "quantize weights round-to-nearest, as dequantize(codes, scale) in the graph", insert_qdq
)
