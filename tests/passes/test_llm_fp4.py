"""LLM-FP4: static activations, shifts of channels, the joint search, and the fold, which is exact in every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import mlp
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.rewrite import fetch

G = torch.Generator().manual_seed(0)
UNEVEN = 2.0 ** torch.randint(-4, 1, (20,), generator=G)
"""Sizes of channels: some are sixteen times as large as others."""
BATCHES = [torch.randn(32, 20, generator=G) * UNEVEN for _ in range(4)]
W4A4 = {"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def build(model: nn.Module, passes: list[Any], rule: dict[str, Any] = W4A4, data: Any = BATCHES) -> Any:
    return fxquant.compile(model, (data[0],), {"rules": [rule], "passes": passes}, calibration=data)


def roundings(compiled: Any) -> list[Any]:
    return [n for n in compiled.program.gm.graph.nodes if n.target is ops.fake_quantize.default]


def constant(compiled: Any, node: Any) -> Tensor:
    return fetch(compiled.program.gm, str(node.target))


def error(compiled: Any, model: nn.Module) -> float:
    x = torch.cat(BATCHES)
    with torch.no_grad():
        want = model(x)
        return float((compiled(x) - want).norm() / want.norm())


def test_static_scales_come_from_the_calibration_data() -> None:
    model = mlp().eval()
    compiled = build(model, [])
    first, second = roundings(compiled)
    largest = torch.cat(BATCHES).abs().max()
    assert constant(compiled, first.args[1]).item() == pytest.approx(float(largest) / 6)
    with torch.no_grad():
        hidden = model[1](model[0](torch.cat(BATCHES)))
    assert constant(compiled, second.args[1]).item() == pytest.approx(float(hidden.abs().max()) / 6)
    assert {q.activation for q in compiled.summary().layers} == {"e2m1/tensor"}


def test_static_activations_need_data() -> None:
    with pytest.raises(ConfigError, match="activation 'e2m1/tensor' needs calibration data"):
        fxquant.compile(mlp(), (BATCHES[0],), {"rules": [W4A4]})


@pytest.mark.parametrize(
    ("activation", "message"), [("e2m1/channel", "e2m1/token"), ("nvfp4", "fp32, fp16"), ("uint8/tensor", "symmetric")]
)
def test_activations_that_have_no_meaning(activation: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fxquant.compile(mlp(), (BATCHES[0],), {"rules": [{**W4A4, "activation": activation}]})


def test_groups_of_channels_have_scales_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(20, 4)).eval()
    rule = {"match": "*", "weight": "e4m3/channel", "activation": "e2m1/group8"}
    compiled = build(model, [], rule)
    x = BATCHES[0]
    scale = torch.stack([part.abs().amax(1) for part in x.split(8, dim=1)], 1) / 6
    wide = scale.repeat_interleave(8, dim=1)[:, :20]
    rounded = fxquant.format("e2m1").round(x / wide) * wide
    weight = fxquant.quantize_tensor(model[0].weight, "e4m3/channel").dequantize()
    assert torch.allclose(compiled(x), nn.functional.linear(rounded, weight, model[0].bias), atol=1e-6)


# --- shifts -----------------------------------------------------------------------------------------------------------
def test_shifts_bring_channels_to_like_size() -> None:
    """By hand, from equation 15: b_j = clip(round(log2(largest / absmax_j)), 0, 2^E - 1), E = 2."""
    model = mlp().eval()
    compiled = build(model, ["pre_shift"])
    first = roundings(compiled)[0]
    absmax = torch.cat(BATCHES).abs().amax(0)
    want = [min(max(round(float(torch.log2(absmax.max() / m))), 0), 3) for m in absmax]
    assert constant(compiled, first.kwargs["exponent_bias"]).tolist() == want
    shifted = absmax * 2.0 ** torch.tensor(want)
    assert constant(compiled, first.args[1]).item() == pytest.approx(float(shifted.max()) / 6)


def test_shifts_help_where_channels_are_uneven() -> None:
    model = mlp().eval()
    assert error(build(model, ["pre_shift"]), model) < 0.95 * error(build(model, []), model)


def test_shifting_needs_a_rounded_activation() -> None:
    with pytest.raises(ConfigError, match="no rule of the config rounds any"):
        build(mlp(), ["pre_shift"], {"match": "*", "weight": "e2m1/channel"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_shifted_rounding_is_what_its_definition_says(dtype: torch.dtype, shifted: bool) -> None:
    x = torch.randn(3, 5, 20, generator=G).to(dtype)
    bias = torch.randint(0, 4, (20,), generator=G).to(torch.int8)
    scale = torch.full((1, 1), 0.37)
    up = 2.0 ** bias.to(torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grid = fxquant.format("e2m1").round(x.to(wide) * up.to(wide) / scale.to(wide)) * scale.to(wide)
    want = (grid if shifted else grid / up.to(wide)).to(dtype)
    got = ops.fake_quantize(x, scale, None, "e2m1/tensor", None, bias, shifted)
    assert torch.equal(got, want)


def test_gradients_pass_through_a_shift() -> None:
    x = torch.tensor([[0.1, 100.0, -0.2]], requires_grad=True)
    bias = torch.tensor([1, 0, 2], dtype=torch.int8)
    ops.fake_quantize(x, torch.ones(1, 1), None, "e2m1/tensor", None, bias, True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 0.0, 4.0]]  # the second is clipped


# --- the search -------------------------------------------------------------------------------------------------------
def test_the_search_beats_its_start_and_says_what_it_chose(tmp_path: Path) -> None:
    model = mlp().eval()
    start, found = build(model, ["pre_shift"]), build(model, ["pre_shift", "search_formats"])
    assert error(found, model) < 0.95 * error(start, model)
    assert "output error" in found.explain("0")
    found.save(tmp_path / "out")
    loaded = fxquant.load(tmp_path / "out")
    assert torch.equal(loaded(BATCHES[0]), found(BATCHES[0]))


def test_float_targets_make_up_for_rounded_activations() -> None:
    model = mlp().eval()
    plain = build(model, ["pre_shift", "search_formats"])
    aimed = build(model, ["pre_shift", {"search_formats": {"float_targets": True}}])
    assert error(aimed, model) < error(plain, model)


@pytest.mark.parametrize("rule", [
    {**W4A4, "activation": "e2m1/token"}, {"match": "*", "weight": "e3m2/channel"},
    {"match": "*", "weight": "e2m1/group8:fp16", "activation": "int8/tensor"},
])  # fmt: skip
def test_it_searches_what_there_is(rule: dict[str, Any]) -> None:
    model = mlp().eval()
    assert error(build(model, ["search_formats"], rule), model) <= error(build(model, [], rule), model)


def test_scales_with_rules_of_their_own_are_declined() -> None:
    model = mlp().eval()
    compiled = build(model, ["search_formats"], {"match": "*", "weight": "mxfp4"})
    assert "follow a rule of their own" in compiled.explain("0")


# --- the fold ---------------------------------------------------------------------------------------------------------
class Normed(nn.Module):
    """A norm that can carry a shift, and a product of two activations' linears that cannot take another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(20), nn.Linear(20, 24), nn.Linear(20, 24), nn.Linear(24, 20, bias=False),
        )  # fmt: skip
        self.norm.weight.data = UNEVEN.clone()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["e2m1/tensor", "e2m1/token", "e3m0/tensor"])
