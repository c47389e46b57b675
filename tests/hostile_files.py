"""What every hostile file must end in: an error of ours that says what to do, soon, and without much memory."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxquant.cli import app
from fxquant.errors import FxquantError

SECONDS, BYTES = 5.0, 1 << 30
ADVICE = re.compile(
    r"expected|at most|\b(give|fetch|mend|take|write|keep|save|copy|start|use|choose|make|merge|convert|load|upgrade|"
    r"remove|name|repair|compile|put|leave)\b"
)


class CommandError(FxquantError):
    """A command that ended with 1 or 2 and said why on stderr."""


@dataclass(frozen=True)
class Row:
    """``make`` writes a hostile file below a folder and returns it; ``read`` must raise ``error`` with ``message``."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    error: type[FxquantError]
    message: str


def command(*args: str) -> Callable[[Path], Any]:
    """Reads a file with a command, whose argument ``FILE`` it is."""

    def read(path: Path) -> Any:
        done = CliRunner().invoke(app, [arg.replace("FILE", str(path)) for arg in args])
        if done.exit_code not in (1, 2) or not isinstance(done.exception, SystemExit):
            raise AssertionError(f"exit code {done.exit_code}: {done.output}") from done.exception
        assert "Traceback" not in done.output
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.output), "a control character reached the terminal"
        raise CommandError(" ".join(done.stderr.replace("│", " ").split()))

    return read


Change = Callable[[Path], Any]
"""Damages a folder."""


def damaged(change: Change, source: Path) -> Callable[[Path], Path]:
    """Makes a copy of the folder ``source`` that ``change`` has been at."""

    def make(place: Path) -> Path:
        shutil.copytree(source, place / "m")
        change(place / "m")
        return place / "m"

    return make


def check(row: Row, place: Path) -> None:
    """Raise unless the row's file ends as it should."""
    path = row.make(place)
    before = resident()
    start = time.process_time()
    with no_hang(), pytest.raises(row.error) as caught:
        row.read(path)
    seconds = time.process_time() - start
    assert re.search(row.message, str(caught.value), re.DOTALL), str(caught.value)
    assert ADVICE.search(str(caught.value)), f"this says nothing to do: {caught.value}"
    assert seconds < SECONDS, f"{seconds:.1f} s of processor time"
    assert (grown := peak() - before) < BYTES, f"{grown} bytes more at the peak"


@contextmanager
def no_hang() -> Iterator[None]:
    """What still runs after a minute, on whatever machine, waits for something that never comes."""

    def stop(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident() -> int:
    """Bytes of memory of this process; its peak counts from here on, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak then counts from the start of the process: growth is seen where it is the most so far
        return max(peak(), _status("VmRSS"))
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10
