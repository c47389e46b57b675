"""Number formats: a format is a finite grid of values, numbered by integer codes.

A float format ExMy stores ``s | e (E bits) | m (M bits)``, sign first::

    value(s, e, m) = (-1)^s * (m / 2^M * 2^(1 - bias)          if e == 0   (subnormal)
                               (1 + m / 2^M) * 2^(e - bias)    otherwise)

An integer format stores two's complement (signed, symmetric: the most negative code is never produced) or
plain binary (unsigned: used with a zero point, ``real = (code - zero_point) * scale``).

A codebook is any table of ``2^bits`` values (``fxquant.codebooks``). Scales have formats of their own: E8M0, the
powers of two of OCP MX, and the unsigned E5M3.

Policies, for every format:

- Rounding is to the nearest grid value, ties to the even *code*, saturating at the largest finite value.
- Encoding is a search among the midpoints of the grid, exact by construction; float32 input of float formats takes a
  shorter way over the bits, which gives the same codes and does not depend on whether the CPU flushes denormals.
- The sign of zero is kept where the format has a negative zero. Subnormals are values like any other.
- NaN becomes NaN where the format has one; Inf saturates. Weights with NaN or Inf are refused before they come here.
- Formats are frozen values; their tables are derived from the definition above, never listed.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import FormatError

Specials = Literal["none", "fn", "fnuz", "ieee"]


class Grid(ABC):
    """What every format offers. Frozen values below it; a code is a uint8 below ``2**bits``."""

    __slots__ = ()

    @property
    @abstractmethod
    def bits(self) -> int: ...

    @abstractmethod
    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``; NaN and Inf where a code is no number."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest grid values of ``x``."""

    def encode_(self, x: Tensor) -> Tensor:
        """The same where ``x`` is not needed any more: its memory may be used for intermediates."""
        return self.encode(x)

    @property
    def max(self) -> float:
        """The largest finite magnitude."""
        return float(self._finite().abs().max())

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest finite value."""
        finite = self._finite()
        return float(finite.min()), float(finite.max())

    @property
    def smallest(self) -> float:
        """The smallest magnitude above zero (a subnormal where the format has any)."""
        magnitudes = self._finite().abs()
        return float(magnitudes[magnitudes > 0].min())

    @property
    def min_normal(self) -> float:
        """The smallest normal magnitude; ``smallest`` where a format has no subnormals."""
        return self.smallest

    def codes(self) -> Tensor:
        """All codes, uint8 ``[2**bits]``."""
        return torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of uint8 ``codes``, in ``dtype``."""
        return lookup(self, codes, dtype)

    def round(self, x: Tensor) -> Tensor:
        """The nearest grid values of ``x``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x.dtype)

    def _finite(self) -> Tensor:
        table = self.table()
        return table[table.isfinite()]


@dataclass(frozen=True, slots=True)
class FloatFormat(Grid):
    """A signed ExMy grid of at most 8 bits.

    ``specials`` says which codes are not numbers: ``none`` (every code is finite: OCP FP4 and FP6), ``fn`` (only
    the all-ones magnitude is NaN: OCP E4M3), ``fnuz`` (only the code of -0 is NaN), ``ieee`` (the top exponent holds
    Inf and NaN: OCP E5M2).
    """

    ebits: int
    mbits: int
    bias: int | float
    specials: Specials = "none"
    signed: bool = True

    def __post_init__(self) -> None:
        if float(self.bias).is_integer():
            object.__setattr__(self, "bias", int(self.bias))
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
        bias = "" if self.bias == default_bias(self.ebits, self.specials) else f"b{self.bias!r}"
        return f"{'' if self.signed else 'u'}e{self.ebits}m{self.mbits}{special}{bias}"

    @property
    def bits(self) -> int:
        return self.signed + self.ebits + self.mbits

    @property
    def magnitudes(self) -> int:
        """How many codes there are without the sign bit."""
        return int(2 ** (self.ebits + self.mbits))

    @property
    def max(self) -> float:
        """The largest finite value."""
        return max(self._finite_magnitudes())

    @property
    def min_normal(self) -> float:
        return float(2.0 ** (1 - self.bias))

    def _magnitude(self, code: int) -> float:
        """The value of a code without its sign; NaN and Inf where ``specials`` says so."""
        top = self.magnitudes - 1
        e, m = code >> self.mbits, code & (2**self.mbits - 1)  # s eee mm -> eee | mm
        if self.specials == "fn" and code == top:
            return float("nan")
        if self.specials == "ieee" and e == 2**self.ebits - 1:
            return float("nan") if m else float("inf")
        significand, exponent = (m, 1) if e == 0 else (2**self.mbits + m, e)
        return float(significand * 2.0 ** (exponent - self.bias - self.mbits))

    def _finite_magnitudes(self) -> list[float]:
        """Values of the codes 0, 1, ... without sign, up to the largest finite one (they are increasing)."""
        values = (self._magnitude(c) for c in range(self.magnitudes))
        return [v for v in values if v == v and v != float("inf")]

    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``."""
        positive = torch.tensor([self._magnitude(c) for c in range(self.magnitudes)], dtype=torch.float64)
        if not self.signed:
            return positive
        table = torch.cat([positive, -positive])
        if self.specials == "fnuz":
            table[self.magnitudes] = float("nan")
        return table

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest grid values of ``x``; ties to the even code, saturating, the sign of zero kept.

        NaN becomes the format's NaN code where it has one, else its largest value with the sign of the NaN. An unsigned
        format takes what is negative for 0.
        """
        return self.encode_(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True))

    def encode_(self, x: Tensor) -> Tensor:
        x = exact_float(x) if self.signed else exact_float(x).clamp(min=0)
        nan = None if self.specials == "none" else x.isnan()
        if x.dtype == torch.float32 and isinstance(self.bias, int):
            code = _nearest_code(self, x.contiguous().view(torch.int32))
        else:
            boundaries = _boundaries(self, x.dtype, x.device)
            code = torch.bucketize(x.abs().contiguous(), boundaries, out_int32=True).to(torch.uint8)
            if self.signed:
                code |= torch.signbit(x).view(torch.uint8).bitwise_left_shift_(self.bits - 1)  # s | eeemm
        if self.specials == "fnuz":
            code.masked_fill_(code == self.magnitudes, 0)  # 0x80 is NaN here, there is no -0
        if nan is not None:
            code.masked_fill_(nan, self.magnitudes if self.specials == "fnuz" else self.magnitudes - 1)
        return code


@dataclass(frozen=True, slots=True)
class IntFormat(Grid):
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

    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``."""
        values = torch.arange(2**self.bits, dtype=torch.float64)
        return torch.where(values > self.max, values - 2**self.bits, values)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of uint8 ``codes``, in ``dtype``; INT8 needs no table."""
        if self.bits == 8 and self.signed and codes.dtype == torch.uint8:
            return codes.view(torch.int8).to(dtype)
        return lookup(self, codes, dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest integers of ``x``, ties to even, saturating; NaN becomes 0."""
        low = -self.max if self.signed else 0.0
        q = torch.round(exact_float(x)).clamp(low, self.max).nan_to_num(0.0)
        codes: Tensor = q.to(torch.int32).to(torch.uint8) & (2**self.bits - 1)  # two's complement: -1 -> 0b1111
        return codes


