"""A number format in figures and tables: its range, its special values, the value of each of its codes."""

from __future__ import annotations

import math
from typing import Any

from fxquant.formats import (
    COMMON,
    NAMED,
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    PowerFormat,
    parse_format,
)  # fmt: skip
from fxquant.scheme import PRESETS
from fxquant.show.text import describe_spec

COLUMNS = ("format", "also", "kind", "bits", "max", "min normal", "smallest", "not a number")
PRESET_COLUMNS = ("preset", "spec", "what it is")
_KINDS = {FloatFormat: "float", IntFormat: "integer", CodebookFormat: "codebook", PowerFormat: "power of two"}
WIDTH = 96
"""Characters of a plot in text."""


def facts(format: Format) -> dict[str, Any]:
    """Name, bits, largest value, smallest normal, smallest above zero, and what its special codes are."""
    special = format.specials if isinstance(format, FloatFormat) else "none"
    numbers = {"max": format.max, "min_normal": format.min_normal, "smallest": format.smallest}
    return {"name": str(format), "bits": format.bits, **numbers, "specials": special}


def codes(format: Format) -> list[dict[str, Any]]:
    """Every code with its bits and its value; what is not finite as the text nan, inf or -inf."""
    values = enumerate(format.table().tolist())
    return [{"code": c, "bits": _bits(c, format), "value": v if math.isfinite(v) else str(v)} for c, v in values]


def overview() -> list[tuple[str, ...]]:
    """A row of COLUMNS for each common format."""
    return [_row(parse_format(name)) for name in COMMON]


def presets() -> list[tuple[str, ...]]:
    """A row of PRESET_COLUMNS for each preset."""
    return [(name, spec, describe_spec(spec)) for name, spec in PRESETS.items()]


def values(format: Format) -> list[float]:
    """The finite values of the grid, in order, each once."""
    return sorted({v for v in format.table().tolist() if math.isfinite(v)})


def position(value: float, format: Format) -> float:
    """Where ``value`` lies in a plot, 0 to 1: by its size, by its logarithm for grids that span more than 2^12."""
    every = values(format)
    low, high = every[0], every[-1]
    least = min(abs(v) for v in every if v)
    if high / least <= 2**12:
        return (value - low) / (high - low)
    span = math.log2(high / least) + 1
    signed = math.copysign(math.log2(abs(value) / least) + 1, value) if value else 0.0
    return (signed + span) / (2 * span) if low < 0 else signed / span


def plot(format: Format) -> str:
    """The grid on a line: ``|`` where one value lies, ``#`` where several do, and a scale below."""
    cells = [0] * WIDTH
    for value in values(format):
        cells[round(position(value, format) * (WIDTH - 1))] += 1
    low, high = f"{values(format)[0]:g}", f"{values(format)[-1]:g}"
    line = "".join(".|#"[min(count, 2)] for count in cells)
    at = round(position(0.0, format) * (WIDTH - 1)) if values(format)[0] < 0 else 0
    zero = f"{'':{at - len(low)}}0" if len(low) < at < WIDTH - len(high) else ""
    return f"{line}\n{low}{zero:{WIDTH - len(low) - len(high)}}{high}"


def svg(format: Format) -> str:
    """The grid as a drawing: a tick for each value, taller for a power of two."""
    ticks = []
    for value in values(format):
        x = 20 + 760 * position(value, format)
        top = 20 if value and math.frexp(abs(value))[0] == 0.5 else 36
        ticks.append(f'<path d="M{x:.2f} {top}V60"><title>{value:g}</title></path>')
    low, high = values(format)[0], values(format)[-1]
    label = f"{format}: {len(ticks)} values from {low:g} to {high:g}"
    texts = ((20, "start", f"{low:g}"), (400, "middle", label), (780, "end", f"{high:g}"))
    words = "".join(f'<text x="{x}" y="84" text-anchor="{where}">{text}</text>' for x, where, text in texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 100" role="img" aria-label="{label}">'
        f'<rect width="800" height="100" fill="#fff"/><g stroke="#1f5fbf">{"".join(ticks)}</g>'
        f'<path d="M20 60H780" stroke="#222"/>'
        f'<g font-family="sans-serif" font-size="14" fill="#222">{words}</g></svg>\n'
    )


def code_table(format: Format) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows of all codes; a code and its negative stand side by side."""
    cells = [[str(c["code"]), c["bits"], _text(c["value"])] for c in codes(format)]
    half = len(cells) // 2
    return ("code", "bits", "value") * 2, [low + high for low, high in zip(cells[:half], cells[half:], strict=True)]


def _row(format: Format) -> tuple[str, ...]:
    table = format.table()
    counts = ((int(table.isnan().sum()), "NaN"), (int(table.isinf().sum()), "Inf"))
    special = ", ".join(f"{count} {what}" for count, what in counts if count)
    also = ", ".join(alias for alias, name in NAMED.items() if name == str(format))
    normal = f"{format.min_normal:.6g}" if isinstance(format, FloatFormat) else ""
    for_scales = isinstance(format, PowerFormat) or (isinstance(format, FloatFormat) and not format.signed)
    kind = _KINDS[type(format)] + (", for scales" if for_scales else "")
    return str(format), also, kind, str(format.bits), f"{format.max:.6g}", normal, f"{format.smallest:.6g}", special


def _bits(code: int, format: Format) -> str:
    """The bits of a code by field: ``0 011 10`` is sign, exponent, mantissa."""
    text = f"{code:0{format.bits}b}"
    if not isinstance(format, FloatFormat):
        return text
    return " ".join(filter(None, (text[0], text[1 : 1 + format.ebits], text[1 + format.ebits :])))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"
