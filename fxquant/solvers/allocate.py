"""Allocation: one of several choices for each layer, so that the sum of losses is least within a budget of bytes.

::

    minimize sum_l loss[l, c_l]   subject to   sum_l size[l, c_l] <= budget          (multiple-choice knapsack)
    L(m) = sum_l min_c (loss[l, c] + m size[l, c]) - m budget                        a lower bound for every m >= 0

The best multiplier m gives the bound and, with what it leaves of the budget spent step by step, a first solution; the
gap between both is at most what one layer can gain. Then every partial choice that the bound cannot bring below the
first solution is dropped, as is every one that another beats in both size and loss, and what is left is enumerated
(Kellerer, Pferschy, Pisinger, Knapsack Problems, chapter 11): exact, and fast since layers come in few sizes.

The losses come from HIGGS' linearity model (2411.17525, section 3): d log perplexity ~ sum_l a_l t_l^2, with
t_l^2 = ||W'_l - W_l||^2 / ||W_l||^2 of the choice and a_l of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxquant.errors import ConfigError

_MOST_STATES = 2_000_000
"""Partial choices kept at a time; beyond it every second one goes, and ``bound`` tells what that can cost."""


@dataclass(frozen=True)
class Allocation:
    """``choice[l]`` is the index of layer l's choice; ``loss`` and ``size`` are the sums, ``bound`` no sum is below.

    ``exact`` says that no choice within the budget has a smaller loss.
    """

    choice: tuple[int, ...]
    loss: float
    size: int
    bound: float
    exact: bool


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def allocate(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Allocation:
    """Choose for every layer l one c with ``losses[l][c]`` (finite) and ``sizes[l][c]`` (bytes); see the module.

    ConfigError where even the smallest choices exceed ``budget``, with their sum.
    """
    loss = [np.asarray(row, dtype=np.float64) for row in losses]
    size = [np.asarray(row, dtype=np.int64) for row in sizes]
    _check(loss, size, budget)
    multiplier = _multiplier(loss, size, budget)
    first = _spend(loss, size, budget, [int(np.argmin(a + multiplier * s)) for a, s in zip(loss, size, strict=True)])
    best, exact = _enumerate(loss, size, budget, multiplier, first)
    total = _total(loss, best)
    return Allocation(
        tuple(best), total, int(_total(size, best)), min(_bound(loss, size, budget, multiplier), total), exact
    )


def _check(loss: Sequence[Floats], size: Sequence[Ints], budget: int) -> None:
    if not loss or any(len(a) != len(s) or not len(a) for a, s in zip(loss, size, strict=True)):
        raise ConfigError("every layer needs at least one choice, with a loss and a size each")
    if bad := [i for i, a in enumerate(loss) if not np.isfinite(a).all()]:
        raise ConfigError(f"a loss of layer {bad[0]} is not finite: {loss[bad[0]].tolist()}")
    least = sum(int(s.min()) for s in size)
    if least > budget:
        raise ConfigError(f"no choice fits {budget} bytes; the smallest takes {least} bytes")


def _total(values: Sequence[Floats] | Sequence[Ints], choice: Sequence[int]) -> float:
    return float(sum(row[c] for row, c in zip(values, choice, strict=True)))


def _multiplier(loss: Sequence[Floats], size: Sequence[Ints], budget: int) -> float:
    """The least m at which the choices min(loss + m size), the smaller where two are equal, fit the budget."""

    def used(m: float) -> int:
        return sum(int(s[_cheapest(a, s, m)]) for a, s in zip(loss, size, strict=True))

    if used(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-12
    while used(high) > budget:
        low, high = high, high * 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= budget else (middle, high)
    return high


def _cheapest(a: Floats, s: Ints, m: float) -> int:
    cost = a + m * s
    equal = np.flatnonzero(cost <= cost.min())
    return int(equal[np.argmin(s[equal])])


def _bound(loss: Sequence[Floats], size: Sequence[Ints], budget: int, m: float) -> float:
    return sum(float((a + m * s).min()) for a, s in zip(loss, size, strict=True)) - m * budget


def _spend(loss: Sequence[Floats], size: Sequence[Ints], budget: int, choice: list[int]) -> list[int]:
    """What is left of the budget spent on the step that gains most, again and again."""
    if _total(size, choice) > budget:  # equal costs at the multiplier went the larger way
        choice = [int(np.argmin(s)) for s in size]
    while True:
        room = budget - _total(size, choice)
        steps = [
            (float(a[c] - a[k]), i, k)
            for i, (a, s, c) in enumerate(zip(loss, size, choice, strict=True))
            for k in range(len(a))
            if a[k] < a[c] and s[k] - s[c] <= room
        ]
        if not steps:
            return choice
        _, i, k = max(steps)
        choice[i] = k


def _enumerate(
    loss: Sequence[Floats], size: Sequence[Ints], budget: int, m: float, first: list[int]
) -> tuple[list[int], bool]:
    """The best choice of all that the bound does not exclude; and whether none was left out."""
    best, exact = _total(loss, first), True
    slack = 1e-12 * max(abs(best), 1.0)
    least = _suffix([float(s.min()) for s in size])
    relaxed = _suffix([float((a + m * s).min()) for a, s in zip(loss, size, strict=True)])
    at_size, at_loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[Ints, Ints]] = []
    for i, (a, s) in enumerate(zip(loss, size, strict=True)):
        new_size = (at_size[:, None] + s).ravel()
        new_loss = (at_loss[:, None] + a).ravel()
        bound = new_loss + m * new_size + relaxed[i + 1] - m * budget
        kept = np.flatnonzero((new_size + least[i + 1] <= budget) & (bound < best + slack))
        kept = kept[np.lexsort((new_loss[kept], new_size[kept]))]
        kept = kept[_improving(new_loss[kept])]
        if len(kept) > _MOST_STATES:
            kept, exact = kept[::2], False
        steps.append((kept // len(a), kept % len(a)))
        at_size, at_loss = new_size[kept], new_loss[kept]
    if not len(at_loss) or at_loss.min() >= best:
        return first, exact
    state, choice = int(np.argmin(at_loss)), []
    for parent, chosen in reversed(steps):
        choice.append(int(chosen[state]))
        state = int(parent[state])
    return choice[::-1], exact


def _improving(loss: Floats) -> NDArray[np.bool_]:
    """Which states, sorted by size, have a smaller loss than all before them."""
    before = np.concatenate(([math.inf], np.minimum.accumulate(loss)[:-1])) if len(loss) else loss
    return loss < before


def _suffix(values: Sequence[float]) -> list[float]:
    """The sums of all values from each on, and 0."""
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]
