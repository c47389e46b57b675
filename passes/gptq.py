"""gptq: the codes of weights in QDQ form refined layer by layer, so that the layer's output changes least.

``linear(x, dequantize(codes, scale))`` keeps its form; codes, scales and zero points get new values. The inputs that a
layer is solved for come from the graph itself, by default with all layers before it refined already ("sequential").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.calibrate import Statistics, Usage, Weights, walk, why_not
from fxquant.errors import CalibrationError
from fxquant.graph import info
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, quant_of, quantized_weights, replace_weight
from fxquant.qtensor import to_matrix
from fxquant.rewrite import Log, Rewrite
from fxquant.solvers.gptq import Solution, solve

RULE = "gptq"


def gptq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches as ``batches_of`` makes them), ``progress``, ``sequential``,
    ``float_targets``, and options of ``solvers.gptq.solve``: ``act_order``, ``damp_percent``, ``block_size``, ``clip``.
    """
    gm, log = program.gm, Log()
    options = {k: settings[k] for k in ("act_order", "damp_percent", "block_size", "clip") if k in settings}
    weight_of = _layers(gm, log)
    short: list[tuple[int, int]] = []

    def reached(layer: fx.Node, seen: Statistics) -> None:
        cols = to_matrix(float_weight(gm, weight_of[layer]), quant_of(weight_of[layer]).spec).shape[1]
        if seen.rows < cols:
            short.append((seen.rows, cols))
            log.declined(RULE, layer, f"too little data: {seen.rows} rows of input for a weight of {cols} columns")
            return
        node = weight_of[layer]
        spec, value = quant_of(node).spec, float_weight(gm, node)
        found = solve(
            to_matrix(value, spec), seen.hessian, spec, drift=seen.drift, held_out=seen.held_out_hessian,
            name=quant_of(node).weight, **options,
        )  # fmt: skip
        if found.fell_back:
            log.declined(RULE, layer, f"it would be worse than round-to-nearest, which stays: {_change(found)}")
            return
        replace_weight(gm, node, replace(found.quantized, shape=tuple(value.shape)), RULE)
        log.rewrote(RULE, layer, f"{spec}, {_change(found)}")

    weights: Weights = "quantized" if settings.get("sequential", True) else "float"
    progress, batches = settings.get("progress", quiet), settings["calibration"]
    drift = weights == "quantized" and settings.get("float_targets", False)
    usage = walk(gm, batches, list(weight_of), reached, weights=weights, drift=drift, progress=progress, what=RULE)
    if short and len(short) == len(weight_of):
        raise CalibrationError(
            f"too little calibration data: {short[0][0]} rows in {len(batches)} batches reach the first layer; gptq "
            f"needs as many as a weight has columns, here {min(cols for _, cols in short)} to "
            f"{max(cols for _, cols in short)}, and several times that to gain anything"
        )
    log.rewrites.insert(0, _used(usage, len(batches)))
    return log


def _layers(gm: fx.GraphModule, log: Log) -> dict[fx.Node, fx.Node]:
    """The layers to refine, each with the dequantize node of its weight; the others are declined."""
    found = {}
    for node in quantized_weights(gm):
        users = list(node.users)
        reasons = [why_not(user) for user in users]
        if len(users) > 1:
            names = ", ".join(info(user).path or user.name for user in users)
            reasons = [f"its weight is shared by {names}, which have inputs of their own"] * len(users)
        for user, reason in zip(users, reasons, strict=True):
            if reason is None:
                found[user] = node
            else:
                log.declined(RULE, user, f"{reason}; it stays round-to-nearest")
    return found


def _change(found: Solution) -> str:
    """The output errors ||dW X|| / ||W X|| of round-to-nearest and of what was found."""
    before, after, held_before, held_after = (
        math.sqrt(max(part, 0.0)) for part in (found.rtn_loss, found.loss, found.held_out_rtn, found.held_out)
    )
    held = "" if (before, after) == (held_before, held_after) else f" ({held_before:.2%} -> {held_after:.2%} held out)"
    return f"output error {before:.2%} -> {after:.2%}{held}, damping {found.damping:g}"


def _used(usage: Usage, batches: int) -> Rewrite:
    mebibytes = usage.peak_bytes / 2**20
    return Rewrite("calibrate", "", "", f"{usage.rows} rows in {batches} batches, {mebibytes:.1f} MiB at most")


GPTQ = Pass("gptq", "refine codes against the inputs of each layer (GPTQ)", gptq)
