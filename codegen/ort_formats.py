"""ort_formats: the formats of the operators' library as a C++ header, written by running this module.

``native/formats.h`` is a file of the project, so that the library compiles where there is no torch to make a table
with; a test compares the two.
"""

from __future__ import annotations

import math
from pathlib import Path

from fxquant.codegen.cpu_codes import grid
from fxquant.codegen.onnx_functions import op_type
from fxquant.formats import COMMON, Format, parse_format
from fxquant.grids import IntFormat

SCALES_ONLY = ("e8m0", "ue5m3")
FORMATS: tuple[Format, ...] = tuple(
    parse_format(name) for name in (*COMMON, "e4m3fnuz", "e5m2fnuz") if name not in SCALES_ONLY
)
"""Every named format of weights. A node on any other format is left to the file's own function."""
PATH = Path(__file__).parent / "native" / "formats.h"
_A_LINE = 12  # values


def header() -> str:
    """The text of ``formats.h``."""
    tables = "\n".join(_table(format) for format in FORMATS)
    rows = "\n".join(_row(format) for format in FORMATS)
    return (
        "// Printed by fxquant.codegen.ort_formats from fxquant.formats: a change belongs there.\n"
        f'#pragma once\n#include "activations.h"\n#include <cmath>\n\nnamespace fxq {{\n\n{tables}\n\n'
        f"static const Format FORMATS[] = {{\n{rows}\n}};\n\n}} // namespace fxq\n"
    )


def _name(format: Format) -> str:
    return op_type("", format)[1:]


def _table(format: Format) -> str:
    values = [_number(v) for v in format.table().float().tolist()]
    lines = (", ".join(values[i : i + _A_LINE]) for i in range(0, len(values), _A_LINE))
    body = ",\n    ".join(lines)
    return f"static const float {_name(format)}[] = {{\n    {body}}};"


def _row(format: Format) -> str:
    zero_point = isinstance(format, IntFormat) and not format.signed
    return f'    {{"{_name(format)}", {format.bits}, {str(zero_point).lower()}, {_name(format)}, {_grid(format)}}},'


def _grid(format: Format) -> str:
    """How activations are rounded to the format, where they can be."""
    found = grid(format)
    return f"{{{found[0]}, {found[1]}, {_number(found[2])}}}" if found else "{}"


def _number(value: float) -> str:
    """A float32 exactly."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    if value.is_integer():
        return f"{'-' if math.copysign(1, value) < 0 else ''}{abs(int(value))}.0f"
    head, _, exponent = value.hex().partition("p")
    return f"{head.rstrip('0').rstrip('.')}p{exponent}f"


if __name__ == "__main__":
    PATH.write_text(header(), encoding="utf-8")
