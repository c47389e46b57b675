"""The gptq pass: the codes it finds are the solver's on the inputs each layer really sees; and what it declines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied, mlp
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph import info
from fxquant.scheme import parse_spec
from fxquant.solvers.gptq import quantize_weight

SPEC = "e2m1/group16"
PLAIN = {"damp_percent": 0.01, "clip": "absmax"}
G = torch.Generator().manual_seed(0)
MIX = torch.randn(20, 20, generator=G)
BATCHES = [torch.randn(16, 20, generator=G) @ MIX for _ in range(7)]  # fewer than 8: none is held out


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gptq(model: nn.Module, data: Any, example: Any = None, spec: str = SPEC, **options: Any) -> fxquant.CompiledModel:
    config = {"rules": [{"match": "*", "weight": spec, "types": ["linear", "conv", "matmul", "embedding"]}],
              "passes": [{"gptq": {**PLAIN, **options}}]}  # fmt: skip
    return fxquant.compile(model, example if example is not None else (data[0],), config, calibration=data)


def told(compiled: fxquant.CompiledModel) -> tuple[dict[str, str], dict[str, str]]:
    """Details of what was refined and reasons of what was declined, by layer."""
    step = next(s for s in compiled.program.trace if s.name == "gptq")
    return {r.layer: r.detail for r in step.rewrites if r.rule == "gptq"}, {d.layer: d.reason for d in step.declines}


def moments(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return 2 / len(x) * x.T @ x


def solved(weight: Tensor, x: Tensor, spec: str = SPEC, **options: Any) -> Tensor:
    return quantize_weight(weight.detach(), moments(x), parse_spec(spec), **options).dequantize()


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_are_solved_on_what_they_are_given(sequential: bool) -> None:
    """By hand: the first layer, then the second on inputs from the refined first one, or from the float one."""
    model = mlp().eval()
    compiled = gptq(model, BATCHES, sequential=sequential)
    x = torch.cat(BATCHES)
    with torch.no_grad():
        first = solved(model[0].weight, x)
        weight = first if sequential else model[0].weight
        hidden = nn.functional.gelu(nn.functional.linear(x, weight, model[0].bias))
        second = solved(model[2].weight, hidden)
        want = nn.functional.linear(
            nn.functional.gelu(nn.functional.linear(x, first, model[0].bias)), second, model[2].bias
        )
    assert torch.allclose(compiled(x), want, atol=1e-4)
    assert set(told(compiled)[0]) == {"0", "2"}


def test_the_output_is_closer_than_round_to_nearest() -> None:
    model, x = mlp().eval(), torch.cat(BATCHES)
    rtn = fxquant.compile(model, (x,), {"rules": [{"match": "*", "weight": SPEC}]})
    with torch.no_grad():
        want = model(x)
    assert (gptq(model, BATCHES)(x) - want).norm() < 0.8 * (rtn(x) - want).norm()


def test_float_targets_aim_at_the_float_models_outputs() -> None:
    """By hand: the second layer is solved for the weight that undoes, by least squares, what the first one changed."""
    model, x = mlp().eval(), torch.cat(BATCHES)
    compiled = gptq(model, BATCHES, float_targets=True)
    with torch.no_grad():
        first = solved(model[0].weight, x)
        float_in = nn.functional.gelu(model[0](x)).double()
        given = nn.functional.gelu(nn.functional.linear(x, first, model[0].bias)).double()
        H = moments(given)
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(32)
        drift = 2 / len(x) * (float_in - given).T @ given
        weight = model[2].weight.double()
        target = (weight + weight @ drift @ torch.linalg.inv(damped)).float()
        second = quantize_weight(target, H.float(), parse_spec(SPEC)).dequantize()
        want = nn.functional.linear(given.float(), second, model[2].bias)
    assert torch.allclose(compiled(x), want, atol=1e-4)


def test_layers_say_what_was_done(tmp_path: Path) -> None:
    compiled = gptq(mlp(), BATCHES)
    assert {q.method for q in compiled.summary().layers} == {"gptq"}
    assert "output error" in compiled.explain("0")
    step = next(s for s in compiled.program.trace if s.name == "gptq")
    assert step.rewrites[0].rule == "calibrate"
    assert "112 rows in 7 batches" in step.rewrites[0].detail
    compiled.save(tmp_path / "out")
    loaded = fxquant.load(tmp_path / "out")
    assert torch.equal(loaded(BATCHES[0]), compiled(BATCHES[0]))
    assert loaded.config == compiled.config
    assert loaded.explain("0") == compiled.explain("0")


@pytest.mark.parametrize(
    "spec", ["int4/channel", "uint4/group8:fp16", "nf4/group16", "mxfp4", "nvfp4", "e2m1/group8:m2"]
)
def test_every_kind_of_scale_passes_through_the_graph(spec: str) -> None:
    model = mlp().eval()
    compiled = gptq(model, BATCHES, spec=spec)
    want = solved(model[0].weight, torch.cat(BATCHES), spec)
    first = next(n for n in compiled.program.gm.graph.nodes if (w := info(n).weight) and w.weight == "0.weight")
    norm = model[0].weight.detach().norm()
    assert info(first).weight.error == pytest.approx(float((want - model[0].weight.detach()).norm() / norm), rel=1e-4)


def test_convolutions_are_solved_on_unfolded_images() -> None:
    model = Convolutions().eval()
    data = [torch.randn(2, 3, 12, 12, generator=G) for _ in range(4)]
    compiled = gptq(model, data, spec="e2m1/channel")
    refined, declined = told(compiled)
    assert set(refined) == {"stem.0", "line", "head"}
    assert "4 groups of channels have inputs of their own" in declined["depthwise"]
    patches = torch.cat([nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27) for x in data])
    want = solved(model.stem[0].weight.reshape(8, 27), patches, "e2m1/channel").reshape(8, 3, 3, 3)
    found = next(w for n in compiled.program.gm.graph.nodes if (w := info(n).weight) and w.weight == "stem.0.weight")
    norm = model.stem[0].weight.detach().norm()
    assert found.error == pytest.approx(float((want - model.stem[0].weight.detach()).norm() / norm), rel=1e-4)


def test_a_one_dimensional_convolution_is_solved_on_its_windows() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2).eval()
    data = [torch.randn(2, 4, 17, generator=G) for _ in range(4)]
    padded = nn.functional.pad(torch.cat(data), (1, 1))
    places = range(0, padded.shape[2] - 4, 2)
    x = torch.cat([padded[:, :, [p, p + 2, p + 4]].reshape(-1, 12) for p in places])
    want = solved(model.weight.reshape(6, 12), x, "e2m1/channel").reshape(6, 4, 3)
    out = nn.functional.conv1d(data[0], want, model.bias, stride=2, padding=1, dilation=2)
    assert torch.allclose(gptq(model, data, spec="e2m1/channel")(data[0]), out, atol=1e-5)


def test_a_weight_stored_in_out_is_solved_as_out_in() -> None:
    torch.manual_seed(0)
    model = Conv1D(10, 10).eval()
    data = [torch.randn(6, 5, 10, generator=G) for _ in range(4)]
    want = solved(model.weight.t(), torch.cat(data), "int4/group4")
    out = data[0] @ want.t() + model.bias
    assert torch.allclose(gptq(model, data, spec="int4/group4")(data[0]), out, atol=1e-4)


def test_what_has_no_hessian_stays_round_to_nearest_and_says_so() -> None:
    tokens = [torch.randint(0, 50, (4, 20), generator=G) for _ in range(4)]
    refined, declined = told(gptq(Tied().eval(), tokens))
    assert set(refined) == {"up", "down"}
    assert "shared by embed, head" in declined["embed"]
    _, declined = told(gptq(Experts().eval(), [torch.randn(3, 5, 8)]))
    assert "no rule says what" in declined["up"]


def test_layers_with_too_little_data_are_named_and_the_others_refined() -> None:
    compiled = gptq(mlp(), [torch.randn(25, 20, generator=G)])
    refined, declined = told(compiled)
    assert set(refined) == {"0"}
    assert declined["2"] == "too little data: 25 rows of input for a weight of 32 columns"
    assert {q.name: q.method for q in compiled.summary().layers} == {"0": "gptq", "2": "rtn"}


class Broken(nn.Module):
    """A model whose second layer is given NaN by negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + x.mean().sqrt())


