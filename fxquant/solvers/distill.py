"""Distillation through rounding: weights of a function trained so that its output stays that of the float weights.

::

    W' = s q(w / s),   w = w_0 + s g d        d: trained, in steps of codes; w_0 rounds to the codes at the start
                                              g: the mean distance of two neighbours on the format's grid
    dW'/dw = 1 inside the range of s, 0 where it clips      straight through: q is taken for the identity
    dW'/ds = q(w / s) - w / s inside, +-max where it clips  only where scales are trained too

ZeroQuant-V2 (2303.08302): ZQ-Global, where the function is a transformer block, and ZQ-Local, where it is
one layer. The gradient of a scale is LSQ's (1902.08153). One thing differs from the paper: the learning rate is in
steps of codes, so that one does for weights of any size and for every format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import Format
from fxquant.ops import operators as ops
from fxquant.qtensor import QuantizedTensor
from fxquant.scales import Scales, dequantize, quantize, spread

SCALE_RATE = 0.1
"""The learning rate of the logarithm of a scale, as a part of that of the weights in it."""

Loss = Callable[[Sequence[Tensor], int], Tensor]
"""``loss(weights, batch)``: a scalar that the weights have a gradient to."""


class Latent:
    """A weight in training. ``original`` is the weight before rounding, of the codes' shape ``[rows, cols]``.

    It starts at ``original`` wherever that rounds to the code ``start`` has, at the code's own value elsewhere: so the
    weight it stands for is exactly ``start``'s, whoever chose the codes. FormatError for scales that cannot be trained.
    """

    def __init__(self, start: QuantizedTensor, original: Tensor, *, train_scales: bool = False) -> None:
        if train_scales and (why := no_trained_scales(start)):
            raise FormatError(why)
        wide = original.detach().to(torch.float64 if original.dtype == torch.float64 else torch.float32)
        value = dequantize(start.codes, start.scales, start.spec, wide.dtype)
        rounded = dequantize(quantize(wide, start.scales, start.spec), start.scales, start.spec, wide.dtype)
        self.start = start
        self.base = torch.where(rounded == value, wide, value)
        step = mean_step(start.spec.format) * start.scales.effective.to(wide.dtype)
        self.unit = spread(step, start.spec.block(*wide.shape), wide.shape)
        self.delta = torch.zeros_like(self.base, requires_grad=True)
        self.log_scale = torch.zeros_like(start.scale, dtype=wide.dtype, requires_grad=True) if train_scales else None

    @property
    def parameters(self) -> list[Tensor]:
        return [self.delta] if self.log_scale is None else [self.delta, self.log_scale]

    @property
    def nbytes(self) -> int:
        """Bytes of the latent weight, its gradient, Adam's two moments and the best values so far."""
        return self.base.nbytes + 5 * sum(p.nbytes for p in self.parameters)

    def weight(self) -> Tensor:
        """W' ``[rows, cols]``, with straight-through gradients to ``parameters``."""
        latent, spec = self.base + self.unit * self.delta, self.start.spec
        if self.log_scale is not None:
            return self._trained(latent, self.log_scale)
        scales = self.start.scales
        return ops.fake_quantize(  # type: ignore[no-any-return]
            latent, scales.scale, scales.zero_point, str(spec), scales.tensor_scale
        )

    def _trained(self, latent: Tensor, log_scale: Tensor) -> Tensor:
        spec, zero = self.start.spec, self.start.zero_point
        stored = self._scales()
        ideal = self.start.scale.to(latent.dtype) * log_scale.exp()
        block = spec.block(*latent.shape)
        wide = spread(ideal + (stored.scale.to(latent.dtype) - ideal).detach(), block, latent.shape)
        low, high = -spec.format.max, spec.format.max
        if zero is None:
            ratio = (latent / wide).clamp(low, high)
        else:
            below = spread(zero.to(latent.dtype), block, latent.shape)
            ratio = torch.minimum(torch.maximum(latent / wide, -below), high - below)
        with torch.no_grad():
            unscaled = Scales(torch.ones_like(stored.scale), zero)
            code = dequantize(quantize(latent, stored, spec), unscaled, spec, latent.dtype)
        return wide * (ratio + (code - ratio).detach())

    def _scales(self) -> Scales:
        """The scales as they would be stored."""
        start = self.start.scales
        if self.log_scale is None:
            return start
        with torch.no_grad():
            ideal = (start.scale.to(self.log_scale.dtype) * self.log_scale.exp()).to(start.scale.dtype)
        return Scales(ideal.clamp(min=torch.finfo(ideal.dtype).tiny), start.zero_point)

    def quantized(self) -> QuantizedTensor:
        """Codes and scales of the weight as it is now."""
        scales = self._scales()
        with torch.no_grad():
            codes = quantize(self.base + self.unit * self.delta, scales, self.start.spec)
        return QuantizedTensor(
            codes, scales.scale, scales.zero_point, self.start.spec, self.start.shape, scales.tensor_scale
        )


