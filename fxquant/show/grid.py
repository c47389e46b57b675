"""A number format in figures and tables: its range, its special values, the value of each of its codes."""

from __future__ import annotations

import math
from typing import Any

from fxquant.formats import COMMON, NAMED, FloatFormat, Format, parse_format

COLUMNS = ("format", "also", "bits", "max", "min normal", "smallest", "not a number")


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
    figures = (f"{value:.6g}" for value in (format.max, format.min_normal, format.smallest))
    return str(format), also, str(format.bits), *figures, special


def _bits(code: int, format: Format) -> str:
    """The bits of a code by field: ``0 011 10`` is sign, exponent, mantissa."""
    text = f"{code:0{format.bits}b}"
    if not isinstance(format, FloatFormat):
        return text
    return " ".join(filter(None, (text[0], text[1 : 1 + format.ebits], text[1 + format.ebits :])))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"
