"""Compiling a model that is larger than memory: weights stay in files until they are packed, one after the other.

    folder --headers--> module of Lazy weights --capture--> graph --passes--> packed graph of Lazy weights --> files

The graph is traced by shapes and rewritten by the same passes as in memory; rounding to nearest is put off
(``deferred``) until a weight is written: its rows are read from the mapped file, cast, rounded, packed and put where
they belong in the new file, some megabytes at a time, while the next are read ahead and the last are on their way to
the disk. Methods that calibrate walk the graph layer by layer; what they keep between layers lies in the spool.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxquant import outputs, pipeline, spool, store
from fxquant.calibrate import Calibration
from fxquant.capture import capture
from fxquant.compiled import CompiledModel
from fxquant.config import Config, ConfigLike, load_config
from fxquant.deferred import Rounding, part_of, taken_from
from fxquant.encoding import Json, MalformedError, decode_number, encode_value
from fxquant.errors import ConfigError, FxquantError, SaveError
from fxquant.graph import WeightQuant, info, update_info
from fxquant.jobs import Job, kept
from fxquant.journal import Journal, Journaled
from fxquant.lazy import Called, Computed, FromFile, Lazy
from fxquant.observations import LayerObservation, Observations
from fxquant.observe import ROWS, Seen, sampled_rows, see, told
from fxquant.observed import decode_observations, encode_observations
from fxquant.origin import of_path, origin
from fxquant.program import Measured, Program, Progress, quiet
from fxquant.qtensor import error_squares
from fxquant.rewrite import fetch, get_attrs
from fxquant.scales import Scales
from fxquant.show.summary import model_bytes
from fxquant.tasks import IN_PROCESS, Executor, single_threaded
from fxquant.weight_file import WeightFile

ELEMENTS = 1 << 19
"""Values of a weight that a thread has in memory at a time, so few that they stay in a core's cache."""
FLUSH = 1 << 28
"""Bytes that are written before the disk is told to take them, and a journal notes them."""
BATCH = 32
"""Weights whose sampled rows are looked at together; more only cost memory."""
Result = TypeVar("Result")
AHEAD = 1 << 29
"""Bytes that the system is asked to read before they are needed."""
_NOTE = "weights/"
_WHOLE = ("zq_global", "rotate", "smooth")
"""Methods that hold more of the model at a time than one layer."""


def compile_to(
    out: str | Path,
    model: nn.Module,
    example_inputs: Any,
    config: ConfigLike = "W6A16-E3M2",
    *,
    calibration: Calibration | None = None,
    tokenizer: Any | None = None,
    overwrite: bool = False,
    job: str | Path | Job | None = None,
    progress: Progress = quiet,
    executor: Executor = IN_PROCESS,
) -> CompiledModel:
    """Compile ``model`` and save it to the folder ``out``, packing each weight as it is written there.

    For a model whose weights are Lazy, ``checkpoints.load_model(path, lazy=True)``, which is never in memory as a
    whole: its graph is traced by shapes, and what ``compile`` measures by running the model, errors of outputs and
    histograms of inputs, is left out. The weights are those that ``compile`` and ``save`` write, bit for bit. Arguments
    are those of ``compile`` and of ``CompiledModel.save``; a ``job`` keeps every weight that was written. Returns the
    compiled model, its weights mapped from ``out``.

    Raises what these raise; ConfigError for methods that need more of a model at a time than a layer.
    """
    torch.set_num_threads(torch.get_num_threads())  # as compile does
    settings, target = load_config(config), Path(os.path.abspath(out))
    check_methods(settings)
    pipeline.check_calibration(settings, calibration)
    store.check_place(target, overwrite)
    progress("capture", 0, 0)
    program = capture(model, example_inputs)
    batches = pipeline.batches_for(settings, program, calibration)
    made_from = origin(
        program, settings, source=job.source if isinstance(job, Job) else _source(program), examples=example_inputs,
        calibration=batches, packages=pipeline.packages_of(model),
    )  # fmt: skip
    given = {"calibration": batches, "progress": progress, "executor": executor}
    try:
        with (
            kept(executor, job, made_from, settings) as keeping,
            outputs.replacing_folder(target, overwrite=overwrite) as folder,
            spool.into(folder),
        ):
            rewrite(program, settings, given, keeping)
            journal = keeping.journal if isinstance(keeping, Journaled) else None
            weights = (journal.folder if journal is not None else folder) / store.WEIGHTS
            record(program, write_weights(program, weights, journal=journal, progress=progress))
            progress("save", 0, 0)
            if journal is not None:
                _linked(weights, folder / store.WEIGHTS)
            store.finish(program, folder, config=settings.to_dict(), tokenizer=tokenizer, origin=made_from)
    except OSError as error:
        if isinstance(error, FxquantError):
            raise
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error
    return pipeline.load(target)


