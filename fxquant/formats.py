"""Formats by name: ``parse_format("e3m2")``. The classes are in ``grids``, the tables in ``codebooks``."""

from __future__ import annotations

import re
from functools import cache

from fxquant.codebooks import NF4, gaussian
from fxquant.errors import FormatError, near
from fxquant.grids import (
    CodebookFormat,
    FloatFormat,
    Grid,
    IntFormat,
    PowerFormat,
    Specials,
    default_bias,
    default_specials,
)

__all__ = ["CodebookFormat", "FloatFormat", "Format", "IntFormat", "PowerFormat", "parse_format"]

Format = Grid

NAMED = {
    "fp4": "e2m1", "fp6": "e3m2", "fp8": "e4m3", "fp4_e2m1": "e2m1", "fp4_e3m0": "e3m0", "fp6_e3m2": "e3m2",
    "fp6_e2m3": "e2m3", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2", "fp8_e3m4": "e3m4", "e5m3": "ue5m3",
}  # fmt: skip
COMMON = (
    "e2m1", "e3m0", "e1m2", "e2m2", "e3m1", "e3m2", "e2m3", "e4m3", "e5m2", "e3m4", "nf4",
    *(f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")),
    *(f"higgs{bits}" for bits in range(2, 9)), "e8m0", "ue5m3",
)  # fmt: skip

_FLOAT = re.compile(r"(u?)e(\d{1,3})m(\d{1,3})(none|fnuz|fn|ieee)?(?:b(-?\d{1,9}(?:\.\d{1,99})?))?")
_INT = re.compile(r"(u?)int(\d{1,3})")
_HIGGS = re.compile(r"higgs([2-8])")
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_LUT = re.compile(rf"lut\(({_NUMBER}(?:,{_NUMBER})*)\)")
_SPECIALS: dict[str, Specials] = {"none": "none", "fn": "fn", "fnuz": "fnuz", "ieee": "ieee"}


@cache
def parse_format(name: str) -> Format:
    """The format called ``name``.

    ``e3m2``, ``e4m3fnuz``, ``e2m1b3`` (a bias of 3), ``ue5m3`` (unsigned), ``int4``, ``uint4``, ``e8m0``, ``nf4``,
    ``higgs4`` (the MSE-optimal Gaussian grid), ``lut(-1,-0.5,0,1)`` (any table), or an alias such as ``fp6``. Raises
    FormatError.
    """
    text = name.strip().lower().replace(" ", "")
    text = NAMED.get(text, text)
    if text == "e8m0":
        return PowerFormat()
    if text == "nf4":
        return NF4
    if match := _HIGGS.fullmatch(text):
        return gaussian(int(match[1]))
    if match := _LUT.fullmatch(text):
        return CodebookFormat(tuple(float(v) for v in match[1].split(",")))
    if (match := _INT.fullmatch(text)) and 2 <= int(match[2]) <= 8:
        return IntFormat(int(match[2]), signed=not match[1])
    if (match := _FLOAT.fullmatch(text)) and (found := _float_format(match)):
        return found
    raise FormatError(
        f"unknown format {name!r}{near(text, [*NAMED, *COMMON])}; expected e<E>m<M>[none|fn|fnuz|ieee][b<bias>] with "
        f"E >= 1 and at most 8 bits, int<2..8>, uint<2..8>, nf4, higgs<2..8>, lut(<values>), e8m0, ue5m3, or one of "
        f"{', '.join(sorted(NAMED))}"
    )


def _float_format(match: re.Match[str]) -> FloatFormat | None:
    unsigned, ebits, mbits = bool(match[1]), int(match[2]), int(match[3])
    if ebits < 1 or ebits + mbits + (not unsigned) > 8:
        return None
    specials = _SPECIALS[match[4]] if match[4] else default_specials(ebits, mbits)
    bias = default_bias(ebits, specials) if match[5] is None else float(match[5])
    return FloatFormat(ebits, mbits, bias, specials, not unsigned)
