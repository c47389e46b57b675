"""Number formats: a format is a finite grid of values, numbered by integer codes.

A float format ExMy stores ``s | e (E bits) | m (M bits)``, sign first::

    value(s, e, m) = (-1)^s * (m / 2^M * 2^(1 - bias)          if e == 0   (subnormal)
                               (1 + m / 2^M) * 2^(e - bias)    otherwise)

An integer format stores two's complement (signed, symmetric: the most negative code is never produced) or
plain binary (unsigned: used with a zero point, ``real = (code - zero_point) * scale``).

Every format rounds the same way: to the nearest grid value, ties to the even *code*, saturating at the largest finite
value. Encoding is a search among the midpoints of the grid, so it is exact by construction and one piece of code
serves every format. Formats are frozen values; their tables are derived from the definition above, never listed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import FormatError, near

Specials = Literal["none", "fn", "fnuz", "ieee"]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A signed ExMy grid of at most 8 bits.

    ``specials`` says which codes are not numbers: ``none`` (every code is finite: OCP FP4 and FP6), ``fn`` (only
    the all-ones magnitude is NaN: OCP E4M3), ``fnuz`` (only the code of -0 is NaN), ``ieee`` (the top exponent holds
    Inf and NaN: OCP E5M2).
    """

    ebits: int
    mbits: int
    bias: int
    specials: Specials = "none"

    def __post_init__(self) -> None:
        if self.ebits < 1 or self.mbits < 0 or self.bits > 8:
            raise FormatError(
                f"unknown format 'e{self.ebits}m{self.mbits}'; a float format has at least 1 exponent bit and at most "
                f"8 bits with its sign, this one has {self.ebits} and {self.bits}"
            )
        if not -64 <= self.bias <= 64:
            raise FormatError(f"exponent bias {self.bias} is out of range; expected -64..64")
        if not any(self._finite_magnitudes()):
            raise FormatError(f"format 'e{self.ebits}m{self.mbits}{self.specials}' has no value but zero")

    def __str__(self) -> str:
        special = "" if self.specials == default_specials(self.ebits, self.mbits) else self.specials
        bias = "" if self.bias == default_bias(self.ebits, self.specials) else f"b{self.bias}"
        return f"e{self.ebits}m{self.mbits}{special}{bias}"

    @property
    def bits(self) -> int:
        return 1 + self.ebits + self.mbits

    @property
    def max(self) -> float:
        """The largest finite value."""
        return max(self._finite_magnitudes())

    @property
    def min_normal(self) -> float:
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest(self) -> float:
        """The smallest value above zero (a subnormal where the format has any)."""
        return min(v for v in self._finite_magnitudes() if v > 0)

    def _magnitude(self, code: int) -> float:
        """The value of a code without its sign; NaN and Inf where ``specials`` says so."""
        top = 2 ** (self.bits - 1) - 1
        e, m = code >> self.mbits, code & (2**self.mbits - 1)  # s eee mm -> eee | mm
        if self.specials == "fn" and code == top:
            return float("nan")
        if self.specials == "ieee" and e == 2**self.ebits - 1:
            return float("nan") if m else float("inf")
        if e == 0:
            return math.ldexp(m, 1 - self.bias - self.mbits)
        return math.ldexp(2**self.mbits + m, e - self.bias - self.mbits)

    def _finite_magnitudes(self) -> list[float]:
        """Values of the codes 0, 1, ... without sign, up to the largest finite one (they are increasing)."""
        values = (self._magnitude(c) for c in range(2 ** (self.bits - 1)))
        return [v for v in values if v == v and v != float("inf")]

    def codes(self) -> Tensor:
        """All codes, uint8 ``[2**bits]``."""
        return torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)

    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``."""
        positive = torch.tensor([self._magnitude(c) for c in range(2 ** (self.bits - 1))], dtype=torch.float64)
        table = torch.cat([positive, -positive])
        if self.specials == "fnuz":
            table[2 ** (self.bits - 1)] = float("nan")
        return table

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest grid values of ``x``; ties to the even code, saturating, the sign of zero kept.

        NaN becomes the format's NaN code where it has one, else its largest value with the sign of the NaN.
        """
        x = exact_float(x)
        magnitude = torch.bucketize(x.abs().contiguous(), _boundaries(self, x.dtype, x.device), out_int32=True).to(
            torch.uint8
        )
        code = magnitude | (torch.signbit(x).to(torch.uint8) << (self.bits - 1))  # s | eeemm
        if self.specials == "fnuz":
            code = torch.where(magnitude == 0, torch.zeros_like(code), code)  # 0x80 is NaN here, there is no -0
        if self.specials != "none":
            nan = 2 ** (self.bits - 1) if self.specials == "fnuz" else 2 ** (self.bits - 1) - 1
            code = torch.where(x.isnan(), torch.full_like(code, nan), code)
        return code

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of uint8 ``codes``, in ``dtype``."""
        return lookup(self, codes, dtype)

    def round(self, x: Tensor) -> Tensor:
        """The nearest grid values of ``x``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x.dtype)


