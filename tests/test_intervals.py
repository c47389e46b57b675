"""Confidence intervals: against tables, closed forms, and how often they hold what they should."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant import intervals
from fxquant.errors import InputError


@pytest.mark.parametrize(
    ("degrees", "level", "want"),  # tables of Student's t, two-sided
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (10, 0.95, 2.228), (31, 0.95, 2.040), (120, 0.95, 1.980),
     (4, 0.99, 4.604), (5, 0.9, 2.015), (5000, 0.95, 1.9604)],
)  # fmt: skip
def test_student_t(degrees: int, level: float, want: float) -> None:
    assert intervals.student_t(degrees, level) == pytest.approx(want, abs=6e-4)


def test_the_expansion_continues_the_series() -> None:
    assert intervals.student_t(1000) > intervals.student_t(1001) > intervals.student_t(2000)


def test_wilson() -> None:
    found = intervals.wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert intervals.wilson(10, 10).high == 1
    assert intervals.wilson(0, 10).low == 0
    with pytest.raises(InputError, match="11 of 10 is no share"):
        intervals.wilson(11, 10)


def test_blocks_of_one_give_the_textbook_interval() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    found = intervals.mean(values, [1] * 4)
    error = torch.tensor(values).std() / 2  # sqrt(4)
    assert found.value == 3.5
    assert found.high - found.value == pytest.approx(3.1824 * float(error), rel=1e-4)


def test_an_interval_over_blocks_covers_the_mean_where_one_over_tokens_does_not() -> None:
    """32 blocks of 64 values with a shift a block: the interval holds 0 in some 95 of 100 cases, tokens' far less."""
    generator = torch.Generator().manual_seed(0)
    held, held_tokens = 0, 0
    for _ in range(300):
        x = torch.randn(32, 1, generator=generator) + torch.randn(32, 64, generator=generator)
        found = intervals.mean(x.sum(1).tolist(), [64] * 32)
        held += found.low <= 0 <= found.high
        tokens = intervals.mean(x.flatten().tolist(), [1] * x.numel())
        held_tokens += tokens.low <= 0 <= tokens.high
    assert 0.91 <= held / 300 <= 0.99
    assert held_tokens / 300 < 0.5


def test_a_share_over_blocks_is_wider_where_members_are_alike() -> None:
    alike = intervals.share([10, 0, 10, 10, 0, 10], [10] * 6)
    mixed = intervals.share([6, 7, 7, 6, 7, 7], [10] * 6)
    assert alike.value == mixed.value == pytest.approx(2 / 3)
    assert alike.low < mixed.low < mixed.value < mixed.high < alike.high
    everything = intervals.share([100] * 20, [100] * 20)
    assert everything.value == everything.high == 1
    assert 0.99 < everything.low < 1


def test_too_few_blocks() -> None:
    with pytest.raises(InputError, match="1 block of data gives no confidence interval"):
        intervals.mean([1.0], [10])


def test_map_and_dict() -> None:
    found = intervals.Estimate(0.0, -1.0, 1.0, 5).map(math.exp)
    assert (found.value, found.high) == (1.0, math.e)
    assert intervals.Estimate(math.inf, 0, math.inf, 5).to_dict()["value"] is None
