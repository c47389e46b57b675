"""insert_qdq: every layer type in QDQ form, ties together, and a reason for every layer left alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, RoutedExperts, Tied, mlp

import fxquant
from fxquant.capture import capture
from fxquant.errors import WeightError
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.program import Program, Stage, run
from fxquant.rewrite import tensors
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify

E3M2 = parse_spec("e3m2/channel")
EVERYTHING = (LayerRule("*", E3M2),)


def quantized(model: torch.nn.Module, x: torch.Tensor, rules: tuple[LayerRule, ...] = EVERYTHING) -> Program:
    program = capture(model.eval(), (x,))
    return run(program, [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules}), Stage(REMOVE_DEAD)], check=verify)


def declines(program: Program) -> dict[str, str]:
    return {d.layer: d.reason for step in program.trace for d in step.declines}


def rewrites(program: Program) -> dict[str, str]:
    step = next(s for s in program.trace if s.name == "insert_qdq")
    return {r.layer: r.detail for r in step.rewrites}


@pytest.mark.parametrize(
    ("make", "x", "layers"),
    [
        (mlp, torch.randn(2, 20), {"0": (32, 20), "2": (6, 32)}),
        (Conv1D, torch.randn(2, 3, 10), {"": (14, 10)}),
        (Convolutions, torch.randn(2, 3, 12, 12), {"stem.0": (8, 3, 3, 3), "depthwise": (8, 2, 3, 3), "line": (6, 8, 3),
                                                   "head": (5, 6)}),
    ],
)  # fmt: skip
def test_the_model_computes_with_its_dequantized_weights(make, x, layers) -> None:
    """Exactly what the float model computes once its weights are replaced by the rounded ones."""
    model = make().eval()
    program = quantized(model, x)
    got = program(x)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in layers:
            value = parameter.data.t() if make is Conv1D else parameter.data
            rounded = fxquant.quantize_tensor(value, E3M2).dequantize()
            parameter.data = rounded.t() if make is Conv1D else rounded
    with torch.no_grad():
        assert torch.equal(got, model(x))
    assert len(rewrites(program)) == len(layers)


def test_experts_share_scales_along_what_is_summed_over() -> None:
    model, x = Experts(), torch.randn(3, 5, 8)
    program = quantized(model, x)
    up = fxquant.quantize_tensor(model.up.data.transpose(1, 2), E3M2, channel_dims=2).dequantize().transpose(1, 2)
    down = fxquant.quantize_tensor(model.down.data, E3M2, channel_dims=2).dequantize()
    want = torch.bmm(torch.bmm(x, up).relu(), down.transpose(1, 2))
    assert torch.allclose(program(x), want, rtol=1e-6, atol=1e-6)
    assert rewrites(program) == {"up": "e3m2/channel", "down": "e3m2/channel"}


def test_experts_as_the_left_operand() -> None:
    model, x, ids = RoutedExperts(), torch.randn(5, 8), torch.tensor([0, 2, 1, 1, 0])
    program = capture(model.eval(), (x, ids))
    run(program, [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": EVERYTHING})], check=verify)
    rounded = fxquant.quantize_tensor(model.weight.data, E3M2, channel_dims=2).dequantize()
    want = torch.stack([rounded[i] @ v for i, v in zip(ids, x, strict=True)])
    assert torch.allclose(program(x, ids), want, rtol=1e-5, atol=1e-5)
    assert len(rewrites(program)) == 1


def test_the_float_weight_stays_until_lowering() -> None:
    model = mlp()
    program = quantized(model, torch.randn(2, 20))
    held = tensors(program.gm)
    assert torch.equal(held["0.weight"], model[0].weight)
    assert {"0.weight_codes", "0.weight_scale"} <= set(held)


def test_embedding_and_tied_head_stay_in_float_and_say_why() -> None:
    program = quantized(Tied(), torch.randint(0, 50, (2, 5)))
    assert set(rewrites(program)) == {"up", "down"}
    assert "exact path" in declines(program)["embed"]
    assert "tied to 'embed'" in declines(program)["head"]


@pytest.mark.parametrize("named", ["head", "embed"])
def test_naming_one_side_of_a_tie_quantizes_both(named: str) -> None:
    program = quantized(Tied(), torch.randint(0, 50, (2, 5)), (LayerRule(named, E3M2),))
    assert rewrites(program) == {"head": "e3m2/channel", "embed": "e3m2/channel"}
    codes = [name for name in tensors(program.gm) if name.endswith("_codes")]
    assert len(codes) == 1
    assert declines(program)["up"] == "no rule matches this layer"


class Twins(torch.nn.Module):
    """Two linears of one weight, one of which has buffers with the names that quantizing would give."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.one.register_buffer("weight_scale", torch.full((8, 1), 3.0))
        self.one.register_buffer("weight_packed", torch.full((8, 8), 7, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) * self.one.weight_scale.reshape(-1) + self.two(x) * self.one.weight_packed[0]


def test_of_two_linears_with_one_weight_the_earliest_rule_decides() -> None:
    e2m1 = parse_spec("e2m1/channel")
    x = torch.randn(2, 8)
    assert rewrites(quantized(Twins(), x, (LayerRule("t*", e2m1), LayerRule("*", E3M2)))) == {
        "one": "e2m1/channel", "two": "e2m1/channel"}  # fmt: skip
    assert set(rewrites(quantized(Twins(), x, (LayerRule("t*", e2m1),)))) == {"one", "two"}
    assert rewrites(quantized(Twins(), x, (LayerRule("two", keep=True), LayerRule("*", E3M2)))) == {}


def test_a_models_own_tensors_are_not_overwritten() -> None:
    model, x = Twins(), torch.randn(4, 8)
    compiled = fxquant.compile(model, (x,), "W8A16-INT")
    with torch.no_grad():
        want = model(x)
    assert float((compiled(x) - want).norm() / want.norm()) < 0.02


def test_types_reach_embeddings() -> None:
    rules = (LayerRule("*", E3M2, types=("embedding", "linear")),)
    assert set(rewrites(quantized(Tied(), torch.randint(0, 50, (2, 5)), rules))) == {"embed", "up", "down", "head"}


def test_first_rule_wins_and_keep_keeps() -> None:
    rules = (LayerRule("*.nothing"), LayerRule("0", keep=True), LayerRule("*", parse_spec("int4/group8")))
    program = quantized(mlp(), torch.randn(2, 20), rules)
    assert rewrites(program) == {"2": "int4/group8"}
    assert declines(program)["0"] == "rule '0' keeps it in float"


def test_error_and_size_are_recorded_on_the_node() -> None:
    model = mlp()
    program = quantized(model, torch.randn(2, 20))
    quants = [w for n in program.gm.graph.nodes if (w := info(n).weight)]
    q = fxquant.quantize_tensor(model[0].weight, E3M2)
    weight = model[0].weight.detach()
    assert quants[0].error == pytest.approx(float((q.dequantize() - weight).norm() / weight.norm()))
    assert (quants[0].nbytes, quants[0].float_nbytes) == (q.nbytes, 32 * 20 * 4)


def test_a_bad_weight_is_named() -> None:
    model = mlp()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"^2.weight holds 1 NaN"):
        quantized(model, torch.randn(2, 20))


def test_half_precision_models_keep_their_dtype() -> None:
    model = mlp().bfloat16()
    x = torch.randn(2, 20).bfloat16()
    program = quantized(model, x)
    assert program(x).dtype == torch.bfloat16
