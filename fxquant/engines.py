"""Engines: executors of tasks in this process, in others of this machine (joblib's loky), and on a Ray cluster.

Every engine runs ``tasks.perform`` with one thread, on arguments that lie in memory as torch allocates it, so the bits
of a result are the same from each, on machines of one kind. A task whose worker dies is run again, up to ``TRIES``
times in all. What a task raises is raised by ``result`` as it is. At most ``AHEAD`` tasks a worker are unfinished.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import FxquantError, InputError, TaskError
from fxquant.lazy import real
from fxquant.tasks import IN_PROCESS, Executor, Pending, Task, mapped, perform

ENGINES = ("in-process", "processes", "ray")
TRIES = 3
"""How often a task is run whose worker dies."""
AHEAD = 2
"""Unfinished tasks for each worker: one that runs, and one whose arguments are there when it ends."""


@contextmanager
def executor(
    engine: str | None = None, *, workers: int | None = None, address: str | None = None
) -> Iterator[Executor]:
    """An Executor to give to ``fxquant.compile(..., executor=...)``; its workers end with the ``with`` block.

    ``in-process``: tasks run here, one after the other. ``processes``: ``workers`` processes of this machine, by
    default one a core. ``ray``: the Ray cluster at ``address`` (``auto`` or ``host:port``), a CPU a task; without an
    address one is started here with ``workers`` CPUs. Without an engine: ray where there is an address, processes for
    two workers and more.

    Raises InputError for what does not go together, and where Ray is not installed or not reached.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected 1 or more, or nothing for one a core")
    if engine is None:
        engine = "ray" if address is not None else "processes" if (workers or 1) > 1 else "in-process"
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise InputError(f"the engine {engine} takes no address; leave it out, or take the engine ray")
    if engine == "in-process" and (workers or 1) > 1:
        raise InputError(f"in-process runs one task at a time, not {workers}; take the engine processes or ray")
    if engine == "ray":
        with _ray_executor(workers, address) as found:
            yield found
        return
    if engine == "in-process":
        yield IN_PROCESS
        return
    processes = _Processes(workers or _cores())
    try:
        yield processes
    finally:
        processes.close()


# --- what goes to a worker and back -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Array:
    """A tensor as bytes, which every pickler takes without copies: uint8 ``[nbytes]``."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """A task on its way. ``dtype`` and ``precision`` are torch's defaults in this process, ``made_by`` the versions."""

    task: Task
    dtype: torch.dtype
    precision: str
    made_by: str


@dataclass(frozen=True)
class _Raised:
    """What a task raised, and where."""

    error: Exception
    where: str


def _packed(value: Any, name: str) -> Any:
    def change(x: Tensor) -> _Array:
        if x.device.type != "cpu":
            raise InputError(
                f"{name}: workers compute on CPUs, and the model is on {x.device}; move it to the CPU, or leave "
                f"workers and engine out"
            )
        return _Array(real(x).detach().contiguous().reshape(-1).view(torch.uint8).numpy(), x.dtype, tuple(x.shape))

    return mapped(value, Tensor, change)


def _unpacked(value: Any) -> Any:
    def change(x: _Array) -> Tensor:
        held = torch.empty(len(x.data), dtype=torch.uint8)  # memory of its own, aligned: Ray's is shared and read-only
        np.copyto(held.numpy(), x.data)
        return held.view(x.dtype).reshape(x.shape)

    return mapped(value, _Array, change)


def _call(task: Task) -> _Call:
    packed = Task(task.name, task.function, _packed(task.args, task.name))
    return _Call(packed, torch.get_default_dtype(), torch.get_float32_matmul_precision(), _versions())


def _perform(call: _Call) -> Any:
    """What the task returns, packed; the exception it raised as a value, so that every engine hands it on alike."""
    import fxquant.codegen.cpu_codes  # noqa: F401  faster bodies of bulk steps, as the pipeline has them

    task = call.task
    try:
        if call.made_by != _versions():
            raise TaskError(
                f"{task.name}: the worker on {os.uname().nodename} has {_versions()}, and the job was started with "
                f"{call.made_by}, so that its bits could differ; install the same on every node"
            )
        torch.set_default_dtype(call.dtype)
        torch.set_float32_matmul_precision(call.precision)
        return _packed(perform(Task(task.name, task.function, _unpacked(task.args))), task.name)
    except Exception as error:
        return _Raised(error, traceback.format_exc())


def _result(answer: Any) -> Any:
    if isinstance(answer, _Raised):
        if not isinstance(answer.error, FxquantError):  # ours say all there is to say
            answer.error.add_note(f"in a worker:\n{answer.where}")
        raise answer.error
    return _unpacked(answer)


def _versions() -> str:
    return f"fxquant {version('fxquant')} and torch {torch.__version__}"


def _gave_up(name: str, reason: str) -> TaskError:
    return TaskError(
        f"{name}: its worker died {TRIES} times while it ran ({reason}). Most often memory runs out: take fewer "
        f"workers, or machines with more. With the engine in-process the same task runs here, and shows what it dies of"
    )


