"""Confidence intervals for means of figures that are not independent, and for shares.

Tokens that follow each other are alike, so the error of a mean over tokens is taken from the spread between blocks of
them (clusters), not between tokens. With sums s_b and counts n_b of B blocks, n = sum n_b::

    mean = sum s_b / n
    variance = B / (B - 1) * sum (s_b - mean n_b)^2 / n^2           (ratio estimator, Cochran, Sampling Techniques, 6.3)
    interval = mean +- t(B - 1) sqrt(variance)                      (Student's t, B - 1 degrees of freedom)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from fxquant.errors import InputError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval of ``level``; ``blocks`` independent parts of the data stand behind it."""

    value: float
    low: float
    high: float
    blocks: int
    level: float = LEVEL

    def to_dict(self) -> dict[str, float | None]:
        """The same as plain values; what is not finite is None, since JSON has no word for it."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    def map(self, monotone: Callable[[float], float]) -> Estimate:
        """The estimate of ``monotone(figure)``, an increasing function."""
        return Estimate(monotone(self.value), monotone(self.low), monotone(self.high), self.blocks, self.level)

    def clipped(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """The interval cut to what the figure can be."""
        return Estimate(self.value, max(self.low, low), min(self.high, high), self.blocks, self.level)


def mean(sums: Sequence[float], counts: Sequence[int], *, level: float = LEVEL) -> Estimate:
    """The mean over all members of blocks with these sums and counts. InputError with fewer than two blocks."""
    average, variance = _clustered(sums, counts)
    half = student_t(len(sums) - 1, level) * math.sqrt(variance)
    return Estimate(average, average - half, average + half, len(sums), level)


def share(hits: Sequence[int], counts: Sequence[int], *, level: float = LEVEL) -> Estimate:
    """The share of hits among all members of blocks: Wilson's interval with the sample size that the blocks are worth.

    n members in blocks are worth n / d, with Kish's design effect d = max(1, clustered variance / (p (1 - p) / n));
    where all are hits or none is, nothing shows d, and it is 1.
    """
    value, variance = _clustered(hits, counts)
    n = sum(counts)
    plain = value * (1 - value) / n
    effect = max(1.0, variance / plain) if plain > 0 else 1.0
    low, high = _wilson(value, n / effect, student_t(len(hits) - 1, level))
    return Estimate(value, low, high, len(hits), level)


def wilson(hits: int, n: int, *, level: float = LEVEL) -> Estimate:
    """The share of ``hits`` among ``n`` independent members, with Wilson's interval (1927)."""
    if n < 1 or not 0 <= hits <= n:
        raise InputError(f"{hits} of {n} is no share; expected 0 <= hits <= n and n >= 1")
    return Estimate(hits / n, *_wilson(hits / n, n, student_t(10**9, level)), n, level)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)"""
    middle, below = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(max(0.0, (middle - half) / below), p), max(min(1.0, (middle + half) / below), p)


def _clustered(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """The mean and its variance, from the spread between blocks."""
    blocks, n = len(sums), sum(counts)
    if blocks < 2:
        raise InputError(
            f"{blocks} block of data gives no confidence interval; at least 2 are needed and 20 are good: give more or "
            f"longer windows"
        )
    average = sum(sums) / n
    spread = sum((s - average * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return average, blocks / (blocks - 1) * spread / n**2


def student_t(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = ``level`` for Student's distribution of ``degrees`` degrees of freedom."""
    if degrees > 1000:  # the normal quantile, and Fisher's first term of the expansion in 1/degrees
        z = _bisect(lambda x: math.erf(x / math.sqrt(2)), level)
        return z + (z**3 + z) / (4 * degrees)
    return _bisect(lambda t: _within(t, degrees), level)


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t), the finite series in cos(theta), theta = atan(t / sqrt(degrees)) (Abramowitz, Stegun 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    if degrees == 1:
        return 2 * theta / math.pi
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _bisect(rising: Callable[[float], float], level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"confidence level {level} is not between 0 and 1, such as {LEVEL}")
    low, high = 0.0, 1.0
    while rising(high) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2
