"""The fallback capture: what torch.fx.symbolic_trace can follow, in torch.export's spelling, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.capture import capture
from fxquant.errors import CaptureError, InputError
from fxquant.graph import info, tensor_type
from fxquant.layers import find_layers
from fxquant.symbolic import trace_symbolically

aten: Any = torch.ops.aten


def calls(gm: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


class Net(nn.Module):
    """Layers, functions, methods, in-place writes, sizes, state that changes, a number from data, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5),
            nn.Flatten(),
        )  # fmt: skip
        self.head, self.norm = nn.Linear(128, 5), nn.LayerNorm(5)
        self.calls, self.last = 0, None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, scale: float | None = None, *, flag: bool = True) -> dict[str, Any]:
        self.calls += 1
        x = self.body(x)
        self.last = x
        self.count += 1
        a, b = self.norm(self.head(x.view(x.size(0), -1))).chunk(2, dim=-1)
        gain = x.sum().item() if scale is None else scale
        return {"a": functional.gelu(a * gain) + x.shape[1], "b": [b.softmax(-1), b[:, 0] if flag else None]}


def test_a_model_with_everything() -> None:
    model = Net().eval()
    program = trace_symbolically(model, (torch.randn(2, 3, 8, 8),), {})
    assert (model.calls, model.last, float(model.count)) == (0, None, 0.0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        got, want = program(x), model(x)
    assert torch.equal(got["a"], want["a"])
    assert [torch.equal(a, b) for a, b in zip(got["b"], want["b"], strict=True)] == [True, True]
    assert all(isinstance(t, torch._ops.OpOverload) or t.__name__ == "getitem" for t in calls(program.gm))
    assert {aten.conv2d.default, aten.batch_norm.default, aten.relu.default, aten.item.default} <= set(
        calls(program.gm)
    )


def test_weights_paths_and_types() -> None:
    model = Net().eval()
    program = trace_symbolically(model, (torch.randn(2, 3, 8, 8),), {"scale": 2.0})
    layers = {layer.name: layer for layer in find_layers(program.gm)}
    assert set(layers) == {"body.0", "head"}
    assert layers["head"].weight.data_ptr() == model.head.weight.data_ptr()
    assert info(layers["head"].node).module == "Linear"
    assert str(tensor_type(layers["head"].node)) == "float32[2, 5]"
    assert "test_symbolic.py:" in info(layers["head"].node).source
    with pytest.raises(InputError, match=r"'scale' was fixed to 2\.0"):
        program(torch.randn(2, 3, 8, 8), scale=3.0)
    with pytest.raises(InputError, match=r"expected float32\[2, 3, 8, 8\]"):
        program(torch.randn(3, 3, 8, 8), scale=2.0)


class UpTo(nn.Module):
    """Reads as many tokens as the mask has ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum().item()
        return (self.embedding(tokens)[:, :count] / count).tanh().mean(1)


def test_a_size_from_data_stays_in_the_graph() -> None:
    model = UpTo().eval()
    tokens, mask = torch.randint(0, 10, (1, 7)), torch.ones(7, dtype=torch.int64)
    mask[3:] = 0
    program = capture(model, {"tokens": tokens, "mask": mask})  # torch.export refuses this one
    assert aten.item.default in calls(program.gm)
    for ones in (1, 3, 7):
        mask = (torch.arange(7) < ones).long()
        with torch.no_grad():
            assert torch.equal(program(tokens, mask), model(tokens, mask))


def test_nested_inputs_and_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, xs: list[Tensor], **more: Tensor) -> Tensor:
            return self.attention(xs[0], xs[1], more["v"], need_weights=False)[0]

    model = Model().eval()
    x = torch.randn(2, 3, 8)
    program = trace_symbolically(model, ([x, x + 1],), {"v": x * 2})
    assert [i.name for i in program.signature.inputs] == ["xs_0", "xs_1", "v"]
    with torch.no_grad():
        torch.testing.assert_close(program([x, x], v=x), model([x, x], v=x))  # eager takes a fused path of its own
    assert "attention.out_proj.weight" in {layer.target for layer in find_layers(program.gm)}


def test_tied_weights_are_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    program = trace_symbolically(Model(), (torch.randn(2, 4),), {})
    assert [(layer.name, layer.target) for layer in find_layers(program.gm)] == [("a", "a.weight"), ("b", "a.weight")]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Listing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().tolist()


class SizeOfData(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        y = x[:, : n.item()]
        return y / y.shape[1]


class ThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1).add_(1)
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Branching(), (torch.ones(2, 4),), "control flow"),
        (Listing(), (torch.ones(2, 4),), "tolist at test_symbolic.py:"),
        (SizeOfData(), (torch.ones(2, 4), torch.tensor(3)), "size of a tensor whose size depends on data"),
        (SizeOfData(), (torch.ones(2, 4), torch.tensor(4)), "in a way that cannot be traced"),
        (ThroughView(), (torch.ones(2, 4),), "differs from the model's"),
    ],
)
def test_what_cannot_be_traced_is_named(model: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises((CaptureError, torch.fx.proxy.TraceError), match=message):
        trace_symbolically(model.eval(), inputs, {})
