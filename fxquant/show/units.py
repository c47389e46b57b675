"""How figures are written: bytes, percentages, seconds, tables of text, and what JSON takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def size(nbytes: float) -> str:
    """``512 B``, ``1.5 KiB``, ``101.3 MiB``."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def percent(fraction: float) -> str:
    """``3.92 %``; ``0 %`` for exactly 0, and never more digits than mean something."""
    if not math.isfinite(fraction):
        return "not finite"
    value = 100 * fraction
    return "0 %" if value == 0 else f"{value:.2f} %" if value >= 0.01 else f"{value:.1e} %"


def seconds(value: float | None) -> str:
    """``0.41 s``, ``12.3 s``, ``2 min 5 s``; ``–`` where it is not known."""
    if value is None:
        return "–"
    if value >= 60:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def plain(value: Any) -> Any:
    """What JSON has: dicts and lists of plain values, None for a figure that is not finite."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plural(count: int, word: str) -> str:
    """``1 rewrite``, ``2 rewrites``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines: two blanks between columns, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]
