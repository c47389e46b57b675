"""Codes and factors of a weight found together: GPTQ around the factors, LoRC of what GPTQ leaves, in turn.

::

    T = W + W D (H + damping)^-1                    what is aimed at; D = 2/n (X_float - X)^T X, T = W without it
    U_0 V_0 = svd(T)                                Q_n = gptq(T - U_(n-1) V_(n-1)),  U_n V_n = lorc(T - Q_n)
    kept: the Q_n + U_n V_n, or gptq(T) alone, with the least tr(R H R^T), R = T - Q_n - U_n V_n

What GPTQ leaves is nearly white, and few directions hold little of it. The weight itself is not: without its first
directions its groups reach less far, so that their scales and all errors are smaller (SVDQuant, 2411.05007). From there
each half step leaves the other's part as it is and makes the same error smaller (LoftQ, 2310.08659), with GPTQ
(2210.17323) in the place of rounding to nearest, and the factors weighted by H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxquant.qtensor import QuantizedTensor
from fxquant.scheme import QuantSpec
from fxquant.solvers import gptq, lorc
from fxquant.solvers.damping import Inputs, solve_damped

Step = tuple[QuantizedTensor, lorc.Solution | None]
"""Codes of a weight, and the factors beside them; None where it has none."""


@dataclass(frozen=True)
class Pair:
    """What was found for a weight: codes, or None where those it has stay, and factors, or None.

    Errors are parts of tr(T H T^T), on the inputs that were solved for and on those held out (the same where there are
    none): ``before`` with the codes it has, ``alone`` with GPTQ's, ``after`` with what was found, in round ``round``.
    """

    quantized: QuantizedTensor | None
    factors: lorc.Solution | None
    round: int
    before: tuple[float, float]
    alone: tuple[float, float]
    after: tuple[float, float]


@dataclass(frozen=True)
class Alternation:
    """Weights that have their inputs in common.

    ``start``: what each is now, codes ``[rows, cols]``; ``ranks`` of the factors of each, 0 for codes alone;
    ``factors``: what factors are stored as; ``rounds``: how many; ``clip`` and ``damp_percent`` as for
    ``gptq.solve``, or auto: what is best on held-out inputs.
    """

    weights: Sequence[gptq.Weight]
    start: Sequence[QuantizedTensor]
    ranks: Sequence[int]
    factors: QuantSpec
    rounds: int
    weighting: lorc.Weighting = "hessian"
    damp_percent: float | Literal["auto"] = "auto"
    clip: gptq.Clip = "hessian"

    def solve(self, inputs: Inputs, whole: Inputs | None = None) -> list[Pair]:
        """The best of all rounds for every weight, on what is held out where something is, else on ``inputs``.

        ``whole``: all inputs, those held out too, on which what was best is done again. Raises what
        ``gptq.solve_together`` raises, and ConfigError for a rank that a weight does not have.
        """
        alone, damping, aimed = self._alone(inputs)
        found = self._judged(inputs, alone, list(self._rounds(inputs, damping, aimed)), aimed)
        if whole is None or not any(pair.quantized for pair in found):
            return found
        last = max(pair.round for pair in found)
        steps = list(self._rounds(whole, damping, aimed, last))
        if any(pair.quantized and not pair.factors for pair in found):
            alone = self._gptq(self._values(), whole, damping, aimed)
        final = []
        for i, pair in enumerate(found):
            if pair.factors:
                codes, factors = steps[pair.round - 1][i]
                pair = replace(pair, quantized=codes, factors=factors)
            elif pair.quantized:
                pair = replace(pair, quantized=alone[i])
            final.append(pair)
        return final

    def _alone(self, inputs: Inputs) -> tuple[list[QuantizedTensor], float, float]:
        """GPTQ's codes, its damping and that of the target."""
        if self.damp_percent != "auto":
            damping = self.damp_percent
            return self._gptq(self._values(), inputs, damping, damping), damping, damping
        solutions, aimed = solve_damped(self.weights, inputs, clip=self.clip)
        return [s.quantized for s in solutions], solutions[0].damping, aimed

    def _gptq(
        self, values: Sequence[Tensor], inputs: Inputs, damping: float, aimed: float,
        like: Sequence[QuantizedTensor] | None = None,
    ) -> list[QuantizedTensor]:  # fmt: skip
        """GPTQ's codes for ``values``; ``like``: codes whose scales they take."""
        weights = [replace(w, value=value) for w, value in zip(self.weights, values, strict=True)]
        if like is not None:
            weights = [replace(w, scales=w.scales or q.scales) for w, q in zip(weights, like, strict=True)]
        return gptq.codes_together(
            weights, inputs.H, damp_percent=damping, drift=inputs.drift, drift_damping=aimed, clip=self.clip
        )[0]

    def _rounds(self, inputs: Inputs, damping: float, aimed: float, most: int | None = None) -> Iterator[list[Step]]:
        """Codes and factors of every weight after each round."""
        targets = gptq.targets(self._values(), inputs.H, inputs.drift, aimed)
        now = replace(inputs, drift=None)
        given = [
            target - lorc.compensate(target, rank).product() if rank else target
            for target, rank in zip(targets, self.ranks, strict=True)
        ]
        codes = None
        for _ in range(self.rounds if most is None else most):
            codes = self._gptq(given, now, damping, aimed, codes)
            factors = [self._factors(t, q, r, inputs.H) for t, q, r in zip(targets, codes, self.ranks, strict=True)]
            given = [t if f is None else t - f.product(t.dtype) for t, f in zip(targets, factors, strict=True)]
            yield list(zip(codes, factors, strict=True))

    def _factors(self, target: Tensor, codes: QuantizedTensor, rank: int, H: Tensor) -> lorc.Solution | None:
        if not rank:
            return None
        restored = codes.dequantize(target.dtype)
        return lorc.solve(target, restored, self.factors, rank=rank, weighting=self.weighting, moments=H)

    def _judged(
        self, inputs: Inputs, alone: list[QuantizedTensor], rounds: list[list[Step]], aimed: float
    ) -> list[Pair]:
        targets = gptq.targets(self._values(), inputs.H, inputs.drift, aimed)
        measures = [m for m in (inputs.H, inputs.held_out) if m is not None]
        found = []
        for i, target in enumerate(targets):

            def error(restored: Tensor, target: Tensor = target) -> tuple[float, float]:
                parts = [gptq.loss(target - restored, m) / (gptq.loss(target, m) or 1.0) for m in measures]
                return parts[0], parts[-1]

            dtype = target.dtype
            before, plain = error(self.start[i].dequantize(dtype)), error(alone[i].dequantize(dtype))
            best = Pair(None, None, 0, before, plain, before)
            best = _better(best, replace(best, quantized=alone[i], after=plain))
            for n, (codes, factors) in enumerate((steps[i] for steps in rounds), 1):
                if factors is not None:
                    after = error(codes.dequantize(dtype) + factors.product(dtype))
                    best = _better(best, Pair(codes, factors, n, before, plain, after))
            found.append(best)
        return found

    def _values(self) -> list[Tensor]:
        return [w.value if w.value.dtype == torch.float64 else w.value.float() for w in self.weights]


def alternated(problem: Alternation, inputs: Inputs) -> list[Pair]:
    """``problem.solve``, and again on all inputs where some are held out."""
    return problem.solve(inputs, None if inputs.held_out is None else inputs.whole())


def _better(best: Pair, other: Pair) -> Pair:
    """``other`` where it is better on what judges, and no worse than what was there on what was solved for."""
    return other if other.after[1] < best.after[1] and other.after[0] < best.before[0] else best
