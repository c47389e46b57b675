"""LoRC: what quantization took from a weight, given back as a product of two thin matrices.

::

    E = W - W' ~ U V            U [rows, rank], V [rank, cols]
    minimizes ||(E - U V) A||   A = I (none: the paper), diag(sqrt(H_jj)) (act_rms), or H = A A^T (hessian)
    P: the first ``rank`` left singular vectors of E A, values s;   U = P sqrt(s),   V = P^T E / sqrt(s)

Since P has orthonormal columns, U V = P P^T E is the best there is for every invertible A: no inverse of A is needed.
With A A^T = H = 2/n X^T X the error that is minimized is that of the layer's output. Both factors get the root of
the singular values, so that both quantize alike. ZeroQuant-V2 (2303.08302), section 4, with rank 8 and 8-bit factors;
the weighting by activations is that of LQER (2402.02446).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.solvers.damping import Inputs, target_damping
from fxquant.solvers.gptq import factor, loss, targets

Weighting = Literal["none", "act_rms", "hessian"]
FACTORS = "int8/channel"
"""How factors are stored by default: U with a scale a row, V with a scale a row too, each of its ``rank`` rows."""


@dataclass(frozen=True)
class LowRank:
    """``U V``: float factors, ``U [rows, rank]`` and ``V [rank, cols]``."""

    U: Tensor
    V: Tensor

    def product(self) -> Tensor:
        return self.U @ self.V

    def quantize(self, spec: QuantSpec | str = FACTORS) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The factors as stored: codes and scales of U and V under ``spec``."""
        parsed = parse_spec(spec) if isinstance(spec, str) else spec
        return quantize_tensor(self.U, parsed, name="U"), quantize_tensor(self.V, parsed, name="V")

    def refit(self, E: Tensor, U: Tensor) -> LowRank:
        """The same with ``U``, its stored form, and the V that is best for it: (U^T U)^-1 U^T E.

        That V is the least squares solution for every weighting of the columns.
        """
        return LowRank(U, torch.linalg.pinv(U) @ E)


def compensate(
    E: Tensor, rank: int = 8, *, column_weight: Tensor | None = None, moments: Tensor | None = None,
    damp_percent: float = 0.01,
) -> LowRank:  # fmt: skip
    """The product of ``rank`` that is nearest to ``E [rows, cols]``, weighted by ``column_weight [cols]`` or by H.

    ``moments``: H [cols, cols] = 2/n X^T X; ``damp_percent`` of its mean diagonal is added, as GPTQ does. The norm of
    the residual is the tail of the singular values of E (of the weighted E). Column weights that are zero count as the
    smallest positive one. Raises ConfigError for a rank that E does not have.
    """
    if not 1 <= rank <= min(E.shape):
        raise ConfigError(f"rank {rank} of a {E.shape[0]}x{E.shape[1]} matrix; expected 1 to {min(E.shape)}")
    wide = E if E.dtype == torch.float64 else E.float()
    if moments is not None:
        weighted = wide @ factor(moments, damp_percent)[0].to(wide.dtype)
    else:
        weighted = wide * _positive(column_weight, E).to(wide.dtype)
    P = _leading(weighted, rank)
    root = (P.t() @ weighted).norm(dim=1).sqrt()
    V = (P.t() @ wide) / torch.where(root > 0, root, torch.ones_like(root))[:, None]
    return LowRank((P * root).to(E.dtype), V.to(E.dtype))


@dataclass(frozen=True)
class Solution:
    """Float factors, the same as stored, and the errors they leave; errors are parts of tr(W H W^T), or of ||W||^2.

    ``before`` is the error without factors, ``after`` with the stored ones; ``held_out`` and ``held_out_before`` are on
    inputs that were not solved for (the same where there are none).
    """

    factors: LowRank
    U: QuantizedTensor
    V: QuantizedTensor
    before: float
    after: float
    held_out_before: float
    held_out: float

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """U V as stored, ``[rows, cols]``."""
        return self.U.dequantize(dtype) @ self.V.dequantize(dtype)

    @property
    def useless(self) -> bool:
        return not (self.after < self.before and self.held_out < self.held_out_before)


