"""What every recipe makes of a model runs in onnxruntime as in torch, written in any operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_onnx_export import difference, exported
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.config import RECIPES

WIDTH = 64


class Block(nn.Module):
    """Attention and an MLP behind norms, their channels of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        with torch.no_grad():
            self.norm.weight *= torch.logspace(-2, 1, WIDTH)
            self.mlp_norm.weight *= torch.logspace(1, -2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def made(config: Any) -> fxquant.CompiledModel:
    torch.manual_seed(0)
    data = [(torch.randn(2, 24, WIDTH),) for _ in range(8)]
    return fxquant.compile(Block().eval(), (torch.randn(2, 8, WIDTH),), config, calibration=data)


def agrees(model: fxquant.CompiledModel, path: Path, **options: Any) -> None:
    session = exported(model.program, path, options=Options(**options))
    for shape in ((1, 1, WIDTH), (3, 11, WIDTH)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert difference(model.program, session, x) < 1e-4, options


FAST = ("W6A16-E3M2", "W4A16-GPTQ-LoRC", "W4A8-FP-M1", "W4A4-FPQ", "NVFP4", "W4A16-HIGGS", "W8A8-INT")


@pytest.mark.parametrize("recipe", [r if r in FAST else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_every_recipe(recipe: str, tmp_path: Path) -> None:
    model = made(recipe)
    agrees(model, tmp_path / "m.onnx")
    agrees(model, tmp_path / "m.onnx", operators="standard")
    agrees(model, tmp_path / "m.onnx", operators="fxquant", optimize_for="memory")


def config(weight: str, activation: str | None = None, *passes: Any) -> dict[str, Any]:
    rule = {"match": "*", "weight": weight} | ({"activation": activation} if activation else {})
    return {"rules": [rule], "passes": list(passes)}


OUTLIERS = [
    {"pb_llm": {"fraction": 0.1}},
    {"pb_llm": {"fraction": 0.1, "criterion": "hessian"}},
    {"gwq": {"fraction": 0.02}},
]


@pytest.mark.parametrize("method", OUTLIERS, ids=str)
def test_outliers(method: dict[str, Any], tmp_path: Path) -> None:
    weight = "int4/group32" if "gwq" in method else "lut(-1,1)/group32"
    model = made(config(weight, None, method))
    assert "with_outliers" in str(model.program.gm.graph)
    for operators in ("auto", "standard"):
        agrees(model, tmp_path / "m.onnx", operators=operators)


@pytest.mark.parametrize(("activation", "into"), [
    ("e2m1/tensor", "exponent_bias"), ("e3m2/token", "exponent_bias"), ("e2m1/token", "e4m3"),
])  # fmt: skip
def test_exponent_biases(activation: str, into: str, tmp_path: Path) -> None:
    passes = ("pre_shift", {"fold_activation_scales": {"into": into}})
    for weight in ("e2m1/channel", "int4/group32"):
        model = made(config(weight, activation, *passes))
        assert "exponent_bias" in str(model.program.trace[-1].text) or into == "e4m3"
        for operators in ("auto", "standard"):
            agrees(model, tmp_path / "m.onnx", operators=operators)


def test_compensation_beside_standard_operators(tmp_path: Path) -> None:
    """LoRC's factors are INT8: with activations in 8 bits they are MatMulNBits too."""
    model = made(config("int4/group32", None, {"lorc": {"rank": 4, "weighting": "none"}}))
    agrees(model, tmp_path / "m.onnx", operators="standard")
    export_onnx(model.program, tmp_path / "m.onnx", options=Options(activation_bits=8))
    names = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not [name for name in names if name.startswith("Linear")]


@pytest.mark.parametrize("spec", ["e4m3/tensor", "int8/tensor", "e4m3/token", "nf4/token"])
def test_operands_of_attention(spec: str, tmp_path: Path) -> None:
    model = made(config("e4m3/channel", None, {"quantize_attention": {"spec": spec}}))
    for operators in ("auto", "standard"):
        agrees(model, tmp_path / "m.onnx", operators=operators)


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["mxfp4", "mxint8", "nvfp4", "nf4", "higgs3/group32", "uint4/block2x32"])
@pytest.mark.parametrize("activation", ["e2m1/group32:e8m0", "int8/group32:m1", "uint8/token", "e4m3fnuz/token"])
def test_weights_and_activations_of_presets(weight: str, activation: str, tmp_path: Path) -> None:
    agrees(made(config(weight, activation)), tmp_path / "m.onnx")
