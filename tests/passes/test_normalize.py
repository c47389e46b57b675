"""normalize changes the spelling and no bit of any value."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied, mlp
from torch import nn

from fxquant.capture import capture
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Stage, run
from fxquant.rewrite import aten
from fxquant.verify import verify


class NoOps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.dropout(x, 0.5, False).to(torch.float32)
        return x[:, :].detach() + 1


CASES = {
    "mlp": (mlp, torch.randn(3, 20)),
    "conv1d": (Conv1D, torch.randn(2, 3, 10)),
    "convolutions": (Convolutions, torch.randn(2, 3, 12, 12)),
    "experts": (Experts, torch.randn(3, 5, 8)),
    "tied": (Tied, torch.randint(0, 50, (2, 7))),
    "no-ops": (NoOps, torch.randn(2, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_bit_identical(name: str) -> None:
    make, x = CASES[name]
    program = capture(make().eval(), (x,))
    with torch.no_grad():
        before = program.gm(x)
        run(program, [Stage(NORMALIZE)], check=verify)
        after = program.gm(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def targets(name: str) -> list[object]:
    make, x = CASES[name]
    program = run(capture(make().eval(), (x,)), [Stage(NORMALIZE)], check=verify)
    return [n.target for n in program.gm.graph.nodes if n.op == "call_function"]


def test_operators_without_effect_disappear() -> None:
    found = targets("no-ops")
    assert not {aten.dropout.default, aten.to.dtype, aten.slice.Tensor, aten.detach.default} & set(found)


def test_products_with_a_constant_matrix_become_linear() -> None:
    assert aten.linear.default in targets("conv1d")
    assert aten.addmm.default not in targets("conv1d")


def test_arguments_are_positional_with_defaults() -> None:
    program = run(capture(mlp().eval(), (torch.randn(2, 20),)), [Stage(NORMALIZE)], check=verify)
    linears = program.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert all(len(n.args) == 3 and not n.kwargs for n in linears)


@pytest.mark.parametrize("name", CASES)
def test_constants_stand_right_before_their_first_user(name: str) -> None:
    make, x = CASES[name]
    program = run(capture(make().eval(), (x,)), [Stage(NORMALIZE)], check=verify)
    for node in program.gm.graph.find_nodes(op="get_attr"):
        after = node.next
        while after.op == "get_attr":
            after = after.next
        assert after in node.users
