"""bulk: steps over whole matrices, each an operator, for which a back end may register what is faster.

Such an implementation gives the same bits as the reference body, so that no result depends on whether there is one.
The functions that offer a step call its operator for LARGE values and more; for fewer, calling it costs more than the
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fxquant"
LARGE = 1 << 16
"""Values, some 0.1 ms of the reference."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``fxquant::<name>`` with its reference body, and one that gives the shape of its result alone."""
    _library.define(name + schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
