"""observe: histograms, errors and candidates against plain computations on the whole weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Tied, mlp
from torch import Tensor, nn

import fxquant
from fxquant.observations import Histogram, LayerObservation, histogram
from fxquant.observe import CANDIDATES, relative
from fxquant.qtensor import quantize_tensor


def observed(model: nn.Module, inputs: object, config: object, **more: object) -> dict[str, LayerObservation]:
    seen = fxquant.compile(model, inputs, config, **more).program.observations
    assert seen is not None
    return {layer.name: layer for layer in seen}


def small(rows: int = 24, cols: int = 16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(cols, rows)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(10, 16) * torch.linspace(0.1, 3, 16)


def test_histogram_counts_every_finite_value_once() -> None:
    x = torch.tensor([-5.0, -1.0, 0.0, 0.5, 1.0, 7.0, float("nan"), float("inf")])
    found = histogram(x, -1.0, 1.0)
    assert (found.below, found.above, found.total) == (1, 1, 6)
    assert found.counts[0] == 1
    assert found.counts[-1] == 1


def test_histogram_of_nothing_and_of_one_value() -> None:
    assert histogram(torch.tensor([])).total == 0
    assert histogram(torch.full((5,), 3.0)) == Histogram(2.5, 3.5, (0,) * 32 + (5,) + (0,) * 31)


def test_limits_leave_one_in_a_thousand_aside() -> None:
    found = histogram(torch.arange(10_000.0))
    assert (found.low, found.high, found.below, found.above) == (10.0, 9989.0, 10, 10)


def test_the_error_is_that_of_the_output_where_columns_do_not_correlate(x: Tensor) -> None:
    layer, m = small(), x.square().mean(0)
    got = quantize_tensor(layer.weight.detach(), "e2m1/channel").dequantize()
    W = layer.weight.detach()
    want = ((got - W).square() * m).sum().sqrt() / (W.square() * m).sum().sqrt()
    seen = observed(nn.Sequential(layer), (x,), {"rules": [{"match": "*", "weight": "e2m1/channel"}]})["0"]
    assert seen.error == pytest.approx(float(want), rel=1e-5)
    assert {c.spec: c.error for c in seen.candidates}["e2m1/channel"] == pytest.approx(seen.error)


def test_candidates_have_the_size_they_pack_to_and_lose_what_they_lose(x: Tensor) -> None:
    layer = small()
    W, m = layer.weight.detach(), x.square().mean(0)
    seen = observed(nn.Sequential(layer), (x,), {"rules": [{"match": "*", "weight": "e3m2/channel"}]})["0"]
    assert [c.spec for c in seen.candidates] == list(CANDIDATES)
    for candidate in seen.candidates:
        q = quantize_tensor(W, candidate.spec)
        assert candidate.nbytes == q.nbytes
        assert candidate.error == pytest.approx(relative(W, q.dequantize(), m), rel=1e-5)


def test_without_inputs_only_weights_are_seen() -> None:
    layer = small()
    exported = torch.export.export(nn.Sequential(layer), (torch.randn(3, 16),))
    seen = observed(exported, None, {"rules": [{"match": "*", "weight": "e2m1/channel"}]})["0"]
    assert seen.input is None
    W = layer.weight.detach()
    got = quantize_tensor(W, "e2m1/channel").dequantize()
    assert seen.error == pytest.approx(float((got - W).norm() / W.norm()), rel=1e-5)


def test_weights_lie_in_units_of_their_scale(x: Tensor) -> None:
    layer = small()
    seen = observed(nn.Sequential(layer), (x,), {"rules": [{"match": "*", "weight": "e2m1/channel"}]})["0"]
    assert seen.weight is not None
    assert (seen.weight.low, seen.weight.high, seen.weight.unit) == (-6.0, 6.0, "scale")
    units = layer.weight.detach() / (layer.weight.detach().abs().amax(1, keepdim=True) / 6)
    counts = torch.histc(units.clamp(-6, 6), 64, -6, 6)
    assert seen.weight.total == W_COUNT
    assert (torch.tensor(seen.weight.counts) - counts).abs().sum() <= 4  # a value on the edge of a bin


W_COUNT = 24 * 16


def test_compensation_belongs_to_what_a_weight_became(x: Tensor) -> None:
    rules = [{"match": "*", "weight": "e2m1/channel"}]
    config = {"rules": rules, "passes": [{"lorc": {"rank": 8}}]}
    plain = observed(nn.Sequential(small()), (x,), {"rules": rules})["0"]
    lorc = observed(nn.Sequential(small()), (x,), config, calibration=[(torch.randn(99, 16),)])["0"]
    assert plain.error is not None
    assert lorc.error is not None
    assert lorc.error < 0.8 * plain.error


def test_a_folded_shift_is_no_error(x: Tensor) -> None:
    config = {
        "rules": [{"match": "*", "weight": "e3m2/channel", "activation": "e3m4/tensor"}],
        "passes": [{"pre_shift": {}}, {"fold_activation_scales": {}}],
    }
    seen = observed(
        mlp(), (torch.randn(64, 20) * torch.linspace(0.05, 4, 20),), config, calibration=[torch.randn(64, 20)]
    )
    errors = [layer.error for layer in seen.values() if layer.error is not None]
    assert len(errors) == len(seen)
    assert max(errors) < 0.08


def test_they_are_saved_with_the_model(tmp_path: Path) -> None:
    q = fxquant.compile(Tied(), {"tokens": torch.randint(0, 50, (2, 5))}, "W6A16-E3M2")
    q.save(tmp_path / "out")
    assert fxquant.load(tmp_path / "out").program.observations == q.program.observations
    assert q.program.observations is not None
    assert {layer.name for layer in q.program.observations} <= {layer.name for layer in q.summary().layers}


def test_every_step_has_its_bytes() -> None:
    q = fxquant.compile(mlp(), (torch.randn(4, 20),), "W6A16-E3M2")
    sizes = [step.nbytes for step in q.summary().steps if step.nbytes is not None]
    assert sizes[0] == q.summary().bytes_before
    assert sizes[-1] == q.summary().bytes_after
