"""remember: what was computed from tensors, kept as long as the first of them lives and all stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First tensor -> what for -> (the others, the state of all, the result): a memory of pure functions."""


def remember(make: Callable[[], T], what: Hashable, first: Tensor, *others: Tensor | None) -> T:
    """``make()``, once for ``what`` and these tensors; again when one was written to in place or given other memory."""
    kept: dict[Hashable, Any] = _KEPT.setdefault(first, {})
    state = tuple(None if t is None else _state(t) for t in (first, *others))
    if what in kept:
        refs, before, found = kept[what]
        if before == state and all((None if r is None else r()) is t for r, t in zip(refs, others, strict=True)):
            return found  # type: ignore[no-any-return]
    made = make()
    kept[what] = (tuple(None if t is None else ref(t) for t in others), state, made)
    return made


def _state(tensor: Tensor) -> tuple[int, int]:
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()
