"""Sizes at which a program is not the model are refused, whatever the model asked about them; others are not."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fxquant
from fxquant.capture import capture
from fxquant.dims import condition_names, holds
from fxquant.encoding import MalformedError, decode_signature, encode_signature
from fxquant.errors import CaptureError, InputError
from fxquant.sizes import UnkeptGuardError

Branch = Callable[[Tensor, Tensor], Tensor]


class Sized(nn.Module):
    """A linear, then something that depends on the size of the input."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch, self.linear = branch, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.linear(x), x)


def below_four(y: Tensor, x: Tensor) -> Tensor:
    assert x.shape[0] < 4
    return y


ALL = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12}
CASES: dict[str, tuple[Branch, int, set[int]]] = {  # what the model does, the example's batch, sizes that are allowed
    "none": (lambda y, x: y, 2, ALL),
    "at least": (lambda y, x: y * 100 if x.shape[0] >= 4 else y, 2, {0, 1, 2, 3}),
    "more than": (lambda y, x: y * 100 if x.shape[0] > 8 else y, 9, {9, 12}),
    "even": (lambda y, x: y * 100 if x.shape[0] % 2 else y, 2, {0, 2, 4, 6, 8, 12}),
    "odd": (lambda y, x: y * 100 if x.shape[0] % 2 else y, 3, {1, 3, 5, 7, 9}),
    "assert": (below_four, 2, {0, 1, 2, 3}),
    "one": (lambda y, x: y * 100 if x.shape[0] == 1 else y, 3, ALL - {0, 1}),
    "one, by an example of one": (lambda y, x: y * 100 if x.shape[0] == 1 else y, 1, {1}),
    "none at all": (lambda y, x: y.sum(1) if x.shape[0] == 0 else y, 3, ALL - {0}),
    "seven": (lambda y, x: y * 100 if x.shape[0] == 7 else y, 7, {7}),
    "all but seven": (lambda y, x: y * 100 if x.shape[0] == 7 else y, 2, ALL - {7}),
    "number of values": (lambda y, x: y * 100 if x.numel() > 12 else y, 6, {4, 5, 6, 7, 8, 9, 12}),
    "float": (lambda y, x: y * 100 if x.shape[0] * 1.5 > 4 else y, 4, ALL - {0, 1, 2}),
    "two bounds": (lambda y, x: y * 100 if 3 < x.shape[0] < 9 else y, 4, {4, 5, 6, 7, 8}),
    "no comparison of sizes": (lambda y, x: y * 100 if x.shape[0] ** 0.5 > 2 else y, 5, {5}),
    "slice": (lambda y, x: y.narrow(0, 0, 3), 4, ALL - {0, 1, 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_program_is_the_model_at_every_size_that_it_takes(name: str) -> None:
    branch, batch, allowed = CASES[name]
    model = Sized(branch)
    program = capture(model, (torch.randn(batch, 4),))
    for size in ALL:
        x = torch.randn(size, 4)
        if size in allowed:
            with torch.no_grad():
                assert torch.equal(program(x), model(x)), size
        else:
            with pytest.raises(InputError, match=r"batch|expected float32"):
                program(x)


def test_a_size_that_is_not_allowed_is_told_with_those_that_are() -> None:
    program = capture(Sized(CASES["even"][0]), (torch.randn(2, 4),))
    with pytest.raises(InputError, match=r"batch = 5; the program holds for batch % 2 == 0 \(such as batch = 4 or 6\)"):
        program(torch.randn(5, 4))


def test_limits_are_saved_and_loaded(tmp_path: Path) -> None:
    compiled = fxquant.compile(Sized(CASES["at least"][0]), (torch.randn(2, 4),))
    compiled.save(tmp_path / "out")
    loaded = fxquant.load(tmp_path / "out")
    assert loaded.program.signature.limits == ("batch <= 3",)
    assert loaded.program.signature.parameters == ("x",)
    with pytest.raises(InputError, match="batch <= 3"):
        loaded(torch.randn(5, 4))


@pytest.mark.parametrize("limit", ["batch < other", "batch", "__import__('os') < 1", 3])
def test_limits_that_are_damaged_are_refused(limit: Any) -> None:
    signature = encode_signature(capture(Sized(CASES["at least"][0]), (torch.randn(2, 4),)).signature)
    with pytest.raises(MalformedError, match="limit"):
        decode_signature({**signature, "limits": [limit]}, 1)


def test_bounds_of_the_user_are_kept() -> None:
    program = capture(Sized(CASES["none"][0]), (torch.randn(2, 4),), dynamic_shapes=({0: Dim("b", min=1, max=4)},))
    assert program(torch.randn(4, 4)).shape == (4, 4)
    assert program(torch.randn(1, 4)).shape == (1, 4)
    with pytest.raises(InputError, match="batch <= 4"):
        program(torch.randn(5, 4))


def test_dynamic_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(CaptureError, match="your code specialized it to be a constant") as caught:
        capture(Sized(lambda y, x: y.view(3, 4)), (torch.randn(3, 4),), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert "symbolic_trace" not in str(caught.value)


@pytest.mark.parametrize("through_a_file", [False, True])
def test_guards_of_an_exported_program(through_a_file: bool) -> None:
    model = Sized(lambda y, x: y * 100 if x.shape[0] % 2 and x.shape[0] < 9 else y)
    exported = export(model, (torch.randn(3, 4),), dynamic_shapes=({0: Dim.AUTO},))
    if through_a_file:
        torch.export.save(exported, buffer := io.BytesIO())
        buffer.seek(0)
        exported = torch.export.load(buffer)
    program = capture(exported)
    assert program(torch.randn(7, 4)).shape == (7, 4)
    for size in (2, 11):
        with pytest.raises(InputError, match="the program holds for"):
            program(torch.randn(size, 4))


def test_one_dimension_is_limited_and_the_other_is_free() -> None:
    class Model(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids * 2 if ids.shape[1] > 8 else ids

    program = capture(Model(), (torch.ones(2, 12, dtype=torch.int64),))
    assert program.signature.limits == ("sequence >= 9",)
    assert int(program(torch.ones(1, 9, dtype=torch.int64)).sum()) == 18


@pytest.mark.parametrize(
    ("condition", "sizes", "value"),
    [
        ("batch <= 3", {"batch": 3}, True),
        ("batch % 2 != 0", {"batch": 4}, False),
        ("2*batch == sequence", {"batch": 2, "sequence": 4}, True),
        ("1.5*ToFloat(batch) > 4.0", {"batch": 2}, False),
        ("Max(5, batch) < 6", {"batch": 1}, True),
    ],
)
def test_conditions(condition: str, sizes: dict[str, int], value: bool) -> None:
    assert holds(condition, sizes) is value
    assert condition_names(condition) == set(sizes)


@pytest.mark.parametrize("condition", ["batch", "batch < 3 < 4", "batch = 3", "x", "batch // 0 == 1", "1 < other"])
def test_conditions_that_are_none(condition: Any) -> None:
    with pytest.raises(ValueError, match=r"comparison|divides by zero|unknown dimension|unexpected"):
        holds(condition, {"batch": 2})


def test_of_sizes_that_are_looked_at_together_the_batch_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba-2 cuts sequences into chunks, with a guard that no condition can say: ``Eq(a, b) | Eq(Mod(a, b), 0)``."""
    module = importlib.import_module("fxquant.capture")
    convert, asked = module.from_export, list[tuple[Any, ...]]()

    def chunked(exported: Any, **about: Any) -> Any:
        program = convert(exported, **about)
        asked.append(program.signature.inputs[0].type.shape)
        if "sequence" in asked[-1]:
            raise UnkeptGuardError("Eq(batch*sequence, 8) | Eq(Mod(batch*sequence, 8), 0)", frozenset({(0, 0), (0, 1)}))
        return program

    monkeypatch.setattr(module, "from_export", chunked)
    program = capture(nn.Linear(4, 4), (torch.randn(2, 16, 4),))
    assert asked == [("batch", "sequence", 4), ("batch", 16, 4)]
    assert program.signature.inputs[0].type.shape == ("batch", 16, 4)