@pytest.mark.parametrize("into", ["exponent_bias", "e4m3"])
def test_the_fold_changes_no_bit(dtype: torch.dtype, activation: str, into: str) -> None:
    torch.manual_seed(1)
    model, data = Normed().eval().to(dtype), [x.to(dtype) for x in BATCHES]
    rule = {**W4A4, "activation": activation}
    plain = build(model, ["pre_shift", "search_formats"], rule, data)
    folded = build(model, ["pre_shift", "search_formats", {"fold_activation_scales": {"into": into}}], rule, data)
    x = torch.cat(data)
    assert torch.equal(plain(x), folded(x))
    step = next(s for s in folded.program.trace if s.name == "fold_activation_scales")
    told = " ".join(r.detail for r in step.rewrites)
    assert "whose constants carry it" in told
    specs = {str(n.args[5]) for n in folded.program.gm.graph.nodes if n.target is ops.linear_wq.default}
    biased = any(
        n.kwargs.get("exponent_bias") for n in folded.program.gm.graph.nodes if n.target is ops.linear_wq.default
    )
    assert biased == (into == "exponent_bias")
    assert (specs == {"e4m3/channel"}) == (into == "e4m3")


def test_what_no_producer_carries_is_shifted_where_it_is_rounded(tmp_path: Path) -> None:
    model = mlp().eval()
    plain, folded = (build(model, ["pre_shift", *more]) for more in ([], ["fold_activation_scales"]))
    x = torch.cat(BATCHES)
    assert torch.equal(plain(x), folded(x))
    assert [n.kwargs.get("shifted") for n in roundings(folded)] == [True, True]
    assert "shifted where it is rounded" in folded.explain("0")
    folded.save(tmp_path / "out")
    assert torch.equal(fxquant.load(tmp_path / "out")(x), folded(x))


