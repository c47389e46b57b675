"""pb_llm: a layer's salient weights in INT8, stored sparse, all others in one bit (PB-LLM, 2310.00034).

``dequantize(signs, a)`` -> ``with_outliers(dequantize(signs, a'), index, dequantize(codes, scale))`` for layers whose
rule gives ``lut(-1,1)``; a' is the mean magnitude of what is left in a block, the best in the sense of least squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import walk, why_not
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import add_outliers, float_weight, quant_of, quantized_of, quantized_weights, replace_weight, task_name
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.rewrite import Log
from fxquant.scheme import QuantSpec
from fxquant.solvers.outliers import binarize, largest, saliency
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "pb_llm"
SALIENT = "int8/group128:fp16"
"""How salient weights are stored: runs of 128 of them share a scale."""


def pb_llm(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``fraction``, ``criterion`` (magnitude, hessian), ``calibration`` for the latter, ``progress``,
    ``executor``. Each weight is a task.
    """
    gm, log = program.gm, Log()
    found = {node: next(iter(node.users)) for node in quantized_weights(gm)}
    by_inputs = settings.get("criterion") == "hessian"
    for node, layer in list(found.items()):
        reason = _not_binary(quant_of(node).spec)
        if by_inputs and reason is None:
            reason = why_not(layer) or ("its weight is shared by several layers" if len(node.users) > 1 else None)
        if reason is not None:
            log.declined(RULE, layer, reason)
            del found[node]
    parts: dict[fx.Node, Parts] = {}
    queue = Queue(settings.get("executor", IN_PROCESS), settings.get("progress", quiet), RULE, len(found))

    def submit(node: fx.Node, H: Tensor | None) -> None:
        value, old = float_weight(gm, node), quantized_of(gm, node)
        args = value.reshape(old.codes.shape), H, settings.get("fraction", 0.1), old.spec, old.shape
        queue.submit(Task(task_name(RULE, node), split, args), partial(parts.__setitem__, node))

    if by_inputs:
        weight_of = {layer: node for node, layer in found.items()}
        walk(gm, settings["calibration"], list(weight_of), lambda layer, seen: submit(weight_of[layer], seen.hessian),
             weights="float")  # fmt: skip
    else:
        for node in found:
            submit(node, None)
    queue.finish()
    for node, layer in found.items():
        rest, index, salient = parts[node]
        replace_weight(gm, node, rest, RULE)
        if salient is not None:
            add_outliers(gm, node, index, salient)
        log.rewrote(RULE, layer, f"{len(index)} of {rest.codes.numel()} weights in {SALIENT}, the others in one bit")
    return log


Parts = tuple[QuantizedTensor, Tensor, QuantizedTensor | None]
"""The weights in one bit, where the salient ones are (int64 ``[n]``), and these; None where there are none."""


def split(matrix: Tensor, H: Tensor | None, fraction: float, spec: QuantSpec, shape: tuple[int, ...]) -> Parts:
    """The salient of the weights ``[rows, cols]``, by ``H [cols, cols]`` or magnitude, and what the rest becomes."""
    index = largest(matrix.abs() if H is None else saliency(matrix, H), fraction)
    salient = quantize_tensor(matrix.reshape(-1)[index][None], SALIENT) if len(index) else None
    return binarize(matrix, index, spec, shape), index, salient


def _not_binary(spec: QuantSpec) -> str | None:
    if sorted(spec.format.table().tolist()) != [-1.0, 1.0]:
        return f"pb_llm is for weights of one bit, lut(-1,1); its rule gives {spec.format}"
    if spec.kind.format is not None or spec.kind.outer is not None:
        return f"pb_llm finds scales in fp32, fp16 or bf16; its rule gives {spec.scale}"
    return None


PB_LLM = Pass("pb_llm", "salient weights in INT8, sparse, the others in one bit (PB-LLM)", pb_llm)
