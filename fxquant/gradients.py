"""Gradients of a model's loss from one backward pass a batch, of the graph in QDQ form with its float weights.

The loss is the cross entropy of the next token for language models (token ids in, logits out), else half the sum of
squares of the first output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant.calibrate import Batch
from fxquant.errors import CalibrationError
from fxquant.graph import info
from fxquant.ops import ROUNDINGS
from fxquant.program import Progress, quiet
from fxquant.qdq import float_weight, quant_of, quantized_weights


def weight_gradients(
    gm: fx.GraphModule, weights: Sequence[fx.Node], batches: Sequence[Batch], *, progress: Progress = quiet,
    what: str = "gradients",
) -> dict[fx.Node, Tensor]:  # fmt: skip
    """Sum over ``batches`` of |d loss / d W| of each weight. CalibrationError where it is NaN or Inf."""
    leaves = {node: float_weight(gm, node).detach().clone().requires_grad_() for node in weights}
    totals: dict[fx.Node, Tensor] = {}
    for i, batch in enumerate(batches):
        progress(what, i, len(batches))
        with torch.enable_grad():
            loss = task_loss(_Float(gm, leaves).run(*batch), batch)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for node, grad in zip(weights, found, strict=True):
            part = torch.zeros_like(leaves[node]) if grad is None else grad.abs()
            if not bool(part.isfinite().all()):
                raise CalibrationError(f"weight {quant_of(node).weight!r}: its gradient is NaN or Inf in batch {i}")
            totals[node] = totals[node] + part if node in totals else part
    progress(what, len(batches), len(batches))
    return totals


@dataclass(frozen=True)
class Importance:
    """g = d loss / d y of a layer's output ``[tokens, channels]``, its squares summed over either.

    ``tokens``: over channels, ``[tokens]`` of every batch; ``channels``: over the tokens of all batches.
    """

    tokens: Sequence[Tensor]
    channels: Tensor


def output_importance(
    gm: fx.GraphModule, layers: Sequence[fx.Node], batches: Sequence[Batch], *, progress: Progress = quiet,
    what: str = "gradients",
) -> dict[fx.Node, Importance]:  # fmt: skip
    """Of every layer's output ``[..., channels]``, in the model with float weights and activations.

    CalibrationError where a gradient is NaN or Inf.
    """
    weights = {node: float_weight(gm, node) for node in quantized_weights(gm)}
    tokens: dict[fx.Node, list[Tensor]] = {layer: [] for layer in layers}
    channels: dict[fx.Node, Tensor] = {}
    for i, batch in enumerate(batches):
        progress(what, i, len(batches))
        with torch.enable_grad():
            model = _Float(gm, weights, watched=set(layers), rounded=False)
            loss = task_loss(model.run(*batch), batch)
            outputs = [model.outputs[layer] for layer in layers]
            found = (
                torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else [None] * len(layers)
            )
        for layer, output, grad in zip(layers, outputs, found, strict=True):
            squares = (
                (torch.zeros_like(output) if grad is None else grad).float().square().reshape(-1, output.shape[-1])
            )
            if not bool(squares.isfinite().all()):
                raise CalibrationError(
                    f"layer {info(layer).path!r}: the gradient of its output is NaN or Inf in batch {i}"
                )
            tokens[layer].append(squares.sum(1))
            channels[layer] = squares.sum(0) + channels[layer] if layer in channels else squares.sum(0)
    progress(what, len(batches), len(batches))
    return {layer: Importance(tokens[layer], channels[layer]) for layer in layers}


def task_loss(outputs: Sequence[Any], batch: Batch) -> Tensor:
    """The loss of a batch. CalibrationError for models that have no output of floats."""
    first = next((o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()), None)
    if first is None:
        raise CalibrationError("the model has no output of floats: there is no loss that gradients could be taken of")
    ids = batch[0]
    tokens = not ids.is_floating_point() and ids.dim() == 2 and ids.shape[1] > 1
    if tokens and first.dim() == 3 and first.shape[:2] == ids.shape and int(ids.max()) < first.shape[2]:
        return F.cross_entropy(first[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return first.float().square().sum() / 2


class _Float(fx.Interpreter):
    """The graph with float weights; without ``rounded``, activations are not rounded. ``watched`` outputs are kept."""

    def __init__(
        self, gm: fx.GraphModule, weights: Mapping[fx.Node, Tensor], *, watched: set[fx.Node] | None = None,
        rounded: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(gm)
        self.weights, self.watched, self.rounded = weights, watched or set(), rounded
        self.outputs: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.weights:
            return self.weights[n]
        if not self.rounded and n.target in ROUNDINGS:
            return self.env[n.all_input_nodes[0]]
        value = super().run_node(n)
        if n in self.watched:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.outputs[n] = value
        return value