@pytest.mark.parametrize("passes", [["pre_shift"], ["pre_shift", "fold_activation_scales"]])
@pytest.mark.parametrize("activation", ["e2m1/tensor", "e3m0/tensor", "e3m2/token", "int4/tensor", "e2m1/group4"])
def test_onnx_computes_the_same(passes: list[Any], activation: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Normed().eval()
    compiled = build(model, passes, {**W4A4, "activation": activation})
    compiled.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.cat(BATCHES)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close = (torch.from_numpy(got) - compiled(x)).abs() < 1e-4
    assert float(close.float().mean()) > 0.99  # a value at a rounding boundary may fall to the other side


def test_gptq_keeps_the_clips_that_were_searched() -> None:
    model = mlp().eval()
    passes = ["pre_shift", "search_formats"]
    searched, refined = build(model, passes), build(model, [*passes, {"gptq": {"float_targets": True}}])

    def scales(compiled: Any) -> list[Tensor]:
        nodes = compiled.program.gm.graph.find_nodes(op="call_function", target=ops.linear_wq.default)
        return [constant(compiled, n.args[2]) for n in nodes]

    assert all(torch.equal(a, b) for a, b in zip(scales(searched), scales(refined), strict=True))
    assert {q.method for q in refined.summary().layers} == {"gptq"}
    assert error(refined, model) < error(searched, model)


def test_the_fisher_loss_protects_what_the_loss_depends_on() -> None:
    """sum g^2 dO^2 of the first layer, computed directly: a diagonal Fisher matrix of its outputs."""
    total, x = {"mse": 0.0, "fisher": 0.0}, torch.cat(BATCHES)
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 8)).eval()
        with torch.no_grad():
            model[0].weight *= 4.0 ** torch.randint(-2, 2, (24, 1))
            model[2].weight *= (torch.rand(24) < 0.2) + 1e-3  # few of its channels count
        hidden = model[0](x)
        (grad,) = torch.autograd.grad(model[2](model[1](hidden)).square().sum() / 2, hidden)
        for loss in total:
            compiled = build(model, ["pre_shift", {"search_formats": {"loss": loss}}])
            seen = Outputs(compiled.program.gm)
            with torch.no_grad():
                seen.run(x)
            total[loss] += float((grad * (seen.outputs["0"] - hidden)).square().sum())
    assert total["fisher"] < 0.8 * total["mse"]


class Outputs(torch.fx.Interpreter):
    """The outputs of layers by their paths."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is ops.linear_wq.default:
            self.__dict__.setdefault("outputs", {})[info(n).path] = value
        return value


def test_the_fisher_loss_needs_a_loss() -> None:
    with pytest.raises(ConfigError, match="loss='hessian'"):
        build(mlp(), [{"search_formats": {"loss": "hessian"}}])