@dataclass(frozen=True, slots=True)
class IntFormat:
    """INT2..INT8: signed and symmetric (-max..max in two's complement) or unsigned (0..2^bits - 1, zero point)."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"unknown format {str(self)!r}; integer formats have 2 to 8 bits")

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def max(self) -> float:
        return float(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def min_normal(self) -> float:
        return 1.0

    @property
    def smallest(self) -> float:
        return 1.0

    def codes(self) -> Tensor:
        """All codes, uint8 ``[2**bits]``."""
        return torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)

    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``."""
        values = torch.arange(2**self.bits, dtype=torch.float64)
        return torch.where(values > self.max, values - 2**self.bits, values)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest integers of ``x``, ties to even, saturating; NaN becomes 0."""
        low = -self.max if self.signed else 0.0
        q = torch.round(exact_float(x)).clamp(low, self.max).nan_to_num(0.0)
        codes: Tensor = q.to(torch.int32).to(torch.uint8) & (2**self.bits - 1)  # two's complement: -1 -> 0b1111
        return codes

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of uint8 ``codes``, in ``dtype``."""
        return lookup(self, codes, dtype)

    def round(self, x: Tensor) -> Tensor:
        """The nearest grid values of ``x``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x.dtype)


Format = FloatFormat | IntFormat


def exact_float(x: Tensor) -> Tensor:
    """``x`` in a float type in which midpoints of every grid are exact: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def lookup(format: Format, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``table[codes]``: int32 indices, since torch has no gather by uint8."""
    table = _table(format, dtype, codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


@cache
def _table(format: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    return format.table().to(device=device, dtype=dtype)


@cache
def _boundaries(format: FloatFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints between neighbouring magnitudes, so that ``bucketize(|x|)`` is the code of the nearest one.

    ``bucketize`` sends a value equal to boundary i down, to code i. A tie must go to the even code: where that is
    the upper one (i odd), the boundary is moved one ulp down, and nothing but the tie itself changes sides.
    """
    grid = torch.tensor(format._finite_magnitudes(), dtype=torch.float64)
    middle = ((grid[:-1] + grid[1:]) / 2).to(dtype)
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    upper_is_even = torch.arange(len(middle)) % 2 == 1
    return torch.where(upper_is_even, below, middle).to(device)


def default_bias(ebits: int, specials: Specials = "none") -> int:
    """2^(E-1) - 1 (0 for E1); one more for ``fnuz``, which hardware defines so."""
    return int(2 ** (ebits - 1) - (specials != "fnuz"))


def default_specials(ebits: int, mbits: int) -> Specials:
    """What the field means by a bare name: E4M3 and E3M4 are ``fn``, E5M2 is ``ieee``, all others use every code."""
    defaults: dict[tuple[int, int], Specials] = {(4, 3): "fn", (3, 4): "fn", (5, 2): "ieee"}
    return defaults.get((ebits, mbits), "none")


NAMED = {
    "fp4": "e2m1", "fp6": "e3m2", "fp8": "e4m3", "fp4_e2m1": "e2m1", "fp4_e3m0": "e3m0", "fp6_e3m2": "e3m2",
    "fp6_e2m3": "e2m3", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2",
}  # fmt: skip
COMMON = ("e2m1", "e3m0", "e1m2", "e2m2", "e3m1", "e3m2", "e2m3", "e4m3", "e5m2", "e3m4", *(
    f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")))  # fmt: skip

_FLOAT = re.compile(r"e(\d+)m(\d+)(none|fnuz|fn|ieee)?(?:b(-?\d+))?")
_INT = re.compile(r"(u?)int(\d+)")


@cache
def parse_format(name: str) -> Format:
    """The format called ``name``: ``e3m2``, ``e4m3fnuz``, ``e2m1b3``, ``int4``, ``uint4`` or an alias (``fp6``)."""
    text = NAMED.get(name.strip().lower(), name.strip().lower())
    if match := _FLOAT.fullmatch(text):
        ebits, mbits = int(match[1]), int(match[2])
        if ebits + mbits <= 7 and ebits >= 1:
            specials = _specials(match[3]) or default_specials(ebits, mbits)
            bias = default_bias(ebits, specials) if match[4] is None else int(match[4])
            return FloatFormat(ebits, mbits, bias, specials)
    elif (match := _INT.fullmatch(text)) and 2 <= int(match[2]) <= 8:
        return IntFormat(int(match[2]), signed=not match[1])
    raise FormatError(
        f"unknown format {name!r}{near(text, [*NAMED, *COMMON])}; expected e<E>m<M>[none|fn|fnuz|ieee][b<bias>] with "
        f"E >= 1 and at most 8 bits, int<2..8>, uint<2..8>, or one of {', '.join(sorted(NAMED))}"
    )


def _specials(text: str | None) -> Specials | None:
    known: dict[str, Specials] = {"none": "none", "fn": "fn", "fnuz": "fnuz", "ieee": "ieee"}
    return known[text] if text else None
