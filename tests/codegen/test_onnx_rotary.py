"""Rotary embeddings as one operator: where they are one, with the same results; elsewhere nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.evaluate import OnnxModel
from tests.tiny_models import tiny_decoder

pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


class Turned(nn.Module):
    """x turned by cos and sin of ``angles``; ``halves``: whether both halves have the same angle."""

    def __init__(self, *, halves: bool = True, batches: int = 1, split: int = 4) -> None:
        super().__init__()
        self.halves, self.split = halves, split
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("angles", torch.randn(batches, 5, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.cat([self.angles, self.angles if self.halves else 2 * self.angles], dim=-1)  # type: ignore[list-item]
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        turned = torch.cat([-x[..., self.split :], x[..., : self.split]], dim=-1)
        return (x * cos + turned * sin) * 2


def exported(model: Any, inputs: Any, path: Path, **options: Any) -> tuple[list[str], OnnxModel]:
    export_onnx(capture(model, inputs), path, options=Options(**options))
    return [node.op_type for node in onnx.load(str(path)).graph.node], OnnxModel(path)


@pytest.mark.parametrize("cls", ["Llama", "Qwen3", "Mistral"])
def test_a_decoder_turns_every_layer_by_one_operator(cls: str, tmp_path: Path) -> None:
    model = tiny_decoder(cls)
    nodes, fused = exported(model, {"input_ids": IDS}, tmp_path / "a.onnx")
    layers = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    assert nodes.count("RotaryEmbedding") == 2 * layers
    assert nodes.count("Neg") == 0
    plain, separate = exported(model, {"input_ids": IDS}, tmp_path / "b.onnx", operators="fxquant")
    assert "RotaryEmbedding" not in plain
    with torch.no_grad():
        want = model(IDS).logits
    for call in (fused, separate):
        torch.testing.assert_close(call(input_ids=IDS)["logits"], want, rtol=1e-5, atol=1e-5)


def test_the_sum_alone(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    nodes, call = exported(Turned(), (x,), tmp_path / "a.onnx")
    assert nodes.count("RotaryEmbedding") == 1
    torch.testing.assert_close(next(iter(call(x=x).values())), Turned()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", [{"halves": False}, {"batches": 2}, {"split": 2}])
def test_what_only_looks_like_it_stays(other: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    nodes, call = exported(Turned(**other), (x,), tmp_path / "a.onnx")
    assert "RotaryEmbedding" not in nodes
    torch.testing.assert_close(next(iter(call(x=x).values())), Turned(**other)(x), rtol=1e-6, atol=1e-6)
