"""pb_llm: a layer's salient weights in INT8, stored sparse, all others in one bit (PB-LLM, 2310.00034).

``dequantize(signs, a)`` -> ``with_outliers(dequantize(signs, a'), index, dequantize(codes, scale))`` for layers whose
rule gives ``lut(-1,1)``; a' is the mean magnitude of what is left in a block, the best in the sense of least squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import Statistics, walk, why_not
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import add_outliers, float_weight, quant_of, quantized_of, quantized_weights, replace_weight
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import Log
from fxquant.scheme import QuantSpec
from fxquant.solvers.outliers import binarize, largest, saliency

RULE = "pb_llm"
SALIENT = "int8/group128:fp16"
"""How salient weights are stored: runs of 128 of them share a scale."""


def pb_llm(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``fraction``, ``criterion`` (magnitude, hessian), ``calibration`` for the latter, ``progress``."""
    gm, log = program.gm, Log()
    scores: dict[fx.Node, Tensor] = {}
    found = {node: next(iter(node.users)) for node in quantized_weights(gm)}
    for node, layer in list(found.items()):
        reason = _not_binary(quant_of(node).spec)
        if settings.get("criterion") == "hessian" and reason is None:
            reason = why_not(layer) or ("its weight is shared by several layers" if len(node.users) > 1 else None)
        if reason is not None:
            log.declined(RULE, layer, reason)
            del found[node]
        elif settings.get("criterion") != "hessian":
            scores[node] = float_weight(gm, node).abs()
    if len(scores) < len(found):
        _from_hessians(gm, found, scores, settings)
    for node, layer in found.items():
        value, old = float_weight(gm, node), quantized_of(gm, node)
        matrix, index = value.reshape(old.codes.shape), largest(scores[node], settings.get("fraction", 0.1))
        replace_weight(gm, node, binarize(matrix, index, old.spec, old.shape), RULE)
        if len(index):
            add_outliers(gm, node, index, quantize_tensor(value.reshape(-1)[index][None], SALIENT))
        log.rewrote(RULE, layer, f"{len(index)} of {value.numel()} weights in {SALIENT}, the others in one bit")
    return log


def _from_hessians(
    gm: fx.GraphModule, found: Mapping[fx.Node, fx.Node], scores: dict[fx.Node, Tensor], settings: Mapping[str, Any]
) -> None:
    """``scores`` by the Hessian criterion, of inputs from the float model."""
    weight_of = {layer: node for node, layer in found.items()}

    def reached(layer: fx.Node, seen: Statistics) -> None:
        node = weight_of[layer]
        scores[node] = saliency(float_weight(gm, node).reshape(quantized_of(gm, node).codes.shape), seen.hessian)

    progress = settings.get("progress", quiet)
    walk(gm, settings["calibration"], list(weight_of), reached, weights="float", progress=progress, what=RULE)


def _not_binary(spec: QuantSpec) -> str | None:
    if sorted(spec.format.table().tolist()) != [-1.0, 1.0]:
        return f"pb_llm is for weights of one bit, lut(-1,1); its rule gives {spec.format}"
    if spec.kind.format is not None or spec.kind.outer is not None:
        return f"pb_llm finds scales in fp32, fp16 or bf16; its rule gives {spec.scale}"
    return None


PB_LLM = Pass("pb_llm", "salient weights in INT8, sparse, the others in one bit (PB-LLM)", pb_llm)
