"""What the rules of a config say of a layer, ties considered; and which linears they quantize."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxquant.layers import Layer, find_layers, ties
from fxquant.rewrite import Decline
from fxquant.scheme import LayerRule, rule_for


def choose(layer: Layer, rules: Sequence[LayerRule], group: Sequence[Layer]) -> LayerRule | Decline:
    """The rule that a layer follows, or why it stays in float; ``group``: the layers that share its weight.

    A shared weight has one fate: of the rules that its layers get, those that name one exactly go first, then the
    earliest. A group with an embedding that no rule takes stays in float unless a member is named.
    """
    wants = [(member, rule_for(rules, member.name, member.type)) for member in group]
    found = [(rule.match != member.name, list(rules).index(rule), rule) for member, rule in wants if rule is not None]
    rule = min(found, key=lambda f: f[:2])[2] if found else None
    untaken = [member for member, own in wants if own is None and member.type == "embedding"]
    if untaken and all(inexact for inexact, _, _ in found):
        return _left_in_float(layer, rules, untaken)
    if rule is None:
        return Decline("no rule matches this layer")
    return Decline(f"rule {rule.match!r} keeps it in float") if rule.keep else rule


def taken_linears(gm: fx.GraphModule, rules: Sequence[LayerRule]) -> dict[fx.Node, list[Layer]]:
    """The linears that ``rules`` quantize, weights or inputs, by the value that they read, in graph order."""
    layers = find_layers(gm)
    tied, found = ties(layers), dict[fx.Node, list[Layer]]()
    for layer in layers:
        x = layer.node.args[0]
        if layer.type == "linear" and isinstance(x, fx.Node):
            rule = choose(layer, rules, tied.get(layer.name, [layer]))
            if not isinstance(rule, Decline):
                found.setdefault(x, []).append(layer)
    return found


def _left_in_float(layer: Layer, rules: Sequence[LayerRule], untaken: Sequence[Layer]) -> Decline:
    if layer not in untaken:
        return Decline(
            f"its weight is tied to {untaken[0].name!r}, which stays in float; name either exactly to quantize both"
        )
    if any(rule.matches(layer.name) for rule in rules):
        return Decline("embeddings stay in float unless a rule names their exact path or lists embedding in its types")
    return Decline("no rule matches this layer")
