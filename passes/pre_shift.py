"""pre_shift: channels of rounded activations brought to like size by powers of two, before they are rounded.

``fake_quantize(x, scale)`` -> ``fake_quantize(x, scale', exponent_bias=b)``: channel j is multiplied by 2^b_j, rounded
and divided by 2^b_j again, so that channels far below the largest one keep their bits. ``fold_activation_scales``
moves the division into the weights. LLM-FP4 (2310.16836), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import Statistics, walk
from fxquant.errors import ConfigError
from fxquant.graph import info
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import place, put, rounding_spec
from fxquant.rewrite import Log, aten, fetch
from fxquant.scales import choose, power_of_two
from fxquant.solvers.search import channel_bias, shift_limit

RULE = "pre_shift"


def pre_shift(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration``, ``progress``, ``max_shift`` (None: 2^E - 1 of the activation's format)."""
    gm, log = program.gm, Log()
    rounded = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ROUNDINGS]
    nodes = [n for n in rounded if all(user.target is aten.linear.default for user in n.users)]
    for node in rounded:
        if node not in nodes:
            log.declined(RULE, node, "it is multiplied by another activation, and no weight could take its shifts")
    if not rounded:
        raise ConfigError(
            "pre_shift shifts channels of rounded activations, and no rule of the config rounds any: give an "
            "activation, such as e2m1/tensor"
        )

    def reached(node: fx.Node, seen: Statistics) -> None:
        spec, most = rounding_spec(node), settings.get("max_shift")
        bias = channel_bias(seen.absmax, seen.absmax.amax(), shift_limit(spec.format) if most is None else most)
        if not bool(bias.any()):
            log.declined(RULE, node, "its channels are of like size already")
            return
        node.update_kwarg("exponent_bias", place(gm, node, f"{node.name}_exponent_bias", bias))
        if node.target is ops.fake_quantize.default:
            _rescale(gm, node, (seen.absmax * power_of_two(bias)).amax())
        shifted = int((bias > 0).sum())
        log.rewrote(RULE, node, f"{shifted} of {len(bias)} channels shifted up, by 2^{int(bias.max())} at most")

    walk(gm, settings["calibration"], nodes, reached, weights="float", progress=settings.get("progress", quiet),
         what=RULE)  # fmt: skip
    return log


def _rescale(gm: fx.GraphModule, node: fx.Node, absmax: Tensor) -> None:
    """The static scale of a rounding for inputs up to ``absmax``."""
    read = node.args[1]
    assert isinstance(read, fx.Node)
    scale = choose(absmax.reshape(1, 1), rounding_spec(node), name=f"the input of {info(node).path}").scale
    assert fetch(gm, str(read.target)).shape == scale.shape
    put(gm, read, scale)


PRE_SHIFT = Pass("pre_shift", "shift channels of activations to like size by powers of two (LLM-FP4)", pre_shift)
