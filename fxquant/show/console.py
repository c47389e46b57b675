"""What the command line shows: tables, and progress bars for what takes long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fxquant import program
from fxquant.files import shown
from fxquant.show.units import percent, size

if TYPE_CHECKING:
    from fxquant.show.summary import Summary

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where there is no terminal to fit."""


def stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), spare: Sequence[str] = ()
) -> None:
    """A table on stdout; the columns in ``right`` hold figures. Names are folded and never read as markup.

    ``spare`` are columns that a narrow terminal goes without, the first of them first.
    """
    console = stdout()
    widths = {
        name: max(map(cell_len, (*name.split("\n"), *(row[i] for row in rows)))) for i, name in enumerate(columns)
    }
    for name in spare:
        if sum(widths.values()) + _BETWEEN * (len(widths) - 1) > console.width:
            del widths[name]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in widths:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for name, cell in zip(columns, row, strict=True) if name in widths))
    console.print(table)


_BETWEEN = 3
"""Spaces between two columns of a table."""


def print_layers(summary: Summary) -> None:
    """One row a layer: what its weight became, with a number where it stayed in float; below, why."""
    rows, reasons = [], dict[str, int]()
    for q in summary.layers:
        error = "" if q.error is None else percent(q.error)
        reason = q.reason or (f"tied to {q.tied_to}" if q.tied_to else "")
        mark = f" ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else ""
        shape = "x".join(map(str, q.shape))
        rows.append((q.name, q.type, q.format + mark, shape, size(q.bytes_before), size(q.bytes_after), error))
    columns = ("layer", "type", "weight", "shape", "before", "after", "error")
    print_table(columns, rows, right=columns[3:], spare=("shape", "type", "before"))
    if reasons:
        stdout().print(Text("\n" + "\n".join(f"({number}) {reason}" for reason, number in reasons.items())))


@contextmanager
def progress_bars() -> Iterator[program.Progress]:
    """A Progress that draws bars on stderr, one for each thing under way; nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield program.quiet
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


@dataclass
class _Bar:
    task: TaskID
    what: str
    done: int
    total: int


class _Bars:
    """A stack of bars, the innermost last.

    ``(name, i, n)`` moves the bar of that name, or the one of n steps of which step i is next, since steps have names
    of their own. Anything else opens a bar below it. One of unknown length goes when the next thing begins.
    """

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.stack: list[_Bar] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        at = self._find(what, done, total)
        if at is None:
            self._cut(next((i for i, bar in enumerate(self.stack) if not bar.total), len(self.stack)))
            at = len(self.stack)
            self.stack.append(_Bar(self.bars.add_task(""), what, done, total))
        self._cut(at + 1)
        if total and done >= total:
            self._cut(at)
            return
        bar = self.stack[at]
        bar.what, bar.done, bar.total = what, done, total
        self.bars.update(bar.task, description=what.replace("_", " "), completed=done, total=total or None)

    def _find(self, what: str, done: int, total: int) -> int | None:
        for i, bar in reversed(list(enumerate(self.stack))):
            if bar.what == what or (0 < total == bar.total and bar.done < done):
                return i
        return None

    def _cut(self, length: int) -> None:
        for bar in self.stack[length:]:
            self.bars.remove_task(bar.task)
        del self.stack[length:]
