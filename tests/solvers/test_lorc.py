"""LoRC: the residual is the tail of the singular values, weighted or not, and 8-bit factors lose little."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.errors import CalibrationError, ConfigError
from fxquant.qtensor import quantize_tensor
from fxquant.solvers.lorc import act_rms, compensate, solve

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


# --- weighted by H, and solved as stored ------------------------------------------------------------------------------
MIX = torch.randn(40, 40, generator=G, dtype=torch.float64)
INPUTS = torch.randn(300, 40, generator=G, dtype=torch.float64) @ MIX
H = 2 / 300 * INPUTS.T @ INPUTS


@pytest.mark.parametrize("shape", [(24, 40), (64, 40)])
def test_with_moments_it_is_the_best_there_is_for_the_outputs(shape: tuple[int, int]) -> None:
    """Eckart and Young on E H^(1/2), with the symmetric root, found independently of any Cholesky factor."""
    error = torch.randn(shape, generator=G, dtype=torch.float64)
    found = compensate(error, 8, moments=H, damp_percent=0.0)
    values, vectors = torch.linalg.eigh(H)
    tail = torch.linalg.svdvals(error @ (vectors * values.sqrt()) @ vectors.T)[8:].norm()
    left = error - found.product()
    assert torch.allclose(((left @ H) * left).sum().sqrt(), tail, rtol=1e-6)
    act = error - compensate(error, 8, column_weight=act_rms(H)).product()
    assert ((act @ H) * act).sum().sqrt() > tail


def test_both_factors_have_the_root_of_the_singular_values() -> None:
    found = compensate(E, 5)
    root = torch.linalg.svdvals(E)[:5].sqrt()
    assert torch.allclose(found.U.norm(dim=0), root)
    assert torch.allclose(found.V.norm(dim=1), root)


def test_v_is_refitted_to_u_as_stored() -> None:
    error = torch.randn(64, 40, generator=G)
    found = compensate(error, 4)
    rough = quantize_tensor(found.U, "int3/channel").dequantize()
    left, plain = error - found.refit(error, rough).product(), error - rough @ found.V
    assert left.norm() < plain.norm()
    assert torch.allclose(rough.T @ left, torch.zeros(4, 40), atol=1e-4)  # nothing is left in the span of U


@pytest.mark.parametrize("weighting", ["none", "act_rms", "hessian"])
def test_solutions_say_what_is_left_with_the_stored_factors(weighting) -> None:
    W = torch.randn(64, 40, generator=G)
    restored = quantize_tensor(W, "int3/channel").dequantize()
    moments = None if weighting == "none" else H.float()
    found = solve(W, restored, rank=6, weighting=weighting, moments=moments)
    left = W - restored - found.U.dequantize() @ found.V.dequantize()
    metric = torch.eye(40) if moments is None else moments
    size = [float(((M @ metric) * M).sum()) for M in (W, W - restored, left)]
    assert found.before == pytest.approx(size[1] / size[0], rel=1e-4)
    assert found.after == pytest.approx(size[2] / size[0], rel=1e-4)
    assert found.after < 0.8 * found.before
    assert not found.useless
    assert replace(found, held_out=1.1 * found.held_out_before).useless
    assert replace(found, after=found.before).useless


def test_drift_moves_the_target() -> None:
    """With all the rank there is, the outputs come to those of W on the float inputs."""
    W, given = torch.randn(24, 40, generator=G, dtype=torch.float64), INPUTS
    wanted = given + 0.1 * torch.randn(300, 40, generator=G, dtype=torch.float64) @ MIX
    restored = quantize_tensor(W, "int3/channel").dequantize(torch.float64)
    drift = 2 / 300 * (wanted - given).T @ given
    found = solve(W, restored, rank=24, weighting="hessian", moments=H, drift=drift, damp_percent=1e-6)
    best = torch.linalg.lstsq(given, wanted @ W.T).solution.T
    left = restored + found.U.dequantize().double() @ found.V.dequantize().double() - best
    assert (given @ left.T).norm() < 0.02 * (given @ best.T).norm() < 0.1 * (given @ (restored - best).T).norm()
