"""Recipes: every one compiles, says where it comes from, and does what its name says."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.config import RECIPES
from fxquant.errors import CalibrationError

NAMES = re.compile(r"W(\d+)A(\d+)")


class Net(nn.Module):
    """Two blocks behind norms, wide enough for groups of 256 to be cut short by a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(64), "up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](layer["norm"](x))))
        return x


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compiles(name: str) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(2, 40, 64),) for _ in range(3)]
    compiled = fxquant.compile(Net().eval(), (torch.randn(2, 5, 64),), name, calibration=data)
    summary = compiled.summary()
    assert sum(layer.spec is not None for layer in summary.layers if not layer.part_of) == 4
    assert summary.bytes_after < summary.bytes_before
    assert summary.error is None or 0 < summary.error < 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_its_name(name: str) -> None:
    recipe = RECIPES[name]
    (rule,) = recipe.config.layer_rules()
    assert recipe.source
    assert rule.weight is not None
    if bits := NAMES.match(name):
        assert rule.weight.format.bits == int(bits[1])
        assert (16 if rule.activation is None else rule.activation.format.bits) == int(bits[2])


def test_the_papers_are_covered() -> None:
    """The settings of the papers' main tables, as (paper, weight format, activation, methods)."""
    found = set()
    for recipe in RECIPES.values():
        (rule,) = recipe.config.layer_rules()
        assert rule.weight is not None
        activation = None if rule.activation is None else str(rule.activation.format)
        methods = tuple(name for name, _ in recipe.config.methods())
        found.add((recipe.source.split(",")[0], str(rule.weight.format), activation, methods))
    fpq = ("pre_shift", "search_formats", "fold_activation_scales")
    v2 = "ZeroQuant-V2"
    assert {
        ("ZeroQuant(4+2)", "e3m2", None, ()), ("ZeroQuant(4+2)", "e3m2", None, ("gptq",)),
        ("ZeroQuant-FP", "e2m1", "e4m3", ("gptq",)), ("ZeroQuant-FP", "e2m1", "e4m3", ("gptq", "lorc")),
        ("ZeroQuant-FP", "e4m3", "e4m3", ()), ("ZeroQuant-FP", "int4", "e4m3", ("gptq",)),
        (v2, "int4", None, ()), (v2, "int4", None, ("gptq",)), (v2, "int4", None, ("gptq", "lorc")),
        (v2, "int4", "int8", ()), (v2, "int4", "int8", ("gptq",)), (v2, "int4", "int8", ("zq_local",)),
        (v2, "int4", "int8", ("zq_global",)), (v2, "int4", "int8", ("gptq", "lorc")),
        (v2, "int8", "int8", ()), (v2, "int8", "int8", ("gptq",)),
        ("LLM-FP4", "e2m1", "e2m1", fpq), ("LLM-FP4", "e2m1", "e4m3", fpq), ("LLM-FP4", "e3m2", "e3m2", fpq),
    } <= found  # fmt: skip


def test_recipes_need_data_where_their_methods_do() -> None:
    with pytest.raises(fxquant.errors.ConfigError, match="zq_global needs calibration data"):
        fxquant.compile(Net().eval(), (torch.randn(2, 5, 64),), "W4A8-V2-Global")
    with pytest.raises(CalibrationError):
        fxquant.compile(
            Net().eval(), (torch.randn(2, 5, 64),), "W4A8-V2-GPTQ", calibration=[(torch.full((2, 5, 64), torch.nan),)]
        )
