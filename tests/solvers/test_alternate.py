"""GPTQ and LoRC in turn: better than one after the other, never worse than what was there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.qtensor import quantize_tensor
from fxquant.scheme import parse_spec
from fxquant.solvers import gptq, lorc
from fxquant.solvers.alternate import Alternation
from fxquant.solvers.damping import Inputs

G = torch.Generator().manual_seed(0)
SPEC, FACTORS = parse_spec("int3/channel"), parse_spec("int8/channel")
MIX = torch.randn(48, 48, generator=G) * torch.linspace(0.1, 2, 48)
W = torch.randn(40, 48, generator=G) + 2 * torch.randn(40, 2, generator=G) @ torch.randn(2, 48, generator=G)


def moments(rows: int = 400) -> Tensor:
    X = torch.randn(rows, 48, generator=G) @ MIX
    return 2 / rows * X.T @ X


H, HELD = moments(), moments()


def problem(*values: Tensor, rounds: int, ranks: tuple[int, ...] = (4,), clip: gptq.Clip = "absmax") -> Alternation:
    weights = [gptq.Weight(value, SPEC) for value in values]
    start = [quantize_tensor(value, SPEC) for value in values]
    return Alternation(weights, start, ranks, FACTORS, rounds, "hessian", 0.01, clip)


def part(R: Tensor, metric: Tensor = H) -> float:
    return gptq.loss(R, metric) / gptq.loss(W, metric)


def test_a_round_is_gptq_around_the_first_directions_and_then_lorc() -> None:
    (found,) = problem(W, rounds=1).solve(Inputs(H))
    around = gptq.solve(W - lorc.compensate(W, 4).product(), H, SPEC).quantized
    factors = lorc.solve(W, around.dequantize(), FACTORS, rank=4, weighting="hessian", moments=H)
    assert found.round == 1
    assert found.quantized is not None
    assert found.factors is not None
    assert torch.equal(found.quantized.codes, around.codes)
    assert torch.equal(found.factors.U.codes, factors.U.codes)
    alone = gptq.solve(W, H, SPEC)
    assert found.before[0] == pytest.approx(alone.rtn_loss)
    assert found.alone[0] == pytest.approx(alone.loss)
    assert found.after[0] == pytest.approx(part(W - around.dequantize() - factors.product()), rel=1e-5)


def test_it_beats_gptq_and_lorc_one_after_the_other() -> None:
    alone = gptq.solve(W, H, SPEC).quantized.dequantize()
    after = lorc.solve(W, alone, FACTORS, rank=4, weighting="hessian", moments=H).after
    (once,), (often,) = (problem(W, rounds=n).solve(Inputs(H)) for n in (1, 5))
    assert often.round > 1
    assert often.after[0] < once.after[0] < 0.8 * after


def test_the_held_out_inputs_choose_the_round() -> None:
    inputs, pairs = Inputs(H, held_out=HELD), []
    for n in range(1, 5):
        (pair,) = problem(W, rounds=n).solve(Inputs(H))  # judged on H, each round is the best so far
        assert pair.quantized is not None
        assert pair.factors is not None
        pairs.append(part(W - pair.quantized.dequantize() - pair.factors.product(), HELD))
    (found,) = problem(W, rounds=4).solve(inputs)
    assert found.after[1] <= min(pairs) * (1 + 1e-5)
    assert found.before[1] > found.alone[1] > found.after[1]


def test_what_was_best_is_done_again_on_all_inputs() -> None:
    all_of_it = Inputs(H.lerp(HELD, 0.5))
    (found,) = problem(W, rounds=1).solve(Inputs(H, held_out=HELD), all_of_it)
    (want,) = problem(W, rounds=1).solve(all_of_it)
    assert found.quantized is not None
    assert want.quantized is not None
    assert torch.equal(found.quantized.codes, want.quantized.codes)


def test_weights_without_factors_get_gptqs_codes() -> None:
    both = problem(W, W[:8], ranks=(4, 0), rounds=2).solve(Inputs(H))
    alone = gptq.solve(W[:8], H, SPEC)
    assert both[0].factors is not None
    assert both[1].factors is None
    assert both[1].quantized is not None
    assert torch.equal(both[1].quantized.codes, alone.quantized.codes)


def test_what_is_there_stays_where_nothing_is_better() -> None:
    exact = quantize_tensor(W, SPEC).dequantize()
    (found,) = problem(exact, rounds=3).solve(Inputs(H))
    assert (found.quantized, found.factors, found.round) == (None, None, 0)
    assert found.after == found.before == (0.0, 0.0)


def test_drift_moves_the_target() -> None:
    """The result comes to the weight that gives the float model's outputs on the inputs at hand."""
    X = torch.randn(400, 48, generator=G) @ MIX
    wanted = X + 0.3 * torch.randn(400, 48, generator=G) @ MIX
    drift, own = 2 / 400 * (wanted - X).T @ X, 2 / 400 * X.T @ X
    best = torch.linalg.lstsq(X, wanted @ W.T).solution.T
    left = {}
    for name, given in (("with", drift), ("without", None)):
        (found,) = problem(W, rounds=3).solve(Inputs(own, given))
        assert found.quantized is not None
        assert found.factors is not None
        left[name] = gptq.loss(best - found.quantized.dequantize() - found.factors.product(), own)
    assert left["with"] < 0.7 * left["without"]
