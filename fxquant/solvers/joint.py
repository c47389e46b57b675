"""LLM-FP4's coordinate descent: an activation and the weights that multiply it, searched in turn, in rounds.

Each time the one is looked for that keeps the layers' outputs best under the other (``search`` has both searches). With
``float_targets`` the weights also make up for the rounding of the activation, by least squares. LLM-FP4 (2310.16836),
section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant.formats import Format
from fxquant.grids import FloatFormat
from fxquant.qtensor import QuantizedTensor, fake_quantize
from fxquant.scales import Scales
from fxquant.scheme import QuantSpec
from fxquant.solvers.gptq import targets
from fxquant.solvers.search import (
    Activation,
    Fisher,
    channel_bias,
    formats_of,
    output_error,
    search_activation,
    search_weight,
    shift_limit,
    weighted,
)

SAMPLE = 256
"""Rows that a candidate for an activation is tried on."""


@dataclass(frozen=True)
class Options:
    """``rounds`` in turn; ``steps`` clips down to 2^-``octaves``; ``formats``: all of the same bits, or the same."""

    rounds: int = 3
    steps: int = 100
    octaves: float = 2.0
    formats: Literal["all", "same"] = "all"
    max_shift: int | None = None
    float_targets: bool = False

    def candidates(self, spec: QuantSpec) -> Sequence[Format]:
        """The formats that may take the place of the spec's own, that one first."""
        own = spec.format
        if self.formats == "same" or not isinstance(own, FloatFormat):
            return [own]
        return [own, *(format for format in formats_of(own.bits) if format != own)]


@dataclass(frozen=True)
class Found:
    """The activation (None: not rounded), the weights, and their layers' errors before and after.

    An error is ||X' W'^T - X W^T||^2 / ||X W^T||^2 on the sample.
    """

    activation: Activation | None
    weights: list[QuantizedTensor]
    before: list[float]
    after: list[float]


def search_together(
    rows: Tensor, W: Sequence[Tensor], start: Sequence[QuantizedTensor], activation: Activation | None, absmax: Tensor,
    fisher: Fisher | None, options: Options,
) -> Found | None:  # fmt: skip
    """What is best for ``rows [n, K]`` of an input, read by weights ``W [N_i, K]`` that are ``start`` now.

    ``activation``: how the input is rounded now, None for not at all; ``absmax`` [K]: its largest magnitudes in all of
    the data. ``fisher``: what errors cost, of the same rows and of all N_i. None where nothing better is found.
    """
    generator = torch.Generator().manual_seed(0)
    wide, found = [w.float() for w in W], list(start)
    again, places = max(len(rows) // SAMPLE, 1), _places(W)
    few, less = rows[::again], None if fisher is None else fisher.sample(again)
    before = [
        _error(_rounded(few, activation), q, few, w, less, at) for q, w, at in zip(found, wide, places, strict=True)
    ]
    for round_ in range(options.rounds):
        tall = torch.cat([q.dequantize() for q in found])
        activation = search_rounding(few, tall, absmax, activation, options, generator, less, again=round_ > 0)
        given = _rounded(rows, activation)
        costly = given if fisher is None else given * fisher.tokens[:, None]
        H = 2 / len(rows) * costly.t() @ given
        aims = _targets(wide, rows, given, costly, H) if options.float_targets else wide
        for i, (target, at) in enumerate(zip(aims, places, strict=True)):
            spec = start[i].spec
            found[i], _ = search_weight(
                target, H, spec, options.candidates(spec), steps=options.steps, octaves=options.octaves,
                generator=generator, row_weight=None if fisher is None else fisher.channels[at],
            )  # fmt: skip
    after = [
        _error(_rounded(few, activation), q, few, w, less, at) for q, w, at in zip(found, wide, places, strict=True)
    ]
    return Found(activation, found, before, after) if sum(after) < sum(before) else None


def search_operand(x: Tensor, absmax: Tensor, activation: Activation, options: Options) -> Activation:
    """The format and clip of a static rounding with the least squared error of its own, for values ``x [n, 1]``."""
    generator = torch.Generator().manual_seed(0)
    found = search_rounding(x, torch.ones(1, 1), absmax, activation, options, generator, again=False)
    assert found is not None
    return found


def search_rounding(
    x: Tensor, W: Tensor, absmax: Tensor, now: Activation | None, options: Options, generator: torch.Generator,
    fisher: Fisher | None = None, *, again: bool,
) -> Activation | None:  # fmt: skip
    """The best rounding of ``x [n, K]`` that is multiplied by ``W [N, K]``; ``again``: near the clip it has ``now``."""
    if now is None:
        return None
    spec, shift = now.spec, now.exponent_bias is not None
    formats = options.candidates(spec)
    if spec.static:
        return search_activation(
            x, W, absmax, spec, formats, shift=shift, limit=options.max_shift, steps=options.steps,
            octaves=options.octaves, near=now.step if again else None, fisher=fisher, generator=generator,
        )  # fmt: skip
    view, best = weighted(W, fisher).t(), now
    whole = output_error(x, view, fisher) or 1.0
    for i, format in enumerate(formats):
        trial = _dynamic(replace(spec, format=format), absmax, shift, options)
        rounded = fake_quantize(x, trial.spec, None, trial.exponent_bias)
        loss = output_error(rounded - x, view, fisher) / whole
        if not i or loss < best.loss:
            best = replace(trial, loss=loss)
    return best


def _dynamic(spec: QuantSpec, absmax: Tensor, shift: bool, options: Options) -> Activation:
    """A rounding whose scales are found when it runs."""
    limit = shift_limit(spec.format) if options.max_shift is None else options.max_shift
    bias = channel_bias(absmax, absmax.amax(), limit) if shift else None
    return Activation(spec, torch.empty(0), bias, torch.inf, 0)


def _rounded(x: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return x
    given = Scales(activation.scale) if activation.spec.static else None
    return fake_quantize(x, activation.spec, given, activation.exponent_bias)


def _places(W: Sequence[Tensor]) -> list[slice]:
    """Where the rows of each weight are among those of all."""
    ends = list(accumulate(len(w) for w in W))
    return [slice(end - len(w), end) for end, w in zip(ends, W, strict=True)]


def _targets(W: list[Tensor], x: Tensor, given: Tensor, costly: Tensor, H: Tensor) -> list[Tensor]:
    """Weights whose outputs on the rounded inputs come nearest to W's on the float ones."""
    drift = 2 / len(x) * (x - given).t() @ costly
    return targets(W, H, drift, 0.01)


def _error(given: Tensor, q: QuantizedTensor, x: Tensor, W: Tensor, fisher: Fisher | None, at: slice) -> float:
    """||X' W'^T - X W^T||^2 / ||X W^T||^2; with ``fisher`` of what errors cost, ``at`` its channels."""
    want = F.linear(x, W)
    squares = torch.stack([(F.linear(given, q.dequantize()) - want).square(), want.square()])
    if fisher is not None:
        squares = squares * fisher.tokens[:, None] * fisher.channels[at]
    error, whole = squares.sum((1, 2)).tolist()
    return float(error / (whole or 1.0))
