"""zq_local: the codes of weights in QDQ form refined layer by layer, by gradient descent on the layer's output error.

Starts from the codes that are there, round-to-nearest or GPTQ's. ``linear(x, dequantize(codes, scale))`` keeps its
form; the codes get new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import Statistics, Weights, error_change, solvable_layers, walk
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, quant_of, quantized_matrix, replace_weight, task_name
from fxquant.qtensor import QuantizedTensor, to_matrix
from fxquant.rewrite import Log
from fxquant.solvers.zq_local import Solution, solve
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "zq_local"


def zq_local(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches), ``progress``, ``executor``, ``sequential``, ``float_targets``, and
    options of ``solvers.zq_local.solve``: ``iterations``, ``learning_rate``, ``damp_percent``. Each layer is a task.
    """
    gm, log = program.gm, Log()
    options = {k: settings[k] for k in ("iterations", "learning_rate", "damp_percent")}
    weight_of, declined = solvable_layers(gm)
    for layer, reason in declined:
        log.declined(RULE, layer, reason)

    sequential = settings["sequential"]
    queue = Queue(settings.get("executor", IN_PROCESS), settings.get("progress", quiet), RULE, len(weight_of))

    def reached(layer: fx.Node, seen: Statistics) -> None:
        node = weight_of[layer]
        quant, value = quant_of(node), float_weight(gm, node)
        args = (
            to_matrix(value, quant.spec), quantized_matrix(gm, node), seen.hessian, seen.drift, seen.held_out_hessian,
            quant.weight, options,
        )  # fmt: skip
        queue.submit(Task(task_name(RULE, node), solved, args), lambda found: write(layer, found))
        if sequential:
            queue.finish()

    def write(layer: fx.Node, found: Solution) -> None:
        node = weight_of[layer]
        quant, value = quant_of(node), float_weight(gm, node)
        if found.fell_back:
            log.declined(RULE, layer, f"nothing better than its {quant.method} codes was found: {_change(found)}")
            return
        replace_weight(gm, node, replace(found.quantized, shape=tuple(value.shape)), RULE)
        log.rewrote(RULE, layer, f"{quant.spec}, from {quant.method}, {_change(found)}")

    weights: Weights = "quantized" if sequential else "float"
    batches, drift = settings["calibration"], sequential and settings["float_targets"]
    usage = walk(gm, batches, list(weight_of), reached, weights=weights, drift=drift)
    queue.finish()
    log.rewrites.insert(0, usage.rewrite(len(batches)))
    return log


def solved(
    W: Tensor, start: QuantizedTensor, H: Tensor, drift: Tensor | None, held_out: Tensor | None, name: str,
    options: Mapping[str, Any],
) -> Solution:  # fmt: skip
    """``solvers.zq_local.solve`` as a task."""
    return solve(W, start, H, drift=drift, held_out=held_out, name=name, **options)


def _change(found: Solution) -> str:
    return f"output error {error_change(found.before, found.after, found.held_out_before, found.held_out)}"


ZQ_LOCAL = Pass("zq_local", "refine codes by gradient descent on each layer's output (ZQ-Local)", zq_local)
