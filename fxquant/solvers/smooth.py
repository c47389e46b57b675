"""SmoothQuant: how far to move the range of each input channel from the activations into the weights.

::

    s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)          x W^T = (x / s) (W diag(s))^T

SmoothQuant (2211.10438), section 4, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothing_scales(inputs: Tensor, weights: Tensor, *, alpha: float) -> Tensor:
    """``s`` [K], float64 and positive: ``inputs`` [K] are max|x_j|, ``weights`` [K] are max|W_:j| over all readers.

    A channel that is dead, on either side, gets 1.
    """
    x, w = inputs.double(), weights.double()
    dead = (x == 0) | (w == 0)
    return torch.where(dead, 1.0, x**alpha / torch.where(dead, 1.0, w) ** (1 - alpha))
