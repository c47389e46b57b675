"""normalize changes the spelling and no bit of any value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied, mlp
from torch import nn

from fxquant.capture import capture
from fxquant.graph import tensor_type
from fxquant.layers import find_layers
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Stage, run
from fxquant.rewrite import aten
from fxquant.verify import verify

Function = Callable[..., torch.Tensor]


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


class Weighted(nn.Module):
    """A function of an input and one weight."""

    def __init__(self, function: Function, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.w = function, nn.Parameter(torch.randn(*shape))
        self.b = nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.b)


linear = nn.functional.linear
PRODUCTS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...], str]] = {
    "x @ w.T": (lambda x, w, b: x @ w.T, (24, 20), (3, 20), "linear"),
    "x @ w.mT": (lambda x, w, b: x @ w.mT, (24, 20), (3, 5, 20), "linear"),
    "mm(x, w.t())": (lambda x, w, b: torch.mm(x, w.t()), (24, 20), (3, 20), "linear"),
    "matmul(x, w.transpose)": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), (24, 20), (3, 20), "linear"),
    "addmm(b, x, w.t())": (lambda x, w, b: torch.addmm(b, x, w.t()), (24, 20), (3, 20), "linear"),
    "bi,oi->bo": (lambda x, w, b: torch.einsum("bi,oi->bo", x, w), (24, 20), (3, 20), "linear"),
    "bsi,io->bso": (lambda x, w, b: torch.einsum("bsi,io->bso", x, w), (20, 24), (3, 5, 20), "linear"),
    "...i,oi->...o": (lambda x, w, b: torch.einsum("...i,oi->...o", x, w), (24, 20), (3, 5, 20), "linear"),
    "ebi,eio->ebo": (lambda x, w, b: torch.einsum("ebi,eio->ebo", x, w), (3, 20, 24), (3, 5, 20), "matmul"),
    "ebi,eoi->ebo": (lambda x, w, b: torch.einsum("ebi,eoi->ebo", x, w), (3, 24, 20), (3, 5, 20), "matmul"),
    "x @ w[i]": (lambda x, w, b: x @ w[0] + x @ w[2], (3, 20, 24), (3, 20), "matmul"),
    "x @ w[i].T": (lambda x, w, b: x @ w[0].T + x @ w[1].T, (3, 24, 20), (3, 20), "matmul"),
    "linear(x, w[i])": (lambda x, w, b: linear(x, w[0]) + linear(x, w[1]), (3, 24, 20), (3, 20), "matmul"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_spelling_of_a_linear_is_a_layer_without_a_difference(name: str, dtype: torch.dtype) -> None:
    function, shape, example, kind = PRODUCTS[name]
    model = Weighted(function, *shape).to(dtype)
    program = run(capture(model, (torch.randn(example).to(dtype),)), [Stage(NORMALIZE)], check=verify)
    (layer,) = find_layers(program.gm)
    assert (layer.name, layer.type) == ("w", kind)
    stored = layer.weight.transpose(-1, -2) if layer.transposed else layer.weight
    assert tuple(stored.shape[-2:]) == (24, 20)  # [out, in]
    for batch in (1, 2, 17) if tensor_type(layer.node).shape[0] == "batch" else (example[0],):
        x = torch.randn(batch, *example[1:]).to(dtype)
        with torch.no_grad():
            assert torch.equal(program(x), model(x))


@pytest.mark.parametrize(
    ("equation", "shape", "reason"),
    [("bi,oi->ob", (24, 20), "write it as a linear"), ("bi,oi->bo", (4, 20), "80 values is rounded in another order")],
)
def test_an_einsum_that_is_no_linear_says_why(equation: str, shape: tuple[int, ...], reason: str) -> None:
    model = Weighted(lambda x, w, b: torch.einsum(equation, x, w), *shape)
    program = run(capture(model, (torch.randn(3, 20),)), [Stage(NORMALIZE)], check=verify)
    assert find_layers(program.gm) == []
    assert any(reason in d.reason for d in program.trace[-1].declines)


def test_the_use_of_a_weight_that_is_no_layer_is_reported() -> None:
    model = Weighted(lambda x, w, b: linear(x, w) + w.sum(), 24, 20)
    program = run(capture(model, (torch.randn(3, 20),)), [Stage(NORMALIZE)], check=verify)
    assert [d.reason for d in program.trace[-1].declines] == [
        "it uses w of layer 'w' and is no layer: a float copy stays"
    ]


class Normed(nn.Module):
    """Modules whose weight is computed from others: a convolution of wav2vec2 is such a one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 12, 3, groups=4), dim=2)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean(2))


def test_a_weight_under_weight_norm_is_a_layer_without_a_difference() -> None:
    model, x = Normed().eval(), torch.randn(3, 8, 10)
    program = run(capture(model, (x,)), [Stage(NORMALIZE)], check=verify)
    assert [(layer.name, layer.target) for layer in find_layers(program.gm)] == [
        ("conv", "conv.weight"),
        ("head", "head.weight"),
    ]
    assert not any("original" in str(n.target) for n in program.gm.graph.find_nodes(op="get_attr"))
    with torch.no_grad():
        assert torch.equal(program(x), model(x))


def test_a_norm_of_what_is_given_stays() -> None:
    model = Weighted(lambda x, w, b: torch._weight_norm(x, w, 0), 3, 1)
    program = run(capture(model, (torch.randn(3, 20),)), [Stage(NORMALIZE)], check=verify)
    assert aten._weight_norm.default in {n.target for n in program.gm.graph.nodes}


def test_a_copy_into_a_slice_leaves_what_is_copied() -> None:
    def joined(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The queries of DeepSeek: two parts written into a new tensor, one of them spread over the heads."""
        out = x.new_empty(x.shape[0], 4, 24)
        out[..., :20] = x[:, None, :]
        out[..., 20:] = x[:, None, :4].to(torch.float64)
        return out

    model = Weighted(joined, 3, 1)
    program = run(capture(model, (torch.randn(3, 20),)), [Stage(NORMALIZE)], check=verify)
    assert aten.copy.default not in {n.target for n in program.gm.graph.nodes}
    for batch in (1, 5):
        x = torch.randn(batch, 20)
        with torch.no_grad():
            assert torch.equal(program(x), model(x))
