"""What makes ``fxquant compile`` a job that can be stopped: where it is kept, and how it is continued."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.cli_options import note
from fxquant.errors import FxquantError, SaveError

if TYPE_CHECKING:
    from fxquant.compiled import CompiledModel
    from fxquant.config import Config
    from fxquant.jobs import Job
    from fxquant.journal import Start

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the job that was stopped, from what it has finished (OUT.job).")
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard the job that was stopped, and begin anew.")]
ARGUMENTS = "fxquant.arguments"
"""The key in a context's ``meta`` of what was typed behind ``fxquant``."""


def start_of(resume: bool, restart: bool) -> Start:
    if resume and restart:
        raise typer.BadParameter("--resume continues a job and --restart discards it; give one of them")
    return "resume" if resume else "restart" if restart else "new"


def job(model: Path, out: Path, made_of: dict[str, Any], start: Start) -> Job:
    """The job whose output is ``out``; JobError where one is there that is not to be continued or discarded."""
    from fxquant import origin
    from fxquant.jobs import Job

    return Job(folder(out), start=start, source=made_of, more={"modified": origin.times(model)})


def folder(out: Path) -> Path:
    """Where a job with the output ``out`` is kept."""
    out = out.absolute()
    return out.with_name(f"{out.name}.job")


def source(model: Path, calibration: Path | None, kv_cache: bool) -> dict[str, Any]:
    """What a job and its output are made of, told without loading it."""
    from fxquant import origin

    try:
        text = None if calibration is None else hashlib.sha256(calibration.read_bytes()).hexdigest()
    except OSError:
        text = None  # the reader of the text says what is wrong with it
    return {**origin.of_path(model), "text": text, "kv_cache": kv_cache}


def finished(out: Path, settings: Config, made_of: dict[str, Any]) -> CompiledModel | None:
    """The model at ``out`` where it is what the job was to make: its own journal may be there still.

    Raises SaveError for anything else that is there.
    """
    from fxquant import journal, origin, pipeline, store

    if not out.exists():
        return None
    try:
        manifest = store.read_manifest(out) or {}
        made = manifest.get("origin") or {}
        same = made["config"] == {"sha256": origin.of_config(settings)}
        same &= made_of.items() <= made["model"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise SaveError(f"{out} exists already, and is not what this job makes; choose another folder, or pass "
                        f"--overwrite")  # fmt: skip
    compiled = pipeline.load(out)
    store.verify(out)
    journal.check(folder(out), "resume")
    if folder(out).is_dir():
        shutil.rmtree(folder(out))
    return compiled


def verified(out: Path) -> str:
    """That a compiled model is the one that was saved; LoadError where it is not."""
    from fxquant import store

    if not store.verify(out):
        return f"{out} has no {store.MANIFEST}, so nobody can tell whether it is what was saved; compile it again"
    return f"{out} is what was saved: every checksum is right"


@contextmanager
def resumable(job: Job, context: typer.Context) -> Iterator[None]:
    """Ctrl-C, SIGTERM and errors inside leave what is finished, and say how to continue."""
    typed = context.meta.get(ARGUMENTS, ())
    with _terminates(), job:
        try:
            yield
        except KeyboardInterrupt:
            _say(job, "stopped", typed)
            raise
        except (FxquantError, OSError, MemoryError, RuntimeError):
            _say(job, "not finished", typed)
            raise


def _say(job: Job, what: str, typed: Sequence[str]) -> None:
    """How to continue, where something is kept: what was typed, with --resume."""
    if count := job.finished():
        tasks = "1 finished task is" if count == 1 else f"{count} finished tasks are"
        again = shlex.join(["fxquant", *(a for a in typed if a not in ("--resume", "--restart")), "--resume"])
        note(f"{what}: {tasks} kept in {job.folder}; continue with\n  {again}")


@contextmanager
def _terminates() -> Iterator[None]:
    """SIGTERM is as Ctrl-C inside; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
