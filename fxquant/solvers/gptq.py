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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.grids import FloatFormat, IntFormat
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scales import Scales, choose, dequantize, quantize, spread
from fxquant.scheme import QuantSpec

Clip = Literal["absmax", "mse", "hessian"]
"""How scales are chosen: as ``scales.choose`` does, or for the least ``sum (w_j - w'_j)^2 / U_jj^2``.

1 / U_jj^2 is what of input j the inputs after it do not explain: GPTQ makes up for the rest of the error.
"""

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
    W: Tensor, H: Tensor, spec: QuantSpec, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 32,
    clip: Clip = "absmax",
) -> QuantizedTensor:  # fmt: skip
    """Codes and scales of ``W [rows, cols]`` for inputs with second moments ``H [cols, cols]``; see ``solve``."""
    return solve(W, H, spec, act_order=act_order, damp_percent=damp_percent, block_size=block_size, clip=clip).quantized


@dataclass(frozen=True)
class Weight:
    """A weight to solve for: ``value [rows, cols]``, what it becomes, and its name for errors.

    ``scales``: those that its codes are to have (found by a search, say); None: they are chosen.
    """

    value: Tensor
    spec: QuantSpec
    name: str = "tensor"
    scales: Scales | None = None


def solve(
    W: Tensor, H: Tensor, spec: QuantSpec, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 32,
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
    (found,) = solve_together(
        [Weight(W, spec, name)], H, act_order=act_order, damp_percent=damp_percent, block_size=block_size, clip=clip,
        drift=drift, held_out=held_out,
    )  # fmt: skip
    return found


def solve_together(
    weights: Sequence[Weight], H: Tensor, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 32,
    clip: Clip = "absmax", drift: Tensor | None = None, drift_damping: float | None = None,
    held_out: Tensor | None = None,
) -> list[Solution]:  # fmt: skip
    """``solve`` of several weights that have their inputs in common: one factor of H, and one loop over the columns.

    Rows do not depend on each other, so weights of the same spec and dtype are solved as the rows of one matrix.
    ``drift_damping`` is the damping of the correction for ``drift``: ``damp_percent`` unless it is given.
    """
    found, aims, damping = codes_together(
        weights, H, act_order=act_order, damp_percent=damp_percent, block_size=block_size, clip=clip, drift=drift,
        drift_damping=drift_damping,
    )  # fmt: skip
    return [judged(w, aim, q, H, held_out, damping) for w, aim, q in zip(weights, aims, found, strict=True)]


def codes_together(
    weights: Sequence[Weight], H: Tensor, *, act_order: bool = True, damp_percent: float = 0.01, block_size: int = 32,
    clip: Clip = "absmax", drift: Tensor | None = None, drift_damping: float | None = None,
) -> tuple[list[QuantizedTensor], list[Tensor], float]:  # fmt: skip
    """``solve_together`` without judging: the codes, what was aimed at, and the damping it took."""
    for weight in weights:
        _check(weight.value, H, weight.name)
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = torch.argsort(H.diagonal().double(), descending=True, stable=True)
    U, damping = inverse_factor(H[order][:, order], damp_percent, name=weights[0].name)
    wide = [w.value if w.value.dtype == torch.float64 else w.value.float() for w in weights]
    wide = targets(wide, H, drift, damping if drift_damping is None else drift_damping)
    found: dict[int, QuantizedTensor] = {}
    kinds = [(w.spec, v.dtype, w.scales is not None) for w, v in zip(weights, wide, strict=True)]
    for spec, dtype, given in dict.fromkeys(kinds):
        own = [i for i, kind in enumerate(kinds) if kind == (spec, dtype, given)]
        held = [s for i in own if (s := weights[i].scales) is not None]
        problem = _Problem([wide[i] for i in own], U.to(dtype), order, spec, clip, weights[own[0]].name, held)
        solved = problem.feed_back(static=act_order or given or spec.kind.outer is not None, block_size=block_size)
        found.update(zip(own, solved, strict=True))
    return [found[i] for i in range(len(weights))], wide, damping


def judged(
    weight: Weight, aim: Tensor, found: QuantizedTensor, H: Tensor, held_out: Tensor | None, damping: float
) -> Solution:
    """The solution for ``aim``, or round-to-nearest of the weight where that is better."""
    rtn, measured = quantize_tensor(weight.value, weight.spec, name=weight.name), []
    for moments in (H,) if held_out is None else (H, held_out):
        whole = loss(aim, moments) or 1.0
        measured += [loss(aim - q.dequantize(aim.dtype), moments) / whole for q in (found, rtn)]
    solution = Solution(found, measured[0], measured[1], measured[-2], measured[-1], damping)
    return replace(solution, quantized=rtn) if solution.fell_back else solution


def targets(values: Sequence[Tensor], H: Tensor, drift: Tensor | None, damp_percent: float) -> list[Tensor]:
    """W + W D (H + damping)^-1 of weights ``[rows, cols]``; W itself without a drift D, or for infinite damping.

    The minimum over T of ||T X - W X_float||^2 plus damping times ||T - W||^2: with its outputs on the inputs at hand
    it comes nearest to W's on the float model's.
    """
    if drift is None or math.isinf(damp_percent):
        return list(values)
    tall, D = torch.cat(list(values)), drift.to(values[0].dtype)
    R = factor(H, damp_percent)[0].to(tall.dtype)

    def divided(M: Tensor) -> Tensor:
        """M (R R^T)^-1."""
        half = torch.linalg.solve_triangular(R.t(), M, upper=False, left=False)
        whole: Tensor = torch.linalg.solve_triangular(R, half, upper=True, left=False)
        return whole

    moved = tall @ divided(D) if len(tall) > len(R) else divided(tall @ D)  # the one with fewer operations
    return list((tall + moved).split([len(value) for value in values]))


def loss(dW: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T): twice the mean squared output over the rows of X, summed over the rows of dW."""
    return float(((dW @ H.to(dW.dtype)) * dW).sum(dtype=torch.float64))


def inverse_factor(H: Tensor, damp_percent: float, *, name: str = "tensor") -> tuple[Tensor, float]:
    """Upper triangular U (float64) with U^T U = (H + damping mean(diag H) I)^-1, and the damping it took: U = R^-1."""
    damping = damp_percent
    while True:
        R, damping = factor(H, damping, name=name)
        eye = torch.eye(len(H), dtype=R.dtype, device=R.device)
        U = torch.linalg.solve_triangular(R, eye, upper=True)
        if bool(U.isfinite().all()):
            return U, damping
        damping = _more(damping)


def factor(H: Tensor, damp_percent: float, *, name: str = "tensor") -> tuple[Tensor, float]:
    """Upper triangular R (float64) with R R^T = H + damping mean(diag H) I, and the damping it took.

    Dead inputs (H_jj = 0) count as average ones that nothing is correlated with. With P the reversal of order,
    P H P = L L^T gives H = R R^T for the upper triangular R = P L P. The damping grows tenfold until H has a Cholesky
    factor; CalibrationError where it never has.
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
            return L.flip(0, 1), damping
        damping = _more(damping)
    raise CalibrationError(
        f"{name}: the {len(H)}x{len(H)} matrix H has no Cholesky factor even with {MOST_DAMPING:g} times its mean "
        f"diagonal added; it must be 2/n X^T X of the layer's inputs"
    )


def _more(damping: float) -> float:
    return max(10 * damping, 1e-4)


# --- the loop over columns --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Problem:
    """Weights ``[rows, cols]`` of one spec and dtype, to be solved as the rows of one matrix."""

    weights: list[Tensor]
    U: Tensor
    order: Tensor
    spec: QuantSpec
    clip: Clip
    name: str
    given: list[Scales]

    def feed_back(self, *, static: bool, block_size: int) -> list[QuantizedTensor]:
        """The solved weights; ``static``: all scales are found before, on the weights themselves.

        Within a block, what the columns before it in the block have to give is gathered when a column is reached; the
        columns after the block get it all at once. A column keeps the value that was rounded, so that the codes of the
        whole matrix are found at the end.
        """
        columns = torch.cat([w.t()[self.order] for w in self.weights], 1)  # a column of W is a row here
        cols, wide = len(columns), self.spec.block(*self.weights[0].shape)[1]
        at = (self.order // wide).tolist()
        chosen: dict[int, list[Scales]] = {}
        if static:
            chosen[0] = self.given or self._choose(self.weights, slice(None))
        grids = self._spread(chosen[0]) if static else []
        nearest, transposed, pivots = _rounding(self.spec, columns.dtype), self.U.t().contiguous(), self.U.diagonal()
        divisors = pivots.tolist()
        for start, end in _blocks(cols, cols if static else wide, block_size):
            errors = torch.empty_like(columns[start:end])
            if not static and at[start] not in chosen:
                group = slice(start, start + wide)
                parts = columns[group].split([len(w) for w in self.weights], 1)
                chosen[at[start]] = self._choose([part.t() for part in parts], group)
                grids += self._spread(chosen[at[start]])
            for j in range(start, end):
                w, done = columns[j], j - start
                if done:
                    w.addmv_(errors[:done].t(), transposed[j, start:j], alpha=-1)
                torch.sub(w, nearest(w, grids[at[j]]), out=errors[done]).div_(divisors[j])
            columns[end:].addmm_(transposed[end:, start:end], errors, alpha=-1)
        return self._quantized(columns, chosen)

    def _choose(self, weights: Sequence[Tensor], columns: slice) -> list[Scales]:
        """Scales for some columns of all weights."""
        if self.clip != "hessian":
            return [choose(w, self.spec, clip=self.clip, name=self.name) for w in weights]
        alone = torch.empty_like(self.U.diagonal())
        alone[self.order] = self.U.diagonal().square().reciprocal()
        return [choose(w, self.spec, clip="mse", name=self.name, column_weight=alone[columns]) for w in weights]

    def _spread(self, scales: list[Scales]) -> list[Scales]:
        """The scales of every group of columns, each spread over the rows of all weights: ``[rows, 1]``."""

        def over(parts: Sequence[Tensor | None]) -> list[Tensor] | None:
            tall = []
            for part, w in zip(parts, self.weights, strict=True):
                if part is None:
                    return None
                block = (self.spec.block(*w.shape)[0], 1)
                tall.append(spread(part, block, (len(w), part.shape[1])).expand(len(w), -1))
            return list(torch.cat(tall).t().contiguous().unsqueeze(2))

        apart = self.spec.kind.outer == "tensor"  # where the operator does not multiply the two
        scale = over([s.scale if apart else s.effective for s in scales])
        zero, outer = over([s.zero_point for s in scales]), over([s.tensor_scale if apart else None for s in scales])
        assert scale is not None
        return [Scales(s, zero[g] if zero else None, outer[0] if outer else None) for g, s in enumerate(scale)]

    def _quantized(self, columns: Tensor, chosen: dict[int, list[Scales]]) -> list[QuantizedTensor]:
        placed = torch.empty_like(columns)
        placed[self.order] = columns
        found, rows = [], 0
        for i, w in enumerate(self.weights):
            scales = _join([chosen[g][i] for g in sorted(chosen)])
            codes = quantize(placed[:, rows : rows + len(w)].t().contiguous(), scales, self.spec)
            rows += len(w)
            own = (codes, scales.scale, scales.zero_point, self.spec, tuple(w.shape), scales.tensor_scale)
            found.append(QuantizedTensor(*own))
        return found


Nearest = Callable[[Tensor, Scales], Tensor]


def _rounding(spec: QuantSpec, dtype: torch.dtype) -> Nearest:
    """The values ``dequantize(quantize(w))`` of one column ``w [rows]`` with scales ``[rows, 1]``, in few operations.

    Formats without a short way go through their codes.
    """
    grid = spec.format
    if dtype == torch.float32 and spec.kind.outer != "tensor":
        if isinstance(grid, IntFormat):
            return _to_integers(grid)
        if isinstance(grid, FloatFormat) and grid.signed and grid.mbits and isinstance(grid.bias, int):
            return _to_floats(grid)
    return lambda w, s: dequantize(quantize(w.unsqueeze(1), s, spec), s, spec, dtype).squeeze(1)


def _to_integers(grid: IntFormat) -> Nearest:
    most = grid.max

    def nearest(w: Tensor, s: Scales) -> Tensor:
        scale, q = s.scale.squeeze(1), w.div(s.scale.squeeze(1)).round_()
        if s.zero_point is None:
            return q.clamp_(-most, most).mul_(scale)
        zero = s.zero_point.squeeze(1)
        return q.add_(zero).clamp_(0, most).sub_(zero).mul_(scale)

    return nearest


def _to_floats(grid: FloatFormat) -> Nearest:
    """x + c - c with c = 1.5 2^23 steps of the binade of x (of the lowest one for subnormals) rounds x to a step."""
    lowest, steps = (128 - int(grid.bias)) << 23, ((23 - grid.mbits) << 23) + (1 << 22)  # bits of float32
    most = grid.max

    def nearest(w: Tensor, s: Scales) -> Tensor:
        scale = s.scale.squeeze(1)
        x = w.div(scale).clamp_(-most, most)
        c = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=lowest).add_(steps).view(torch.float32)
        return x.add_(c).sub_(c).mul_(scale)

    return nearest


def _blocks(cols: int, wide: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of columns to update together, none of them across the end of a group of ``wide`` columns."""
    for group in range(0, cols, wide):
        last = min(group + wide, cols)
        yield from ((start, min(start + block_size, last)) for start in range(group, last, block_size))


def _join(groups: list[Scales]) -> Scales:
    zeros = [g.zero_point for g in groups if g.zero_point is not None]
    scale = torch.cat([g.scale for g in groups], 1)
    return Scales(scale, torch.cat(zeros, 1) if zeros else None, groups[0].tensor_scale)


def _check(W: Tensor, H: Tensor, name: str) -> None:
    if W.dim() != 2 or tuple(H.shape) != (W.shape[1],) * 2:
        raise CalibrationError(
            f"{name}: W is {list(W.shape)} and H is {list(H.shape)}; expected [rows, cols] and [cols, cols]"
        )
    if not bool(H.isfinite().all()) or bool((H.diagonal() < 0).any()):
        raise CalibrationError(f"{name}: H holds NaN, Inf or a negative diagonal; expected 2/n X^T X of finite inputs")
