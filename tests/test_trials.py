"""Trials: the rest of a graph computed from a layer on gives what the whole graph gives; gradients against formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import BothWays, Conv1D, Convolutions, Experts, RoutedExperts, Tied, mlp
from torch import Tensor, nn

from fxquant import evaluate
from fxquant.errors import CalibrationError, InputError
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.scheme import parse_spec
from fxquant.sensitivity import float_program
from fxquant.trials import Trial, Trials, Unit, units_of

MODELS: list[tuple[type[nn.Module] | Any, tuple[Tensor, ...]]] = [
    (mlp, (torch.randn(5, 20),)),
    (Tied, (torch.randint(0, 50, (3, 7)),)),
    (Convolutions, (torch.randn(2, 3, 9, 9),)),
    (Experts, (torch.randn(3, 4, 8),)),
    (RoutedExperts, (torch.randn(4, 8), torch.tensor([0, 2, 1, 1]))),
    (Conv1D, (torch.randn(2, 3, 10),)),
    (BothWays, (torch.randn(4, 16),)),
]


def prepared(make: Any, example: tuple[Tensor, ...], batches: int = 2) -> tuple[nn.Module, Program, Trials]:
    torch.manual_seed(0)
    model = make().eval()
    program = float_program(model, example)
    data = [tuple(x + 0.1 if x.is_floating_point() else x for x in example)] * (batches - 1)
    return model, program, Trials(program, [example, *data])


def changed(unit: Unit) -> Trial:
    return Trial({unit: unit.weight * 1.5 + 0.1})


@pytest.mark.parametrize(("make", "example"), MODELS)
def test_the_rest_of_the_graph_gives_what_the_whole_gives(make: Any, example: tuple[Tensor, ...]) -> None:
    model, program, trials = prepared(make, example)
    units = units_of(program)
    found = dict(trials.one_by_one(units, lambda unit: [Trial({}), changed(unit)]))
    assert set(found) == set(units)
    with torch.no_grad():
        before = [model(*batch) for batch in (trials.batches)]
    for unit, (nothing, change) in found.items():
        assert nothing.error == 0
        assert change.error == pytest.approx(trials.all_at_once(changed(unit)).error, rel=1e-6)
        other = copy.deepcopy(model)
        weights = dict(other.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            weights[unit.layers[0].target].mul_(1.5).add_(0.1)
            after = [other(*batch) for batch in trials.batches]
        square = norm = 0.0
        for a, b in zip(before, after, strict=True):
            x, y = (v["logits"] if isinstance(v, dict) else v for v in (a, b))
            square, norm = square + float((x - y).double().square().sum()), norm + float(x.double().square().sum())
        assert change.error == pytest.approx((square / norm) ** 0.5, rel=1e-4)
        assert change.error > 0


def test_units_are_weights_with_all_their_layers() -> None:
    _, program, _ = prepared(*MODELS[1])
    assert [[layer.name for layer in unit.layers] for unit in units_of(program)] == [
        ["embed", "head"],
        ["up"],
        ["down"],
    ]


class Bigram(nn.Module):
    """Logits that depend on the current token only, through two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.mix = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.mix(self.embed(input_ids))))}


def test_a_language_model_is_judged_as_evaluate_does() -> None:
    torch.manual_seed(0)
    model, windows = Bigram(), torch.randint(0, 30, (3, 40))
    program = float_program(model, {"input_ids": windows[:2]})
    trials = Trials(program, windows)
    mix = next(unit for unit in units_of(program) if unit.name == "mix")
    change = trials.all_at_once(changed(mix))
    other = copy.deepcopy(model)
    other.mix.weight.data.mul_(1.5).add_(0.1)
    want = evaluate.compare(other, model, windows)
    assert change.kl == pytest.approx(want.kl.value, rel=1e-4)
    assert change.nll == pytest.approx((want.perplexity.nll - want.reference.nll) / want.perplexity.tokens, rel=1e-3)
    assert trials.float_nll == pytest.approx(want.reference.nll / want.reference.tokens, rel=1e-5)


def test_rounded_inputs_are_those_of_a_units_linears() -> None:
    model = mlp()
    x = torch.randn(5, 20)
    program = float_program(model, (x,))
    first, second = units_of(program)
    trials, spec = Trials(program, [(x,)]), parse_spec("int4/token")
    with torch.no_grad():
        y, want = model(x), model[2](ops.fake_quantize_dynamic.default(model[1](model[0](x)), str(spec)))
    change = trials.all_at_once(Trial({}, {second: spec}))
    assert change.error == pytest.approx(float((want - y).norm() / y.norm()), rel=1e-4)
    assert trials.all_at_once(Trial({}, {first: parse_spec("int8/token")})).error < 0.01
    assert change.kl is None
    assert change.nll is None


def test_curvature_of_a_linear_output_is_its_input_squared() -> None:
    """y = W x with one row: J^T J is x_j^2 for every row of W, whatever the random signs."""
    x = torch.randn(1, 6)
    model = nn.Linear(6, 4, bias=False)
    program = float_program(model, (torch.randn(2, 6),))
    (unit,) = units_of(program)
    found = Trials(program, [(x,)]).curvature([unit])[unit]
    assert torch.allclose(found, (x.square() / model(x).square().sum()).expand(4, 6), rtol=1e-4)


def test_curvature_of_logits_is_the_fisher_matrix() -> None:
    """logits = W x: the Fisher diagonal is p_i (1 - p_i) x_j^2, half of it the KL of a small change."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x)}

    model, x = Classifier(), torch.randn(1, 6)
    program = float_program(model, (torch.randn(2, 6),))
    (unit,) = units_of(program)
    found = Trials(program, [(x,)] * 600).curvature([unit])[unit]
    p = torch.softmax(model(x)["logits"], -1).detach()
    want = (p * (1 - p)).t() * x.square() / 2
    assert torch.allclose(found, want, rtol=0.25, atol=1e-3)
    one = Trials(program, [(x,)])
    noise = torch.randn(500, 4, 6) * 0.02
    kl = [one.all_at_once(Trial({unit: unit.weight.detach() + n})).kl or 0.0 for n in noise]
    assert sum(kl) / len(kl) == pytest.approx(float(want.sum() * 0.02**2), rel=0.1)


def test_data_that_do_not_fit() -> None:
    model = nn.Linear(6, 4)
    program = float_program(model, (torch.randn(2, 6),))
    with pytest.raises(CalibrationError, match="NaN or Inf in batch 1"):
        _ = Trials(program, [(torch.zeros(1, 6),), (torch.full((1, 6), torch.nan),)]).judges

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(tokens).mean(1))}

    tokens = torch.randint(0, 9, (2, 5))
    with pytest.raises(InputError, match="token windows are for causal language models"):
        _ = Trials(float_program(Pooled(), (tokens,)), tokens).judges
