"""Writing the weights of a packed program one after the other: by threads here, or by workers elsewhere.

Some units are read and some are on their way to the disk while others are computed.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fxquant import store
from fxquant.encoding import Json, MalformedError, decode_number, encode_value
from fxquant.graph import info
from fxquant.journal import Journal
from fxquant.observations import LayerObservation, Observations
from fxquant.observe import ROWS, Seen, told
from fxquant.observed import decode_observations, encode_observations
from fxquant.program import Program, Progress, quiet
from fxquant.tasks import IN_PROCESS, Executor, InProcess, Pending, Task, single_threaded
from fxquant.units import Unit, pack_unit, units_of
from fxquant.weight_file import Digests, WeightFile

FLUSH = 1 << 27
"""Bytes that are written before the disk is told to take them, and a journal notes them."""
BATCH = 32
"""Weights whose sampled rows are looked at together; more only cost memory."""
WAITING = 2
"""Threads more than torch has: as many as wait for the disk."""
UNITS_AHEAD = 4
"""Units that a thread may be ahead, so that it has work while the disk is waited for."""
Found = tuple[float, Seen] | None
"""A rounded weight's relative error, and what was seen of it."""
Result = TypeVar("Result")
_NOTE = "weights/"


@dataclass
class Written:
    """What was found while weights were written: of each rounded weight, by its name, the relative error, and what
    there is to say of it; of the file its digests."""

    errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerObservation] = field(default_factory=dict)
    digests: Digests | None = None

    def add(self, unit: str, error: float, layer: LayerObservation) -> None:
        self.errors[unit], self.layers[unit] = error, layer

    def noted(self, unit: str) -> dict[str, Json]:
        """What a journal keeps of a unit."""
        if unit not in self.errors:
            return {}
        seen = encode_observations(Observations((self.layers[unit],), ROWS))
        return {"error": encode_value(self.errors[unit]), "seen": seen}

    def recall(self, unit: Unit, facts: Mapping[str, Json]) -> None:
        """The inverse of ``noted``. Raises MalformedError."""
        if unit.rounding is not None:
            (layer,) = decode_observations(facts["seen"])
            self.add(unit.name, decode_number(facts["error"], unit.name), layer)


def write_weights(
    program: Program, path: Path, *, journal: Journal | None = None, executor: Executor = IN_PROCESS,
    progress: Progress = quiet,
) -> Written:  # fmt: skip
    """Write every tensor of a packed program to a safetensors file, each weight read, rounded and packed once.

    With a ``journal`` the file may be there, and the units that it notes are finished: they are checked and kept. A
    unit is noted once it is on the disk. An ``executor`` with workers packs units there, which read the same files.
    """
    tensors = store.stored_tensors(program)
    units, written = units_of(tensors, layer_names(program)), Written()

    def settle() -> None:
        """Turn sampled rows into figures, and note what was written."""
        rounded = [(unit, found) for unit, found in batch if found is not None]
        layers = told([seen for _, (_, seen) in rounded])
        for (unit, (error, _)), layer in zip(rounded, layers, strict=True):
            written.add(unit.name, error, layer)
        file.sync(forget=True)
        if journal is not None:
            journal.note_all({
                _NOTE + unit.name: {"sha256": _digests(file, unit), **written.noted(unit.name)} for unit, _ in batch
            })  # fmt: skip
        batch.clear()

    batch: list[tuple[Unit, Found]] = []
    resumed = journal is not None and path.exists()
    if resumed and not _any_finished(units, journal):
        path.unlink()  # of a job that was stopped before anything was noted
        resumed = False
    with WeightFile(path, store.types_of(tensors), resumed=resumed) as file:
        left = _unfinished(units, file, journal, written) if resumed and journal is not None else units
        with _packed(left, file, executor) as results:
            for i, found in enumerate(results):
                progress("write weights", len(units) - len(left) + i, len(units))
                batch.append((left[i], found))
                if file.unsynced >= FLUSH or len(batch) >= BATCH:
                    settle()
        settle()
        written.digests = file.digests()
    progress("write weights", len(units), len(units))
    return written


def _digests(file: WeightFile, unit: Unit) -> dict[str, Json]:
    return {name: file.digest(name) for name in unit.tensors}


def _any_finished(units: Sequence[Unit], journal: Journal | None) -> bool:
    return journal is not None and any(journal.noted(_NOTE + unit.name) is not None for unit in units)


def _unfinished(units: Sequence[Unit], file: WeightFile, journal: Journal, written: Written) -> list[Unit]:
    """The units that the journal does not note, or whose bytes are others than it says; ``written`` has the rest."""
    left = []
    for unit in units:
        facts = journal.noted(_NOTE + unit.name)
        try:
            whole = facts is not None and facts["sha256"] == _digests(file, unit)
            if whole and facts is not None:
                written.recall(unit, facts)
        except (MalformedError, KeyError, ValueError):
            whole = False
        if facts is not None and not whole:
            warnings.warn(f"{file.path}: {unit.name} is damaged; it is written again", stacklevel=2)
        if not whole:
            left.append(unit)
    return left


def layer_names(program: Program) -> dict[str, str]:
    """The first layer that reads each quantized weight."""
    found: dict[str, str] = {}
    for node in program.gm.graph.nodes:
        if (quant := info(node).weight) is not None:
            found.setdefault(quant.weight, info(node).path or quant.weight)
    return found


# --- who packs --------------------------------------------------------------------------------------------------------
@contextmanager
def _packed(units: Sequence[Unit], file: WeightFile, executor: Executor) -> Iterator[Iterator[Found]]:
    """What ``pack_unit`` finds for each unit, in order, once its values are in ``file``."""
    if not isinstance(executor, InProcess):
        yield _by_workers(units, file, executor)
        return
    yield _in_threads(lambda at: pack_unit(units[at], file.write), len(units))


class Packet:
    """A unit on its way to a worker: its Lazy tensors go as the recipes that they are."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit


def packed_elsewhere(packet: Packet) -> tuple[dict[str, Tensor], Found]:
    """The tensors of a unit, and what ``pack_unit`` found."""
    parts: dict[str, list[Tensor]] = {}
    found = pack_unit(packet.unit, lambda name, value, row: parts.setdefault(name, []).append(value))
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}, found


def _by_workers(units: Sequence[Unit], file: WeightFile, executor: Executor) -> Iterator[Found]:
    waiting = deque[Pending]()

    def finished() -> Found:
        tensors, found = waiting.popleft().result()
        for name, value in tensors.items():
            file.write(name, value)
        return found  # type: ignore[no-any-return]

    for unit in units:
        waiting.append(executor.submit(Task(_NOTE + unit.name, packed_elsewhere, (Packet(unit),))))
        if len(waiting) > 2 * executor.workers:
            yield finished()
    while waiting:
        yield finished()


def _in_threads(function: Callable[[int], Result], count: int) -> Iterator[Result]:
    """``function`` of 0 to ``count - 1``, in order, by some threads more than torch has, each with one of its own:
    rounding is elementwise, so that neither changes a bit, and several weights at a time keep cores busier than several
    parts of one."""
    _keep_memory()
    workers = torch.get_num_threads() + WAITING
    with single_threaded(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque[Future[Result]]()
        try:
            for at in range(count):
                waiting.append(pool.submit(function, at))
                if len(waiting) > UNITS_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@cache
def _keep_memory() -> None:
    """Have the allocator of glibc keep what threads free and ask for again, parts of weights of a few megabytes: to get
    it from the system each time took a third of the time of packing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in ((_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 28)):
            mallopt(parameter, value)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
