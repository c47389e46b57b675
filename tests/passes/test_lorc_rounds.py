"""lorc with rounds: codes and factors found together in one walk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Convolutions, mlp
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError
from fxquant.graph import info
from fxquant.qtensor import quantize_tensor
from fxquant.scheme import parse_spec
from fxquant.solvers.alternate import Alternation
from fxquant.solvers.damping import Inputs
from fxquant.solvers.gptq import Weight

SPEC = "int3/channel"
G = torch.Generator().manual_seed(0)
MIX = torch.randn(20, 20, generator=G)
BATCHES = [torch.randn(16, 20, generator=G) @ MIX for _ in range(8)]  # the last is held out
X = torch.cat(BATCHES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def build(model: nn.Module, *passes: Any, data: Any = BATCHES, types: Any = None) -> fxquant.CompiledModel:
    rule = {"match": "*", "weight": SPEC, **({"types": types} if types else {})}
    return fxquant.compile(model, (data[0],), {"rules": [rule], "passes": list(passes)}, calibration=data)


def told(compiled: fxquant.CompiledModel) -> tuple[dict[str, str], dict[str, str]]:
    step = next(s for s in compiled.program.trace if s.name == "lorc")
    return {r.layer: r.detail for r in step.rewrites if r.rule == "lorc"}, {d.layer: d.reason for d in step.declines}


def moments(*batches: Tensor) -> Tensor:
    x = torch.cat(batches)
    return 2 / len(x) * x.T @ x


def test_codes_and_factors_are_those_of_the_solver_on_what_each_layer_sees() -> None:
    """By hand: the first layer, then the second on what the compensated first one gives."""
    model = mlp().eval()
    compiled = build(model, {"lorc": {"rank": 3, "rounds": 2}})

    def by_hand(W: Tensor, given: list[Tensor]) -> Tensor:
        spec, value = parse_spec(SPEC), W.detach()
        problem = Alternation([Weight(value, spec)], [quantize_tensor(value, spec)], [3],
                              parse_spec("int8/channel"), 2)  # fmt: skip
        (pair,) = problem.solve(Inputs(moments(*given[:7]), held_out=moments(given[7])), Inputs(moments(*given)))
        assert pair.quantized is not None
        assert pair.factors is not None
        return pair.quantized.dequantize() + pair.factors.product()

    with torch.no_grad():
        first = by_hand(model[0].weight, BATCHES)
        hidden = [nn.functional.gelu(nn.functional.linear(x, first, model[0].bias)) for x in BATCHES]
        want = nn.functional.linear(torch.cat(hidden), by_hand(model[2].weight, hidden), model[2].bias)
    got = compiled(X)
    assert (got - want).norm() < 0.01 * want.norm()
    rewrites, _ = told(compiled)
    assert all("rank 3, int8/channel" in line and "GPTQ alone" in line for line in rewrites.values())


@pytest.mark.parametrize("float_targets", [False, True])
def test_it_is_closer_than_gptq_and_lorc_one_after_the_other(float_targets: bool) -> None:
    model, fresh = mlp().eval(), torch.randn(500, 20, generator=G) @ MIX
    with torch.no_grad():
        want = model(fresh)
    aim = {"float_targets": float_targets}
    together = build(model, {"lorc": {"rank": 4, "rounds": 3, **aim}})(fresh)
    apart = build(model, {"gptq": aim}, {"lorc": {"rank": 4, **aim}})(fresh)
    assert (together - want).norm() < (apart - want).norm()


def test_layers_without_factors_get_gptqs_codes() -> None:
    model = Convolutions().eval()
    data = [torch.randn(2, 3, 12, 12, generator=G) for _ in range(4)]
    compiled = build(model, {"lorc": {"rank": 4, "rounds": 1}}, data=data)
    alone = build(model, "gptq", data=data)
    rewrites, declines = told(compiled)
    assert "codes alone" in rewrites["stem.0"]
    assert "it is a convolution" in declines["stem.0"]
    errors = [
        {w.weight: w.error for n in c.program.gm.graph.nodes if (w := info(n).weight) and not w.part_of}
        for c in (compiled, alone)
    ]
    assert errors[0]["stem.0.weight"] == pytest.approx(errors[1]["stem.0.weight"], rel=1e-4)


def test_what_is_exact_stays_as_it_is() -> None:
    model = mlp().eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(quantize_tensor(layer.weight.detach(), SPEC).dequantize())
        want = model(X)
    compiled = build(model, {"lorc": {"rank": 3, "rounds": 2}})
    assert torch.allclose(compiled(X), want, atol=1e-5)
    assert "factors would not bring it closer" in told(compiled)[1]["0"]
    assert {n.meta["fxquant"].weight.method for n in compiled.program.gm.graph.nodes if info(n).weight} == {"rtn"}


def test_too_little_data() -> None:
    with pytest.raises(CalibrationError, match=r"too little calibration data for lorc with rounds: 16 rows .* 20 col"):
        build(mlp(), {"lorc": {"rank": 2, "rounds": 1}}, data=BATCHES[:1])
