"""gwq: the weights that the loss depends on most stay in 16 bits, stored sparse; the others are quantized without them.

``dequantize(codes, scale)`` -> ``with_outliers(dequantize(codes', scale'), index, values)`` (GWQ, 2411.00850). The loss
is that of ``fxquant.gradients``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxquant.gradients import weight_gradients
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import add_outliers, float_weight, quant_of, quantized_of, quantized_weights, replace_weight
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import Log
from fxquant.solvers.outliers import largest, without

RULE = "gwq"


def gwq(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches as ``batches_of`` makes them), ``samples``, ``fraction``, ``progress``."""
    gm, log = program.gm, Log()
    weights = quantized_weights(gm)
    batches = list(settings["calibration"])[: settings.get("samples", 1)]
    scores = weight_gradients(gm, weights, batches, progress=settings.get("progress", quiet), what=RULE)
    for node in weights:
        value, quant = float_weight(gm, node), quant_of(node)
        index = largest(scores[node], settings.get("fraction", 0.01))
        layer = next(iter(node.users))
        if not len(index):
            log.declined(RULE, layer, f"a weight of {value.numel()} values has none to keep at this fraction")
            continue
        if quant.method == "rtn":  # codes that a method has refined stay as they are
            rest = without(value, index).reshape(quantized_of(gm, node).codes.shape)
            q = quantize_tensor(rest, quant.spec, name=quant.weight)
            replace_weight(gm, node, replace(q, shape=tuple(value.shape)), RULE)
        dtype = value.dtype if value.dtype in (torch.float16, torch.bfloat16) else torch.float16
        kept = value.reshape(-1)[index].to(dtype)
        if not bool(kept.isfinite().all()):  # beyond float16
            kept = value.reshape(-1)[index].to(torch.bfloat16)
        add_outliers(gm, node, index, kept)
        log.rewrote(RULE, layer, f"{len(index)} of {value.numel()} weights in 16 bits")
    return log


GWQ = Pass("gwq", "keep the weights with the largest gradients in 16 bits, sparse (GWQ)", gwq)
