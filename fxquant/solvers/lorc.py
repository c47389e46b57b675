"""LoRC: what quantization took from a weight, given back as a product of two thin matrices.

::

    E = W - W' ~ U V        U [rows, rank], V [rank, cols]: the leading part of E's singular value decomposition
    weighting act_rms:        minimizes ||(E - U V) diag(a)||, a_j = sqrt(H_jj): the SVD is that of E diag(a), and V is
                              divided by a afterwards

Both factors get the square root of the singular values, so that both quantize alike: ZeroQuant-V2 (2303.08302), section
4, with rank 8 and 8-bit factors; the weighting is that of LQER (2402.02446).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scheme import QuantSpec, parse_spec

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


def compensate(E: Tensor, rank: int = 8, *, column_weight: Tensor | None = None) -> LowRank:
    """The product of ``rank`` that is nearest to ``E [rows, cols]``, columns weighted by ``column_weight [cols]``.

    The residual's norm is the tail of the singular values of E (of the weighted E). Weights that are zero count as the
    smallest positive one. Raises ConfigError for a rank that E does not have.
    """
    if not 1 <= rank <= min(E.shape):
        raise ConfigError(f"rank {rank} of a {E.shape[0]}x{E.shape[1]} matrix; expected 1 to {min(E.shape)}")
    a = _positive(column_weight, E)
    left, values, right = torch.linalg.svd(E.double() * a, full_matrices=False)
    root = values[:rank].sqrt()
    U, V = left[:, :rank] * root, root[:, None] * right[:rank] / a
    return LowRank(U.to(E.dtype), V.to(E.dtype))


def act_rms(H: Tensor) -> Tensor:
    """The root mean square of every input, times sqrt(2): ``sqrt(diag H)`` of H = 2/n X^T X."""
    return H.diagonal().clamp(min=0).sqrt()


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
