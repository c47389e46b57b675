"""gptq: the codes of weights in QDQ form refined layer by layer, so that the layer's output changes least.

``linear(x, dequantize(codes, scale))`` keeps its form; codes, scales and zero points get new values. The inputs that a
layer is solved for come from the graph itself, by default with all layers before it refined already ("sequential").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.calibrate import Statistics, Weights, error_change, shared_input, solvable_layers, walk
from fxquant.errors import CalibrationError
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, quant_of, quantized_of, replace_weight, task_name
from fxquant.qtensor import to_matrix
from fxquant.rewrite import Log
from fxquant.solvers.damping import Inputs, solve_for_all
from fxquant.solvers.gptq import Solution, Weight
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "gptq"


def gptq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches as ``batches_of`` makes them), ``progress``, ``executor``,
    ``sequential``, ``float_targets``, ``damp_percent`` (a number or auto), and options of
    ``solvers.gptq.solve_together``: ``act_order``, ``block_size``, ``clip``.

    Layers with the same input are a task. With sequential inputs each needs what was found for those before it.
    """
    gm, log = program.gm, Log()
    options = {k: settings[k] for k in ("act_order", "block_size", "clip") if k in settings}
    damp, sequential = settings.get("damp_percent", "auto"), settings.get("sequential", True)
    weight_of, declined = solvable_layers(gm)
    for layer, reason in declined:
        log.declined(RULE, layer, f"{reason}; it stays round-to-nearest")
    short: list[tuple[int, int]] = []
    done: set[fx.Node] = set()
    queue = Queue(
        settings.get("executor", IN_PROCESS),
        settings.get("progress", quiet),
        RULE,
        len(set(map(shared_input, weight_of))),
    )

    def reached(layer: fx.Node, seen: Statistics) -> None:
        """Solve the layer together with those after it that have the same input."""
        if layer in done:
            return
        same = [other for other in weight_of if shared_input(other) == shared_input(layer)]
        done.update(same)
        cols = to_matrix(float_weight(gm, weight_of[layer]), quant_of(weight_of[layer]).spec).shape[1]
        if seen.rows < cols:
            for each in same:
                short.append((seen.rows, cols))
                log.declined(RULE, each, f"too little data: {seen.rows} rows of input for a weight of {cols} columns")
            queue.skip()
            return
        args = [_weight(gm, weight_of[each]) for each in same], Inputs(*seen.figures), damp, options
        task = Task(task_name(RULE, weight_of[layer]), solve_for_all, args)

        def write(found: list[Solution]) -> None:
            for each, solution in zip(same, found, strict=True):
                _accept(gm, each, weight_of[each], solution, log)

        queue.submit(task, write)
        if sequential:
            queue.finish()

    weights: Weights = "quantized" if sequential else "float"
    batches, drift = settings["calibration"], sequential and settings.get("float_targets", False)
    usage = walk(gm, batches, list(weight_of), reached, weights=weights, drift=drift)
    queue.finish()
    if short and len(short) == len(weight_of):
        raise CalibrationError(
            f"too little calibration data: {short[0][0]} rows in {len(batches)} batches reach the first layer; gptq "
            f"needs as many as a weight has columns, here {min(cols for _, cols in short)} to "
            f"{max(cols for _, cols in short)}, and several times that to gain anything"
        )
    log.rewrites.insert(0, usage.rewrite(len(batches)))
    return log


def _weight(gm: fx.GraphModule, node: fx.Node) -> Weight:
    """The layer's weight; where its clipping was searched for, with the scales that were found."""
    quant = quant_of(node)
    scales = quantized_of(gm, node).scales if quant.method == "search_formats" else None
    return Weight(to_matrix(float_weight(gm, node), quant.spec), quant.spec, quant.weight, scales)


def _accept(gm: fx.GraphModule, layer: fx.Node, node: fx.Node, found: Solution, log: Log) -> None:
    """Write what was found, unless it is worse than what the layer has."""
    if found.fell_back:
        log.declined(RULE, layer, f"it would be worse than round-to-nearest, which stays: {_change(found)}")
        return
    replace_weight(gm, node, replace(found.quantized, shape=tuple(float_weight(gm, node).shape)), RULE)
    log.rewrote(RULE, layer, f"{quant_of(node).spec}, {_change(found)}")


def _change(found: Solution) -> str:
    """The output errors ||dW X|| / ||W X|| of round-to-nearest and of what was found."""
    errors = error_change(found.rtn_loss, found.loss, found.held_out_rtn, found.held_out)
    return f"output error {errors}, damping {found.damping:g}"


GPTQ = Pass("gptq", "refine codes against the inputs of each layer (GPTQ)", gptq)
