"""zq_local: the codes of weights in QDQ form refined layer by layer, by gradient descent on the layer's output error.

Starts from the codes that are there, round-to-nearest or GPTQ's. ``linear(x, dequantize(codes, scale))`` keeps its
form; the codes get new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.calibrate import Statistics, Weights, error_change, solvable_layers, walk
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, quant_of, quantized_matrix, replace_weight
from fxquant.qtensor import to_matrix
from fxquant.rewrite import Log
from fxquant.solvers.zq_local import Solution, solve

RULE = "zq_local"


def zq_local(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches), ``progress``, ``sequential``, ``float_targets``, and options of
    ``solvers.zq_local.solve``: ``iterations``, ``learning_rate``, ``damp_percent``.
    """
    gm, log = program.gm, Log()
    options = {k: settings[k] for k in ("iterations", "learning_rate", "damp_percent")}
    weight_of, declined = solvable_layers(gm)
    for layer, reason in declined:
        log.declined(RULE, layer, reason)

    def reached(layer: fx.Node, seen: Statistics) -> None:
        node = weight_of[layer]
        quant, value = quant_of(node), float_weight(gm, node)
        found = solve(
            to_matrix(value, quant.spec), quantized_matrix(gm, node), seen.hessian, drift=seen.drift,
            held_out=seen.held_out_hessian, name=quant.weight, **options,
        )  # fmt: skip
        if found.fell_back:
            log.declined(RULE, layer, f"nothing better than its {quant.method} codes was found: {_change(found)}")
            return
        replace_weight(gm, node, replace(found.quantized, shape=tuple(value.shape)), RULE)
        log.rewrote(RULE, layer, f"{quant.spec}, from {quant.method}, {_change(found)}")

    weights: Weights = "quantized" if settings["sequential"] else "float"
    drift = weights == "quantized" and settings["float_targets"]
    progress, batches = settings.get("progress", quiet), settings["calibration"]
    usage = walk(gm, batches, list(weight_of), reached, weights=weights, drift=drift, progress=progress, what=RULE)
    log.rewrites.insert(0, usage.rewrite(len(batches)))
    return log


def _change(found: Solution) -> str:
    return f"output error {error_change(found.before, found.after, found.held_out_before, found.held_out)}"


ZQ_LOCAL = Pass("zq_local", "refine codes by gradient descent on each layer's output (ZQ-Local)", zq_local)
