"""How a captured program is called, and what is said of a model or an example that cannot be captured."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.capture import capture
from fxquant.errors import CaptureError, InputError, WeightError
from fxquant.symbolic import trace_symbolically


# --- how a program is called ------------------------------------------------------------------------------------------
def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    x = torch.randn(3, 4)
    program = capture(Model(), (x, x))
    assert torch.equal(program(x, 3 * x), x - 6 * x)
    assert torch.equal(trace_symbolically(Model(), (x, x), {})(x, 3 * x), x - 6 * x)


def test_self_attention_by_one_tensor_is_attention() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y, z = torch.randn(3, 2, 5, 8)
    program = capture(model, (x, x, x))
    with torch.no_grad():
        torch.testing.assert_close(program(x, y, z)[0], model(x, y, z)[0])


def test_a_dict_is_bound_by_its_keys() -> None:
    class Model(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return inputs["a"] - 2 * inputs["b"]

    x, y = torch.randn(2, 3, 4)
    program = capture(Model(), ({"a": x, "b": y},))
    assert torch.equal(program({"b": x, "a": y}), y - 2 * x)
    assert torch.equal(program(inputs={"b": x, "a": y}), y - 2 * x)
    exported = torch.export.export(Model(), ({"a": x, "b": y},))
    assert torch.equal(capture(exported)({"b": x, "a": y}), y - 2 * x)
    with pytest.raises(InputError, match="unknown input 'inputs_c'"):
        program({"c": x, "a": y})


def test_variadic_forwards_have_a_dynamic_batch() -> None:
    class Positional(nn.Module):
        def forward(self, x: Tensor, *args: Tensor) -> Tensor:
            return x + 2 * args[0] + 3 * args[1]

    class Named(nn.Module):
        def forward(self, x: Tensor, **more: Any) -> Tensor:
            return x + 2 * more["v"]["w"]

    x, y, z = torch.randn(3, 2, 4)
    program = capture(Positional(), (x, y, z))
    assert [i.name for i in program.signature.inputs] == ["x", "args_0", "args_1"]
    x5, y5, z5 = torch.randn(3, 5, 4)
    assert torch.equal(program(x5, y5, z5), Positional()(x5, y5, z5))
    program = capture(Named(), {"x": x, "v": {"w": y}})
    assert torch.equal(program(x5, v={"w": y5}), Named()(x5, v={"w": y5}))


def test_values_that_are_forwards_defaults_may_be_given() -> None:
    class Model(nn.Module):
        """As transformers does it: a default of None stands for the config's setting."""

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor, flag: bool = True, n: float = 2.0, use_cache: bool | None = None) -> Tensor:
            return x * n if flag else x

    x = torch.randn(3, 4)
    program = capture(Model(), (x,))
    assert torch.equal(program(x, flag=True, use_cache=False), 2 * x)
    assert torch.equal(program(x, True, 2.0), 2 * x)
    for name in ("flag", "use_cache"):
        with pytest.raises(InputError, match=f"'{name}' was fixed to"):
            program(x, **{name: name == "use_cache"})


# --- mistakes, told in the user's own code ----------------------------------------------------------------------------
class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) @ y


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(3, 4), torch.randn(3, 4)), r"test_calls.py:\d+: RuntimeError: mat1 and mat2 shapes"),
        ((torch.randn(3, 5), torch.randn(4, 4)), r"in module 'linear' \(Linear\) at .*test_calls.py:\d+"),
        ((torch.randn(3, 4),), "missing 1 required positional argument: 'y'"),
        ({"x": torch.randn(3, 4), "z": torch.randn(4, 4)}, "unexpected keyword argument 'z'"),
        (([1.0], torch.randn(4, 4)), "must be Tensor, not list"),
    ],
)
def test_example_inputs_that_the_model_fails_on(inputs: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=message) as caught:
        capture(Product(), inputs)
    assert "control flow" not in str(caught.value)
    assert capfd.readouterr().err == ""


class Autocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))


@pytest.mark.parametrize(("part", "advice"), [(Autocast(), r"model.to\(dtype\)"), (Cond(), "torch.where")])
def test_higher_order_operators_are_located_once(part: nn.Module, advice: str) -> None:
    with pytest.raises(CaptureError, match=rf"in module 1 at test_calls.py:\d+.*(?s:.)*{advice}") as caught:
        capture(nn.Sequential(nn.Linear(4, 4), part), (torch.randn(2, 4),))
    assert "CaptureError" not in str(caught.value)


def test_weights_that_no_model_can_have() -> None:
    integers = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = integers
    with pytest.raises(WeightError, match=r"0.weight holds int8; expected floating point"):
        capture(model, (torch.randn(2, 8),))
    free = Product()
    free.register_parameter("w", integers)
    free.forward = lambda x: nn.functional.linear(x, free.w)  # type: ignore[method-assign, assignment]
    with pytest.raises(WeightError, match="w holds int8"):
        capture(free, (torch.randn(2, 8),))
    with pytest.raises(WeightError, match="not initialized yet"):
        capture(nn.LazyLinear(3), (torch.randn(2, 8),))


def test_models_that_fx_cannot_write() -> None:
    with pytest.raises(CaptureError, match=r"'in' is a keyword of Python.*rename"):
        capture(nn.Sequential(OrderedDict([("in", nn.Linear(4, 4))])), (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match=r"torch.jit.ScriptModule; give the nn.Module"):
        capture(torch.jit.script(nn.Linear(4, 4)), (torch.randn(2, 4),))


def test_what_depends_on_no_input_is_an_error() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return x + self.calls[0]

    with pytest.raises(CaptureError, match="does not give what the model gives"):
        capture(Counting(), (torch.randn(2, 4),))


def test_several_threads() -> None:
    def compiled(seed: int) -> bool:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
        capture(model, (torch.randn(2, 4),))
        return model.training and model[1].training

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compiled, range(6)))


@pytest.mark.parametrize("name", ["self", "args", "program"])
def test_an_input_of_any_name_is_refused_as_an_input(name: str) -> None:
    """Names come from files of inputs (``--data``)."""
    compiled = fxquant.compile(
        torch.nn.Linear(4, 3), (torch.randn(2, 4),), {"rules": [{"match": "*", "weight": "fp8"}]}
    )
    with pytest.raises(InputError, match=f"unknown input '{name}'"):
        compiled(**{name: torch.randn(2, 4)})
