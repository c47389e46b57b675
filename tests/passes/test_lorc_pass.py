"""The lorc pass: factors as weights of the graph, found on what each layer sees, and what it declines or takes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BothWays, Conv1D, Convolutions, Tied, mlp
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.qtensor import quantize_tensor
from fxquant.solvers.lorc import solve

SPEC = "int3/channel"
G = torch.Generator().manual_seed(0)
MIX = torch.randn(20, 20, generator=G)
BATCHES = [torch.randn(16, 20, generator=G) @ MIX for _ in range(7)]  # fewer than 8: none is held out
X = torch.cat(BATCHES)


def config(*passes: Any, spec: str = SPEC, **rule: Any) -> dict[str, Any]:
    types = ["linear", "conv", "matmul", "embedding"]
    return {"rules": [{"match": "*", "weight": spec, "types": types, **rule}], "passes": list(passes)}


def lorc(model: nn.Module, data: Any = BATCHES, *, spec: str = SPEC, **options: Any) -> fxquant.CompiledModel:
    return fxquant.compile(model, (data[0],), config({"lorc": options}, spec=spec), calibration=data)


def told(compiled: fxquant.CompiledModel) -> tuple[dict[str, str], dict[str, str]]:
    step = next(s for s in compiled.program.trace if s.name == "lorc")
    return {r.layer: r.detail for r in step.rewrites if r.rule == "lorc"}, {d.layer: d.reason for d in step.declines}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def near(got: Tensor, want: Tensor) -> bool:
    """But for factors on the border between two codes, which the order of a sum may move."""
    return bool((got - want).norm() < 0.01 * want.norm())


def moments(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def by_hand(W: Tensor, x: Tensor | None, **options: Any) -> Tensor:
    """The weight that a layer computes with: codes and factors as stored."""
    restored = quantize_tensor(W.detach(), SPEC).dequantize()
    H = None if x is None else moments(x)
    found = solve(W.detach(), restored, weighting=options.pop("weighting", "hessian"), moments=H, **options)
    return restored + found.U.dequantize() @ found.V.dequantize()


@pytest.mark.parametrize("weighting", ["none", "act_rms", "hessian"])
def test_later_layers_see_the_compensated_outputs(weighting: str) -> None:
    """By hand: the first layer, then the second on what the compensated first one gives."""
    model = mlp().eval()
    compiled = lorc(model, rank=3, weighting=weighting)
    data = None if weighting == "none" else X
    with torch.no_grad():
        first = by_hand(model[0].weight, data, rank=3, weighting=weighting)
        hidden = nn.functional.gelu(nn.functional.linear(X, first, model[0].bias))
        second = by_hand(model[2].weight, data if data is None else hidden, rank=3, weighting=weighting)
        want = nn.functional.linear(hidden, second, model[2].bias)
    assert near(compiled(X), want)
    assert set(told(compiled)[0]) == {"0", "2"}


def test_float_targets_aim_at_the_float_models_outputs() -> None:
    model = mlp().eval()
    compiled = lorc(model, rank=3, float_targets=True, damp_percent=0.01)
    with torch.no_grad():
        first = by_hand(model[0].weight, X, rank=3)
        given = nn.functional.gelu(nn.functional.linear(X, first, model[0].bias))
        drift = 2 / len(X) * (nn.functional.gelu(model[0](X)) - given).T @ given
        second = by_hand(model[2].weight, given, rank=3, drift=drift)
        want = nn.functional.linear(given, second, model[2].bias)
    assert near(compiled(X), want)


def test_inputs_of_the_float_model() -> None:
    model = mlp().eval()
    with torch.no_grad():
        second = by_hand(model[2].weight, nn.functional.gelu(model[0](X)), rank=3)
        first = by_hand(model[0].weight, X, rank=3)
        hidden = nn.functional.gelu(nn.functional.linear(X, first, model[0].bias))
        want = nn.functional.linear(hidden, second, model[2].bias)
    assert near(lorc(model, rank=3, sequential=False)(X), want)


@pytest.mark.parametrize("factors", ["int8/channel", "e4m3/channel"])
def test_the_output_is_closer_and_closest_with_the_hessian(factors: str) -> None:
    model = mlp().eval()
    with torch.no_grad():
        want = model(X)
    plain = fxquant.compile(model, (X,), config())

    def error(compiled: fxquant.CompiledModel) -> float:
        return float((compiled(X) - want).norm() / want.norm())

    none, weighted = (error(lorc(model, rank=4, factors=factors, weighting=w)) for w in ("none", "hessian"))
    assert weighted < none < error(plain)


def test_no_data_are_needed_without_weighting() -> None:
    model = mlp().eval()
    compiled = fxquant.compile(model, (X,), config({"lorc": {"rank": 2, "weighting": "none"}}))
    assert "weight error" in told(compiled)[0]["0"]
    with pytest.raises(ConfigError, match="lorc needs calibration data"):
        fxquant.compile(model, (X,), config("lorc"))


def test_it_lowers_to_packed_operators_and_the_sum_keeps_the_layers_name() -> None:
    model = mlp().eval()
    names = [n.name for n in fxquant.compile(model, (X,), config()).program.gm.graph.nodes if info(n).weight]
    graph = lorc(model, rank=3).program.gm.graph
    packed = [n for n in graph.nodes if n.target is ops.linear_wq.default]
    assert [info(n).weight.weight for n in packed[:3]] == ["0.weight", "0.weight_lorc_V", "0.weight_lorc_U"]
    assert [info(n).weight.part_of for n in packed[:3]] == ["", "0.weight", "0.weight"]
    sums = {n.name: n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor}
    assert list(sums) == names
    assert [a.name for a in sums[names[0]].args] == [f"{names[0]}_base", f"{names[0]}_lorc_u"]


def test_factors_are_counted_saved_exported_and_explained(tmp_path: Path) -> None:
    compiled = lorc(mlp().eval(), rank=3)
    summary, plain = compiled.summary(), fxquant.compile(mlp(), (X,), config()).summary()
    factors = 32 * 3 + 3 * 20 + 6 * 3 + 3 * 32 + 4 * (32 + 3 + 6 + 3)
    assert summary.weight_bytes_after == plain.weight_bytes_after + factors
    assert summary.bytes_after == plain.bytes_after + factors
    assert (summary.weights, summary.bytes_before) == (plain.weights, plain.bytes_before)
    assert "lorc rank 3, int8/channel, output error" in compiled.explain("0")
    compiled.report(tmp_path / "report.html")
    compiled.save(tmp_path / "out")
    loaded = fxquant.load(tmp_path / "out")
    assert torch.equal(loaded(X), compiled(X))
    assert loaded.summary().to_dict() == summary.to_dict()
    onnxruntime = pytest.importorskip("onnxruntime")
    compiled.export_onnx(tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert np.allclose(got, compiled(X).numpy(), atol=1e-4)


@pytest.mark.parametrize("make", [mlp, lambda: Conv1D(20, 12)])
def test_it_is_written_back_into_the_model(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    compiled = lorc(model, rank=3)
    fxquant.quantize_(model, config({"lorc": {"rank": 3}}), (X,), calibration=BATCHES)
    assert torch.allclose(model(X), compiled(X), atol=1e-5)
    copied = make().eval()
    if isinstance(model, nn.Sequential):
        assert torch.equal(model(X), compiled(X))
        for old, new in zip(copied, model, strict=True):
            if isinstance(old, nn.Linear):
                old.weight.data, old.bias.data = new.weight, new.bias.data
        assert torch.allclose(copied(X), compiled(X), atol=1e-5)  # .weight holds the compensation
        assert model.half()(X.half()).dtype == torch.float16


def test_rounded_activations_reach_the_factors_too() -> None:
    rule = {"rules": [{"match": "*", "weight": SPEC, "activation": "e4m3/token"}], "passes": [{"lorc": {"rank": 3}}]}
    compiled = fxquant.compile(mlp().eval(), (X,), rule, calibration=BATCHES)
    rounded = compiled.program.gm.graph.find_nodes(op="call_function", target=ops.fake_quantize_dynamic.default)
    assert [sorted(u.name for u in n.users) for n in rounded] == [
        ["linear_base", "linear_lorc_v"], ["linear_1_base", "linear_1_lorc_v"],
    ]  # fmt: skip


def test_what_is_no_linear_of_its_own_or_too_small_is_declined() -> None:
    images = [torch.randn(2, 3, 12, 12, generator=G) for _ in range(4)]
    done, declined = told(lorc(Convolutions().eval(), images, rank=3))
    assert set(done) == {"head"}
    assert "the factors are for linears" in declined["stem.0"]
    tokens = [torch.randint(0, 50, (4, 20), generator=G) for _ in range(4)]
    done, declined = told(lorc(Tied().eval(), tokens))
    assert "shared by embed, head" in declined["embed"]
    done, declined = told(lorc(mlp().eval(), rank=7))
    assert set(done) == {"0"}
    assert declined["2"] == "rank 7 is more than its 6x32 weight has; give at most 6"


def test_a_weight_used_both_ways_has_factors_for_each() -> None:
    model = BothWays().eval()
    data = [torch.randn(40, 16, generator=G)]
    want = (model(data[0])).detach()
    plain = fxquant.compile(model, (data[0],), config())
    assert (lorc(model, data)(data[0]) - want).norm() < 0.8 * (plain(data[0]) - want).norm()


def test_factors_that_do_not_help_are_taken_out_again() -> None:
    """A weight that is on the grid already leaves no error to compensate."""
    model = mlp().eval()
    with torch.no_grad():
        model[0].weight.copy_(quantize_tensor(model[0].weight, SPEC).dequantize())
    compiled = lorc(model, rank=3)
    done, declined = told(compiled)
    assert set(done) == {"2"}
    assert "factors would not bring it closer" in declined["0"]
    names = [n.name for n in compiled.program.gm.graph.nodes]
    assert "linear" in names
    assert not any(name.startswith(("linear_lorc", "linear_base", "_0_weight_lorc")) for name in names)
    assert not any("0.weight_lorc" in name for name, _ in compiled.program.gm.named_buffers())


def test_too_little_data() -> None:
    with pytest.raises(CalibrationError, match=r"too little calibration data for lorc .*act_rms or none"):
        lorc(mlp().eval(), [BATCHES[0][:9]])
    assert set(told(lorc(mlp().eval(), [BATCHES[0][:9]], rank=2, weighting="act_rms"))[0]) == {"0", "2"}


def test_it_comes_last() -> None:
    with pytest.raises(ConfigError, match="pass 'lorc' makes up for what the others left and must come after 'gptq'"):
        fxquant.compile(mlp(), (X,), config("lorc", "gptq"), calibration=BATCHES)
