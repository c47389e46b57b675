"""Hadamard rotations are orthogonal and spread one value over its block; smoothing scales are SmoothQuant's."""

from __future__ import annotations

import pytest
import torch

from fxquant.solvers.rotate import block_size, hadamard
from fxquant.solvers.smooth import smoothing_scales


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_rotations_are_orthogonal_and_flat(size: int) -> None:
    R = hadamard(size, seed=3)
    assert torch.allclose(R @ R.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(R.abs(), torch.full_like(R, size**-0.5))


def test_the_seed_chooses_the_signs() -> None:
    assert torch.equal(hadamard(16, seed=1), hadamard(16, seed=1))
    assert not torch.equal(hadamard(16, seed=1), hadamard(16, seed=2))
    with pytest.raises(ValueError, match="power of two"):
        hadamard(12)


@pytest.mark.parametrize(("channels", "size"), [(576, 64), (1536, 128), (4096, 128), (20, 4), (7, 1)])
def test_the_largest_power_of_two_that_divides(channels: int, size: int) -> None:
    assert block_size(channels, limit=128) == size


def test_smoothing_scales() -> None:
    x, w = torch.tensor([4.0, 16.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 3.0, 0.0])
    assert torch.equal(smoothing_scales(x, w, alpha=0.5), torch.tensor([2.0, 2.0, 1.0, 1.0]).double())
    assert torch.equal(smoothing_scales(x, w, alpha=1.0), torch.tensor([4.0, 16.0, 1.0, 1.0]).double())
