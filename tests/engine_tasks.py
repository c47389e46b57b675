"""Tasks that tests hand to workers: they are imported there by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import WeightError


def facts(x: Tensor) -> dict[str, Any]:
    """What a task sees of its process and of its argument, which it may write to."""
    seen = {
        "pid": os.getpid(), "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "aligned": x.data_ptr() % 64 == 0, "contiguous": x.is_contiguous(), "sum": x.double().sum(),
    }  # fmt: skip
    x.add_(0)
    return seen


def same(*values: Any) -> tuple[Any, ...]:
    return values


def fails(kind: str) -> None:
    if kind == "ours":
        raise WeightError("layer.3 holds 1 NaN")
    raise ZeroDivisionError("as asked")


def dies_once(marker: str, x: Tensor) -> Tensor:
    """Ends its process the first time, as the kernel's OOM killer does."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


def waits(marker: str) -> None:
    """Says who it is, and goes on for a minute."""
    Path(f"{marker}.new").write_text(str(os.getpid()))
    Path(f"{marker}.new").rename(marker)
    time.sleep(60)


def dies(marker: str) -> None:
    """Always ends its process, after it has noted that it ran."""
    with Path(marker).open("a") as file:
        file.write("x")
    os._exit(1)
