"""Which weights are kept, and that one bit with the mean magnitude is the least-squares choice for the others."""

from __future__ import annotations

import pytest
import torch

from fxquant.scheme import parse_spec
from fxquant.solvers.outliers import binarize, largest, saliency, without

G = torch.Generator().manual_seed(0)
W = torch.randn(6, 40, generator=G)


def test_the_largest_values_are_found_in_order() -> None:
    index = largest(W.abs(), 0.1)
    assert len(index) == 24
    assert bool((index.diff() > 0).all())
    assert float(without(W, index).abs().max()) <= float(W.abs().flatten()[index].min())
    assert len(largest(W, 0.0)) == 0


@pytest.mark.parametrize("granularity", ["channel", "group16", "tensor", "block4x8"])
def test_one_bit_is_the_least_squares_choice(granularity: str) -> None:
    spec, index = parse_spec(f"lut(-1,1)/{granularity}"), largest(W.abs(), 0.1)
    q = binarize(W, index, spec, (6, 40))
    q.check()
    assert q.spec.format.bits == 1
    kept = torch.ones(240).scatter(0, index, 0.0).reshape(6, 40)

    def error(scale: torch.Tensor) -> float:
        other = type(q)(q.codes, scale, None, q.spec, q.shape)
        return float(((other.dequantize() - W) * kept).square().sum())

    assert torch.equal(q.dequantize() > 0, W >= 0)
    assert all(error(q.scale) < error(q.scale * f) for f in (0.99, 1.01))


def test_a_block_with_nothing_left_gets_scale_1() -> None:
    q = binarize(torch.zeros(2, 4), torch.tensor([0, 1, 2, 3]), parse_spec("lut(-1,1)/channel:fp16"), (2, 4))
    assert torch.equal(q.scale, torch.ones(2, 1, dtype=torch.float16))


def test_saliency_is_that_of_the_optimal_brain_surgeon() -> None:
    X = torch.randn(100, 40, generator=G).double()
    H = 2 * X.T @ X / 100
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(40)
    want = (W.double() / torch.linalg.inv(damped).diagonal()).square()
    assert torch.allclose(saliency(W, H.float()).double(), want, rtol=1e-3)
    assert bool(saliency(W, torch.zeros(40, 40)).isfinite().all())
