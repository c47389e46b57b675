"""One target in one process: cases are made, given to a loader, and watched.

What a loader may do with a case: take it, or raise one of our errors. Anything else is a finding: another exception,
more than 5 seconds, more than 1 GB of memory, the end of the process. A case lies in a folder while it is tried, so
that who watches finds it if the process dies.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutate import Case, mutated

from fxquant.errors import FxquantError

SECONDS = 5.0
"""What a case may take of the processor."""
MEMORY = 1 << 30
"""By how many bytes the resident memory may grow while a case is tried."""
ADDRESSES = 6 << 30
"""By how many bytes the address space may grow: what asks for more gets a MemoryError, not the machine."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """A loader. ``load`` is given a folder with a case's files; ``seeds`` makes valid ones, with a folder to work in.

    ``chosen``: the files that are mutated, all by default. ``allowed``: exceptions beside ours that its contract names.
    """

    name: str
    seeds: Callable[[Path], list[Case]]
    load: Callable[[Path], object]
    chosen: tuple[str, ...] = ()
    allowed: tuple[type[Exception], ...] = ()


@dataclass
class Finding:
    """What went wrong, where, and with which case; findings with one ``key`` are one."""

    key: str
    text: str
    case: Case


@dataclass
class Tally:
    """What a run did: cases, how many of them were taken, lines of fxquant that ran, the largest growth of memory."""

    cases: int = 0
    taken: int = 0
    lines: int = 0
    corpus: int = 0
    memory: int = 0
    slowest: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)


class TooSlowError(BaseException):
    """A case took longer than it may; no loader catches this."""


def fuzz(
    target: Target, folder: Path, *, seconds: float = float("inf"), cases: int = sys.maxsize, seed: int = 0,
    guided: bool = True, report: Callable[[Tally, Finding | None], None] = lambda tally, finding: None,
) -> Tally:  # fmt: skip
    """Try mutated seeds for so long, or so many. ``guided``: a case that reaches a new line of fxquant is mutated on.

    ``report`` is called after every case. The same ``seed`` and ``cases`` make the same cases, unless a case is slow.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made, place = target.seeds(folder / "seeds"), folder / "case"
    pool, rng, tally, end = list(made), random.Random(seed), Tally(), time.monotonic() + seconds
    lines = Lines()
    for case in made:
        found = attempt(target, case, place, tally, lines if guided else None, seconds=120)  # with imports
        assert found is None, (
            f"{target.name}: a seed is not taken: {found.text if isinstance(found, Finding) else found!r}"
        )
        report(tally, None)
    while tally.cases < cases and time.monotonic() < end:
        fresh = rng.random() < 0.3 or len(pool) == len(made)
        base = rng.choice(made) if fresh else rng.choice(pool[len(made) :])
        case = mutated(rng, base, pool[-300:], target.chosen)
        known = lines.count
        found = attempt(target, case, place, tally, lines if guided else None)
        finding = found if isinstance(found, Finding) else None
        if lines.count > known and sum(map(len, case.values())) < 1 << 20:
            pool.append(case)
        tally.lines, tally.corpus = lines.count, len(pool)
        new = finding if finding is not None and finding.key not in tally.findings else None
        if finding is not None:
            tally.findings.setdefault(finding.key, finding)
        report(tally, new)
    return tally


def attempt(
    target: Target, case: Case, place: Path, tally: Tally, lines: Lines | None = None, *, seconds: float = SECONDS
) -> Finding | Exception | None:
    """Give the loader the case: None where it takes it, the error with which it refuses it, or what is wrong."""
    write(place, case)
    before, begin = reset_peak(), time.process_time()
    found: Finding | Exception | None = None
    try:
        with limit(seconds), lines or nothing():
            target.load(place)
        tally.taken += 1
    except FxquantError as error:
        found = error if str(error).strip() else Finding(f"{target.name} no message", repr(error), case)
    except target.allowed as error:
        found = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        found = Finding(f"{target.name} {where(error)}", "".join(traceback.format_exception(error))[-6000:], case)
    took, grown = time.process_time() - begin, peak() - before
    tally.cases += 1
    tally.memory, tally.slowest = max(tally.memory, grown), max(tally.slowest, took)
    if not isinstance(found, Finding) and grown > MEMORY:
        found = Finding(f"{target.name} memory", f"resident memory grew by {grown >> 20} MiB", case)
    return found


def write(place: Path, case: Case) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, content in case.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def read(place: Path) -> Case:
    return {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}


def where(error: BaseException) -> str:
    """The kind of an error and the innermost line of fxquant on its way, which make findings one or two."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(str(ROOT)) and "/tests/" not in f.filename] or list(frames)
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else type(error).__name__


@contextmanager
def nothing() -> Iterator[None]:
    yield


# --- limits ----------------------------------------------------------------------------------------------------------
@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TooSlowError in what takes longer; code outside of Python ends first."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise TooSlowError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_addresses() -> None:
    """Let this process's address space grow by ``ADDRESSES`` from now on, and no further."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, resource.RLIM_INFINITY))


def reset_peak() -> int:
    """Resident bytes now, from which ``peak`` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The largest resident bytes since ``reset_peak``."""
    return _status("VmHWM")


def _status(name: str) -> int:
    rows = Path("/proc/self/status").read_text().split(f"{name}:", 1)
    return int(rows[1].split()[0]) * 1024


# --- lines -----------------------------------------------------------------------------------------------------------
class Lines:
    """Lines of fxquant that ran inside ``with``, each counted once; a function that ran wholly costs nothing more."""

    def __init__(self) -> None:
        self.count = 0
        self._left: dict[types.CodeType, set[int] | None] = {}

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        left = self._left.get(code, False)
        if left is False:
            file = code.co_filename
            own = file.startswith(str(ROOT)) and "/tests/" not in file
            left = self._left[code] = {line for _, _, line in code.co_lines() if line} if own else None
        return self._line if left else None

    def _line(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        left = self._left[frame.f_code]
        if left and frame.f_lineno in left:
            left.discard(frame.f_lineno)
            self.count += 1
        return self._line


# --- the process -----------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str]) -> None:
    """``TARGET FOLDER SECONDS SEED``: fuzz, and print what happens as lines of JSON; run.py starts this."""
    import faulthandler
    import logging
    import warnings

    import torch
    from fuzz_targets import TARGETS

    name, folder, seconds, seed = arguments
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    target, last = TARGETS[name], 0.0

    def report(tally: Tally, finding: Finding | None) -> None:
        nonlocal last
        if tally.cases == 1:
            limit_addresses()  # what the first case imports is not counted
        if finding is not None:
            say({"finding": finding.key, "text": finding.text}, finding.case)
        if finding is not None or time.monotonic() - last > 0.5:
            last = time.monotonic()
            say({"cases": tally.cases, "taken": tally.taken, "lines": tally.lines, "corpus": tally.corpus,
                 "memory": tally.memory, "slowest": tally.slowest})  # fmt: skip

    def say(what: dict[str, Any], case: Case | None = None) -> None:
        if case is not None:
            what["case"] = {name: content.hex() for name, content in case.items()}
        print(json.dumps(what), file=told, flush=True)

    tally = fuzz(target, Path(folder), seconds=float(seconds), seed=int(seed), report=report)
    last = 0.0
    report(tally, None)


if __name__ == "__main__":
    main(sys.argv[1:])
