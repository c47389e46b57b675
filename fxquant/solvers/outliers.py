"""Weights that stay precise while the others are quantized: which they are, and what one bit makes of the rest.

::

    GWQ      the ``fraction`` of a layer's weights with the largest |gradient of the loss|            2411.00850
    PB-LLM   the largest |w|, or the largest w_ij^2 / [H^-1]_jj^2 as in optimal brain surgeon         2310.00034
             the rest: w' = a sign(w),  a = mean |w| over the rest of the block, the least squares    section 3.3
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.qtensor import QuantizedTensor
from fxquant.scales import block_reduce
from fxquant.scheme import QuantSpec


def largest(score: Tensor, fraction: float) -> Tensor:
    """Positions (int64 [n], increasing) in the flattened ``score`` of the ``round(fraction * size)`` largest values."""
    count = round(fraction * score.numel())
    return score.reshape(-1).topk(count, sorted=False).indices.sort().values


def without(matrix: Tensor, index: Tensor) -> Tensor:
    """A copy of ``matrix`` with zeros at ``index``: what scales are found on."""
    flat = matrix.reshape(-1).clone()
    flat[index] = 0
    return flat.reshape(matrix.shape)


def saliency(weight: Tensor, H: Tensor, *, damping: float = 0.01) -> Tensor:
    """``w_ij^2 / [H^-1]_jj^2``, float32 ``[rows, cols]``; ``damping``, a part of the mean diagonal, is added to H."""
    diagonal = H.diagonal()
    level = damping * float(diagonal.mean()) or 1.0
    factor = None
    while factor is None:
        found, info = torch.linalg.cholesky_ex(H + level * torch.eye(len(H), dtype=H.dtype))
        factor = found if not int(info) else None
        level *= 10
    return (weight.float() / torch.cholesky_inverse(factor).diagonal()).square()


def binarize(matrix: Tensor, index: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> QuantizedTensor:
    """``a sign(w)`` for ``[rows, cols]``, a the mean |w| of each block without the values at ``index``.

    ``spec`` has the two values -1 and 1 and plain scales. A block that has nothing left, or only zeros, gets 1.
    """
    wide = matrix.float()
    block = spec.block(*matrix.shape)
    rest = without(torch.ones_like(wide), index)
    total = block_reduce(without(wide.abs(), index), block, "sum")
    scale = total / block_reduce(rest, block, "sum").clamp(min=1)
    stored = torch.where(scale > 0, scale, 1.0).to(spec.scale_dtype)
    stored = torch.where(stored > 0, stored, torch.finfo(spec.scale_dtype).tiny)
    positive = spec.format.table().tolist().index(1.0)
    codes = torch.where(wide >= 0, positive, 1 - positive).to(torch.uint8)
    return QuantizedTensor(codes, stored, None, spec, shape)
