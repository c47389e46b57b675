"""report: one self-contained HTML page about a program: totals, passes, layers, and what each pass changed.

The template gets plain values and escapes every name in them; its style and script are inline, and the page asks the
network for nothing. Graphs are stored as differences, and long parts are cut so that the page stays below 5 MB.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from fxquant.errors import SaveError
from fxquant.program import Program
from fxquant.show.compare import Line, compare
from fxquant.show.summary import Summary, labelled, ratio, summarize
from fxquant.show.text import Stories, describe_spec
from fxquant.show.units import percent, plural, seconds, size

BUDGET = {"diffs": 1_800_000, "stories": 1_200_000, "graph": 600_000}
"""Characters each part may take; what lies beyond is left out, and the page says so."""


def report(
    program: Program, path: str | Path | None = None, *, title: str = "fxquant report", config: Any = None
) -> str:
    """The page as text; written to ``path`` too if that is given, whole or not at all (SaveError if it cannot be).

    ``config`` is shown as it is if it is a string, else as JSON.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(size=size, percent=percent, seconds=seconds)
    environment.globals.update(plural=plural, ratio=ratio)
    page = environment.get_template("report.html.j2").render(_context(program, title, config))
    if path is not None:
        write_page(Path(path), page)
    return page


def _source(name: str) -> str:
    return resources.files("fxquant.show").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, page: str) -> None:
    """Write ``page`` under a temporary name next to ``path``, then move it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error


# --- what the template shows -----------------------------------------------------------------------------------------
def _context(program: Program, title: str, config: Any) -> dict[str, Any]:
    summary = summarize(program)
    return {
        "title": title,
        "config": config if isinstance(config, str) else json.dumps(config, indent=2, default=str) if config else "",
        "s": summary,
        "inputs": [(i.name, str(i.type)) for i in program.signature.inputs],
        "specs": [
            (spec, describe_spec(spec))
            for spec in dict.fromkeys(s for q in summary.layers for s in (q.spec, q.activation))
            if spec
        ],
        "reasons": _reasons(summary),
        "max_error": max((_finite(q.error) for q in summary.layers), default=0.0),
        "max_seconds": max((step.seconds for step in summary.steps), default=0.0),
        "max_step_error": max((_finite(step.error) for step in summary.steps), default=0.0),
        "stories": _stories(program, summary),
        "diffs": list(_diffs(program, summary)),
        "graph": _cut(program.trace[-1].text.splitlines() if program.trace else [], BUDGET["graph"]),
        "share": _share,
    }


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _share(value: float | None, whole: float) -> str:
    """``value / whole`` in percent for a bar's width."""
    return f"{max(0.0, min(100.0, 100 * _finite(value) / whole)):.1f}" if whole > 0 else "0"


def _reasons(summary: Summary) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for layer in summary.layers:
        if layer.spec is None:
            found[str(layer.reason)] = found.get(str(layer.reason), 0) + 1
    return sorted(found.items(), key=lambda item: -item[1])


def _stories(program: Program, summary: Summary) -> list[list[Line]]:
    """For every layer what ``explain`` says, as lines with their kind; empty once the budget is spent."""
    stories, left = Stories(program), BUDGET["stories"]
    found: list[list[Line]] = []
    for layer in summary.layers:
        if left > 0:
            text = stories.tell(layer).splitlines()[1:]
            left -= sum(len(line) + 24 for line in text)
        found.append([(line[4:5] if line[:4] == "    " else " ", line) for line in text] if left > 0 else [])
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a diff in three parts; ``middle`` is what differs from the line it replaces or is replaced by."""

    kind: str
    head: str
    middle: str = ""
    tail: str = ""


@dataclass(frozen=True, slots=True)
class StepDiff:
    label: str
    headline: str
    rows: tuple[Row, ...]
    left_out: int


def _diffs(program: Program, summary: Summary) -> Iterator[StepDiff]:
    """The difference that each pass made, but for the first, which made the graph."""
    steps, left = labelled(program.trace), BUDGET["diffs"]
    for (_, before), (label, after) in pairwise(steps):
        found = compare(before.text, after.text, context=2)
        shown = _cut(found.lines, left)
        left -= sum(len(text) + 24 for _, text in shown)
        yield StepDiff(label, found.headline, tuple(mark(shown)), len(found.lines) - len(shown))


def _cut(lines: Sequence[Any], budget: int) -> list[Any]:
    """As many lines as fit in ``budget`` characters, their markup included."""
    shown = []
    for line in lines:
        budget -= len(line if isinstance(line, str) else line[1]) + 24
        if budget < 0:
            break
        shown.append(line)
    return shown


_TOKEN = re.compile(r"\w+|\s+|.")


def mark(lines: Sequence[Line]) -> Iterator[Row]:
    """Rows in which a removed line and the added line that defines the same node have marked what differs."""
    partner: dict[str, dict[str, str]] = {"-": {}, "+": {}}
    for kind, text in lines:
        if kind in partner:
            partner[kind][text.split(" ", 1)[0]] = text
    for kind, text in lines:
        other = partner["+" if kind == "-" else "-"].get(text.split(" ", 1)[0]) if kind in partner else None
        yield Row(kind, *_parts(text, other)) if other is not None else Row(kind, text)


def _parts(text: str, other: str) -> tuple[str, str, str]:
    """``text`` as what it shares with ``other`` at its start, what is its own, and what it shares at its end."""
    mine, theirs = _TOKEN.findall(text), _TOKEN.findall(other)
    shortest, head, tail = min(len(mine), len(theirs)), 0, 0
    while head < shortest and mine[head] == theirs[head]:
        head += 1
    while tail < shortest - head and mine[-1 - tail] == theirs[-1 - tail]:
        tail += 1
    end = len(mine) - tail
    return "".join(mine[:head]), "".join(mine[head:end]), "".join(mine[end:])
