"""torch.compile(model, backend="fxquant"): what runs is what fxquant.compile makes, on packed weights."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_models import Convolutions, mlp, tiny_decoder
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.dynamo import backend
from fxquant.errors import InputError
from fxquant.ops import operators as ops
from fxquant.rewrite import tensors


@pytest.fixture(autouse=True)
def _no_graphs_of_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> tuple[Any, list[CompiledModel]]:
    """The model on the backend, and the list that its compiled graphs are added to."""
    made: list[CompiledModel] = []
    given = {**options, "on_compiled": made.append}
    return torch.compile(model, backend=backend, dynamic=dynamic, options=given), made  # type: ignore[call-overload]


def test_the_entry_point_names_the_backend() -> None:
    """What an installed wheel registers; registered by hand here, since an editable install may be older."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["fxquant"].partition(":")
    assert getattr(importlib.import_module(module), name) is backend
    if "fxquant" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(backend, name="fxquant")  # type: ignore[attr-defined]
    model, x = mlp(), torch.randn(2, 20)
    want = fxquant.compile(model, (x,), "W6A16-E3M2")(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="fxquant")(x), want)


def test_a_decoder_computes_what_compile_makes_and_sizes_may_vary() -> None:
    model = tiny_decoder(num_hidden_layers=1)
    run, made = compiled(model, config="W6A16-E3M2")
    reference = fxquant.compile(model, {"input_ids": torch.arange(32).reshape(2, 16)}, "W6A16-E3M2")
    with torch.no_grad():
        for length in (16, 12, 21):
            ids = torch.randint(0, 64, (2, length))
            assert torch.equal(run(input_ids=ids).logits, reference(input_ids=ids)["logits"])
    assert len(made) == 2  # as it was first, then with the length dynamic
    got = [layer.name for layer in made[-1].summary().layers]
    assert got == [layer.name for layer in reference.summary().layers]


def test_weights_are_packed_in_what_runs() -> None:
    model = tiny_decoder(num_hidden_layers=1)
    run, made = compiled(model, config={"rules": [{"match": "*.mlp.*", "weight": "e2m1/group16"}]})
    with torch.no_grad():
        run(input_ids=torch.randint(0, 64, (2, 8)))
    held = tensors(made[0].program.gm)
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    for name in names:
        weight = model.get_submodule(name).weight
        assert held[f"{name}.weight_packed"].nbytes * 8 == weight.nbytes
        assert f"{name}.weight" not in held
    assert len(made[0].program.gm.graph.find_nodes(op="call_function", target=ops.linear_wq.default)) == len(names)


def test_convolutions_and_positional_inputs() -> None:
    model, x = Convolutions().eval(), torch.randn(2, 3, 8, 8)
    run, made = compiled(model, config="W8A16-INT")
    with torch.no_grad():
        assert torch.equal(run(x), fxquant.compile(model, (x,), "W8A16-INT")(x))
    assert {layer.name for layer in made[0].summary().layers} == {"stem.0", "depthwise", "line", "head"}


def test_methods_that_need_data_take_it() -> None:
    model = tiny_decoder(num_hidden_layers=1)
    windows = torch.randint(0, 64, (8, 16))
    config = {"rules": [{"match": "*", "weight": "int4/group16"}], "passes": ["gptq"]}
    run, made = compiled(model, config=config, calibration=windows, dynamic=True)
    with torch.no_grad():
        run(input_ids=windows[:2])
    assert "gptq" in [step.name for step in made[0].program.trace]


def test_a_graph_break_leaves_graphs_without_weights() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = x.relu() + 1
            torch._dynamo.graph_break()
            return self.inner(y)

    model, x = Broken(), torch.randn(2, 8)
    run, made = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(x), fxquant.compile(model.inner, (x,), "W6A16-E3M2")(x.relu() + 1))
    assert len(made) == 1


def test_a_gradient_is_an_error_and_a_forward_pass_is_not() -> None:
    run, _ = compiled(mlp())
    y = run(torch.randn(2, 20))
    with pytest.raises(InputError, match=r"no gradients.*quantize_"):
        y.sum().backward()


def test_a_weight_that_changed_is_an_error() -> None:
    model, x = mlp(), torch.randn(2, 20)
    run, _ = compiled(model)
    with torch.no_grad():
        run(x)
        model[0].weight.mul_(2)  # type: ignore[index,operator,union-attr]
        with pytest.raises(InputError, match=r"changed after.*torch\._dynamo\.reset"):
            run(x)
        torch._dynamo.reset()
        assert torch.equal(run(x), fxquant.compile(model, (x,), "W6A16-E3M2")(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confg": "MXFP4"}, "unknown option 'confg'.*did you mean 'config'"),
        ({"config": "W5"}, "unknown recipe 'W5'"),
        (
            {"config": {"rules": [{"match": "nowhere", "weight": "int4"}]}},
            "'nowhere' matches no layer; the layers are 0, 2",
        ),
        ({"config": "W8A8-INT"}, "needs calibration data"),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], said: str) -> None:
    run = torch.compile(mlp(), backend=backend, options=options)  # type: ignore[call-overload]
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=said):
        run(torch.randn(2, 20))


def test_a_mode_is_refused() -> None:
    run = torch.compile(mlp(), backend=backend, mode="max-autotune")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="no mode 'max-autotune'"):
        run(torch.randn(2, 20))


def test_models_in_training_are_refused() -> None:
    torch._dynamo.reset()
    for model in (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))):
        run, _ = compiled(model.train())
        with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"1 is in training mode.*model\.eval\(\)"):
            run(torch.randn(4, 8))
