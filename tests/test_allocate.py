"""The allocator against brute force, and its bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import ConfigError
from fxquant.solvers.allocate import allocate

Problem = tuple[list[list[float]], list[list[int]], int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 6 layers of up to 4 choices; equal sizes and equal losses happen often."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    losses = [[draw(st.integers(0, 9)) / 8 for _ in range(n)] for n in counts]
    sizes = [[draw(st.integers(1, 12)) for _ in range(n)] for n in counts]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return losses, sizes, draw(st.integers(least, most))


def brute_force(losses: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    every = itertools.product(*(range(len(row)) for row in losses))
    return min(
        sum(row[c] for row, c in zip(losses, choice, strict=True))
        for choice in every
        if sum(row[c] for row, c in zip(sizes, choice, strict=True)) <= budget
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_choice_is_better(problem: Problem) -> None:
    losses, sizes, budget = problem
    found = allocate(losses, sizes, budget)
    assert found.loss == pytest.approx(brute_force(losses, sizes, budget), abs=1e-12)
    assert found.loss == pytest.approx(sum(row[c] for row, c in zip(losses, found.choice, strict=True)))
    assert found.size == sum(row[c] for row, c in zip(sizes, found.choice, strict=True)) <= budget
    assert found.bound <= found.loss + 1e-12
    assert found.exact


def test_as_many_layers_and_sizes_as_a_language_model_has() -> None:
    """210 layers of 4 shapes, 10 choices: the least loss lies within a part of one layer of the bound."""
    generator = np.random.default_rng(0)
    weights = np.array([[576 * 576, 192 * 576, 1536 * 576][i % 3] for i in range(210)])
    bits = np.array([2.25, 3.25, 4.25, 4.3, 4.5, 4.75, 5.25, 6.25, 6.5, 8.25])
    sizes = (weights[:, None] * bits / 8).astype(np.int64)
    noise = generator.lognormal(0, 1, (210, 1)) * 4.0**-bits * generator.uniform(0.8, 1.2, (210, 10))
    budget = int(weights.sum() * 4.5 / 8)
    found = allocate(noise.tolist(), sizes.tolist(), budget)
    assert found.exact
    assert found.size <= budget < found.size * 1.0001
    assert found.bound <= found.loss <= found.bound * 1.001
    uniform = [noise[:, c].sum() for c in range(10) if sizes[:, c].sum() <= budget]
    assert found.loss < 0.9 * min(uniform)


def test_a_budget_that_nothing_meets_and_one_that_all_meet() -> None:
    with pytest.raises(ConfigError, match="no choice fits 4 bytes; the smallest takes 5 bytes"):
        allocate([[1.0, 2.0], [1.0, 2.0]], [[8, 3], [6, 2]], 4)
    assert allocate([[1.0, 2.0], [1.0, 2.0]], [[8, 3], [6, 2]], 100).choice == (0, 0)
    assert allocate([[1.0, 2.0], [1.0, 2.0]], [[8, 3], [6, 2]], 5).choice == (1, 1)


@pytest.mark.parametrize(
    ("losses", "sizes", "says"),
    [([], [], "at least one choice"), ([[1.0]], [[1, 2]], "at least one"), ([[float("nan")]], [[1]], "not finite")],
)
def test_problems_that_are_none(losses: list[list[float]], sizes: list[list[int]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        allocate(losses, sizes, 10)
