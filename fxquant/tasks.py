"""Tasks: what a job consists of, and the interface of what runs them.

A task is a pure function of its arguments: one layer that is solved, one candidate of a search. It runs with one
thread wherever it runs, since torch's sums, products and decompositions differ in their last bits between one thread
and two; so the bits of its result do not depend on how many tasks run at a time. ``engines`` has executors that run
them in other processes and on other machines.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant.lazy import real

ALIGNMENT = 64
"""Bytes to a multiple of which torch allocates; products of tensors elsewhere may differ in their last bits."""


@dataclass(frozen=True)
class Task:
    """``function(*args)``, a module's function of values that pickle (tensors, plain values, frozen dataclasses).

    ``name`` is unique in a job and the same whenever the job is run: ``gptq/model.layers.0.self_attn.q_proj``. The
    function writes to none of its arguments, and nobody else does before its result is there.
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
    """What ``task`` returns, computed with one thread and without gradients, of tensors as torch lays them."""
    with single_threaded(), torch.no_grad():
        return task.function(*mapped(task.args, Tensor, plain))


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch computes with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain(x: Tensor) -> Tensor:
    """``x`` without its history, contiguous and aligned; a copy only where it is not."""
    x = real(x).detach().contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change(part)`` for every part that is a ``kind``, in tuples, lists, dicts and dataclasses.

    What holds no such part is the same object as before.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, kind, change) for part in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
    if isinstance(value, dict):
        found = {key: mapped(part, kind, change) for key, part in value.items()}
        return value if all(found[key] is part for key, part in value.items()) else found
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        new = mapped(own, kind, change)
        return value if new is own else dataclasses.replace(value, **new)
    return value


Keep = Callable[[str, Callable[[], Any]], Any]
"""``keep(name, compute)``: what ``compute`` returns, here and now; or what it returned when a job was run before."""


def computed(name: str, compute: Callable[[], Any]) -> Any:
    """A Keep that keeps nothing."""
    return compute()


# --- what passes do with tasks ----------------------------------------------------------------------------------------
AHEAD = 4
"""Results that wait for an earlier one, for each worker; more and no task is handed over."""


@dataclass
class Queue:
    """Tasks handed over one after the other, whose results are used in that order, as soon as they may.

    ``progress(what, done, total)`` is called with the results that were used; ``total`` of them are expected.
    """

    executor: Executor
    progress: Callable[[str, int, int], None]
    what: str
    total: int
    done: int = 0
    _waiting: deque[tuple[Pending, Callable[[Any], None]]] = field(default_factory=deque)

    def submit(self, task: Task, use: Callable[[Any], None]) -> None:
        """Hand ``task`` over; ``use(result)`` is called now or in a later call."""
        if not self.done:
            self.progress(self.what, 0, self.total)
        self._waiting.append((self.executor.submit(task), use))
        while self._waiting and (
            isinstance(self._waiting[0][0], Done) or len(self._waiting) >= AHEAD * self.executor.workers
        ):
            self._use()

    def skip(self) -> None:
        """One of the tasks that were expected does not come."""
        self.total -= 1

    def finish(self) -> None:
        """Use all results that are left."""
        while self._waiting:
            self._use()

    def _use(self) -> None:
        pending, use = self._waiting.popleft()
        use(pending.result())
        self.done += 1
        self.progress(self.what, self.done, self.total)


@dataclass(frozen=True)
class Prefixed:
    """``executor`` under other names: ``prefix`` in front of each task's."""

    executor: Executor
    prefix: str

    @property
    def workers(self) -> int:
        return self.executor.workers

    def submit(self, task: Task) -> Pending:
        return self.executor.submit(dataclasses.replace(task, name=self.prefix + task.name))
