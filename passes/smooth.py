"""smooth: outliers of activations moved into the weights that read them (SmoothQuant).

``linear(x, W)`` -> ``linear(x / s, W diag(s))`` with ``1 / s`` folded into what produces x (``producers``). What the
model computes does not change but for rounding; where s cannot be folded, the layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import Statistics, walk
from fxquant.choice import taken_linears
from fxquant.layers import Layer
from fxquant.producers import Fold, columns_of, plan_fold, scale_constant
from fxquant.program import Pass, Program, quiet
from fxquant.rewrite import Decline, Log
from fxquant.solvers.smooth import smoothing_scales

RULE = "smooth"


def smooth(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules``, ``calibration`` (batches as ``batches_of`` makes them), ``progress``, ``alpha``."""
    gm, log = program.gm, Log()
    folds: dict[fx.Node, tuple[Fold, list[Layer]]] = {}
    for x, readers in taken_linears(gm, settings["rules"]).items():
        fold = plan_fold(gm, x, readers={layer.node for layer in readers})
        if isinstance(fold, Decline):
            for layer in readers:
                log.declined(RULE, layer.node, f"its input cannot be scaled for free: {fold.reason}")
        else:
            folds[readers[0].node] = fold, readers
    ranges: dict[fx.Node, Tensor] = {}

    def reached(node: fx.Node, seen: Statistics) -> None:
        ranges[node] = seen.absmax

    walk(
        gm, settings["calibration"], list(folds), reached, weights="float",
        progress=settings.get("progress", quiet), what=RULE,
    )  # fmt: skip
    for first, (fold, readers) in folds.items():
        s = _scales(fold, readers, ranges[first], settings.get("alpha", 0.5))
        fold.apply(1 / s)
        for layer in readers:
            edit = columns_of(layer)
            scale_constant(gm, edit.holder, edit.position, s, axis=edit.axis)
            log.rewrote(RULE, layer.node, f"{float(s.min()):.3g} to {float(s.max()):.3g} times the weight's columns")
    return log


def _scales(fold: Fold, readers: list[Layer], inputs: Tensor, alpha: float) -> Tensor:
    """One scale a channel of x, the same for channels that come from one source."""
    weights = torch.stack([_columns(layer).abs().amax(0) for layer in readers]).amax(0)
    return smoothing_scales(fold.merge(inputs.double()), fold.merge(weights.double()), alpha=alpha)


def _columns(layer: Layer) -> Tensor:
    return layer.weight.t() if layer.transposed else layer.weight


SMOOTH = Pass("smooth", "move outliers of activations into the weights that read them (SmoothQuant)", smooth)
