"""Observations: what a compiler saw of a model's numbers while it had the float weights, kept for the report.

Plain values only, some hundred numbers a layer: they are saved with the model, so that a report needs no float model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BINS = 64
Unit = Literal["value", "scale", "log2"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each of equal bins from ``low`` to ``high``, and how many below and above.

    ``unit``: ``value``, the numbers as they are; ``scale``, each divided by its scale, so that the format's own grid is
    their grid; ``log2``, the binary logarithm of positive numbers. Values that are not finite are not counted.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    below: int = 0
    above: int = 0
    unit: Unit = "value"

    @property
    def total(self) -> int:
        return sum(self.counts) + self.below + self.above

    @property
    def outside(self) -> float:
        """The share of values that lie outside the range."""
        return (self.below + self.above) / self.total if self.total else 0.0


def histogram(x: Tensor, low: float | None = None, high: float | None = None, *, unit: Unit = "value") -> Histogram:
    """The histogram of all values of ``x``; without limits, between those that 1 in 1000 lie below and above."""
    x = x.detach().flatten().to(torch.float32)
    x = x[x.isfinite()]
    if low is None or high is None:
        low, high = _limits(x)
    inside = x[(x >= low) & (x <= high)]
    counts = torch.histc(inside, BINS, min=low, max=high) if inside.numel() else torch.zeros(BINS)
    below, above = int((x < low).sum()), int((x > high).sum())
    return Histogram(low, high, tuple(int(n) for n in counts.tolist()), below, above, unit)


def _limits(x: Tensor) -> tuple[float, float]:
    if not x.numel():
        return -1.0, 1.0
    aside = x.numel() // 1000 + 1
    low, high = (float(x.kthvalue(k).values) for k in (aside, x.numel() + 1 - aside))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a weight would take, in bytes, and lose under another spec: ``error`` as in ``LayerObservation``."""

    spec: str
    error: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerObservation:
    """A quantized layer: histograms of its float weight, its scales and its input, and what other specs would lose.

        error^2 = sum_ij m_j (W' - W)_ij^2 / sum_ij m_j W_ij^2        m_j: mean square of the input's column j

    is the relative error of the layer's output where the columns of its input do not correlate, over sampled rows i.
    Without a known input all m_j are 1. ``candidates`` round to nearest.
    """

    name: str
    weight: Histogram | None = None
    scale: Histogram | None = None
    input: Histogram | None = None
    error: float | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Observations:
    """``rows``: how many rows of each weight were looked at, at most. ``inputs``: where they came from, "" for none."""

    layers: tuple[LayerObservation, ...]
    rows: int
    inputs: str = ""

    def __iter__(self) -> Iterator[LayerObservation]:
        return iter(self.layers)

    def totals(self) -> tuple[Candidate, ...]:
        """Each candidate for all layers at once: bytes add up, the error is the root mean square of the layers'."""
        found: dict[str, list[Candidate]] = {}
        for layer in self.layers:
            for candidate in layer.candidates:
                found.setdefault(candidate.spec, []).append(candidate)
        whole = [members for members in found.values() if len(members) == len(self.layers)]
        return tuple(
            Candidate(members[0].spec, rms([c.error for c in members]), sum(c.nbytes for c in members))
            for members in whole
        )

    @property
    def error(self) -> float | None:
        """The root mean square of the layers' errors, as in ``totals``; None where a layer has none."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return rms(errors) if errors and len(errors) == len(self.layers) else None


def rms(values: list[float]) -> float:
    """The root mean square."""
    return float((sum(v * v for v in values) / len(values)) ** 0.5)
