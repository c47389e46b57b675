"""gwq: the weights that the loss depends on most stay in 16 bits, stored sparse; the others are quantized without them.

``dequantize(codes, scale)`` -> ``with_outliers(dequantize(codes', scale'), index, values)`` (GWQ, 2411.00850). The loss
is the cross entropy of the next token where the model takes token ids [batch, length] and gives logits [batch, length,
vocabulary] first, else half the sum of squares of its first output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant.calibrate import Batch
from fxquant.errors import CalibrationError
from fxquant.program import Pass, Program, Progress, quiet
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
    scores = gradients(gm, weights, batches, progress=settings.get("progress", quiet))
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


def gradients(
    gm: fx.GraphModule, weights: Sequence[fx.Node], batches: Sequence[Batch], *, progress: Progress = quiet
) -> dict[fx.Node, Tensor]:
    """Sum over ``batches`` of |d loss / d W| of each weight, of the model with float weights."""
    leaves = {node: float_weight(gm, node).detach().clone().requires_grad_() for node in weights}
    totals: dict[fx.Node, Tensor] = {}
    for i, batch in enumerate(batches):
        progress(RULE, i, len(batches))
        with torch.enable_grad():
            loss = _loss(_Float(gm, leaves).run(*batch), batch)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for node, grad in zip(weights, found, strict=True):
            part = torch.zeros_like(leaves[node]) if grad is None else grad.abs()
            if not bool(part.isfinite().all()):
                raise CalibrationError(f"weight {quant_of(node).weight!r}: its gradient is NaN or Inf in batch {i}")
            totals[node] = totals[node] + part if node in totals else part
    progress(RULE, len(batches), len(batches))
    return totals


def _loss(outputs: Sequence[Any], batch: Batch) -> Tensor:
    first = next((o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()), None)
    if first is None:
        raise CalibrationError("the model has no output of floats: there is no loss that gwq could take gradients of")
    ids = batch[0]
    tokens = not ids.is_floating_point() and ids.dim() == 2 and ids.shape[1] > 1
    if tokens and first.dim() == 3 and first.shape[:2] == ids.shape and int(ids.max()) < first.shape[2]:
        return F.cross_entropy(first[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return first.float().square().sum() / 2


class _Float(fx.Interpreter):
    """The graph with float leaves in the place of quantized weights."""

    def __init__(self, gm: fx.GraphModule, leaves: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(gm)
        self.leaves = leaves

    def run_node(self, n: fx.Node) -> Any:
        return self.leaves[n] if n in self.leaves else super().run_node(n)


GWQ = Pass("gwq", "keep the weights with the largest gradients in 16 bits, sparse (GWQ)", gwq)
