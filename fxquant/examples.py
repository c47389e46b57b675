"""Example inputs for models that say in their config what they take: those of Hugging Face transformers."""

from __future__ import annotations

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
    """Keyword inputs for a transformers model: token ids (and a mask for encoders) or pixels."""
    kind = str(getattr(model, "main_input_name", ""))
    config: Any = model.config
    if kind == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {kind: torch.randn(BATCH, channels, height, width, generator=torch.Generator().manual_seed(0))}
    if kind != "input_ids":
        raise ModelError(f"no example inputs are known for {type(model).__name__}, which takes {kind or 'unnamed'!r}; "
                         f"load the model yourself and give example_inputs to fxquant.compile")  # fmt: skip
    vocabulary = int(config.get_text_config().vocab_size)
    ids = (torch.arange(BATCH * LENGTH) * 37 % vocabulary).reshape(BATCH, LENGTH)
    inputs = {"input_ids": ids}
    if not is_decoder(model):
        inputs["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : LENGTH - 3]  # a length of its own: equal sizes would be one dimension
    return inputs


def is_decoder(model: nn.Module) -> bool:
    """Whether the model reads tokens left to right and predicts the next one."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) or bool(getattr(model.config, "is_decoder", False))


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model's class, or one it derives from, is one of transformers'."""
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)
