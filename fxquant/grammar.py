"""The grammar of specs as regular expressions, for editors: what ``parse_spec`` takes, in lower case.

    weight      preset | format[/granularity][:scale[.rounding]]
    activation  the same with the granularities token, group<N> and tensor

The expressions are made from the tables of ``formats`` and ``scheme``: every float format is tried. They are anchored,
and mean the same to Python and to ECMAScript.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from fxquant.errors import FormatError
from fxquant.formats import NAMED, parse_format
from fxquant.grids import FloatFormat
from fxquant.scheme import PRESETS, SCALES, QuantSpec, parse_spec

_SPECIALS = ("none", "fn", "fnuz", "ieee")
_NUMBER = r"-?\d+(\.\d+)?(e[+-]?\d+)?"
_COUNT = r"[1-9]\d{0,8}"
GROUP = f"group{_COUNT}"
BLOCK = f"block{_COUNT}x{_COUNT}"
WEIGHT_GRANULARITIES = ("tensor", "channel", GROUP, BLOCK)
UNSIGNED = "uint[2-8]"
"""The formats with a zero point."""
PLAIN_SCALES = tuple(name for name, kind in SCALES.items() if kind.format is None)
"""The scales that a zero point goes with."""

Check = Callable[[QuantSpec], None]
"""Raises a ValueError for a spec that cannot stand in a place."""


def signed_formats() -> str:
    """The formats for values without a zero point."""
    found: dict[tuple[str, ...], list[str]] = {}
    for e in range(1, 8):
        by_specials: dict[tuple[str, ...], list[int]] = {}
        for m in range(8 - e):
            by_specials.setdefault(tuple(s for s in _SPECIALS if _is_format(f"e{e}m{m}{s}")), []).append(m)
        for specials, bits in by_specials.items():
            found.setdefault(specials, []).append(f"{e}m[{bits[0]}-{bits[-1]}]")
    floats = "|".join(f"e({'|'.join(names)})({'|'.join(specials)})?" for specials, names in found.items())
    named = [name for name in NAMED if not _unsigned(name)]
    tables = _either([*named, "nf4", "int[2-8]", "higgs[2-8]"])
    return f"({floats})(b-?\\d+(\\.\\d+)?)?|{tables}|lut\\({_NUMBER}(,{_NUMBER})+\\)"


def format_pattern() -> str:
    """A format of a weight, as the long form has it."""
    return f"^({signed_formats()}|{UNSIGNED})$"


def scale_pattern(names: Collection[str] = tuple(SCALES)) -> str:
    """A scale format with its rounding."""
    return f"^({_scales(names)})$"


def spec_pattern(
    granularities: Collection[str], check: Check, *, scales: Collection[str] = tuple(SCALES),
    unsigned: Collection[str] = (),
) -> str:  # fmt: skip
    """A spec in the short form, with one of ``granularities`` and ``scales``; ``check`` sorts out the presets.

    ``unsigned``: the granularities that unsigned integers take.
    """
    presets = [name for name in PRESETS if _passes(name, check)]
    optional = "?" if _passes("e4m3", check) else ""  # without a granularity a spec is one a channel
    rows = [(signed_formats(), granularities, scales)]
    rows += [(UNSIGNED, unsigned, [name for name in scales if name in PLAIN_SCALES])] if unsigned else []
    full = [f"({f})(/({'|'.join(g)})){optional}(:({_scales(s)}))?" for f, g, s in rows]
    return f"^({'|'.join([*([_either(presets)] if presets else []), *full])})$"


def _scales(names: Collection[str]) -> str:
    roundings = {name: tuple(filter(None, SCALES[name].roundings)) for name in SCALES if name in names}
    return "|".join(f"{name}(\\.({'|'.join(ways)}))?" if ways else name for name, ways in roundings.items())


def _either(names: Iterable[str]) -> str:
    return "|".join(sorted(dict.fromkeys(names), key=lambda name: (-len(name), name)))


def _is_format(name: str) -> bool:
    try:
        parse_format(name)
    except FormatError:
        return False
    return True


def _unsigned(name: str) -> bool:
    found = parse_format(name)
    return isinstance(found, FloatFormat) and not found.signed


def _passes(text: str, check: Check) -> bool:
    try:
        check(parse_spec(text))
    except ValueError:
        return False
    return True