def _source(program: Program) -> dict[str, Json] | None:
    """What tells the files that weights are read from; None for a model whose weights are in memory."""
    values = (fetch(program.gm, str(node.target)) for node in get_attrs(program.gm.graph))
    folders = sorted({source.path.parent for value in values for source in sources_of(value)})
    return {"folders": [of_path(folder) for folder in folders]} if folders else None


def _linked(weights: Path, path: Path) -> None:
    """``weights`` at ``path`` too, so that it is in the job until the output is there; a copy on another disk."""
    try:
        os.link(weights, path)
    except OSError:
        shutil.copyfile(weights, path)


def can(settings: Config) -> bool:
    """Whether a config's methods can be streamed."""
    return not any(name in _WHOLE for name, _ in settings.methods())


def check_methods(settings: Config) -> None:
    """Raise a ConfigError for methods that cannot be streamed."""
    if not can(settings):
        found = next(name for name, _ in settings.methods() if name in _WHOLE)
        raise ConfigError(
            f"{found} changes several layers of a model together and cannot be streamed; leave it out of passes, or "
            f"compile in memory, without --stream"
        )


def rewrite(program: Program, settings: Config, given: Mapping[str, Any], keeping: Executor) -> None:
    """The passes of ``compile``, on a program with Lazy weights. No weight is read for rounding to nearest."""

    def measure(program: Program) -> Measured:
        return Measured(None, model_bytes(program.gm))

    pipeline.to_qdq(program, settings, given, keeping, measure=measure)
    pipeline.to_packed(program, settings, measure=measure, progress=given["progress"])


# --- units ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Unit:
    """Tensors of the new file that are made together: the parts of one rounded weight, or a tensor by itself."""

    name: str
    tensors: Mapping[str, Tensor]
    rounding: Rounding | None = None

    @property
    def sources(self) -> list[FromFile]:
        """The parts of files that it is made of."""
        given = [self.rounding.weight] if self.rounding is not None else list(self.tensors.values())
        return [source for value in given for source in sources_of(value)]


def sources_of(value: Any) -> Iterator[FromFile]:
    """The parts of files that a Lazy tensor is made of."""
    recipe = value.recipe if isinstance(value, Lazy) else None
    if isinstance(recipe, FromFile):
        yield recipe
    elif isinstance(recipe, (Computed, Called)):
        kwargs = dict(recipe.kwargs) if isinstance(recipe, Computed) else {}
        for leaf in tree_leaves((recipe.args, kwargs)):
            yield from sources_of(leaf)


def units_of(tensors: Mapping[str, Tensor]) -> list[Unit]:
    """The units of a packed graph's tensors, in the order in which the graph reads them."""
    groups: dict[object, dict[str, Tensor]] = {}
    roundings: dict[object, Rounding] = {}
    for name, value in tensors.items():
        part = part_of(value)
        key: object = name if part is None else part.of
        groups.setdefault(key, {})[name] = value
        if part is not None:
            roundings[key] = part.of
    return [
        Unit(roundings[key].name if key in roundings else next(iter(group)), group, roundings.get(key))
        for key, group in groups.items()
    ]


