"""The zq_local pass: it starts from the codes that are there, on the inputs that each layer really sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Convolutions, Tied, mlp
from torch import nn

import fxquant
from fxquant.qtensor import quantize_tensor
from fxquant.solvers.zq_local import solve

SPEC = "e2m1/group16"
G = torch.Generator().manual_seed(0)
MIX = torch.randn(20, 20, generator=G)
BATCHES = [torch.randn(16, 20, generator=G) @ MIX for _ in range(7)]
X = torch.cat(BATCHES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, *passes: Any, data: Any = BATCHES) -> fxquant.CompiledModel:
    types = ["linear", "conv", "matmul", "embedding"]
    config = {"rules": [{"match": "*", "weight": SPEC, "types": types}], "passes": list(passes)}
    return fxquant.compile(model, (data[0],), config, calibration=data)


def told(model: fxquant.CompiledModel) -> tuple[dict[str, str], dict[str, str]]:
    step = next(s for s in model.program.trace if s.name == "zq_local")
    details = {r.layer: r.detail for r in step.rewrites if r.rule == "zq_local"}
    return details, {d.layer: d.reason for d in step.declines}


def test_layers_are_solved_on_what_they_are_given() -> None:
    """By hand: the first layer, then the second on inputs from the refined first one."""
    model = mlp().eval()

    def by_hand(W: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        W = W.detach()
        return solve(W, quantize_tensor(W, SPEC), 2 / len(x) * x.T @ x).quantized.dequantize()

    with torch.no_grad():
        first = by_hand(model[0].weight, X)
        hidden = nn.functional.gelu(nn.functional.linear(X, first, model[0].bias))
        want = nn.functional.linear(hidden, by_hand(model[2].weight, hidden), model[2].bias)
    got = compiled(model, "zq_local")(X)
    assert (got - want).norm() < 0.02 * want.norm()  # but for weights on the border between two codes


def test_it_goes_on_from_gptq_and_before_lorc() -> None:
    model = mlp().eval()
    with torch.no_grad():
        want = model(X)
    both = compiled(model, "gptq", {"zq_local": {"float_targets": True}}, {"lorc": {"rank": 2}})
    assert any("from gptq" in detail for detail in told(both)[0].values())
    errors = [float((c(X) - want).norm()) for c in (both, compiled(model, "zq_local"), compiled(model))]
    assert errors[0] < errors[1] < errors[2]


def test_convolutions_are_refined_and_shared_weights_declined() -> None:
    images = [torch.randn(2, 3, 12, 12, generator=G) for _ in range(4)]
    done, declined = told(compiled(Convolutions().eval(), "zq_local", data=images))
    assert {"stem.0", "head"} <= set(done)
    assert "groups of channels" in declined["depthwise"]
    tokens = [torch.randint(0, 50, (4, 20), generator=G) for _ in range(4)]
    assert "shared by embed, head" in told(compiled(Tied().eval(), "zq_local", data=tokens))[1]["embed"]
