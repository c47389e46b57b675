"""Jobs: a compilation whose finished tasks are kept in a folder, so that it can be continued where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fxquant import journal, results
from fxquant.config import Config
from fxquant.encoding import Json
from fxquant.journal import Journal, Journaled, Start
from fxquant.passes import gwq
from fxquant.solvers import alternate, distill, gptq, joint, lorc, search, zq_local
from fxquant.tasks import Executor

RESULTS = results.CORE | results.table(
    alternate.Pair,
    distill.Outcome,
    gptq.Solution,
    gwq.Kept,
    joint.Found,
    lorc.LowRank,
    lorc.Solution,
    search.Activation,
    zq_local.Solution,
)
"""The dataclasses that results of tasks are made of: a row each."""


class Job:
    """``folder`` keeps what is finished; ``start`` says what to do with an unfinished job in it (``journal.Start``).

    ``source`` tells the model where it came from a file (``origin.of_path``), ``more`` is anything else by which this
    job differs from others. As a context it lets go of the folder at its end, which is removed where nothing is
    finished. Raises JobError as a Journal does.
    """

    def __init__(
        self, folder: str | Path, *, start: Start = "resume", source: Mapping[str, Json] | None = None,
        more: Mapping[str, Json] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.start, self.source, self.more = Path(os.path.abspath(folder)), start, source, more or {}
        self.journal: Journal | None = None
        journal.check(self.folder, start)

    def open(self, made_from: Mapping[str, Json], config: Config) -> Journal:
        """The journal of the job that ``origin`` and the config describe."""
        if self.journal is None:
            manifest = {**made_from, "config": config.to_dict(), **self.more}
            self.journal = Journal(self.folder, manifest, types=RESULTS, start=self.start)
        return self.journal

    def finished(self) -> int:
        """How much is kept."""
        return self.journal.finished() if self.journal is not None else 0

    def finish(self) -> None:
        """Everything is done: remove the folder."""
        if self.journal is not None:
            self.journal.finish()
            self.journal = None

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None


@contextmanager
def kept(
    executor: Executor, job: str | Path | Job | None, made_from: Mapping[str, Json], config: Config
) -> Iterator[Executor]:
    """``executor``, its tasks answered from the job and kept in it; as it is without a job.

    A Job stays open at the end, for its owner; a folder is let go of.
    """
    if job is None:
        yield executor
    elif isinstance(job, Job):
        yield Journaled(executor, job.open(made_from, config))
    else:
        with Job(job) as own:
            yield Journaled(executor, own.open(made_from, config))
