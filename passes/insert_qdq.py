"""insert_qdq: weights to QDQ form by round-to-nearest, as the scheme's rules say.

``linear(x, w)`` -> ``linear(x, dequantize(codes, scale))``, likewise for convolutions, embeddings and batched
products. The float weight stays on the module until lowering, for the passes that refine the codes. A weight that
several layers share is quantized once, and only if the rules quantize all of its layers the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.choice import choose
from fxquant.deferred import quantize_later
from fxquant.graph import NodeInfo, TensorType, WeightQuant, set_info, update_info
from fxquant.layers import Layer, find_layers, ties
from fxquant.lazy import Lazy
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import PARTS, weight_error
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.rewrite import Decline, Log, aten, attach, free_name, get_attr
from fxquant.scheme import QuantSpec
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "quantize_weight"


def insert_qdq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules`` (LayerRules in order), ``progress``, ``executor``. Every weight is a task."""
    gm, log = program.gm, Log()
    layers = find_layers(gm)
    shared = ties(layers)
    wanted: dict[_Key, list[tuple[Layer, QuantSpec]]] = {}
    for layer in layers:
        update_info(layer.node, path=layer.name)
        choice = choose(layer, settings["rules"], shared.get(layer.name, [layer]))
        if isinstance(choice, Decline):
            log.declined(RULE, layer.node, choice.reason)
            continue
        if choice.weight is None:
            log.declined(RULE, layer.node, f"rule {choice.match!r} asks for activations only")
            continue
        wanted.setdefault((layer.target, layer.transposed), []).append((layer, choice.weight))
        log.rewrote(RULE, layer.node, str(choice.weight))
    progress, executor = settings.get("progress", quiet), settings.get("executor", IN_PROCESS)
    queue = Queue(executor, progress, "quantize weights", len(wanted))
    for users in wanted.values():
        (layer, spec), weight = users[0], _oriented_weight(users[0][0])
        if isinstance(weight, Lazy):
            q = quantize_later(weight, spec, channel_dims=layer.channel_dims, name=layer.target)
            _write(gm, users, (q, weight_error(weight, q)))
        else:
            queue.submit(_task(layer, spec), partial(_write, gm, users))
    queue.finish()
    return log


_Key = tuple[str, bool]
"""A weight, and whether it is quantized transposed."""


def _task(layer: Layer, spec: QuantSpec) -> Task:
    name = f"insert_qdq/{layer.target}{'_t' if layer.transposed else ''}"
    return Task(name, rounded, (_oriented_weight(layer), spec, layer.channel_dims, layer.target))


def rounded(value: Tensor, spec: QuantSpec, channel_dims: int, name: str) -> tuple[QuantizedTensor, float]:
    """``value`` rounded to nearest, and its relative error."""
    q = quantize_tensor(value, spec, channel_dims=channel_dims, name=name)
    return q, weight_error(value, q)


def _oriented_weight(layer: Layer) -> Tensor:
    return layer.weight.transpose(-1, -2) if layer.transposed else layer.weight


def _write(gm: fx.GraphModule, users: list[tuple[Layer, QuantSpec]], found: tuple[QuantizedTensor, float]) -> None:
    """Give all layers that read a weight what was found for it."""
    weight = _insert_dequantize(gm, users[0][0], *found)
    for layer, _ in users:
        _use(layer, weight)


def _insert_dequantize(gm: fx.GraphModule, layer: Layer, q: QuantizedTensor, error: float) -> fx.Node:
    """Put ``dequantize(codes, scale, zero_point)`` in front of the layer."""
    dtype, spec = layer.weight.dtype, q.spec
    graph, base = gm.graph, layer.target + ("_t" if layer.transposed else "")
    with graph.inserting_before(_first_use(layer)):
        parts: list[fx.Node | None] = []
        for suffix in PARTS:
            if (tensor := getattr(q, suffix)) is not None:
                name = free_name(gm, f"{base}_{suffix}")
                attach(gm, name, tensor)
            parts.append(None if tensor is None else get_attr(graph, name, tensor))
        options: dict[str, Any] = {} if dtype == torch.float32 else {"dtype": dtype}
        options |= {name: part for name, part in zip(PARTS[3:], parts[3:], strict=True) if part is not None}
        node = graph.call_function(ops.dequantize.default, (*parts[:3], str(spec), list(q.shape)), options)
    weight = WeightQuant(layer.target, spec, "rtn", error, q.nbytes, layer.weight.nbytes, layer.transposed)
    set_info(node, NodeInfo(TensorType(dtype, q.shape), layer.name, weight=weight))
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