# --- processes --------------------------------------------------------------------------------------------------------
def _cores() -> int:
    import joblib

    return int(joblib.cpu_count(only_physical_cores=True))


class _Processes:
    """A thread for each worker hands it one task after the other, and starts it anew when it dies.

    Each worker is a loky executor of its own, so that it is known which task it ran when it died, and no other task
    has to be run again.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._room = threading.BoundedSemaphore(AHEAD * workers)
        self._threads = ThreadPoolExecutor(workers, "fxquant-worker")
        self._own = threading.local()
        self._pools: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, task: Task) -> Pending:
        call = _call(task)
        self._room.acquire()
        future = self._threads.submit(self._run, call)
        future.add_done_callback(lambda _: self._room.release())
        return _Process(future)

    def close(self) -> None:
        """End all workers now, whatever they do."""
        with self._lock:
            self._closed = True
            pools = list(self._pools)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True, kill_workers=True)
        self._threads.shutdown(wait=True)

    def _run(self, call: _Call) -> Any:
        from joblib.externals.loky.process_executor import BrokenProcessPool, ShutdownExecutorError

        reason = ""
        for _ in range(TRIES):
            pool = self._pool()
            try:
                return pool.submit(_perform, call).result()
            except (BrokenProcessPool, ShutdownExecutorError) as error:
                reason = " ".join(str(error).split())
                self._drop(pool)
                if self._closed:
                    break
        raise _gave_up(call.task.name, reason)

    def _pool(self) -> Any:
        """The worker of this thread."""
        from joblib.externals import loky

        with self._lock:
            if getattr(self._own, "pool", None) is None:
                if self._closed:
                    raise TaskError("the executor is closed; submit tasks within its with block")
                env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
                self._own.pool = loky.ProcessPoolExecutor(1, initializer=_ready, initargs=(os.getpid(),), env=env)
                self._pools.append(self._own.pool)
            return self._own.pool

    def _drop(self, pool: Any) -> None:
        with self._lock:
            self._own.pool = None
            self._pools.remove(pool)
        pool.shutdown(wait=False, kill_workers=True)


@dataclass(frozen=True)
class _Process:
    future: Future[Any]

    def result(self) -> Any:
        return _result(self.future.result())


def _ready(parent: int) -> None:
    """Ctrl-C is for the parent, which ends its workers; one whose parent was killed ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --- Ray --------------------------------------------------------------------------------------------------------------
@contextmanager
def _ray_executor(workers: int | None, address: str | None) -> Iterator[Executor]:
    if importlib.util.find_spec("ray") is None:
        raise InputError("the engine ray needs the Python package ray; run: pip install 'fxquant[ray]'")
    import ray

    if ray.is_initialized():  # the caller's own, which stays
        found = _Ray(ray, workers, all_ours=False)
        try:
            yield found
        finally:
            found.close()
        return
    with _silent(ray):
        _connect(ray, workers, address)
        found = _Ray(ray, workers, all_ours=address is None)
        try:
            yield found
        finally:
            found.close()
            ray.shutdown()


def _connect(ray: Any, workers: int | None, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(address="local", num_cpus=workers or _cores(), include_dashboard=False, **quiet)
        return
    try:
        host, colon, port = address.rpartition(":")
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster at {address!r} ({error}); start one with ray start --head, or leave the address out"
        ) from error


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Ray tells of each worker that died on stdout, where our figures go, and has no option against it."""
    private = ray._private.worker
    before, private._worker_logs_enabled = getattr(private, "_worker_logs_enabled", True), False
    try:
        yield
    finally:
        private._worker_logs_enabled = before


class _Ray:
    """Each task takes one CPU; Ray runs it again elsewhere when its worker or its node dies."""

    def __init__(self, ray: Any, workers: int | None, *, all_ours: bool) -> None:
        cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self.ray, self.workers = ray, min(workers or cpus, cpus)
        # of a cluster with more CPUs than workers, what is ahead would run at once too
        self._most = AHEAD * self.workers if all_ours or self.workers == cpus else self.workers
        self._perform = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_perform)
        self._unfinished: list[Any] = []

    def submit(self, task: Task) -> Pending:
        while len(self._unfinished) >= self._most:
            _, self._unfinished = self.ray.wait(self._unfinished, num_returns=1, fetch_local=False)
        reference = self._perform.options(name=task.name).remote(_call(task))
        self._unfinished.append(reference)
        return _Remote(self.ray, reference, task.name)

    def close(self) -> None:
        """Nothing is left to run for us."""
        for reference in self._unfinished:
            self.ray.cancel(reference, force=True)


@dataclass(frozen=True)
class _Remote:
    ray: Any
    reference: Any
    name: str

    def result(self) -> Any:
        try:
            answer = self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            raise _gave_up(self.name, " ".join(str(error).split())[:300]) from error
        return _result(answer)
