"""Tasks: what a job consists of, and the interface of what runs them.

A task is a pure function of its arguments: one layer that is solved, one candidate of a search. It runs with one
thread wherever it runs, since torch's sums, products and decompositions differ in their last bits between one thread
and two; so the bits of its result do not depend on how many tasks run at a time. ``engines`` has executors that run
them in other processes and on other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Task:
    """``function(*args)``, a module's function of values that pickle (tensors, plain values, frozen dataclasses).

    ``name`` is unique in a job and the same whenever the job is run: ``gptq/model.layers.0.self_attn.q_proj``.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


class Pending(Protocol):
    """A task that was handed over."""

    def result(self) -> Any:
        """What the task returned, waiting for it; raises what it raised."""
        ...


class Executor(Protocol):
    """Runs tasks, up to ``workers`` of them at a time."""

    workers: int

    def submit(self, task: Task) -> Pending:
        """Hand a task over; waits while so many are unfinished that their arguments would pile up."""
        ...


@dataclass(frozen=True)
class Done:
    """A task that has run."""

    value: Any

    def result(self) -> Any:
        return self.value


class InProcess:
    """Runs each task when it is handed over, here."""

    workers = 1

    def submit(self, task: Task) -> Pending:
        return Done(perform(task))


IN_PROCESS = InProcess()


def perform(task: Task) -> Any:
    """What ``task`` returns, computed with one thread and without gradients."""
    with single_threaded(), torch.no_grad():
        return task.function(*task.args)


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch computes with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
