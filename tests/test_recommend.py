"""Recommendations: exact sizes, true losses, and the best of what there is, against brute force."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from tiny_models import Convolutions, Tied, mlp, tiny_decoder
from torch import Tensor, nn

import fxquant
from fxquant.candidates import SPECS, Space, space
from fxquant.config import load_config
from fxquant.errors import ConfigError
from fxquant.evaluate import perplexity
from fxquant.recommend import Measured, Recommendation, _bisect, recommend, with_front
from fxquant.scheme import parse_spec
from fxquant.sensitivity import quantized_units
from fxquant.trials import Trials

FEW = ("e2m1/group16:fp16", "e3m2/channel:fp16", "e4m3/channel:fp16")


class TiedLm(Tied):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids)["logits"]}


def tied() -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A language model of two linears and a tied table, what to measure on, and what to calibrate on."""
    torch.manual_seed(0)
    windows = torch.randint(0, 50, (10, 12))
    return TiedLm().eval(), {"input_ids": windows[:2]}, windows[:4], windows[4:]


@pytest.fixture(scope="module")
def small() -> tuple[Space, nn.Module, Any]:
    model, inputs, _, calibration = tied()
    return space(model, inputs, calibration, candidates=FEW), model, inputs


def compiled_bytes(model: nn.Module, inputs: Any, config: Any) -> int:
    return fxquant.compile(model, inputs, config).summary().bytes_after


