"""Rotations: Hadamard matrices with random signs, which spread an outlier evenly over its block.

::

    R = diag(d) H / sqrt(n)        H = Sylvester's matrix of +1 and -1, d random signs        R R^T = 1
    y = x W^T = (x R) (W R)^T      block by block of n channels

QuIP# (2402.04396), section 3; QuaRot (2404.00456), section 4; HIGGS (2411.17525), section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int, *, seed: int = 0) -> Tensor:
    """``R``, float64 ``[size, size]`` and orthogonal. ValueError where ``size`` is no power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation of size {size}: expected a power of two, such as 64")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return (signs[:, None] * H).div_(math.sqrt(size))


def block_size(channels: int, *, limit: int) -> int:
    """The largest power of two that divides ``channels``, ``limit`` at most."""
    size = 1
    while size * 2 <= limit and channels % (size * 2) == 0:
        size *= 2
    return size
