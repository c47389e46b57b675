"""Tasks run with one thread, whatever the process has, and leave it as it was."""

from __future__ import annotations

import pytest
import torch

from fxquant.tasks import IN_PROCESS, Task


def threads(grad: bool) -> tuple[int, bool]:
    if grad:
        raise ValueError("as asked")
    return torch.get_num_threads(), torch.is_grad_enabled()


def test_a_task_runs_with_one_thread_and_without_gradients() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert IN_PROCESS.submit(Task("threads", threads, (False,))).result() == (1, False)
        with pytest.raises(ValueError, match="as asked"):
            IN_PROCESS.submit(Task("threads", threads, (True,)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
