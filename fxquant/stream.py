"""Compiling a model that is larger than memory: weights stay in files until they are packed, one after the other.

    folder --headers--> module of Lazy weights --capture--> graph --passes--> packed graph of Lazy weights --> files

The graph is traced by shapes and rewritten by the same passes as in memory; rounding to nearest is put off
(``deferred``) until a weight is written: its rows are read from their file, cast, rounded, packed and put where
they belong in the new file, some megabytes at a time, while others are read and the last are on their way to the disk.
Methods that calibrate walk the graph layer by layer; what they keep between layers lies in the spool.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant import memory, outputs, pipeline, spool, store
from fxquant.calibrate import Calibration
from fxquant.capture import capture
from fxquant.codegen import cpu, cpu_library
from fxquant.compiled import CompiledModel
from fxquant.config import Config, ConfigLike, load_config
from fxquant.encoding import Json
from fxquant.errors import FxquantError, SaveError
from fxquant.graph import WeightQuant, info, update_info
from fxquant.jobs import Job, kept
from fxquant.journal import Journaled
from fxquant.lazy import FromFile
from fxquant.observations import Observations
from fxquant.observe import ROWS
from fxquant.origin import of_path, origin
from fxquant.program import Measured, Program, Progress, quiet
from fxquant.show.summary import model_bytes
from fxquant.tasks import IN_PROCESS, Executor
from fxquant.units import sources_of
from fxquant.weight_writer import Written, layer_names, write_weights

COMPILED = 1 << 33
"""Bytes of weights from which on a compiler is started for the kernels that pack them, where they are not there."""


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

    Raises what these raise.
    """
    torch.set_num_threads(torch.get_num_threads())  # as compile does
    settings, target = load_config(config), Path(os.path.abspath(out))
    pipeline.check_calibration(settings, calibration)
    store.check_place(target, overwrite)
    progress("capture", 0, 0)
    sources = _sources(model)
    if sum(source.nbytes for source in sources) > COMPILED:
        threading.Thread(target=_compile_kernels, name="kernels", daemon=True).start()
    with _read_meanwhile(sources, memory.total() // 4):
        program = capture(model, example_inputs)
    batches = pipeline.batches_for(settings, program, calibration)
    made_from = origin(
        program, settings, source=job.source if isinstance(job, Job) else _identity(sources), examples=example_inputs,
        calibration=batches, packages=pipeline.packages_of(model),
    )  # fmt: skip
    given = {"calibration": batches, "progress": progress, "executor": executor}
    try:
        with (
            kept(executor, job, made_from, settings) as keeping,
            outputs.replacing_folder(target, overwrite=overwrite) as folder,
        ):
            journal = keeping.journal if isinstance(keeping, Journaled) else None
            weights = (journal.folder if journal is not None else folder) / store.WEIGHTS
            with spool.into(folder):
                rewrite(program, settings, given, keeping)
                written = write_weights(program, weights, journal=journal, executor=executor, progress=progress)
            record(program, written)
            progress("save", 0, 0)
            if journal is not None:
                _linked(weights, folder / store.WEIGHTS)
            assert written.digests is not None
            store.finish(
                program, folder, config=settings.to_dict(), digests=written.digests, tokenizer=tokenizer,
                origin=made_from,
            )  # fmt: skip
    except OSError as error:
        if isinstance(error, FxquantError):
            raise
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error
    return pipeline.load(target)


def _sources(model: nn.Module) -> list[FromFile]:
    """The parts of files that a model's weights are read from, in the order of the files."""
    found = {source for value in model.state_dict().values() for source in sources_of(value)}
    return sorted(found, key=lambda source: (str(source.path), source.begin))


def _compile_kernels() -> None:
    with suppress(FxquantError):  # without a compiler torch packs, which nobody needs to be told
        cpu_library.library()
        cpu.available()


@contextmanager
def _read_meanwhile(sources: Sequence[FromFile], limit: int) -> Iterator[None]:
    """Have the system read ``sources``, up to ``limit`` bytes of them, while what is inside needs no disk."""
    stopped = threading.Event()

    def read() -> None:
        room, left = bytearray(_AT_ONCE), limit
        for source in sources:
            begin, end = source.begin, min(source.begin + source.nbytes, source.begin + left)
            with suppress(OSError), source.path.open("rb", buffering=0) as file:  # an error when it is needed
                for at in range(begin, end, _AT_ONCE):
                    if stopped.is_set():
                        return
                    os.preadv(file.fileno(), [memoryview(room)[: end - at]], at)
            left -= end - begin

    thread = threading.Thread(target=read, name="read meanwhile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


_AT_ONCE = 1 << 23


def _identity(sources: Sequence[FromFile]) -> dict[str, Json] | None:
    """What tells the files that weights are read from; None for a model whose weights are in memory."""
    folders = sorted({source.path.parent for source in sources})
    return {"folders": [of_path(folder) for folder in folders]} if folders else None


def _linked(weights: Path, path: Path) -> None:
    """``weights`` at ``path`` too, so that it is in the job until the output is there; a copy on another disk."""
    try:
        os.link(weights, path)
    except OSError:
        shutil.copyfile(weights, path)


def rewrite(program: Program, settings: Config, given: Mapping[str, Any], keeping: Executor) -> None:
    """The passes of ``compile``, on a program with Lazy weights. No weight is read for rounding to nearest."""

    def measure(program: Program) -> Measured:
        return Measured(None, model_bytes(program.gm))

    pipeline.to_qdq(program, settings, given, keeping, measure=measure)
    pipeline.to_packed(program, settings, measure=measure, progress=given["progress"])


def record(program: Program, written: Written) -> None:
    """Tell the graph the errors of its weights, which were not known when it was made."""
    for node in program.gm.graph.nodes:
        quant: WeightQuant | None = info(node).weight
        if quant is not None and quant.weight in written.errors and math.isnan(quant.error):
            update_info(node, weight=replace(quant, error=written.errors[quant.weight]))
    layers = (written.layers[name] for name in layer_names(program) if name in written.layers)
    program.observations = Observations(tuple(layers), ROWS)
