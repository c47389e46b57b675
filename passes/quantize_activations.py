"""quantize_activations: the inputs of layers rounded token by token, where a rule says so.

``linear(x, w)`` -> ``linear(fake_quantize_dynamic(x), w)``. Layers that read the same tensor under the same spec share
one rounding. ZeroQuant-FP, section 3 (token-wise activations).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxquant.choice import choose
from fxquant.graph import NodeInfo, info, set_info
from fxquant.layers import Layer, find_layers, ties
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program
from fxquant.rewrite import Decline, Log

RULE = "quantize_activation"


def quantize_activations(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules`` (LayerRules in order)."""
    log, shared = Log(), dict[tuple[fx.Node, str], fx.Node]()
    layers = find_layers(program.gm)
    tied = ties(layers)
    for layer in layers:
        rule = choose(layer, settings["rules"], tied.get(layer.name, [layer]))
        if isinstance(rule, Decline) or rule.activation is None:
            continue  # why a layer stays in float as a whole is said with its weight
        if layer.type != "linear":
            log.declined(RULE, layer.node, f"token-wise activations are for linears; this is of type {layer.type}")
            continue
        x, spec = layer.node.args[0], str(rule.activation)
        assert isinstance(x, fx.Node)
        if (x, spec) not in shared:
            shared[x, spec] = _insert(program.gm.graph, layer, x, spec)
        layer.node.args = (shared[x, spec], *layer.node.args[1:])
        log.rewrote(RULE, layer.node, spec)
    return log


def _insert(graph: fx.Graph, layer: Layer, x: fx.Node, spec: str) -> fx.Node:
    with graph.inserting_before(layer.node):
        node = graph.call_function(ops.fake_quantize_dynamic.default, (x, spec))
    set_info(node, NodeInfo(info(x).type, layer.name))
    return node


QUANTIZE_ACTIVATIONS = Pass("quantize_activations", "round the inputs of layers token by token", quantize_activations)