@dataclass(frozen=True, slots=True)
class PowerFormat(Grid):
    """E8M0, the scale format of OCP MX: code c is 2^(c - 127), 255 is NaN; no sign and no zero."""

    @property
    def bits(self) -> int:
        return 8

    def __str__(self) -> str:
        return "e8m0"

    def table(self) -> Tensor:
        """The value of every code, float64 ``[256]``."""
        powers = torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(255) - 127)
        return torch.cat([powers, torch.tensor([float("nan")], dtype=torch.float64)])

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest powers of two; what is not positive becomes 2^-127, NaN becomes NaN."""
        code = nearest_in_table(self, exact_float(x))
        return torch.where(x.isnan(), torch.full_like(code, 255), code)


def _shortest(value: float) -> str:
    """Nine digits, where they are the value, else as many as it takes."""
    short = f"{value:.9g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True, slots=True)
class CodebookFormat(Grid):
    """A table of ``2**bits`` finite values, code by code, in any order; ``name`` is a name that ``parse_format`` knows.

    Without a name the table itself is the name: ``lut(-1,-0.5,0,1)``. ``unit`` says what a scale of 1 stands for: the
    absolute maximum of a group of weights (``absmax``) or its root mean square (``rms``, for Gaussian grids).
    """

    values: tuple[float, ...]
    name: str = ""
    unit: Literal["absmax", "rms"] = "absmax"

    def __post_init__(self) -> None:
        if len(self.values) not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise FormatError(f"a codebook of {len(self.values)} values; expected a power of two from 2 to 256")
        if not all(math.isfinite(v) for v in self.values) or not any(self.values):
            raise FormatError("a codebook holds a value that is not finite, or zeros alone; expected finite values")

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    def __str__(self) -> str:
        return self.name or f"lut({','.join(map(_shortest, self.values))})"

    def table(self) -> Tensor:
        """The value of every code, float64 ``[2**bits]``."""
        return torch.tensor(self.values, dtype=torch.float64)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest values; ties to the even code, and down where both or neither are even."""
        return nearest_in_table(self, exact_float(x))


