"""What the command line shows: tables, and progress bars for what takes long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fxquant import program
from fxquant.show.units import percent, size

if TYPE_CHECKING:
    from fxquant.show.summary import Summary

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where there is no terminal to fit."""


def stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout; the columns in ``right`` hold figures. Names are folded and never read as markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stdout().print(table)


def print_layers(summary: Summary) -> None:
    """One row a layer: what its weight became, or why it stayed in float."""
    rows = []
    for q in summary.layers:
        error = "" if q.error is None else percent(q.error)
        note = q.reason or (f"tied to {q.tied_to}" if q.tied_to else "")
        shape = "x".join(map(str, q.shape))
        rows.append((q.name, q.type, q.spec or "float", shape, size(q.bytes_before), size(q.bytes_after), error, note))
    columns = ("layer", "type", "weight", "shape", "before", "after", "error", "note")
    print_table(columns, rows, right=("shape", "before", "after", "error"))


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
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    """A bar for each ``what``. One of unknown length goes when the next thing begins, others when they are full."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.endless: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        for name in self.endless - {what}:
            self._drop(name)
        if total and done >= total:
            self._drop(what)
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what.replace("_", " "), total=total or None)
        if not total:
            self.endless.add(what)
        self.bars.update(self.tasks[what], completed=done, total=total or None)

    def _drop(self, what: str) -> None:
        self.endless.discard(what)
        if what in self.tasks:
            self.bars.remove_task(self.tasks.pop(what))
