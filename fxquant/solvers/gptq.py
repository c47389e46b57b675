"""GPTQ: codes that keep a layer's output, not its weight: each column's rounding error goes into the columns after it.

::

    loss = tr(dW H dW^T),  dW = W - W',  H = 2/n X^T X        X [n, cols]: what the layer was given
    U    : upper triangular, U^T U = (H + damping mean(diag H) I)^-1
    for column j:  w'_j = nearest(w_j);  e = (w_j - w'_j) / U_jj;  w_k -= e U_jk for every k > j

Frantar et al., GPTQ (2210.17323), section 3; columns in order of falling H_jj ("act_order") as in its released code.
Any spec goes: scales come from ``fxquant.scales``, codes from the format's own grid, saturating. Two things differ from
the released code: a column whose input was always zero is rounded to nearest instead of being set to 0, and scales
"from the up-to-date columns" hold the updates of the current block too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scales import Clip, Scales, choose, dequantize, quantize
from fxquant.scheme import QuantSpec

MOST_DAMPING = 100.0
"""Damping at which a matrix that is still not positive definite is given up."""


@dataclass(frozen=True)
class Solution:
    """What GPTQ found, and what round-to-nearest would have given; losses are parts of tr(W H W^T).

    ``loss`` is on the inputs that were solved for, ``held_out`` and ``held_out_rtn`` are on inputs that were not (the
    same where there are none). ``damping`` is the part of mean(diag H) that was added to H: ``damp_percent``, or more
    where a Cholesky factor needed it. ``quantized`` is the round-to-nearest tensor where GPTQ's would be worse on
    either (``fell_back``).
    """

    quantized: QuantizedTensor
    loss: float
    rtn_loss: float
    held_out: float
    held_out_rtn: float
    damping: float

    @property
    def fell_back(self) -> bool:
        return not (self.loss <= self.rtn_loss and self.held_out <= self.held_out_rtn)


def quantize_weight(
    W: Tensor, H: Tensor, spec: QuantSpec, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 128,
    clip: Clip = "absmax",
) -> QuantizedTensor:  # fmt: skip
    """Codes and scales of ``W [rows, cols]`` for inputs with second moments ``H [cols, cols]``; see ``solve``."""
    return solve(W, H, spec, act_order=act_order, damp_percent=damp_percent, block_size=block_size, clip=clip).quantized


def solve(
    W: Tensor, H: Tensor, spec: QuantSpec, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 128,
    clip: Clip = "absmax", drift: Tensor | None = None, held_out: Tensor | None = None, name: str = "tensor",
) -> Solution:  # fmt: skip
    """GPTQ of ``W [rows, cols]``, in float64 where W is, else in float32; never worse than round-to-nearest.

    With ``act_order`` the scales of all groups are found before, on W ("static groups"); without it each group's are
    found when its first column is reached, on the updated columns (but scales under an outer scale, NVFP4 and M2, are
    always found before). ``damp_percent`` is a fraction: 0.01 adds 1 % of mean(diag H). ``block_size`` columns are
    updated at a time; it changes speed only. ``drift`` [cols, cols] = 2/n (X_float - X)^T X says how far the inputs are
    from the float model's: W X_float is aimed at then, not W X (as in GPTAQ, 2504.02692). ``held_out`` is H of inputs
    that are only used to judge the result.

    Raises WeightError for NaN or Inf in W, CalibrationError where H is not finite, symmetric in shape or positive.
    """
    _check(W, H, name)
    rtn = quantize_tensor(W, spec, name=name)
    diagonal = H.diagonal().double()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    )
    U, damping = inverse_factor(H[order][:, order], damp_percent, name=name)
    wide = W if W.dtype == torch.float64 else W.float()
    if drift is not None:
        wide = wide + correction(wide, drift, order, U)
    columns = wide.t()[order].contiguous()  # a column of W is a row here
    static = choose(wide, spec, clip=clip, name=name) if act_order or spec.kind.outer else None
    codes, scales = _feed_back(columns, U.to(wide.dtype), order, spec, static, block_size, clip, name)
    found = QuantizedTensor(codes, scales.scale, scales.zero_point, spec, tuple(W.shape), scales.tensor_scale)
    measured = []
    for moments in (H,) if held_out is None else (H, held_out):
        whole = loss(wide, moments) or 1.0
        measured += [loss(wide - q.dequantize(wide.dtype), moments) / whole for q in (found, rtn)]
    solution = Solution(found, measured[0], measured[1], measured[-2], measured[-1], damping)
    return replace(solution, quantized=rtn) if solution.fell_back else solution


def correction(W: Tensor, drift: Tensor, order: Tensor, U: Tensor) -> Tensor:
    """W D (H + damping)^-1: added to W, its outputs on the inputs at hand come nearest to W's on the float inputs.

    The minimum over A of ||(W + A) X - W X_float||^2 plus damping times ||A||^2; U is the factor for H in ``order``.
    """
    moved = (W.double() @ drift.double())[:, order] @ U.t() @ U
    placed = torch.empty_like(moved)
    placed[:, order] = moved
    return placed.to(W.dtype)


def loss(dW: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T): twice the mean squared output over the rows of X, summed over the rows of dW."""
    return float(((dW @ H.to(dW.dtype)) * dW).sum(dtype=torch.float64))