def solve(
    W: Tensor, restored: Tensor, spec: QuantSpec | str = FACTORS, *, rank: int = 8, weighting: Weighting = "none",
    moments: Tensor | None = None, drift: Tensor | None = None, held_out: Tensor | None = None,
    damp_percent: float = 0.01, drift_damping: float | None = None,
) -> Solution:  # fmt: skip
    """Stored factors for ``W - restored`` [rows, cols]; V is found anew for U as stored, before it is rounded itself.

    ``moments`` is H of the inputs, needed for every ``weighting`` but none; ``held_out`` is H of inputs that are only
    used to judge. ``drift`` and ``drift_damping`` as in ``gptq.solve_together``: the outputs of W on the float model's
    inputs are aimed at.
    """
    wide = W if W.dtype == torch.float64 else W.float()
    target = wide
    if moments is not None:
        (target,) = targets([wide], moments, drift, damp_percent if drift_damping is None else drift_damping)
    E = target - restored.to(wide.dtype)
    weight = None if moments is None or weighting != "act_rms" else act_rms(moments)
    by = moments if weighting == "hessian" else None
    found = compensate(E, rank, column_weight=weight, moments=by, damp_percent=damp_percent)
    U_stored, _ = found.quantize(spec)
    found = found.refit(E, U_stored.dequantize(wide.dtype))
    _, V_stored = found.quantize(spec)
    left = E - found.U @ V_stored.dequantize(wide.dtype)
    errors = []
    measures: list[Tensor | None] = [H for H in (moments, held_out) if H is not None]
    for H in measures or [None]:
        whole = _size(wide, H) or 1.0
        errors += [_size(part, H) / whole for part in (E, left)]
    return Solution(found, U_stored, V_stored, errors[0], errors[1], errors[-2], errors[-1])


def solve_for(
    W: Tensor, codes: QuantizedTensor, spec: QuantSpec, rank: int, weighting: Weighting,
    damp: float | Literal["auto"], inputs: Inputs | None,
) -> Solution:  # fmt: skip
    """``solve`` for what ``codes`` leave of W; ``damp``: of ``inputs``, where they are known, or the best."""
    restored = codes.dequantize(W.dtype)
    if inputs is None:
        return solve(W, restored, spec, rank=rank, weighting=weighting)
    damping: dict[str, float] = {"damp_percent": damp} if damp != "auto" else {}
    if damp == "auto":
        damping["drift_damping"] = target_damping([W], inputs)
    return solve(
        W, restored, spec, rank=rank, weighting=weighting, moments=inputs.H, drift=inputs.drift,
        held_out=inputs.held_out, **damping,
    )  # fmt: skip


def _size(M: Tensor, H: Tensor | None) -> float:
    """tr(M H M^T), or ||M||^2."""
    return float(M.double().square().sum()) if H is None else loss(M, H)


def act_rms(H: Tensor) -> Tensor:
    """The root mean square of every input, times sqrt(2): ``sqrt(diag H)`` of H = 2/n X^T X."""
    return H.diagonal().clamp(min=0).sqrt()


def _leading(M: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that span the first ``rank`` left singular vectors of ``M``, each in its place.

    Through the eigenvectors of the smaller of M M^T and M^T M, which for the few leading ones is as good as a singular
    value decomposition and many times as fast.
    """
    if M.shape[0] <= M.shape[1]:
        return _last(M @ M.t(), rank)
    found: Tensor = torch.linalg.qr(M @ _last(M.t() @ M, rank)).Q
    return found


def _last(M: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, the largest first."""
    vectors: Tensor = torch.linalg.eigh(M).eigenvectors
    return vectors[:, -rank:].flip(1)


def _positive(weight: Tensor | None, E: Tensor) -> Tensor:
    """Column weights in float64, ones where there are none; zeros raised to the smallest that is not zero."""
    if weight is None:
        return torch.ones(E.shape[1], dtype=torch.float64, device=E.device)
    if weight.shape != E.shape[1:] or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise CalibrationError(
            f"column weights are {list(weight.shape)} for a matrix of {list(E.shape)}; expected one finite number >= 0 "
            f"for every column"
        )
    a = weight.double()
    return torch.where(a > 0, a, a[a > 0].min()) if bool((a > 0).any()) else torch.ones_like(a)
