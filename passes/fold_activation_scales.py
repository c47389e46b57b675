"""fold_activation_scales: the shifts of pre-shifted activations taken out of the run: weights and producers carry them.

::

    linear(fake_quantize(x, exponent_bias=b), dequantize(w))
 -> linear(fake_quantize(x 2^b), dequantize(w, exponent_bias=b))           x 2^b from the constants of x's producer
 -> linear(fake_quantize(x, exponent_bias=b, shifted=True), dequantize(w, exponent_bias=b))            where it has none

Before, channel j was multiplied by 2^b_j, rounded, and divided again; now the weight's column j is divided. Powers of
two move through products without rounding, so both graphs give the same numbers, bit for bit, in float64, and in
float32 where nothing over- or underflows. LLM-FP4 (2310.16836), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.formats import parse_format
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.producers import plan_fold
from fxquant.program import Pass, Program
from fxquant.qdq import place, quant_of, quantized_of, requantize
from fxquant.rewrite import Decline, Log, aten, detach, fetch
from fxquant.scales import power_of_two

RULE = "fold_activation_scales"


def fold_activation_scales(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``into``: weights take the shift as an "exponent_bias", or their codes become "e4m3"."""
    gm, log = program.gm, Log()
    for node in [n for n in gm.graph.nodes if n.target in ROUNDINGS and n.kwargs.get("exponent_bias") is not None]:
        if node.kwargs.get("shifted"):
            continue
        read = node.kwargs["exponent_bias"]
        assert isinstance(read, fx.Node)
        bias = fetch(gm, str(read.target))
        weights = _weights(node)
        if isinstance(weights, Decline):
            log.declined(RULE, node, f"{weights.reason}; it is shifted back where it is rounded")
            continue
        for weight in weights:
            told = _take(gm, weight, bias, settings.get("into", "exponent_bias"))
            log.rewrote(RULE, next(iter(weight.users)), told)
        log.rewrote(RULE, node, _shift_producer(gm, node, read, bias))
    return log


def _weights(node: fx.Node) -> list[fx.Node] | Decline:
    """The weights that the rounded activation is multiplied with; declined where it is read otherwise."""
    found = []
    for user in node.users:
        weight = user.args[1] if user.target is aten.linear.default and user.args[0] is node else None
        if not isinstance(weight, fx.Node) or weight.target is not ops.dequantize.default:
            return Decline(f"{user.name} reads it and multiplies it with no quantized weight")
        if any(reader not in node.users for reader in weight.users):
            return Decline(f"the weight of {user.name} is shared with a layer of another input")
        if weight.kwargs.get("exponent_bias") is not None:
            return Decline(f"the weight of {user.name} has an exponent bias already")
        found.append(weight)
    return list(dict.fromkeys(found))


def _take(gm: fx.GraphModule, weight: fx.Node, bias: Tensor, into: str) -> str:
    """Divide the columns of a weight by 2^bias, and say how."""
    if into == "e4m3" and (told := _as_e4m3(gm, weight, bias)):
        return told
    name = f"{quant_of(weight).weight}_exponent_bias"
    weight.update_kwarg("exponent_bias", place(gm, weight, name, bias.clone()))
    return f"columns divided by up to 2^{int(bias.max())}, as an exponent bias of each input channel"


def _as_e4m3(gm: fx.GraphModule, weight: fx.Node, bias: Tensor) -> str | None:
    """Codes of the divided values in E4M3 under the same scales; None unless every one of them is exact."""
    q, e4m3 = quantized_of(gm, weight), parse_format("e4m3")
    if q.zero_point is not None:
        return None
    values = q.spec.format.decode(q.codes, torch.float64) * power_of_two(-bias.int(), torch.float64)
    codes = e4m3.encode(values)
    if not torch.equal(e4m3.decode(codes, torch.float64), values):
        return None
    requantize(gm, weight, replace(q, codes=codes, spec=replace(q.spec, format=e4m3)), quant_of(weight).method)
    return f"columns divided by up to 2^{int(bias.max())}, exactly as {quant_of(weight).spec}"


def _shift_producer(gm: fx.GraphModule, node: fx.Node, read: fx.Node, bias: Tensor) -> str:
    """Have x come shifted from its producer, or be shifted where it is rounded; and say which."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    plan, factors = plan_fold(gm, x, readers={node}), power_of_two(bias, torch.float64)
    if not isinstance(plan, Decline) and not torch.equal(plan.merge(factors), factors):
        plan = Decline(f"channels that {plan.producer.name} makes once have different shifts")
    if not isinstance(plan, Decline):
        try:
            plan.apply(factors)
        except ValueError as error:
            plan = Decline(str(error))
    if isinstance(plan, Decline):
        node.update_kwarg("shifted", True)
        return f"shifted where it is rounded: {plan.reason}"
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "exponent_bias"}
    if not read.users:
        detach(gm, str(read.target))
        gm.graph.erase_node(read)
    return f"shifted by {plan.producer.name}, whose constants carry it"


FOLD_ACTIVATION_SCALES = Pass(
    "fold_activation_scales",
    "move the shifts of activations into weights and producers, exactly (LLM-FP4)",
    fold_activation_scales,
)
