"""LoRC: the residual is the tail of the singular values, weighted or not, and 8-bit factors lose little."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import CalibrationError, ConfigError
from fxquant.qtensor import quantize_tensor
from fxquant.solvers.lorc import act_rms, compensate

G = torch.Generator().manual_seed(0)
E = torch.randn(24, 40, generator=G, dtype=torch.float64)
A = torch.rand(40, generator=G, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_the_residual_is_the_tail_of_the_singular_values(rank: int) -> None:
    found = compensate(E, rank)
    assert (found.U.shape, found.V.shape) == ((24, rank), (rank, 40))
    tail = torch.linalg.svdvals(E)[rank:].norm()
    assert torch.allclose((E - found.product()).norm(), tail, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_with_weights_it_is_the_tail_of_the_weighted_matrix(rank: int) -> None:
    found = compensate(E, rank, column_weight=A)
    tail = torch.linalg.svdvals(E * A)[rank:].norm()
    assert torch.allclose(((E - found.product()) * A).norm(), tail, atol=1e-10)
    assert rank == 24 or ((E - compensate(E, rank).product()) * A).norm() > tail


def test_equal_weights_change_nothing() -> None:
    ones = compensate(E, 8, column_weight=torch.full((40,), 3.0))
    assert torch.allclose(ones.product(), compensate(E, 8).product(), atol=1e-10)


@pytest.mark.parametrize("spec", ["int8/channel", "e4m3/channel"])
def test_factors_of_eight_bits_lose_little(spec: str) -> None:
    W = torch.randn(64, 96, generator=G)
    error = W - quantize_tensor(W, "int2/channel").dequantize()
    found = compensate(error, 8)
    U, V = (q.dequantize() for q in found.quantize(spec))
    assert (U @ V - found.product()).norm() < 0.06 * found.product().norm()
    assert (error - U @ V).norm() < error.norm()


def test_dead_inputs_do_not_divide_by_zero() -> None:
    H = torch.diag(A.square())
    H[3, 3] = 0
    found = compensate(E, 8, column_weight=act_rms(H))
    assert bool(found.V.isfinite().all())
    assert torch.equal(compensate(E, 2, column_weight=torch.zeros(40)).V, compensate(E, 2).V)


def test_mistakes() -> None:
    for rank in (0, 25):
        with pytest.raises(ConfigError, match=f"rank {rank} of a 24x40 matrix; expected 1 to 24"):
            compensate(E, rank)
    for weight in (torch.ones(24), torch.full((40,), torch.nan), -torch.ones(40)):
        with pytest.raises(CalibrationError, match="column weights"):
            compensate(E, 8, column_weight=weight)