# --- candidates -------------------------------------------------------------------------------------------------------
def test_sizes_are_those_of_the_compiled_model(small: tuple[Space, nn.Module, Any]) -> None:
    found, model, inputs = small
    schemes = [*found.uniform(), found.mixed(found.least), found.mixed((found.least + found.float_nbytes) // 2)]
    assert len(schemes) > 5
    for scheme in schemes:
        assert scheme.nbytes == compiled_bytes(model, inputs, scheme.config), scheme.name
    assert found.float_nbytes == fxquant.compile(model, inputs, FEW_CONFIG).summary().bytes_before


FEW_CONFIG = {"rules": [{"match": "*", "weight": "e3m2"}]}


@pytest.mark.parametrize(
    "kind", ["mlp", "conv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("untied", "gpt2"))]
)
def test_configs_say_what_the_choice_is(kind: str) -> None:
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(0, 64, (2, 8))}
    model, inputs = {
        "mlp": lambda: (mlp().eval(), (torch.randn(3, 20),)),
        "conv": lambda: (Convolutions().eval(), (torch.randn(2, 3, 8, 8),)),
        "untied": lambda: (tiny_decoder("Llama", num_hidden_layers=1), tokens),
        "gpt2": lambda: (tiny_decoder("GPT2", n_embd=32, n_layer=1, n_head=4, n_positions=64), tokens),
    }[kind]()
    found = space(model, inputs, [inputs], candidates=FEW)
    for scheme in [*found.uniform()[1:3], found.mixed((found.least + found.float_nbytes) // 2)]:
        taken = quantized_units(found.program, scheme.config.layer_rules())
        by_name = {unit.name: rule.weight for unit, rule in taken.items()}
        assert [by_name.get(unit.name) for unit in found.units] == list(scheme.choice), scheme.name
        assert scheme.nbytes == compiled_bytes(model, inputs, scheme.config)


def test_the_mixed_scheme_is_the_best_by_prediction(small: tuple[Space, nn.Module, Any]) -> None:
    found, _, _ = small
    for budget in range(found.least, found.float_nbytes, 700):
        scheme = found.mixed(budget)
        every = itertools.product(range(len(found.specs)), repeat=len(found.units))
        fitting = [
            sum(row[c] for row, c in zip(found.losses, choice, strict=True))
            for choice in every
            if found.fixed_nbytes + sum(row[c] for row, c in zip(found.sizes, choice, strict=True)) <= budget
        ]
        assert scheme.nbytes <= budget
        assert scheme.predicted == pytest.approx(min(fitting), rel=1e-9)


# --- a size -----------------------------------------------------------------------------------------------------------
def test_a_size_is_met_to_the_byte_and_the_perplexity_is_true() -> None:
    model, inputs, data, calibration = tied()
    target = 4_600
    found = recommend(model, inputs, target_bytes=target, data=data, calibration=calibration, candidates=FEW)
    compiled = fxquant.compile(model, inputs, found.config)
    assert found.best.nbytes == compiled.summary().bytes_after <= target
    assert found.best.perplexity == pytest.approx(perplexity(compiled, data).value, rel=1e-5)
    assert found.float_perplexity == pytest.approx(perplexity(lambda input_ids: model(input_ids), data).value, rel=1e-5)
    assert found.best.loss == pytest.approx(found.best.perplexity / found.float_perplexity - 1, rel=1e-4)
    assert found.best.loss == min(each.loss for each in found.measured)
    assert found.measure == "perplexity"


def test_every_scheme_that_fits_is_tried_if_there_is_time() -> None:
    """With as many tries as schemes the answer is the best of all, by measuring each on its own."""
    model, inputs, data, calibration = tied()
    found = recommend(model, inputs, target_bytes=6_000, data=data, calibration=calibration, candidates=FEW, tries=1000)
    every = [s for s in space(model, inputs, calibration, candidates=FEW).uniform() if s.nbytes <= 6_000]
    least = min(perplexity(fxquant.compile(model, inputs, s.config), data).value for s in every)
    assert found.best.perplexity is not None
    assert found.best.perplexity <= least * (1 + 1e-6)
    assert len(found.measured) in (len(every), len(every) + 1)


def test_methods_are_measured_compiled() -> None:
    model, inputs, data, calibration = tied()
    found = recommend(
        model, inputs, target_bytes=5_000, data=data, calibration=calibration, candidates=FEW, tries=2, finalists=1,
        methods=[{"gptq": {"damp_percent": 0.1}}],
    )  # fmt: skip
    (refined,) = [each for each in found.measured if each.methods]
    assert refined.methods == ("gptq",)
    compiled = fxquant.compile(model, inputs, refined.config, calibration=calibration)
    assert refined.nbytes == compiled.summary().bytes_after
    assert refined.perplexity == pytest.approx(perplexity(compiled, data).value, rel=1e-4)


def test_sizes_that_cannot_be() -> None:
    model, inputs, data, _ = tied()
    least = space(model, inputs, data, candidates=FEW).least
    with pytest.raises(
        ConfigError, match=re.escape(f"the smallest that the candidates reach is {least / 1024:.1f} KiB ({least:,}")
    ):
        recommend(model, inputs, target_bytes=least - 1, data=data, candidates=FEW)
    assert recommend(model, inputs, target_bytes=least, data=data, candidates=FEW).best.nbytes == least
    with pytest.raises(ConfigError, match=r"fits .* already"):
        recommend(model, inputs, target_bytes=1 << 30, data=data, candidates=FEW)


@pytest.mark.parametrize(
    ("goal", "says"),
    [({}, "one goal"), ({"target_bytes": 1, "max_loss": 1.0}, "one goal"), ({"max_loss": -1.0}, "more than 0"),
     ({"max_loss": math.nan}, "more than 0"), ({"max_loss": 1.0, "tries": 0}, "at least one")],
)  # fmt: skip
def test_goals_that_are_none(goal: dict[str, Any], says: str) -> None:
    model, inputs, data, _ = tied()
    with pytest.raises(ConfigError, match=says):
        recommend(model, inputs, data=data, **goal)


# --- a loss -----------------------------------------------------------------------------------------------------------
def test_a_loss_is_kept() -> None:
    model, inputs, data, calibration = tied()
    for goal in (0.003, 0.03):
        found = recommend(model, inputs, max_loss=goal, data=data, calibration=calibration, tries=6)
        assert found.best.loss <= goal
        assert found.best.nbytes == min(each.nbytes for each in found.measured if each.loss <= goal)
        compiled = fxquant.compile(model, inputs, found.config)
        assert compiled.summary().bytes_after == found.best.nbytes
        assert perplexity(compiled, data).value <= found.float_perplexity * (1 + goal) * (1 + 1e-6)


def test_a_loss_that_nothing_keeps_names_the_nearest() -> None:
    torch.manual_seed(0)
    model, x = mlp().eval(), torch.randn(8, 20)
    with pytest.raises(
        ConfigError, match=r"nothing that was measured stays within 1e-05 % of output error: the nearest"
    ):
        recommend(model, (x,), max_loss=1e-7, data=[(x,)], candidates=FEW)


def test_models_that_are_no_language_models() -> None:
    torch.manual_seed(0)
    model, x = mlp().eval(), torch.randn(8, 20)
    found = recommend(model, (x,), max_loss=0.05, data=[(x,)], candidates=FEW)
    with torch.no_grad():
        got, want = fxquant.compile(model, (x,), found.config)(x), model(x)
    assert found.measure == "error"
    assert found.best.loss == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
    assert found.best.loss <= 0.05
    assert "output error" in str(found)
    assert found.best.perplexity is None


class Steps:
    """Losses by position, and which were asked for."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.asked = losses, list[int]()

    def __call__(self, at: int) -> Measured:
        self.asked.append(at)
        return Measured(str(at), load_config(FEW_CONFIG), at, self.losses[at], None, 0.0)


@pytest.mark.parametrize("length", [1, 2, 5, 24])
def test_bisection_finds_the_border_from_anywhere(length: int) -> None:
    for border, start in itertools.product(range(length + 1), range(length)):
        steps = Steps([1.0 if i < border else 0.0 for i in range(length)])
        found = _bisect(range(length), start, 0.5, steps, tries=100)  # type: ignore[arg-type]
        assert len(steps.asked) == len(set(steps.asked)) <= 2 * length.bit_length() + 1
        assert border == length or border in found
        assert border == 0 or border - 1 in found


# --- results ----------------------------------------------------------------------------------------------------------
def test_the_front() -> None:
    def one(nbytes: int, loss: float) -> Measured:
        return Measured("", load_config(FEW_CONFIG), nbytes, loss, None, 0.0)

    found = with_front([one(3, 0.1), one(1, 0.5), one(2, 0.6), one(3, 0.2), one(4, 0.1)])
    assert [(each.nbytes, each.loss) for each in found if each.pareto] == [(1, 0.5), (3, 0.1)]


def test_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    model, inputs, data, calibration = tied()
    told: list[Measured] = []
    found = recommend(
        model, inputs, target_bytes=5_000, data=data, calibration=calibration, candidates=FEW, tries=3, tell=told.append
    )
    assert {each.name for each in told} == {each.name for each in found.measured}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["best"]["nbytes"] == found.best.nbytes
    assert f"{found.best.nbytes:,} bytes" in str(found)
    assert sum(line.startswith(">") for line in str(found).splitlines()) == 1
    assert isinstance(found, Recommendation)
    with pytest.raises(AttributeError):
        found.goal = "another"  # type: ignore[misc]


def test_an_interrupt_leaves_what_was_told() -> None:
    model, inputs, data, calibration = tied()
    told: list[Measured] = []

    def stop(measured: Measured) -> None:
        told.append(measured)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend(model, inputs, target_bytes=5_000, data=data, calibration=calibration, candidates=FEW, tell=stop)
    assert len(told) == 2


def test_candidates_are_specs_of_weights() -> None:
    model, inputs, data, _ = tied()
    assert [str(parse_spec(spec)) for spec in SPECS] == list(SPECS)
    with pytest.raises(ConfigError, match="weights take"):
        recommend(model, inputs, target_bytes=5_000, data=data, candidates=["e4m3/token"])


def test_a_compiled_program_is_measured_as_trials_are() -> None:
    """Rounding in place and compiling are the same to the last digits of float32."""
    model, inputs, data, _ = tied()
    found = space(model, inputs, data, candidates=FEW)
    trials = Trials(found.program, data)
    compiled = fxquant.compile(model, inputs, FEW_CONFIG)
    change = trials.measured(compiled.program)
    assert change.nll is not None
    assert trials.float_nll is not None
    assert math.exp(trials.float_nll + change.nll) == pytest.approx(perplexity(compiled, data).value, rel=1e-5)