# --- writing ----------------------------------------------------------------------------------------------------------
@dataclass
class Written:
    """What was found while weights were written: of each rounded weight, by its name, the relative error, and what
    there is to say of it."""

    errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerObservation] = field(default_factory=dict)

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
    program: Program, path: Path, *, journal: Journal | None = None, progress: Progress = quiet
) -> Written:
    """Write every tensor of a packed program to a safetensors file, each weight read, rounded and packed once.

    With a ``journal`` the file may be there, and the units that it notes are finished: they are checked and kept. A
    unit is noted once it is on the disk.
    """
    tensors = store.stored_tensors(program)
    units, written = units_of(tensors), Written()
    names = layer_names(program)

    def write(unit: Unit) -> tuple[float, Seen] | None:
        if unit.rounding is None:
            _copy(unit, file)
            return None
        return _round(unit, unit.rounding, file, names.get(unit.name, unit.name))

    def settle() -> None:
        """Turn sampled rows into figures, and note what was written."""
        rounded = [(unit, found) for unit, found in batch if found is not None]
        layers = told([seen for _, (_, seen) in rounded])
        for (unit, (error, _)), layer in zip(rounded, layers, strict=True):
            written.add(unit.name, error, layer)
        if journal is not None:
            file.sync()
            for unit, _ in batch:
                journal.note(_NOTE + unit.name, {"crc": file.checksum(unit.tensors), **written.noted(unit.name)})
        batch.clear()

    batch: list[tuple[Unit, tuple[float, Seen] | None]] = []
    resumed = journal is not None and path.exists()
    if resumed and not _finished(units, journal):
        path.unlink()  # of a job that was stopped before anything was noted
        resumed = False
    with WeightFile(path, store.types_of(tensors), resumed=resumed) as file:
        left = _unfinished(units, file, journal, written) if resumed and journal is not None else units
        with _ReadAhead([unit.sources for unit in left]) as ahead:
            for i, found in enumerate(_in_threads(write, left)):
                progress("write weights", len(units) - len(left) + i, len(units))
                ahead.reached(i)
                batch.append((left[i], found))
                if file.unsynced >= FLUSH or len(batch) >= BATCH:
                    settle()
                    file.sync()
        settle()
    progress("write weights", len(units), len(units))
    return written


def _finished(units: Sequence[Unit], journal: Journal | None) -> bool:
    return journal is not None and any(journal.noted(_NOTE + unit.name) is not None for unit in units)


def _unfinished(units: Sequence[Unit], file: WeightFile, journal: Journal, written: Written) -> list[Unit]:
    """The units that the journal does not note, or whose bytes are others than it says; ``written`` has the rest."""
    left = []
    for unit in units:
        facts = journal.noted(_NOTE + unit.name)
        try:
            whole = facts is not None and facts["crc"] == file.checksum(unit.tensors)
            if whole and facts is not None:
                written.recall(unit, facts)
        except (MalformedError, KeyError, ValueError):
            whole = False
        if facts is not None and not whole:
            warnings.warn(f"{file.path}: {unit.name} is damaged; it is written again", stacklevel=2)
        if not whole:
            left.append(unit)
    return left


