"""ZQ-Local: codes found by gradient descent on a layer's output error, straight through the rounding.

::

    loss = tr((T - W') H (T - W')^T),   W' = dequantize(quantize(L)),   H = 2/n X^T X    X [n, cols]: its inputs
    straight through: dW'/dL = 1, so  dloss/dL = -2 (T - W') H;   Adam moves the latent weights L, its rate falls to 0

T is the weight, or with ``drift`` the weight whose outputs come nearest to the float model's. Rows do not depend on
each other: each keeps its best iterate. The scales stay. ZeroQuant-V2 (2303.08302), section 3: distillation layer by
layer, here on the Gram matrix of the inputs, so that a step costs the same whatever the amount of data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.qtensor import QuantizedTensor
from fxquant.scales import dequantize, quantize, spread
from fxquant.solvers.gptq import loss, targets

_BETAS = (0.9, 0.99)
"""Adam's, the second for runs of some ten to some hundred steps."""


@dataclass(frozen=True)
class Solution:
    """What was found, and the errors before and after, parts of tr(W H W^T); ``quantized`` is the start if better.

    ``held_out`` and ``held_out_before`` are on inputs that were not solved for (the same where there are none).
    """

    quantized: QuantizedTensor
    before: float
    after: float
    held_out_before: float
    held_out: float

    @property
    def fell_back(self) -> bool:
        return not (self.after < self.before and self.held_out <= self.held_out_before)


def solve(
    W: Tensor, start: QuantizedTensor, H: Tensor, *, iterations: int = 64, learning_rate: float = 0.01,
    damp_percent: float = 0.01, drift: Tensor | None = None, held_out: Tensor | None = None, name: str = "tensor",
) -> Solution:  # fmt: skip
    """New codes for ``W [rows, cols]``, whose codes and scales are ``start`` (a matrix); never worse than these.

    ``learning_rate`` is in units of the scale: what a latent weight moves at most in a step, at first. ``drift`` and
    ``held_out`` as in ``gptq.solve``; ``damp_percent`` is for ``drift`` alone. CalibrationError as there.
    """
    wide = W if W.dtype == torch.float64 else W.float()
    target = wide
    (target,) = targets([wide], H, drift, damp_percent)
    codes = _descend(target, start, H.to(wide.dtype), iterations, learning_rate)
    found = replace(start, codes=codes)
    errors = []
    for moments in (H,) if held_out is None else (H, held_out):
        whole = loss(wide, moments) or 1.0
        errors += [loss(target - q.dequantize(wide.dtype), moments) / whole for q in (start, found)]
    solution = Solution(found, errors[0], errors[1], errors[-2], errors[-1])
    return replace(solution, quantized=start) if solution.fell_back else solution


def _descend(T: Tensor, start: QuantizedTensor, H: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """The best codes of every row, those of ``start`` among them."""
    spec, scales = start.spec, start.scales
    unit = spread(scales.effective.to(T.dtype), spec.block(*T.shape), T.shape)
    codes = start.codes
    restored = dequantize(codes, scales, spec, T.dtype)
    latent = torch.where(quantize(T, scales, spec) == codes, T, restored)  # T itself where it rounds to its code
    best, least = codes.clone(), torch.full_like(T[:, 0], torch.inf)
    mean, square = torch.zeros_like(T), torch.zeros_like(T)
    tiny = 1e-12
    for step in range(iterations + 1):
        error = T - restored
        slope = error @ H  # -1/2 dloss/dW'
        own = (error * slope).sum(1)
        better = own < least
        least = torch.where(better, own, least)
        best[better] = codes[better]
        if step == iterations:
            break
        slope *= unit  # by the latent weight in units of its scale
        mean.lerp_(slope, 1 - _BETAS[0])
        square.lerp_(slope.square(), 1 - _BETAS[1])
        rate = learning_rate * (1 - step / iterations) / (1 - _BETAS[0] ** (step + 1))
        by = (square / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(tiny)
        latent += (mean / by).mul_(unit).mul_(rate)
        codes = quantize(latent, scales, spec)
        restored = dequantize(codes, scales, spec, T.dtype)
    return best
