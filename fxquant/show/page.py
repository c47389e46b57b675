"""page: what the report's script draws, as plain values: the graph after every pass, layers, their numbers and stories.

Graphs are stored as lines that stand once however many passes share them, and as runs of line numbers a pass. Long
traces are cut from the front, for the page to stay below 5 MB: the graph as it is now is worth most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fxquant.graph import info
from fxquant.observations import Candidate, Histogram, LayerObservation, Observations
from fxquant.program import Program
from fxquant.scheme import parse_spec
from fxquant.show.grid import values
from fxquant.show.numerics import Comparison, Errors, LayerError
from fxquant.show.summary import LayerSummary, Summary
from fxquant.show.text import Stories, describe_spec
from fxquant.show.units import percent

BUDGET = {"lines": 2_400_000, "stories": 900_000, "observed": 600_000, "compared": 400_000}
"""Characters each part may take; what lies beyond is left out, and the page says so."""


def page_data(program: Program, summary: Summary, comparison: Comparison | None = None) -> dict[str, Any]:
    """Everything that the script draws; ``comparison`` with the float model adds errors of outputs, layer by layer."""
    lines, steps = _graphs(program, summary)
    return {
        "lines": lines,
        "steps": steps,
        "layers": list(_layers(program, summary)),
        "specs": {
            spec: {"words": describe_spec(spec), "grid": values(parse_spec(spec).format)} for spec in specs(summary)
        },
        "modules": _modules(program),
        "observed": None if program.observations is None else _observed(program.observations, summary),
        "comparison": None if comparison is None else _compared(comparison),
        "bytes": {"before": summary.bytes_before, "after": summary.bytes_after, "weights": summary.weight_bytes_after},
    }


def specs(summary: Summary) -> list[str]:
    """Every spec of a weight or an input, once."""
    return list(dict.fromkeys(s for q in summary.layers for s in (q.spec, q.activation) if s))


def _modules(program: Program) -> dict[str, str]:
    """The class of each module that a node came from, by path."""
    return {i.path: i.module for i in map(info, program.gm.graph.nodes) if i.path and i.module}


# --- the graph after every pass ---------------------------------------------------------------------------------------
def _graphs(program: Program, summary: Summary) -> tuple[list[str], list[dict[str, Any]]]:
    """All lines, and the steps; a step beyond the budget has no ``runs``, the last one is cut to it."""
    index: dict[str, int] = {}
    left, runs = BUDGET["lines"], dict[int, list[int]]()
    for at in reversed(range(len(program.trace))):
        text = program.trace[at].text.splitlines()
        fresh = dict.fromkeys(line for line in text if line not in index)
        cost = sum(len(line) + 4 for line in fresh) + 2 * len(fresh)
        if cost > left and at < len(program.trace) - 1:
            break
        while cost > left:
            cost -= len(text.pop()) + 6
        left -= cost
        runs[at] = _runs([index.setdefault(line, len(index)) for line in text])
    steps = [
        {
            "label": s.label, "seconds": s.seconds, "rewrites": s.rewrites, "declines": s.declines,
            "error": _finite(s.error), "nbytes": s.nbytes, "runs": runs.get(i),
        }
        for i, s in enumerate(summary.steps)
    ]  # fmt: skip
    return list(index), steps


def _runs(numbers: list[int]) -> list[int]:
    """``[first, count, first, count, ...]`` of runs of consecutive numbers."""
    found: list[int] = []
    for number in numbers:
        if found and number == found[-2] + found[-1]:
            found[-1] += 1
        else:
            found += [number, 1]
    return found


# --- layers -----------------------------------------------------------------------------------------------------------
def _layers(program: Program, summary: Summary) -> Iterator[dict[str, Any]]:
    stories, left = Stories(program), BUDGET["stories"]
    for q in summary.layers:
        story: str | None = stories.tell(q).split("\n\n", 1)[-1] if left > 0 else None
        left -= len(story or "")
        yield {
            "name": q.name, "node": q.node, "type": q.type, "module": q.module, "bits": q.bits,
            "shape": q.shape, "before": q.bytes_before, "after": q.bytes_after, "spec": q.spec, "method": q.method,
            "activation": q.activation, "error": _finite(q.error), "reason": q.reason, "tied": q.tied_to,
            "part": q.part_of, "source": q.source, "story": story if left > 0 else None,
        }  # fmt: skip


def formats(summary: Summary) -> list[dict[str, Any]]:
    """For each format: its layers, bytes and mean error, the largest first; weights in float last."""
    found: dict[str, list[LayerSummary]] = {}
    for q in summary.layers:
        found.setdefault(q.spec or "float", []).append(q)
    rows = []
    for name, members in found.items():
        errors = [q.error for q in members if q.error is not None and math.isfinite(q.error)]
        mean, stored = (
            sum(errors) / len(errors) if errors else None,
            sum(q.bytes_after for q in members if not q.tied_to),
        )
        rows.append({"name": name, "layers": len(members), "error": mean, "nbytes": stored})
    return sorted(rows, key=lambda row: (row["name"] == "float", -row["nbytes"]))


# --- observations -----------------------------------------------------------------------------------------------------
def _observed(seen: Observations, summary: Summary) -> dict[str, Any]:
    left, layers = BUDGET["observed"], dict[str, Any]()
    for layer in seen:
        layers[layer.name] = found = _layer(layer)
        left -= 6 * sum(len(h[2]) for h in found.values() if isinstance(h, list) and len(h) == 6)
        if left < 0:
            break
    return {
        "rows": seen.rows, "inputs": seen.inputs, "error": _finite(seen.error), "layers": layers,
        "totals": [_candidate(c) for c in seen.totals()], "nbytes": summary.weight_bytes_after,
    }  # fmt: skip


def _layer(layer: LayerObservation) -> dict[str, Any]:
    parts = {part: _histogram(getattr(layer, part)) for part in ("weight", "scale", "input")}
    return {
        **{part: value for part, value in parts.items() if value},
        "error": _finite(layer.error),
        "candidates": [_candidate(c) for c in layer.candidates],
    }


# --- comparison -------------------------------------------------------------------------------------------------------
def _compared(found: Comparison) -> dict[str, Any]:
    left, layers = BUDGET["compared"], dict[str, Any]()
    ranks = {by: {row.name: i + 1 for i, row in enumerate(found.ranked(by))} for by in ("local", "accumulated")}
    for row in found.layers:
        layers[row.name] = {
            "type": row.type, "node": row.node,
            "local": _relative(row.local), "accumulated": _relative(row.accumulated),
            "alone": _in_words(row, row.local, ranks["local"], "fed what the float model is fed"),
            "inside": _in_words(row, row.accumulated, ranks["accumulated"], "inside the quantized model"),
            "input": _histogram(row.input) if left > 0 else None,
        }  # fmt: skip
        left -= 6 * len(row.input.counts) if row.input is not None else 0
    return {"layers": layers}


def _relative(errors: Errors | None) -> float | None:
    return None if errors is None else _finite(errors.relative)


def _in_words(row: LayerError, errors: Errors | None, ranks: dict[str, int], where: str) -> str:
    if errors is None:
        return row.reason or "not compared"
    rank = f", worst {ranks[row.name]} of {len(ranks)}" if row.name in ranks else ""
    return f"{percent(errors.relative)}, SQNR {errors.sqnr:.1f} dB, cosine {errors.cosine:.5f} {where}{rank}"


def _histogram(value: Histogram | None) -> list[Any] | None:
    if value is None:
        return None
    return [_round(value.low), _round(value.high), value.counts, value.below, value.above, value.unit]


def _candidate(value: Candidate) -> list[Any]:
    return [value.spec, _finite(value.error), value.nbytes]


def _finite(value: float | None) -> float | None:
    """A number of six digits, None for none and for what JSON cannot hold."""
    return _round(value) if value is not None and math.isfinite(value) else None


def _round(value: float) -> float:
    return float(f"{value:.6g}")
