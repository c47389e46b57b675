"""The spool: tensors kept in files that have no name, so that the operating system decides what of them is in memory.

Inside ``into(folder)`` what ``keep`` is given is written to such a file and mapped; the file goes with its last
tensor. Outside, ``keep`` returns what it is given. Without it the activations of a calibration, and the codes of a
model that is larger than memory, would not fit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import SaveError

LARGE = 1 << 20
"""Bytes from which on a tensor is worth a file."""

_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def into(folder: Path | None) -> Iterator[None]:
    """Tensors are kept in files of ``folder`` inside, which should lie on a disk; None: in memory."""
    before = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(before)


def is_open() -> bool:
    """Whether ``keep`` keeps tensors in files."""
    return _FOLDER.get() is not None


def keep(value: Any) -> Any:
    """``value``, its tensors from a file where a spool is open and they are large: equal in every bit and stride."""
    folder = _FOLDER.get()
    if isinstance(value, (tuple, list)):
        return type(value)(keep(v) for v in value) if folder is not None else value
    plain = type(value) is Tensor and value.device.type == "cpu" and value.layout == torch.strided
    if folder is None or not plain or value.nbytes < LARGE or value.requires_grad:
        return value
    order = sorted(range(value.dim()), key=lambda d: -value.stride(d))
    dense = value.permute(order)
    if not dense.is_contiguous():
        return value
    return _written(dense, folder).permute(sorted(range(value.dim()), key=order.__getitem__))


def _written(value: Tensor, folder: Path) -> Tensor:
    """A contiguous tensor as a mapped file that is unlinked already. Raises SaveError where it cannot be written."""
    handle, name = tempfile.mkstemp(prefix=".spool", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return torch.from_file(name, shared=False, size=value.numel(), dtype=value.dtype).view(value.shape)
    except OSError as error:
        raise SaveError(
            f"cannot keep {value.nbytes} bytes of what is being calculated in {folder}: {error}. Free some space there"
        ) from error
    finally:
        os.unlink(name)
