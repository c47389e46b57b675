"""Damping chosen on held-out inputs: more where there is little data, none of the drift's noise where it is noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.scheme import parse_spec
from fxquant.solvers.damping import CODES, TARGETS, Inputs, solve_damped, target_damping, target_error
from fxquant.solvers.gptq import Weight, solve, targets

G = torch.Generator().manual_seed(0)
MIX = torch.randn(48, 48, generator=G) * torch.linspace(0.05, 2, 48)
W = torch.randn(24, 48, generator=G)
SPEC = parse_spec("int4/channel")


def inputs(rows: int, change: float = 0.0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """X, and X_float that is off by a fixed map of it and by noise."""
    X = torch.randn(rows, 48, generator=G) @ MIX
    fixed = torch.randn(48, 48, generator=torch.Generator().manual_seed(7)) / 7
    return X, X + change * X @ fixed + noise * torch.randn(rows, 48, generator=G) @ MIX


def known(rows: int, change: float = 0.0, noise: float = 0.0) -> Inputs:
    (X, F), (Y, E) = inputs(rows, change, noise), inputs(4000, change, noise)
    return Inputs(2 / rows * X.T @ X, 2 / rows * (F - X).T @ X, 2 / 4000 * Y.T @ Y, 2 / 4000 * (E - Y).T @ Y)


def test_the_error_is_that_of_the_outputs() -> None:
    """By the definition, on X itself."""
    X, F = inputs(500, 0.1, 0.1)
    restored = W + 0.1 * torch.randn(24, 48, generator=G)
    squares = (X @ restored.T - F @ W.T).square().sum() - ((F - X) @ W.T).square().sum()
    found = target_error(W, restored, 2 / 500 * X.T @ X, 2 / 500 * (F - X).T @ X)
    assert found == pytest.approx(float(2 / 500 * squares), rel=1e-3)


def test_noise_is_damped_and_what_is_real_is_followed() -> None:
    assert math.isinf(target_damping([W], known(60, noise=0.3)))
    assert target_damping([W], known(4000, change=0.3)) == min(TARGETS)
    assert target_damping([W], Inputs(known(60).H)) == TARGETS[0]


def test_the_chosen_target_is_the_best_of_those_tried() -> None:
    given = known(200, change=0.2, noise=0.2)
    assert given.held_out is not None
    assert given.drift is not None
    errors = {}
    for damping in TARGETS:
        (target,) = targets([W], given.H, given.drift, damping)
        errors[damping] = target_error(W, target, given.held_out, given.held_drift)
    assert errors[math.inf] == 0.0
    assert target_damping([W], given) == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize(("rows", "want"), [(50, max(CODES)), (8000, min(CODES))])
def test_few_rows_want_more_damping(rows: int, want: float) -> None:
    root = torch.eye(48) + 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
    X, Y = (torch.randn(n, 48, generator=G) @ root for n in (rows, 8000))
    H = 2 / rows * X.T @ X
    found, aimed = solve_damped([Weight(W, SPEC)], Inputs(H, held_out=2 / 8000 * Y.T @ Y))
    assert found[0].damping == want
    assert aimed == TARGETS[0]  # without drift it says nothing
    same = solve(W, H, SPEC, damp_percent=want)
    assert torch.equal(found[0].quantized.codes, same.quantized.codes)


def test_nothing_held_out() -> None:
    given = known(400, change=0.2)
    (found,), aimed = solve_damped([Weight(W, SPEC)], Inputs(given.H, given.drift))
    assert (found.damping, aimed) == (CODES[0], TARGETS[0])