def _in_threads(function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
    """The results in order, of as many threads as torch has, each with one of its own: rounding is elementwise, so
    that neither changes a bit, and several weights at a time keep cores busier than several parts of one."""
    workers = torch.get_num_threads()
    with single_threaded(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque[Future[Result]]()
        try:
            for unit in units:
                waiting.append(pool.submit(function, unit))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _copy(unit: Unit, file: WeightFile) -> None:
    for name, value in unit.tensors.items():
        rows = value.shape[0] if value.dim() else 1
        step = max(1, ELEMENTS * rows // max(value.numel(), 1))
        if not isinstance(value, Lazy):
            file.write(name, value)
        elif value.has_rows and value.dim():
            for start in range(0, rows, step):
                file.write(name, value.read_rows(start, min(start + step, rows)), start)
        else:
            file.write(name, value.read())


def _round(unit: Unit, rounding: Rounding, file: WeightFile, layer: str) -> tuple[float, Seen]:
    """Write what the weight is rounded to; its relative error, and what was seen of it."""
    at = dict.fromkeys(unit.tensors, 0)
    lost, whole = list[float](), list[float]()
    sampled, scales = list[tuple[Tensor, Tensor]](), list[Scales]()
    rows = 0
    wanted = sampled_rows(rounding.rows)
    for where, x, q in rounding.in_rows(ELEMENTS):
        q.check()
        for name, value in unit.tensors.items():
            assert isinstance(value, Lazy)
            part = taken_from(value, q)
            file.write(name, part, at[name])
            at[name] += len(part)
        squares = error_squares(x, q)
        lost.append(squares[0])
        whole.append(squares[1])
        some = wanted[(wanted >= where.start) & (wanted < where.stop)] - where.start
        if len(some):
            sampled.append((x[some].float(), q.rows(some).dequantize()))
        scales.append(q.scales)
        rows, cols = where.stop, x.shape[1]
    error = math.sqrt(math.fsum(lost) / total) if (total := math.fsum(whole)) else 0.0
    W, got = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    return error, see(layer, W, got, _joined(scales), rounding.spec, (rows, cols))


def _joined(parts: Sequence[Scales]) -> Scales:
    """The scales of a whole matrix from those of its rows."""
    if len(parts) == 1:
        return parts[0]
    zero = [p.zero_point for p in parts if p.zero_point is not None]
    outer = [p.tensor_scale for p in parts if p.tensor_scale is not None]
    return Scales(
        torch.cat([p.scale for p in parts]), torch.cat(zero) if zero else None, torch.cat(outer) if outer else None
    )


def layer_names(program: Program) -> dict[str, str]:
    """The first layer that reads each quantized weight."""
    found: dict[str, str] = {}
    for node in program.gm.graph.nodes:
        if (quant := info(node).weight) is not None:
            found.setdefault(quant.weight, info(node).path or quant.weight)
    return found


def record(program: Program, written: Written) -> None:
    """Tell the graph the errors of its weights, which were not known when it was made."""
    for node in program.gm.graph.nodes:
        quant: WeightQuant | None = info(node).weight
        if quant is not None and quant.weight in written.errors and math.isnan(quant.error):
            update_info(node, weight=replace(quant, error=written.errors[quant.weight]))
    layers = (written.layers[name] for name in layer_names(program) if name in written.layers)
    program.observations = Observations(tuple(layers), ROWS)


class _ReadAhead:
    """Asks the system to read what is needed soon, in a thread: reading and computing take turns otherwise."""

    def __init__(self, sources: Iterable[list[FromFile]]) -> None:
        self._sources = list(sources)
        self._at, self._stopped = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> _ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def reached(self, unit: int) -> None:
        with self._changed:
            self._at = unit
            self._changed.notify_all()

    def _run(self) -> None:
        sizes = [sum(math.prod(s.shape) * s.dtype.itemsize for s in sources) for sources in self._sources]
        files: dict[Path, int] = {}
        try:
            for i, sources in enumerate(self._sources):
                with self._changed:
                    while not self._stopped and sum(sizes[self._at + 1 : i]) > AHEAD:
                        self._changed.wait()
                    if self._stopped:
                        return
                for source in sources:
                    if source.path not in files:
                        files[source.path] = os.open(source.path, os.O_RDONLY)
                    nbytes = math.prod(source.shape) * source.dtype.itemsize
                    os.posix_fadvise(files[source.path], source.begin, nbytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # a file that is gone is an error where it is read
        finally:
            for file in files.values():
                os.close(file)