def mean_step(format: Format) -> float:
    """The mean distance of two neighbouring codes of a format, for a scale of 1."""
    table = format.table()
    finite = table[table.isfinite()]
    return float(finite.max() - finite.min()) / (len(finite) - 1)


def no_trained_scales(q: QuantizedTensor) -> str | None:
    """Why the scales of ``q`` cannot be trained; None where they can."""
    if q.spec.kind.format is None:
        return None
    return f"scales stored as {q.spec.scale} are too coarse to be trained; fp32, fp16 and bf16 scales can be"


def relative_error(y: Tensor, target: Tensor, power: float, kind: str = "relative") -> Tensor:
    """The squared error of ``y`` as a part of what it should be, a scalar with a gradient.

    ``mse``: ``mean((y - target)^2) / power``, ``power`` the mean square of all targets. ``relative``: the mean of
    ``||y - t||^2 / ||t||^2`` over rows, so that a few tokens of huge activations do not drown the others; a row is a
    token's vector ``[..., width]``, of images ``[batch, channels, ...]`` the whole image. Rows whose mean square is
    below ``power / 1000`` count as if it were that.
    """
    y, target = y.float(), target.float()
    if kind == "mse":
        return (y - target).square().mean() / power
    rows = (target.shape[0], -1) if target.dim() >= 4 else (-1, target.shape[-1]) if target.dim() else (1, 1)
    own = target.reshape(rows).square().mean(1).clamp(min=power / 1000)
    return ((y - target).reshape(rows).square().mean(1) / own).mean()


@dataclass(frozen=True)
class Outcome:
    """Losses on the batches that judge, at the start and at the best iterate, whose number is ``iteration``.

    ``iteration`` is 0 where nothing was better than the start.
    """

    start: float
    best: float
    iteration: int

    @property
    def improved(self) -> bool:
        return self.iteration > 0


def distill(
    latents: Sequence[Latent], loss: Loss, train: Sequence[int], held_out: Sequence[int], *, iterations: int,
    learning_rate: float, batch: int = 1, checks: int = 8, seed: int = 0,
) -> Outcome:  # fmt: skip
    """Train ``latents`` by Adam on mini-batches of ``train`` and leave them at the best iterate for ``held_out``.

    A mini-batch is ``batch`` of the numbers in ``train``, drawn anew without replacement epoch by epoch (``seed``); the
    learning rate, in steps of codes, falls linearly to 0. ``checks`` times the loss on ``held_out`` is looked at
    (on ``train`` where there is none), and what was best stays: the start, where nothing is better.
    """
    judges = list(held_out) or list(train)
    start = best = _mean_loss(latents, loss, judges)
    at, kept = 0, [p.detach().clone() for latent in latents for p in latent.parameters]
    groups = [{"params": [latent.delta for latent in latents], "lr": learning_rate}]
    if scales := [latent.log_scale for latent in latents if latent.log_scale is not None]:
        groups.append({"params": scales, "lr": learning_rate * SCALE_RATE})
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(iterations, 1))
    generator, left = torch.Generator().manual_seed(seed), list[int]()
    every = max(1, math.ceil(iterations / checks))
    for step in range(1, iterations + 1):
        picked = []
        for _ in range(min(batch, len(train))):
            left = left or [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
            picked.append(left.pop())
        if not _backward(latents, loss, picked):
            break
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        if step % every == 0 or step == iterations:
            now = _mean_loss(latents, loss, judges)
            if now < best:
                best, at = now, step
                _copy(latents, kept)
    with torch.no_grad():
        for parameter, value in zip((p for latent in latents for p in latent.parameters), kept, strict=True):
            parameter.copy_(value)
    return Outcome(start, best, at)


def _backward(latents: Sequence[Latent], loss: Loss, picked: Sequence[int]) -> bool:
    """Gradients of the mean loss of some batches, one batch's graph alive at a time; False if they are not finite."""
    with torch.enable_grad():
        weights = [latent.weight() for latent in latents]
        leaves = [w.detach().requires_grad_() for w in weights]
        for i in picked:
            (loss(leaves, i) / len(picked)).backward()
        used = [(w, leaf.grad) for w, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None]
        if not used or not all(bool(grad.isfinite().all()) for _, grad in used):
            return False
        torch.autograd.backward([w for w, _ in used], [grad for _, grad in used])
    return True


def _mean_loss(latents: Sequence[Latent], loss: Loss, batches: Sequence[int]) -> float:
    with torch.no_grad():
        weights = [latent.weight() for latent in latents]
        return sum(float(loss(weights, i)) for i in batches) / len(batches)


def _copy(latents: Sequence[Latent], kept: Sequence[Tensor]) -> None:
    for value, parameter in zip(kept, (p for latent in latents for p in latent.parameters), strict=True):
        value.copy_(parameter.detach())
