"""A tiny Llama in a folder, compiled, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_decoder
from torch import nn

import fxquant
from fxquant.codegen.checkpoint import Rounding, Weight
from fxquant.compiled import CompiledModel
from fxquant.examples import example_inputs
from fxquant.scheme import parse_spec

HEAD_IN_FLOAT = {"match": "lm_head", "keep": True}


def llama(folder: Path, **settings: Any) -> nn.Module:
    """A Llama of one layer, whose widths are multiples of 64 and whose norms are not all ones, saved to ``folder``."""
    wide = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = tiny_decoder(**{**wide, **settings})
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight"):
                value.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def compiled(model: nn.Module, weight: str, activation: str | None = None, **more: Any) -> CompiledModel:
    """The model with every linear but its head quantized, or as ``rules`` say."""
    rule = {"match": "*", "weight": weight, **({} if activation is None else {"activation": activation})}
    config = {"rules": more.pop("rules", [HEAD_IN_FLOAT, rule]), **more}
    windows = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    return fxquant.compile(model, example_inputs(model), config, calibration=windows)


def weight_of(
    spec: str, inputs: str | None = None, *, name: str = "layer", reads: str = "x", size: float = 1.0
) -> Weight:
    """A random weight ``[48, 192]`` of a linear, its largest value ``size``."""
    x = torch.randn(48, 192, generator=torch.Generator().manual_seed(len(name)))
    x = x / x.abs().max() * size
    parsed = None if inputs is None else parse_spec(inputs)
    scale = torch.full((1, 1), 0.01) if parsed is not None and parsed.static else None
    rounding = None if parsed is None else Rounding(parsed, scale)
    return Weight(f"{name}.weight", fxquant.quantize_tensor(x, spec), (reads,), False, rounding)
