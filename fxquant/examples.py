"""Example inputs for models that say in their config what they take: those of Hugging Face transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxquant.errors import CaptureError, ModelError

BATCH, LENGTH = 2, 16


def default_inputs(model: nn.Module) -> Any:
    """Inputs to capture ``model`` with: by its config for a transformers model, else the ``dummy_inputs`` it carries.

    They lie on the model's device, floats in its dtype. Raises CaptureError where there are none.
    """
    found: Any
    try:
        found = example_inputs(model) if is_hugging_face(model) else model.dummy_inputs
    except (ModelError, AttributeError):
        found = getattr(model, "dummy_inputs", None)
    if found is None:
        raise CaptureError(f"no inputs are known for {type(model).__name__}; give example_inputs to quantize_")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return tree_map_only(Tensor, lambda t: t.to(first if t.is_floating_point() else first.device), found)


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Keyword inputs for a transformers model: what it says is its main input, and what else it cannot do without.

    Token ids int64 [2, 16] (and a mask for encoders), pixels [2, channels, height, width], a waveform [2, 8000] or its
    features; pixels beside the ids of a model that compares images and texts, and ids for a decoder behind an encoder.
    Raises ModelError where the main input is none of these.
    """
    kind, config = str(getattr(model, "main_input_name", "")), model.config
    make = _MAKERS.get(kind)
    first = make(config) if make is not None else None
    if first is None:
        raise ModelError(f"no example inputs are known for {type(model).__name__}, which takes {kind or 'unnamed'!r}; "
                         f"load the model yourself and give example_inputs to fxquant.compile")  # fmt: skip
    inputs, taken = {kind: first}, inspect.signature(model.forward).parameters
    if kind == "input_ids" and not is_decoder(model) and "attention_mask" in taken:
        inputs["attention_mask"] = torch.ones_like(first)
    if kind == "input_ids" and "pixel_values" in taken and hasattr(model, "logit_scale"):
        inputs["pixel_values"] = _pixels(config)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = _ids(config)[:, : LENGTH - 3]  # a length of its own: equal sizes would be one
    return inputs


def _ids(config: Any) -> Tensor:
    vocabulary = int(config.get_text_config().vocab_size)
    return (torch.arange(BATCH * LENGTH) * 37 % vocabulary).reshape(BATCH, LENGTH)


def _pixels(config: Any) -> Tensor:
    own = getattr(config, "vision_config", config)
    size, channels = getattr(own, "image_size", 224), getattr(own, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _noise(channels, height, width)


def _waveform(config: Any) -> Tensor:
    """Half a second at 16 kHz; of a model that reads spectrograms, one of those [2, frames, bins]."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _noise(config.max_length, config.num_mel_bins)
    return _noise(*([config.audio_channels] if hasattr(config, "audio_channels") else []), 8000)


def _features(config: Any) -> Tensor | None:
    """Spectrograms: [2, bins, frames] of Whisper, whose encoder takes 30 s, else [2, frames, bins]."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return _noise(config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "input_feat_per_channel"):
        return _noise(4 * LENGTH, config.input_feat_per_channel * config.input_channels)
    if hasattr(config, "feature_projection_input_dim"):
        return _noise(4 * LENGTH, config.feature_projection_input_dim)
    return None


def _noise(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))


_MAKERS: dict[str, Callable[[Any], Tensor | None]] = {
    "input_ids": _ids, "pixel_values": _pixels, "input_values": _waveform, "input_features": _features,
}  # fmt: skip
"""A model's main input -> an example of it, by the config; None where the config does not tell its size."""


def is_decoder(model: nn.Module) -> bool:
    """Whether the model reads tokens left to right and predicts the next one."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) or bool(getattr(model.config, "is_decoder", False))


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model's class, or one it derives from, is one of transformers'."""
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)