def inverse_factor(H: Tensor, damp_percent: float, *, name: str = "tensor") -> tuple[Tensor, float]:
    """Upper triangular U (float64) with U^T U = (H + damping mean(diag H) I)^-1, and the damping it took.

    Dead inputs (H_jj = 0) count as average ones that nothing is correlated with. With P the reversal of order,
    P H P = L L^T gives H = R R^T for the upper triangular R = P L P, so U = R^-1. The damping grows tenfold until H has
    a Cholesky factor.
    """
    H = H.double()
    diagonal = H.diagonal()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    base = torch.where(alive, diagonal, mean)
    damping = damp_percent
    while damping <= MOST_DAMPING:
        damped = H.clone()
        damped.diagonal().copy_(base + damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
            if bool(U.isfinite().all()):
                return U, damping
        damping = max(10 * damping, 1e-4)
    raise CalibrationError(
        f"{name}: the {len(H)}x{len(H)} matrix H has no Cholesky factor even with {MOST_DAMPING:g} times its mean "
        f"diagonal added; it must be 2/n X^T X of the layer's inputs"
    )


def _feed_back(
    columns: Tensor, U: Tensor, order: Tensor, spec: QuantSpec, static: Scales | None, block_size: int, clip: Clip,
    name: str,
) -> tuple[Tensor, Scales]:  # fmt: skip
    """Codes ``[rows, cols]`` and scales; ``columns`` is W^T in the order of work and is overwritten."""
    cols, rows = columns.shape
    wide = spec.block(rows, cols)[1]
    groups = {} if static is None else {g: _group(static, g) for g in range(static.scale.shape[1])}
    codes = torch.empty((cols, rows), dtype=torch.uint8, device=columns.device)
    at = (order // wide).tolist()
    for start, end in _blocks(cols, wide, block_size):
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            if at[j] not in groups:
                groups[at[j]] = choose(columns[j : j + wide].t(), spec, clip=clip, name=name)
            w, own = columns[j].unsqueeze(1), groups[at[j]]
            code = quantize(w, own, spec)
            error = (w - dequantize(code, own, spec, w.dtype)).squeeze(1) / U[j, j]
            columns[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
            errors[j - start], codes[j] = error, code.squeeze(1)
        columns[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return placed.t().contiguous(), static or _join([groups[g] for g in sorted(groups)])


def _blocks(cols: int, wide: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of columns to update together; every group lies in one of them or begins one."""
    if wide <= block_size:
        step = block_size - block_size % wide
        yield from ((start, min(start + step, cols)) for start in range(0, cols, step))
        return
    for group in range(0, cols, wide):
        last = min(group + wide, cols)
        yield from ((start, min(start + block_size, last)) for start in range(group, last, block_size))


def _group(scales: Scales, group: int) -> Scales:
    """The scales of one group of columns."""
    where = slice(group, group + 1)
    zero = None if scales.zero_point is None else scales.zero_point[:, where].contiguous()
    return Scales(scales.scale[:, where].contiguous(), zero, scales.tensor_scale)


def _join(groups: list[Scales]) -> Scales:
    zeros = [g.zero_point for g in groups if g.zero_point is not None]
    return Scales(torch.cat([g.scale for g in groups], 1), torch.cat(zeros, 1) if zeros else None)


def _check(W: Tensor, H: Tensor, name: str) -> None:
    if W.dim() != 2 or tuple(H.shape) != (W.shape[1],) * 2:
        raise CalibrationError(
            f"{name}: W is {list(W.shape)} and H is {list(H.shape)}; expected [rows, cols] and [cols, cols]"
        )
    if not bool(H.isfinite().all()) or bool((H.diagonal() < 0).any()):
        raise CalibrationError(f"{name}: H holds NaN, Inf or a negative diagonal; expected 2/n X^T X of finite inputs")
