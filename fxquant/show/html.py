"""report: one self-contained HTML page about a program: totals, passes, the model as a tree and as a graph, trade-offs.

The template gets plain values and escapes every name in them; what the script draws is one JSON value in the page.
Style and script are inline, only that script may run, and the page asks the network for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from fxquant import outputs
from fxquant.errors import SaveError
from fxquant.program import Program
from fxquant.show.numerics import Comparison
from fxquant.show.page import formats, page_data, specs
from fxquant.show.summary import Summary, ratio, summarize
from fxquant.show.text import describe_spec
from fxquant.show.units import percent, plural, seconds, size

SCRIPTS = ("dom", "data", "charts", "layout", "tree", "detail", "graph", "changes", "tradeoff", "main")
"""The files of the script, in order; they share one scope."""


def report(
    program: Program, path: str | Path | None = None, *, title: str = "fxquant report", config: Any = None,
    figures: Mapping[str, str] | None = None, comparison: Comparison | None = None,
) -> str:  # fmt: skip
    """The page as text; written to ``path`` too if that is given, whole or not at all (SaveError if it cannot be).

    ``config`` is shown as it is if it is a string, else as JSON. ``figures`` are measurements to show at the top, by
    name: ``{"perplexity, float": "8.1091"}``. ``comparison`` with the float model adds the errors of layers' outputs.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(size=size, percent=percent, seconds=seconds)
    environment.globals.update(plural=plural, ratio=ratio)
    page = environment.get_template("report.html.j2").render(
        _context(program, title, config, dict(figures or {}), comparison)
    )
    if path is not None:
        write_page(Path(path), page)
    return page


def source(name: str) -> str:
    """A file of the page: the template, its style, a part of its script."""
    return resources.files("fxquant.show").joinpath("report", name).read_text(encoding="utf-8")


def script() -> str:
    """The page's script, all parts in one scope."""
    parts = "\n".join(source(f"{name}.js") for name in SCRIPTS)
    return f'\n(() => {{\n"use strict";\n{parts}\n}})();\n'


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``, whole or not at all. Raises SaveError."""
    try:
        outputs.write(path, page.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error


def embedded(value: Any) -> str:
    """JSON that can stand in a script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- what the template shows -----------------------------------------------------------------------------------------
def _context(
    program: Program, title: str, config: Any, figures: dict[str, str], comparison: Comparison | None
) -> dict[str, Any]:
    summary, code = summarize(program), script()
    return {
        "title": title,
        "config": config if isinstance(config, str) else json.dumps(config, indent=2, default=str) if config else "",
        "s": summary,
        "figures": figures,
        "compared": comparison,
        "inputs": [(i.name, str(i.type)) for i in program.signature.inputs],
        "specs": [(spec, describe_spec(spec)) for spec in specs(summary)],
        "formats": formats(summary),
        "reasons": _reasons(summary),
        "max_seconds": max((step.seconds or 0.0 for step in summary.steps), default=0.0),
        "max_step_error": max((_finite(step.error) for step in summary.steps), default=0.0),
        "share": _share,
        "data": embedded(page_data(program, summary, comparison)),
        "script": code,
        "hash": base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
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
