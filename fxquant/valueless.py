"""Tracing a model whose weights are Lazy: by their shapes alone, so that none of them is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.errors import CaptureError
from fxquant.lazy import Lazy
from fxquant.rewrite import attach, detach, fetch, get_attrs


@contextmanager
def without_values(model: nn.Module) -> Iterator[dict[str, Lazy]]:
    """The model's Lazy weights by name, a tied one under each; inside, tensors without values stand in their places."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()
    places: list[tuple[dict[str, Any], str, Lazy]] = []
    found: dict[str, Lazy] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if isinstance(value, Lazy):
                    found[f"{path}.{key}" if path else key] = value.detach()  # type: ignore[assignment]
                    places.append((held, key, value))
    for held, key, value in places:
        if id(value) not in made:
            with mode:
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            made[id(value)] = nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake
        held[key] = made[id(value)]
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # tells developers what the caller finds out anyway
    disabled, logger.disabled = logger.disabled, True
    try:
        yield found
    finally:
        logger.disabled = disabled
        for held, key, value in places:
            held[key] = value


def give_values(gm: fx.GraphModule, weights: Mapping[str, Lazy]) -> None:
    """Put Lazy weights in the place of the tensors without values that a graph was traced with."""
    for node in list(get_attrs(gm.graph)):
        name = str(node.target)
        if not isinstance(fetch(gm, name), FakeTensor):
            continue
        if name not in weights:
            raise CaptureError(
                f"{name} is computed from weights while the model is traced, and they are not read: compile this model "
                f"in memory"
            )
        detach(gm, name)
        attach(gm, name, weights[name])