def test_nan_activations_name_the_layer_and_the_batch() -> None:
    data = [x.abs() for x in BATCHES]
    data[5] = -data[5]
    with pytest.raises(CalibrationError, match=r"layer 'second': its input holds 320 NaN .* batch 5 of 7"):
        gptq(Broken().eval(), data)


# --- data -------------------------------------------------------------------------------------------------------------
def test_every_form_of_data_means_the_same() -> None:
    windows = torch.randint(0, 50, (6, 20), generator=G)
    model, example = Tied().eval(), (windows[:2],)
    want = gptq(model, windows, example)(windows)["logits"]

    def generated() -> Iterator[tuple[Tensor]]:
        yield from ((w.unsqueeze(0),) for w in windows)

    loader = torch.utils.data.DataLoader([{"tokens": w} for w in windows])
    for data in (generated(), [{"tokens": w.unsqueeze(0)} for w in windows], list(windows.unsqueeze(1)), loader):
        assert torch.equal(gptq(model, data, example)(windows)["logits"], want)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batches"),
        ("text", "calibration is a str"),
        ({"tokens": torch.ones(1)}, "calibration is a dict"),
        (torch.randn(4, 20), r"tensor torch.float32 \[4, 20\].*give \[x\]"),
        ([BATCHES[0], torch.randn(4, 3)], r"calibration batch 1: input 'input' is float32\[4, 3\]"),
        ([3], "calibration batch 0: .* is a int"),
        ([BATCHES[0][:9]], "too little calibration data: 9 rows in 1 batches.*here 20 to 32"),
    ],
)
def test_data_that_do_not_fit(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        gptq(mlp(), data, (BATCHES[0],))


def test_no_data_where_a_method_needs_some() -> None:
    with pytest.raises(ConfigError, match="gptq needs calibration data; give calibration=batches"):
        gptq(mlp(), None, (BATCHES[0],))


def test_the_model_is_not_changed_and_can_be_written_back() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = gptq(model, BATCHES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    config = {"rules": [{"match": "*", "weight": SPEC}], "passes": [{"gptq": PLAIN}]}
    fxquant.quantize_(model, config, (BATCHES[0],), calibration=BATCHES)
    assert torch.equal(model(BATCHES[0]), compiled(BATCHES[0]))


def test_a_layer_that_is_worse_on_held_out_data_falls_back() -> None:
    """The last of eight batches is not solved on. Where its inputs lie elsewhere, round-to-nearest does better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8, bias=False))
    narrow = [torch.randn(16, 2, generator=G) @ torch.randn(2, 20, generator=G) for _ in range(7)]
    wide = torch.randn(400, 20, generator=G) * 5
    kept = gptq(model, [*narrow, torch.cat(narrow)], act_order=False)
    refused = gptq(model, [*narrow, wide], act_order=False)
    assert "held out" in told(kept)[0]["0"]
    assert "worse than round-to-nearest" in told(refused)[1]["0"]
    rtn = fxquant.compile(model, (wide,), {"rules": [{"match": "*", "weight": SPEC}]})
    assert torch.equal(refused(wide), rtn(wide))


def test_after_the_judgement_what_was_held_out_is_used_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8, bias=False)).eval()
    data = [*BATCHES, torch.randn(16, 20, generator=G) @ MIX]
    compiled, x = gptq(model, data), torch.cat(data)
    assert "held out" in told(compiled)[0]["0"]
    with torch.no_grad():
        want = nn.functional.linear(x, solved(model[0].weight, x))
    assert torch.allclose(compiled(x), want, atol=1e-4)
