"""Bars: how much each layer loses, as lines of text and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 40
COLOURS = ("#1f7a4d", "#c98a00", "#b3261e")
"""For the levels 1 to 3 of a bar."""


@dataclass(frozen=True)
class Bar:
    """A layer's name, its figure as a number and as text, and a level from 1 (harmless) to 3."""

    name: str
    value: float
    text: str
    level: int = 1


def text_bar(value: float, largest: float) -> str:
    """``#########``: WIDTH characters for the largest value, at least one for any above 0."""
    if value <= 0 or largest <= 0:
        return ""
    return "#" * max(1, round(WIDTH * value / largest))


def svg(bars: Sequence[Bar], title: str) -> str:
    """One bar a layer, from top to bottom in the order given; a value below 0 has no length."""
    left, wide, step, top = 330, 560, 16, 44
    largest = max((bar.value for bar in bars), default=0.0)
    height = top + step * len(bars) + 12
    parts = []
    for i, bar in enumerate(bars):
        y = top + step * i
        length = wide * max(bar.value, 0.0) / largest if largest > 0 else 0.0
        parts.append(
            f"<g><title>{escape(bar.name)}: {escape(bar.text)}</title>"
            f'<text x="{left - 8}" y="{y + 10}" text-anchor="end">{escape(bar.name[-46:])}</text>'
            f'<rect x="{left}" y="{y}" width="{length:.2f}" height="{step - 4}" fill="{COLOURS[bar.level - 1]}"/>'
            f'<text x="{left + length + 6:.2f}" y="{y + 10}">{escape(bar.text)}</text></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><rect width="1000" height="{height}" fill="#fff"/>'
        f'<g font-family="sans-serif" font-size="11" fill="#222"><text x="12" y="24" font-size="14">{escape(title)}'
        f"</text>{''.join(parts)}</g></svg>\n"
    )
