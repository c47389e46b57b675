"""How much damping a layer's solution gets: as much as is best on inputs that were held out.

H and D are estimates from the rows of X there are, and what is solved for fits the noise in them: with few rows for the
columns there are, the codes and even more the corrected target are worse on other inputs. Two dampings are chosen:

::

    T = W + W D (H + r mean(diag H) I)^-1       the target: the r of TARGETS, infinity (T = W) among them, under which
                                                T X is nearest to W X_float
    Q = gptq(T) with H + d mean(diag H) I       the codes: the d of CODES under which Q X is nearest to W X_float
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fxquant.solvers.gptq import Solution, Weight, codes_together, judged, loss, solve_together, targets

CODES = (0.03, 0.3)
"""Dampings of H for the codes; the first where nothing is held out."""
TARGETS = (1.0, 0.1, math.inf)
"""Dampings of H for the target; the first where nothing is held out."""


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs X ``[n, cols]``: ``H = 2/n X^T X`` and ``drift = 2/n (X_float - X)^T X``.

    ``drift`` is None where the outputs on X are aimed at; ``held_out`` and ``held_drift`` are the same of other inputs,
    which are ``share`` of all.
    """

    H: Tensor
    drift: Tensor | None = None
    held_out: Tensor | None = None
    held_drift: Tensor | None = None
    share: float = 0.0

    def whole(self) -> Inputs:
        """All inputs, those held out too."""
        if self.held_out is None:
            return Inputs(self.H, self.drift)
        drift = None if self.drift is None or self.held_drift is None else self.drift.lerp(self.held_drift, self.share)
        return Inputs(self.H.lerp(self.held_out, self.share), drift)


def target_damping(values: Sequence[Tensor], inputs: Inputs, tries: Sequence[float] = TARGETS) -> float:
    """The damping of ``tries`` whose target is best on what is held out, for all of the weights ``[rows, cols]``."""
    if inputs.drift is None or inputs.held_out is None:
        return tries[0]
    tall, errors = torch.cat(list(values)), []
    for damping in tries:
        (target,) = targets([tall], inputs.H, inputs.drift, damping)
        same = math.isinf(damping)
        errors.append(0.0 if same else target_error(tall, target, inputs.held_out, inputs.held_drift))
    return tries[errors.index(min(errors))]


def solve_damped(
    weights: Sequence[Weight], inputs: Inputs, *, tries: Sequence[float] = CODES, **options: Any
) -> tuple[list[Solution], float]:
    """``gptq.solve_together`` with the damping that is best on what is held out, and the damping of the target.

    One damping for all weights, in the solutions. With ``act_order`` the scales of the first try are those of the
    others.
    """
    wide = [w.value if w.value.dtype == torch.float64 else w.value.float() for w in weights]
    aimed, held = target_damping(wide, inputs), inputs.held_out
    whole = [1.0 if held is None else loss(value, held) or 1.0 for value in wide]
    best, least, given = None, math.inf, list(weights)
    for damping in tries if held is not None else tries[:1]:
        codes, aims, took = codes_together(
            given, inputs.H, damp_percent=damping, drift=inputs.drift, drift_damping=aimed, **options
        )
        error = 0.0
        for value, q, size in zip(wide, codes, whole, strict=True):
            if held is not None:
                error += target_error(value, q.dequantize(value.dtype), held, inputs.held_drift) / size
        if best is None or error < least:
            best, least = (codes, aims, took), error
        if options.get("act_order", True):
            given = [replace(w, scales=q.scales) for w, q in zip(weights, codes, strict=True)]
    assert best is not None
    found = [judged(w, aim, q, inputs.H, held, best[2]) for w, q, aim in zip(weights, *best[:2], strict=True)]
    return found, aimed


def solve_for_all(
    weights: Sequence[Weight], inputs: Inputs, damp: float | Literal["auto"], options: Mapping[str, Any]
) -> list[Solution]:
    """``gptq.solve_together``, or ``solve_damped``; what is good on held-out inputs is solved again on all of them.

    ``options``: ``act_order``, ``block_size`` and ``clip`` of ``gptq.solve_together``. With ``act_order`` scales stay.
    """
    if damp == "auto":
        found, aimed = solve_damped(weights, inputs, **options)
    else:
        aimed = damp
        found = solve_together(
            weights, inputs.H, drift=inputs.drift, held_out=inputs.held_out, damp_percent=damp, **options
        )
    good = [i for i, solution in enumerate(found) if not solution.fell_back]
    if not good or inputs.held_out is None:
        return found
    kept, whole = [weights[i] for i in good], inputs.whole()
    if options.get("act_order", True):
        kept = [replace(weights[i], scales=weights[i].scales or found[i].quantized.scales) for i in good]
    again, _, _ = codes_together(
        kept, whole.H, drift=whole.drift, drift_damping=aimed, damp_percent=found[0].damping, **options
    )
    for i, quantized in zip(good, again, strict=True):
        found[i] = replace(found[i], quantized=quantized)
    return found


def target_error(W: Tensor, restored: Tensor, H: Tensor, drift: Tensor | None = None) -> float:
    """``2/n (||X restored^T - X_float W^T||^2 - ||(X_float - X) W^T||^2)``.

    What is subtracted does not depend on ``restored``, so the result may be negative.
    """
    dW = restored - W
    cross = 0.0 if drift is None else float(((W @ drift.to(W.dtype)) * dW).sum(dtype=torch.float64))
    return loss(dW, H) - 2 * cross
