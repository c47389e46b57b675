"""Codebooks: NF4, and the Gaussian grids of HIGGS, computed."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fxquant.grids import CodebookFormat

NF4 = CodebookFormat(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    name="nf4",
)  # fmt: skip
"""4-bit NormalFloat: quantiles of a normal distribution, as QLoRA (2305.14314), appendix E, lists them."""


@cache
def gaussian(bits: int) -> CodebookFormat:
    """The grid of ``2**bits`` values with the least mean squared error on N(0, 1) (HIGGS, 2411.17525).

    Its weights are scaled by the root mean square of their group.
    """
    half = lloyd_max(2**bits)
    return CodebookFormat(tuple(half.tolist()), name=f"higgs{bits}", unit="rms")


def lloyd_max(levels: int) -> Tensor:
    """The Lloyd-Max grid of an even number of ``levels`` for N(0, 1), float64, increasing and symmetric.

    Each value is the mean of its cell, each cell ends half way between neighbours::

        x_i = (phi(b_{i-1}) - phi(b_i)) / (Phi(b_i) - Phi(b_{i-1})),    b_i = (x_i + x_{i+1}) / 2

    Solved by Newton's method on the positive half, whose Jacobian is tridiagonal, from the quantiles of N(0, 3), the
    limit density of many levels (Panter and Dite, 1951). The density is log-concave, so the solution is the only one.
    """
    n = levels // 2
    quantiles = (torch.arange(n, dtype=torch.float64) + n + 0.5) / levels
    x = math.sqrt(3) * torch.special.ndtri(quantiles)
    for _ in range(60):
        residual, jacobian = _system(x)
        step = torch.linalg.solve(jacobian, residual)
        scale = 1.0
        while not _increasing(x - scale * step):
            scale /= 2
        x = x - scale * step
        if float(step.abs().max()) < 1e-14:
            break
    return torch.cat([-x.flip(0), x])


def _increasing(x: Tensor) -> bool:
    return bool((x > 0).all() and (x[1:] > x[:-1]).all())


def _system(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean of its cell`` for the positive half, and its derivative by x."""
    zero, far = x.new_zeros(1), x.new_full((1,), torch.inf)
    edges = torch.cat([zero, (x[1:] + x[:-1]) / 2, far])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    tail = torch.special.erfc(edges / math.sqrt(2)) / 2
    mass = tail[:-1] - tail[1:]
    mean = (density[:-1] - density[1:]) / mass
    by_low = density[:-1] * (mean - torch.cat([zero, edges[1:-1]])) / mass
    by_high = density[1:-1] * (edges[1:-1] - mean[:-1]) / mass[:-1]
    jacobian = torch.eye(len(x), dtype=x.dtype)
    for i in range(len(x) - 1):  # edge i+1 = (x_i + x_{i+1}) / 2 is the high end of cell i, the low end of cell i+1
        jacobian[i, i] -= by_high[i] / 2
        jacobian[i, i + 1] -= by_high[i] / 2
        jacobian[i + 1, i] -= by_low[i + 1] / 2
        jacobian[i + 1, i + 1] -= by_low[i + 1] / 2
    return x - mean, jacobian
