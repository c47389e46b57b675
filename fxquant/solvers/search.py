"""LLM-FP4's search: the format and the clipping of a layer's activation and weight that keep its output best.

::

    O = X W^T,  O' = X' W'^T,   loss ||O' - O||^2, or sum_tc a_t b_c (O' - O)_tc^2
    X'  per tensor:  clip 2^-d of the largest magnitude, d = 0, 1/50, ... ("steps" of them up to "octaves"), any format
        pre-shifted: channel j is multiplied by 2^b_j before rounding, b_j = round(log2(clip / max|x_j|)) in 0..limit
    W'  per output channel: a clip of its own, one format for the tensor

Liu et al., LLM-FP4 (2310.16836): section 3.2 (search by coordinate descent, in rounds), section 4 (pre-shifted exponent
bias). Three things differ. Clips lie on a grid of log2, which does not depend on units as factors of the bias do. The
loss of a weight is taken from the Gram matrix of its inputs, that of an activation on a sample of rows; both through
random projections, which keep lengths on average and make a candidate cheap. The clips of rows are searched from coarse
to fine.

The paper's loss for BERT and ViT (equation 24) weights every output's error by the square of its gradient, a diagonal
Fisher matrix. Here that is taken as a product, g_tc^2 ~ a_t b_c with the same sums over channels and over tokens
(``Fisher``): then it needs no gradient of every output, and weights rows of X and of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.formats import Format
from fxquant.grids import FloatFormat, default_bias, default_specials
from fxquant.qtensor import QuantizedTensor
from fxquant.scales import Scales, block_reduce, chunks, dequantize, extremes, power_of_two, quantize
from fxquant.scheme import QuantSpec

WIDTH = 128
"""Columns of a random projection: the relative noise of a loss is sqrt(2 / WIDTH), the same for all candidates."""


@dataclass(frozen=True)
class Activation:
    """A format, a static ``scale`` (float32 ``[1, 1]``), the ``exponent_bias`` of each channel (int8 ``[K]`` or None).

    ``loss`` is ||(X' - X) W^T||^2 / ||X W^T||^2 on the sample, ``step`` the clip's place in the grid.
    """

    spec: QuantSpec
    scale: Tensor
    exponent_bias: Tensor | None
    loss: float
    step: int


@dataclass(frozen=True)
class Fisher:
    """What errors of outputs cost: ``a_t b_c``, ``tokens`` [n] times ``channels`` [N], both of mean 1."""

    tokens: Tensor
    channels: Tensor

    @staticmethod
    def of(tokens: Tensor, channels: Tensor) -> Fisher:
        """From sums of squared gradients; ones where all of them are zero."""

        def of_mean_one(sums: Tensor) -> Tensor:
            mean = sums.mean()
            return sums / mean if float(mean) > 0 else torch.ones_like(sums)

        return Fisher(of_mean_one(tokens), of_mean_one(channels))

    def sample(self, step: int) -> Fisher:
        """Of every ``step``-th token."""
        return Fisher(self.tokens[::step], self.channels)


def formats_of(bits: int) -> list[FloatFormat]:
    """Every ExMy of ``bits`` with its sign: M = 0 .. bits - 2; from 8 bits on M = 2 .. 6, the paper's candidates."""
    mantissas = range(bits - 1) if bits < 8 else range(2, bits - 1)
    found = []
    for m in mantissas:
        e = bits - 1 - m
        specials = default_specials(e, m)
        found.append(FloatFormat(e, m, default_bias(e, specials), specials))
    return found


def channel_bias(absmax: Tensor, clip: Tensor | float, limit: int) -> Tensor:
    """How far each channel is shifted up (int8 ``[K]``): ``clip(round(log2(clip / absmax_j)), 0, limit)``.

    0 for a channel that was always zero. LLM-FP4, equation 15; ``limit`` is 2^E - 1 there, so that weights which take
    the shift back stay exact in E4M3.
    """
    ratio = torch.log2(torch.as_tensor(clip, dtype=absmax.dtype) / absmax)
    bias = torch.where(absmax > 0, ratio.round().clamp(0, limit), torch.zeros_like(ratio))
    return bias.to(torch.int8)


def shift_limit(format: Format) -> int:
    """2^E - 1 for a float format with E exponent bits; 3 for others."""
    return int(2**format.ebits - 1) if isinstance(format, FloatFormat) else 3


def projection(rows: int, generator: torch.Generator, width: int = WIDTH) -> Tensor:
    """A Gaussian matrix R ``[rows, width]`` with E[R R^T] = I."""
    R: Tensor = torch.randn(rows, width, generator=generator) / width**0.5
    return R


# --- activations ------------------------------------------------------------------------------------------------------
def search_activation(
    x: Tensor, W: Tensor, absmax: Tensor, spec: QuantSpec, formats: Sequence[Format], *, shift: bool,
    limit: int | None = None, steps: int = 100, octaves: float = 2.0, near: int | None = None,
    fisher: Fisher | None = None, generator: torch.Generator,
) -> Activation:  # fmt: skip
    """The best format and clip for a sample of rows ``x [n, K]`` that are multiplied by ``W [N, K]``.

    ``absmax`` [K]: the largest magnitude of each channel in all of the data, which a sample may not hold. ``shift``:
    with a shift of every channel, up to ``limit`` (by default the format's ``shift_limit``). ``near``: only the clips
    around that step are tried (later rounds). ``fisher``: what errors of the outputs cost. CalibrationError where all
    of the data are zeros.
    """
    largest = float(absmax.amax())
    if not largest > 0:
        raise CalibrationError("an activation is zero in all of the calibration data")
    view = weighted(W, fisher).t()
    view = view @ projection(len(W), generator) if len(W) > WIDTH else view  # [K, width]: ||E W^T|| ~ ||E view||
    whole = output_error(x, view, fisher) or 1.0
    best: Activation | None = None
    for format in formats:
        most, own = shift_limit(format) if limit is None else limit, replace(spec, format=format)
        for i in range(steps) if near is None else range(max(near - 8, 0), min(near + 9, steps)):
            clip = largest * 2.0 ** (-i * octaves / steps)
            bias = channel_bias(absmax, clip, most) if shift else None
            scale = torch.full((1, 1), clip / format.max)
            loss = output_error(_rounded(x, own, scale, bias) - x, view, fisher) / whole
            if best is None or loss < best.loss:
                best = Activation(own, scale, bias, loss, i)
    assert best is not None
    return best


def weighted(W: Tensor, fisher: Fisher | None) -> Tensor:
    """``sqrt(b) W``: rows whose squared products with an input count as much as they cost."""
    return W if fisher is None else W * fisher.channels.sqrt()[:, None]


def output_error(E: Tensor, view: Tensor, fisher: Fisher | None) -> float:
    """``sum_t a_t ||(E view)_t||^2`` of errors ``E [n, K]`` of an activation; ``view [K, ...]`` has sqrt(b) in it."""
    squares = (E @ view).square().sum(1)
    return float((squares if fisher is None else squares * fisher.tokens).sum())


def _rounded(x: Tensor, spec: QuantSpec, scale: Tensor, bias: Tensor | None) -> Tensor:
    up = None if bias is None else power_of_two(bias)
    codes = quantize(x if up is None else x * up, Scales(scale), spec)
    value = dequantize(codes, Scales(scale), spec)
    return value if up is None else value / up


# --- weights ----------------------------------------------------------------------------------------------------------
def search_weight(
    W: Tensor, H: Tensor, spec: QuantSpec, formats: Sequence[Format], *, steps: int = 100, octaves: float = 2.0,
    row_weight: Tensor | None = None, generator: torch.Generator,
) -> tuple[QuantizedTensor, float]:  # fmt: skip
    """The best format of ``W [N, K]`` for inputs of second moments ``H [K, K]``, with the best clip of every block.

    A block is a row, or a group of a row. Clips of all blocks are moved together: 13 of ``steps`` 100 first, then the
    neighbours of each block's best one at 4, 2 and 1 steps. The loss of a group counts the errors of its own columns
    only. ``row_weight`` [N]: what errors of each output cost. Returns the codes and tr(dW H dW^T) / tr(W H W^T), rows
    weighted, from the same projection for every format.
    """
    L = _root(H, generator)
    by = torch.ones(len(W), 1) if row_weight is None else row_weight[:, None]
    whole = float(((W @ L).square() * by).sum()) or 1.0
    best: tuple[QuantizedTensor, float] | None = None
    for format in formats:
        own = replace(spec, format=format)
        scale = _best_clips(W, L, own, steps, octaves)
        found = _quantized(W, Scales(scale), own)
        loss = float((((found.dequantize() - W) @ L).square() * by).sum()) / whole
        if best is None or loss < best[1]:
            best = found, loss
    assert best is not None
    return best


def _root(H: Tensor, generator: torch.Generator) -> Tensor:
    """``[K, width]`` L with E[L L^T] = H: a projected Cholesky factor, of H with a thousandth of its mean diagonal."""
    damped = H.double().clone()
    damped.diagonal().add_(1e-3 * float(H.diagonal().mean()) + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise CalibrationError("the second moments of a layer's inputs are not positive semidefinite")
    L: Tensor = factor.float()
    return L if len(L) <= WIDTH else torch.mm(L, projection(len(L), generator))


def _best_clips(W: Tensor, L: Tensor, spec: QuantSpec, steps: int, octaves: float) -> Tensor:
    """The scale of every block with the least loss."""
    block = spec.block(*W.shape)
    low, high = extremes(W, block)
    ideal = torch.maximum(-low, high) / spec.format.max
    ideal = torch.where(ideal == 0, torch.ones_like(ideal), ideal)

    def scale(index: Tensor) -> Tensor:
        found: Tensor = (ideal * torch.exp2(-index * (octaves / steps))).to(spec.scale_dtype)
        return found.clamp_(min=torch.finfo(spec.scale_dtype).tiny)

    def loss(index: Tensor) -> Tensor:
        E = _restored(W, Scales(scale(index)), spec) - W
        if block[1] >= W.shape[1]:
            return (E @ L).square().sum(1, keepdim=True)
        return block_reduce(E.square() * L.square().sum(1), block, "sum")  # groups: the diagonal of H

    every = max(steps // 12, 1)
    best = torch.zeros_like(ideal)
    least = loss(best)
    trials = [torch.full_like(ideal, float(i)) for i in range(every, steps, every)]
    for trial in trials:
        best, least = _better(best, least, trial, loss(trial))
    while every > 1:
        every //= 2
        centre = best
        for sign in (-1, 1):
            trial = (centre + sign * every).clamp(0, steps - 1)
            best, least = _better(best, least, trial, loss(trial))
    return scale(best)


def _better(best: Tensor, least: Tensor, trial: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    wins = loss < least
    return torch.where(wins, trial, best), torch.where(wins, loss, least)


def _restored(W: Tensor, scales: Scales, spec: QuantSpec) -> Tensor:
    high = spec.block(*W.shape)[0]
    return torch.cat([dequantize(quantize(part, own, spec), own, spec) for _, part, own in chunks(W, scales, high)])


def _quantized(W: Tensor, scales: Scales, spec: QuantSpec) -> QuantizedTensor:
    high = spec.block(*W.shape)[0]
    codes = torch.cat([quantize(part, own, spec) for _, part, own in chunks(W, scales, high)])
    return QuantizedTensor(codes, scales.scale, None, spec, tuple(W.shape))
