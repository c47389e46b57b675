"""smooth and rotate change what is quantized and nothing of what the float model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_producers import Block, linear, values
from tiny_models import mlp
from torch import nn

import fxquant
from fxquant.capture import capture
from fxquant.errors import ConfigError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.rotate import ROTATE
from fxquant.passes.smooth import SMOOTH
from fxquant.program import Pass, Program, Stage, run
from fxquant.rewrite import aten, fetch
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify

G = torch.Generator().manual_seed(0)
RULES = (LayerRule("*", parse_spec("int8/channel")),)


def outlier_block(width: int = 16) -> nn.Module:
    """A block whose norms make one channel thirty times as large as the others, as large language models do."""
    torch.manual_seed(0)
    model = Block(width).eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[0] *= 30
    return model


BATCHES = [torch.randn(2, 5, 16, generator=G) for _ in range(4)]


def passed(model: nn.Module, pass_: Pass, rules: Any = RULES, **settings: Any) -> Program:
    x = BATCHES[0].to(next(model.parameters()).dtype)
    given = {"rules": rules, "calibration": [[b.to(x.dtype)] for b in BATCHES], **settings}
    return run(capture(model, (x,)), [Stage(NORMALIZE), Stage(pass_, given)], check=verify)


def declined(program: Program) -> dict[str, str]:
    return {d.layer: d.reason for d in program.trace[-1].declines}


@pytest.mark.parametrize("pass_", [SMOOTH, ROTATE], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_float_model_stays_the_same(pass_: Pass, dtype: torch.dtype) -> None:
    model = outlier_block().to(dtype)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    program = passed(model, pass_)
    assert len(program.trace[-1].rewrites) == 7
    with torch.no_grad():
        for x in (b.to(dtype) for b in BATCHES):
            assert torch.allclose(program(x), model(x), atol=1e-4 if dtype == torch.float32 else 1e-12)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_smoothing_balances_inputs_and_weights() -> None:
    """With alpha 0.5, the largest input and the largest weight of every channel are equal afterwards."""
    program = passed(outlier_block(), SMOOTH)
    node = linear(program, "down")
    absmax = torch.stack([values(program, b)[node.args[0].name].abs().amax((0, 1)) for b in BATCHES]).amax(0)
    assert torch.allclose(absmax, fetch(program.gm, node.args[1].target).abs().amax(0), rtol=1e-4)


def test_smoothing_says_what_it_cannot_fold() -> None:
    model = mlp().eval()
    data = [[torch.randn(8, 20, generator=G)] for _ in range(2)]
    program = run(
        capture(model, tuple(data[0])),
        [Stage(NORMALIZE), Stage(SMOOTH, {"rules": RULES, "calibration": data})],
        check=verify,
    )
    assert "it is the input" in declined(program)["0"]
    assert "gelu" in declined(program)["2"]


def test_a_dead_channel_keeps_its_scale() -> None:
    model = outlier_block()
    with torch.no_grad():
        model.norm1.weight[3] = 0
    program = passed(model, SMOOTH)
    with torch.no_grad():
        assert torch.allclose(program(BATCHES[0]), model(BATCHES[0]), atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha(alpha: float) -> None:
    program = passed(outlier_block(), SMOOTH, alpha=alpha)
    node = linear(program, "gate")
    seen = torch.stack([values(program, b)[node.args[0].name].abs().amax((0, 1)) for b in BATCHES]).amax(0)
    if alpha == 1:
        assert torch.allclose(seen, torch.ones(16), rtol=1e-4)
    assert (seen.max() / seen.min() > 3) == (alpha < 1)


@pytest.mark.parametrize("passes", [["smooth"], ["rotate"], ["smooth", "rotate", "gptq"]])
def test_outliers_do_less_harm(passes: list[str], tmp_path: Path) -> None:
    model, batches = outlier_block(64), [torch.randn(2, 40, 64, generator=G) for _ in range(4)]
    x = torch.cat(batches)
    rules = [{"match": "*", "weight": "int4/channel", "activation": "int4/token"}]

    def error(passes: list[str]) -> tuple[float, Any]:
        made = fxquant.compile(model, (x,), {"rules": rules, "passes": passes}, calibration=batches)
        with torch.no_grad():
            return float((made(x) - model(x)).norm()), made

    better, compiled = error(passes)
    assert better < 0.8 * error([])[0]
    compiled.save(tmp_path / "out")
    assert torch.equal(fxquant.load(tmp_path / "out")(x), compiled(x))
    rounded = [n for n in compiled.program.gm.graph.nodes if n.target is ops.fake_quantize_dynamic.default]
    assert len(rounded) == 4
    if "rotate" in passes:  # activations are rounded after they are rotated
        targets = [n.args[0].target for n in rounded]
        assert set(targets) <= {aten.flatten.using_ints, aten.reshape.default}


def test_rotations_are_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = outlier_block()
    compiled = fxquant.compile(model, (BATCHES[0],), {"rules": [{"match": "*", "weight": "higgs4/group4"}],
                                                      "passes": [{"rotate": {"size": 4}}]})  # fmt: skip
    compiled.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 7, 16, generator=G)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), compiled(x), atol=1e-4)


def test_what_is_rotated_where() -> None:
    """v -> o is folded on both sides; the other inputs are rotated once for all readers, with one matrix a size."""
    program = passed(outlier_block(), ROTATE, size=4)
    details = {r.layer: r.detail for r in program.trace[-1].rewrites}
    assert "in the weight that produces it" in details["o"]
    assert {n for n, d in details.items() if "when the model runs" in d} == {"q", "k", "v", "gate", "up", "down"}
    turned = [n for n in program.gm.graph.nodes if n.target is aten.unflatten.int]
    assert len(turned) == 3
    assert {n.args[1].target for n in program.gm.graph.nodes if "matmul" in str(n.target)} == {"rotation_4"}
    assert linear(program, "q").args[0] is linear(program, "v").args[0]
    assert info(linear(program, "q").args[0]).type == info(turned[0].args[0]).type


def test_rules_decide_what_is_rotated() -> None:
    rules = (LayerRule("q", keep=True), LayerRule("*", parse_spec("int8/channel")))
    program = passed(outlier_block(), ROTATE, rules)
    assert linear(program, "q").args[0].target is aten.mul.Tensor  # it reads x as it is, beside the others
    assert linear(program, "k").args[0].target is aten.flatten.using_ints
    smoothed = passed(outlier_block(), SMOOTH, rules)
    assert "linear of q reads it too" in declined(smoothed)["k"]


def test_sizes_that_do_not_divide_decline() -> None:
    program = passed(outlier_block(), ROTATE, size=16)
    assert "24 channels, no multiple of 16" in declined(program)["down"]
    model, x = nn.Linear(7, 3), torch.randn(4, 7)
    stages = [Stage(NORMALIZE), Stage(ROTATE, {"rules": RULES})]
    program = run(capture(model, (x,)), stages, check=verify)
    assert "7 channels" in next(iter(declined(program).values()))


@pytest.mark.parametrize("options", [{"size": 48}, {"size": 1}, {"seed": "x"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        fxquant.Config(rules=[{"match": "*", "weight": "e3m2"}], passes=[{"rotate": options}])


def test_modules_cannot_hold_a_changed_graph() -> None:
    with pytest.raises(ConfigError, match="rotate changes more"):
        fxquant.quantize_(outlier_block(), "W4A16-HIGGS", (BATCHES[0],))


def test_higgs_beats_the_grid_without_rotation() -> None:
    """The Gaussian grid fits rotated weights, not heavy-tailed ones."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.distributions.StudentT(3.0).sample((64, 128)))
    x = torch.randn(200, 128)

    def error(passes: list[Any]) -> float:
        config = {"rules": [{"match": "*", "weight": "higgs4/group64"}], "passes": passes}
        with torch.no_grad():
            return float((fxquant.compile(model, (x,), config)(x) - model(x)).norm())

    assert error([{"rotate": {"size": 64}}]) < 0.8 * error([])
