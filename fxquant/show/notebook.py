"""HTML for notebooks: a title, lines and tables. No script, no colours of its own, so that it suits light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_LINE = "border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: 2px 10px"


def page(title: str, *parts: str) -> str:
    """A block of HTML: a title, then ``parts``, which are HTML already."""
    return f'<div style="overflow-x: auto"><p><strong>{escape(title)}</strong></p>{"".join(parts)}</div>'


def lines(*texts: str) -> str:
    """Lines of text, with their blanks."""
    return f'<pre style="color: inherit; background: none">{escape(chr(10).join(texts))}</pre>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head; figures to the right."""
    head, *body = rows
    right = [all(row[i][:1].isdigit() or row[i][:1] == "-" or not row[i] for row in body) for i in range(len(head))]
    html = [_row("th", head, right), *(_row("td", row, right) for row in body)]
    return f'<table style="border-collapse: collapse; background: none">{"".join(html)}</table>'


def _row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    style = [f'style="{_LINE}; text-align: {"right" if r else "left"}"' for r in right]
    return f"<tr>{''.join(f'<{tag} {s}>{escape(c)}</{tag}>' for s, c in zip(style, cells, strict=True))}</tr>"
