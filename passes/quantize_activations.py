"""quantize_activations: the inputs of layers rounded, where a rule says so.

``linear(x, w)`` -> ``linear(fake_quantize_dynamic(x), w)`` where scales are found when the model runs, for every token
or every group of channels of a token (ZeroQuant-FP, section 3); ``linear(fake_quantize(x, scale), w)`` for one scale a
tensor, of the largest magnitude in the calibration data. Layers that read the same tensor under the same spec share
one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import Statistics, walk
from fxquant.choice import choose
from fxquant.layers import Layer, find_layers, ties
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import insert_rounding
from fxquant.rewrite import Decline, Log
from fxquant.scheme import QuantSpec

RULE = "quantize_activation"


def quantize_activations(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules`` (LayerRules in order), ``progress``, and ``calibration`` where a spec is static."""
    gm, log = program.gm, Log()
    wanted = _wanted(gm, settings, log)
    static = [layer.node for layer, spec in wanted if spec.static]
    absmax = _ranges(gm, static, settings) if static else {}
    shared = dict[tuple[fx.Node, str], fx.Node]()
    for layer, spec in wanted:
        x = layer.node.args[0]
        assert isinstance(x, fx.Node)
        if (x, str(spec)) not in shared:
            shared[x, str(spec)] = insert_rounding(gm, layer.node, x, spec, absmax.get(layer.node), layer.name)
        layer.node.args = (shared[x, str(spec)], *layer.node.args[1:])
        log.rewrote(RULE, layer.node, str(spec))
    return log


def _wanted(gm: fx.GraphModule, settings: Mapping[str, Any], log: Log) -> list[tuple[Layer, QuantSpec]]:
    """The layers whose inputs are rounded, each with the spec."""
    layers, found = find_layers(gm), []
    tied = ties(layers)
    for layer in layers:
        rule = choose(layer, settings["rules"], tied.get(layer.name, [layer]))
        if isinstance(rule, Decline) or rule.activation is None:
            continue  # why a layer stays in float as a whole is said with its weight
        if layer.type != "linear":
            log.declined(RULE, layer.node, f"activations are rounded for linears; this is of type {layer.type}")
            continue
        found.append((layer, rule.activation))
    return found


def _ranges(gm: fx.GraphModule, layers: list[fx.Node], settings: Mapping[str, Any]) -> dict[fx.Node, Tensor]:
    """The largest magnitude of each layer's input, in all batches."""
    found = dict[fx.Node, Tensor]()

    def reached(layer: fx.Node, seen: Statistics) -> None:
        found[layer] = seen.absmax.amax()

    progress = settings.get("progress", quiet)
    walk(gm, settings["calibration"], layers, reached, progress=progress, what="ranges of activations")
    return found


QUANTIZE_ACTIVATIONS = Pass("quantize_activations", "round the inputs of layers", quantize_activations)