def exact_float(x: Tensor) -> Tensor:
    """``x`` in a float type in which midpoints of every grid are exact: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def nearest_in_table(format: Grid, x: Tensor) -> Tensor:
    """Codes (uint8) of the nearest finite values of the format's table."""
    boundaries, codes = _sorted_table(format, x.dtype, x.device)
    rank = torch.bucketize(x.contiguous(), boundaries, out_int32=True)
    return codes.index_select(0, rank.reshape(-1)).reshape(x.shape)


@cache
def _sorted_table(format: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boundaries between the sorted values of a table, and the code of each; equal values share the lower code."""
    table = format.table()
    finite = table.isfinite().nonzero().squeeze(1)
    values, order = table[finite].sort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    grid, codes = values[first], finite[order][first]
    upper_wins_tie = (codes[1:] % 2 == 0) & (codes[:-1] % 2 == 1)
    return midpoints(grid, upper_wins_tie=upper_wins_tie, dtype=dtype).to(device), codes.to(torch.uint8).to(device)


def lookup(format: Grid, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``table[codes]``: int32 indices, since torch has no gather by uint8."""
    table = _table(format, dtype, codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


@cache
def _table(format: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    return format.table().to(device=device, dtype=dtype)


@cache
def _boundaries(format: FloatFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints between neighbouring magnitudes, so that ``bucketize(|x|)`` is the code of the nearest one."""
    grid = torch.tensor(format._finite_magnitudes(), dtype=torch.float64)
    return midpoints(grid, upper_wins_tie=torch.arange(1, len(grid)) % 2 == 0, dtype=dtype).to(device)


def midpoints(grid: Tensor, *, upper_wins_tie: Tensor, dtype: torch.dtype) -> Tensor:
    """Boundaries between the increasing values of ``grid`` (float64), in ``dtype``, for ``torch.bucketize``.

    ``bucketize`` sends a value equal to a boundary down. Where the upper neighbour wins a tie, the boundary is moved
    one ulp down, and nothing but the tie itself changes sides. A midpoint that ``dtype`` cannot hold is no
    tie: the largest number below it separates the two.
    """
    middle = (grid[:-1] + grid[1:]) / 2
    rounded = middle.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    exact = rounded.double() == middle
    return torch.where((rounded.double() > middle) | (exact & upper_wins_tie), below, rounded)


def _nearest_code(format: FloatFormat, bits: Tensor) -> Tensor:
    """Codes (uint8) of float32 values, from their ``bits`` (int32), which are overwritten.

    With c = 2^23 steps of the binade of |x| (of the lowest one for subnormals), the float |x| + c is rounded to a step,
    ties to even, and its bits less those of c count steps. The exponent fields below add their codes. No operand is
    a denormal that matters, so flushing them changes nothing. Limits are put on bits, where NaN is above all numbers.
    In place, since fresh memory costs more than an operation.
    """
    c = bits >> (32 - format.bits)
    sign = c.bitwise_and_(format.magnitudes).to(torch.uint8) if format.signed else None
    magnitude = bits.bitwise_and_(0x7FFFFFFF).clamp_(max=_float_bits(format.max))
    if format.mbits == 0:
        code = _nearest_power(format, magnitude)
    else:
        drop = 23 - format.mbits
        lowest = (128 - int(format.bias)) << 23  # bits of the smallest normal
        torch.bitwise_and(magnitude, 0x7F800000, out=c).clamp_(min=lowest).add_(drop << 23)
        code = magnitude.view(torch.float32).add_(c.view(torch.float32)).view(torch.int32).sub_(c)
        code.add_(c.sub_(lowest + (drop << 23)).bitwise_right_shift_(drop))
    short = code.to(torch.uint8)
    return short if sign is None else short.bitwise_or_(sign)  # s | eeemm


def _nearest_power(format: FloatFormat, bits: Tensor) -> Tensor:
    """The same for a format without mantissa, where a tie goes to the even code and not to the even significand."""
    rebias = (127 - int(format.bias)) << 23
    code = bits - rebias
    code = (code + ((1 << 22) - 1) + ((code >> 23) & 1)) >> 23
    magic = torch.tensor(2.0 ** (24 - int(format.bias)), device=bits.device)
    low = (bits.view(torch.float32) + magic).view(torch.int32) - magic.view(torch.int32)
    return torch.where(bits < rebias + (1 << 23), low, code).clamp_(max=len(format._finite_magnitudes()) - 1)


def _float_bits(value: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def default_bias(ebits: int, specials: Specials = "none") -> int:
    """2^(E-1) - 1 (0 for E1); one more for ``fnuz``, which hardware defines so."""
    return int(2 ** (ebits - 1) - (specials != "fnuz"))


def default_specials(ebits: int, mbits: int) -> Specials:
    """What the field means by a bare name: E4M3 and E3M4 are ``fn``, E5M2 is ``ieee``, all others use every code."""
    defaults: dict[tuple[int, int], Specials] = {(4, 3): "fn", (3, 4): "fn", (5, 2): "ieee"}
    return defaults.get((ebits, mbits), "none")
