"""The maths of LLM-FP4's search, against definitions and against looking at every candidate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.errors import CalibrationError
from fxquant.formats import parse_format
from fxquant.qtensor import quantize_tensor
from fxquant.scales import power_of_two
from fxquant.scheme import PerChannel, parse_spec
from fxquant.solvers.gptq import loss
from fxquant.solvers.search import Fisher, channel_bias, formats_of, search_activation, search_weight, shift_limit


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_candidates_are_all_formats_of_the_bits() -> None:
    assert {str(f) for f in formats_of(4)} == {"e3m0", "e2m1", "e1m2"}
    assert {str(f) for f in formats_of(6)} == {"e5m0", "e4m1", "e3m2", "e2m3", "e1m4"}
    assert {str(f) for f in formats_of(8)} == {"e5m2", "e4m3", "e3m4", "e2m5", "e1m6"}


def test_shifts_are_equation_15() -> None:
    absmax = torch.tensor([8.0, 4.1, 1.0, 0.01, 0.0])
    assert channel_bias(absmax, 8.0, 3).tolist() == [0, 1, 3, 3, 0]
    assert channel_bias(absmax, 4.0, 10).tolist() == [0, 0, 2, 9, 0]
    assert [shift_limit(parse_format(f)) for f in ("e2m1", "e3m0", "e1m2", "int4")] == [3, 7, 1, 3]


FISHER = Fisher.of(torch.rand(64, generator=generator()) ** 4, torch.rand(10, generator=generator()) ** 4)


@pytest.mark.parametrize("fisher", [None, FISHER])
@pytest.mark.parametrize("shift", [False, True])
def test_the_best_activation_is_the_best_of_all(shift: bool, fisher: Fisher | None) -> None:
    """Every format and every clip computed plainly; few enough rows of W that no projection is used."""
    cost = torch.ones(64, 10) if fisher is None else fisher.tokens[:, None] * fisher.channels
    g = generator()
    x = torch.randn(64, 24, generator=g) * 2.0 ** torch.randint(-3, 3, (24,), generator=g)
    W, absmax = torch.randn(10, 24, generator=g), x.abs().amax(0)
    spec = parse_spec("e2m1/tensor")
    found = search_activation(x, W, absmax, spec, formats_of(4), shift=shift, steps=20, fisher=fisher, generator=g)
    losses = {}
    for format in formats_of(4):
        for i in range(20):
            clip = float(absmax.amax()) * 2 ** (-i * 2.0 / 20)
            up = power_of_two(channel_bias(absmax, clip, shift_limit(format))) if shift else torch.ones(24)
            scale = clip / format.max
            rounded = format.round(x * up / scale) * scale / up
            errors = ((rounded - x) @ W.t()).square() * cost
            losses[str(format), i] = float(errors.sum() / ((x @ W.t()).square() * cost).sum())
    best = min(losses, key=losses.__getitem__)
    assert (str(found.spec.format), found.step) == best
    assert found.loss == pytest.approx(losses[best], rel=1e-4)


def test_an_activation_of_zeros_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="zero in all"):
        search_activation(torch.zeros(3, 4), torch.ones(2, 4), torch.zeros(4), parse_spec("e2m1/tensor"),
                          formats_of(4), shift=False, generator=generator())  # fmt: skip


@pytest.mark.parametrize("spec", ["e2m1/channel", "e2m1/group16", "int4/channel:fp16"])
def test_clips_of_weights_beat_the_whole_range(spec: str) -> None:
    g = generator()
    W = torch.randn(30, 48, generator=g) ** 3
    x = torch.randn(200, 48, generator=g) * torch.rand(48, generator=g)
    H, parsed = 2 / 200 * x.t() @ x, parse_spec(spec)
    plain = quantize_tensor(W, parsed)
    found, _ = search_weight(W, H, parsed, [parsed.format], generator=g)
    found.check()
    assert loss(W - found.dequantize(), H) < loss(W - plain.dequantize(), H)


def test_rows_of_a_weight_can_cost_more_than_others() -> None:
    """Two rows: one wants E2M1's wide range, one even steps; the format goes with the one that costs."""
    g, spec = generator(), parse_spec("e2m1/tensor")
    even, wide = torch.linspace(-1, 1, 48), 2.0 ** -torch.arange(48).remainder(7)
    W, H = torch.stack([even, wide]), torch.eye(48)
    found = {}
    for name, cost in (("even", [1000.0, 1]), ("wide", [1.0, 1000])):
        q, part = search_weight(W, H, replace(spec, granularity=PerChannel(0)), formats_of(4), generator=g,
                                row_weight=torch.tensor(cost))  # fmt: skip
        found[name] = str(q.spec.format)
        squares = torch.tensor(cost)[:, None] * torch.stack([W - q.dequantize(), W]).square()
        assert part == pytest.approx(float(squares[0].sum() / squares[1].sum()), rel=1e-2)
    assert found == {"even": "e1m2", "wide": "e3m0"}


def test_importance_of_nothing_is_one_for_all() -> None:
    fisher = Fisher.of(torch.zeros(3), torch.tensor([1.0, 3.0]))
    assert fisher.tokens.tolist() == [1, 1, 1]
    assert fisher.channels.tolist() == [0.5, 1.5]


def test_a_wide_weight_goes_through_a_projection_and_still_gains() -> None:
    g = generator()
    W = torch.randn(20, 300, generator=g) ** 3
    x = torch.randn(900, 300, generator=g) * torch.rand(300, generator=g)
    H, spec = 2 / 900 * x.t() @ x, parse_spec("e2m1/channel")
    found, estimate = search_weight(W, H, spec, formats_of(4), generator=g)
    exact = loss(W - found.dequantize(), H)
    assert exact < loss(W - quantize_tensor(W, spec).dequantize(), H)
    assert estimate == pytest.approx(exact / loss(W, H), rel=0.3)
