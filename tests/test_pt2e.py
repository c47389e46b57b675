"""What PT2E users have: an ExportedProgram is taken; one that is quantized already, or a prepared model, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from tiny_models import mlp, tiny_decoder
from torch import Tensor, nn
from torch.export import Dim, export

import fxquant
from fxquant.errors import CaptureError, ModelError
from fxquant.hf import load_model

qd = torch.ops.quantized_decomposed


class Converted(nn.Module):
    """What convert_pt2e makes of a linear: int8 weights and inputs between quantize and dequantize."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(16, 8)
        scale = weight.abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(16, dtype=torch.int64))
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = qd.quantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8)
        x = qd.dequantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8)
        weight = qd.dequantize_per_channel(self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        return self.head(nn.functional.linear(x, weight))


def test_an_exported_program_compiles_as_its_model() -> None:
    model, x = mlp(), torch.randn(4, 20)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2)},))
    got = fxquant.compile(program, config="W8A8-FP8")
    want = fxquant.compile(model, (x,), "W8A8-FP8")
    for rows in (2, 4, 7):
        x = torch.randn(rows, 20)
        assert torch.equal(got(x), want(x))


def test_an_exported_decoder() -> None:
    model, ids = tiny_decoder(num_hidden_layers=1), torch.randint(0, 64, (2, 16))
    program = export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    got = fxquant.compile(program, config="MXFP4")
    want = fxquant.compile(model, {"input_ids": ids}, "MXFP4")
    assert torch.equal(got(input_ids=ids, use_cache=False)["logits"], want(input_ids=ids)["logits"])


@pytest.mark.parametrize("exported", [True, False])
def test_a_converted_program_is_refused(exported: bool) -> None:
    model, x = Converted(), torch.randn(2, 8)
    with pytest.raises(CaptureError, match=r"quantized already.*quantize_per_tensor.*before prepare_pt2e.*W8A8-INT"):
        fxquant.compile(export(model, (x,)) if exported else model, None if exported else (x,), "W8A16-INT")


def test_a_prepared_model_is_refused() -> None:
    from torch.ao.quantization.observer import MinMaxObserver

    model = nn.Sequential(nn.Linear(8, 8), MinMaxObserver())
    with pytest.raises(CaptureError, match=r"1 is a MinMaxObserver \(ObserverBase\).*prepared for another quantizer"):
        fxquant.compile(model, (torch.randn(2, 8),), "W8A16-INT")


def test_a_saved_program_is_not_loaded(tmp_path: Path) -> None:
    """Loading .pt2 may run code from the file: the error says how to load it where it is trusted."""
    path = tmp_path / "model.pt2"
    torch.export.save(export(mlp(), (torch.randn(2, 20),)), path)
    with pytest.raises(ModelError, match=r"may run code.*fxquant\.compile\(torch\.export\.load\('model\.pt2'\)"):
        load_model(path)
    assert fxquant.compile(torch.export.load(path), config="W8A16-INT")(torch.randn(2, 20)).shape == (2, 6)
