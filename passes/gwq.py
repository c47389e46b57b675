"""gwq: the weights that the loss depends on most stay in 16 bits, stored sparse; the others are quantized without them.

``dequantize(codes, scale)`` -> ``with_outliers(dequantize(codes', scale'), index, values)`` (GWQ, 2411.00850). The loss
is that of ``fxquant.gradients``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.gradients import weight_gradients
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import add_outliers, float_weight, quant_of, quantized_of, quantized_weights, replace_weight, task_name
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.rewrite import Log
from fxquant.scheme import QuantSpec
from fxquant.solvers.outliers import largest, without
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "gwq"


def gwq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches as ``batches_of`` makes them), ``samples``, ``fraction``, ``progress``,
    ``executor``. Each weight is a task.
    """
    gm, log = program.gm, Log()
    weights = quantized_weights(gm)
    batches = list(settings["calibration"])[: settings.get("samples", 1)]
    progress = settings.get("progress", quiet)
    scores = weight_gradients(gm, weights, batches, progress=progress, what=RULE)
    queue = Queue(settings.get("executor", IN_PROCESS), progress, RULE, len(weights))

    def write(node: fx.Node, found: Kept) -> None:
        value, layer = float_weight(gm, node), next(iter(node.users))
        if not len(found.index):
            log.declined(RULE, layer, f"a weight of {value.numel()} values has none to keep at this fraction")
            return
        if found.rest is not None:
            replace_weight(gm, node, replace(found.rest, shape=tuple(value.shape)), RULE)
        add_outliers(gm, node, found.index, found.values)
        log.rewrote(RULE, layer, f"{len(found.index)} of {value.numel()} weights in 16 bits")

    for node in weights:
        quant, fraction = quant_of(node), settings.get("fraction", 0.01)
        spec = quant.spec if quant.method == "rtn" else None  # codes that a method has refined stay as they are
        matrix = float_weight(gm, node).reshape(quantized_of(gm, node).codes.shape)
        task = Task(task_name(RULE, node), split, (matrix, scores.pop(node), fraction, spec, quant.weight))
        queue.submit(task, partial(write, node))
    queue.finish()
    return log


@dataclass(frozen=True)
class Kept:
    """``values`` stay at ``index``, int64 ``[n]``; ``rest``: the others in codes, None where those there are stay."""

    index: Tensor
    values: Tensor
    rest: QuantizedTensor | None


def split(matrix: Tensor, score: Tensor, fraction: float, spec: QuantSpec | None, name: str) -> Kept:
    """The values of ``matrix`` with the highest scores in 16 bits, and the others as ``spec``, if there is one."""
    index = largest(score, fraction)
    dtype = matrix.dtype if matrix.dtype in (torch.float16, torch.bfloat16) else torch.float16
    kept = matrix.reshape(-1)[index].to(dtype)
    if not bool(kept.isfinite().all()):  # beyond float16
        kept = matrix.reshape(-1)[index].to(torch.bfloat16)
    rest = None if spec is None or not len(index) else quantize_tensor(without(matrix, index), spec, name=name)
    return Kept(index, kept, rest)


GWQ = Pass("gwq", "keep the weights with the largest gradients in 16 bits, sparse (GWQ)", gwq)
