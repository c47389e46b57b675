"""Decodings: how a kernel gets the numbers of a format out of packed words by shifts and masks, with no table.

The fields of a code are put where a wider float has its own. What comes out is the value times a power of two, which
goes into the scale (ZeroQuant(4+2), section 4: the bias shift)::

    E3M2 code            s eee mm               value = float16 * 2^12       15 - 3
    as a float16         s 00eee mm00000000
    E2M1 as E4M3         s 00ee m00             value = E4M3 * 2^6            7 - 1
    INT4 as a float16    s 00000 0000000mmm     value = float16 * 2^24        sign and magnitude: a subnormal float16

Subnormals become subnormals, zeros stay zeros. A ``Decoding`` is checked over all codes when it is made: codes for
which the equation does not hold (NaN, the most negative integer) are ``left_out``, and no kernel takes them.

Two targets have dots: ``float16``, and a byte float (E4M3, E5M2). Where the codes lie in the high byte, four byte lanes
of a word T become two registers of two float16, ``[0 T0 0 T2]`` and ``[0 T1 0 T3]``; wider ones lie in lanes of 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from fxquant.bitops import Expr, permute
from fxquant.errors import FormatError
from fxquant.formats import Format, IntFormat, parse_format
from fxquant.grids import FloatFormat
from fxquant.layouts import Layout, Stream
from fxquant.tilings import tile

BLOCK = 256
"""Columns of a tile, unless a group of scales asks for fewer: a step of a kernel's loop."""
SMALLEST_SLICE = {True: 8, False: 32}
"""Units side by side, at least: for float16 (True) two columns of each make the 16 that a dot takes, for bytes 32."""
EXACT = 128
"""Columns of byte floats whose products are summed at once: Hopper's tensor cores add with fewer bits than float32."""
WASTE = 1 / 16
"""How much longer than with the smallest block a row may get for the sake of a larger one."""


@dataclass(frozen=True)
class Decoding:
    """``value(code) = target(bits of the code at places) * 2^log2``, for the codes that are not ``left_out``.

    ``target`` is None for float16, else the byte float. ``recode[code]`` is the code that is packed in its place (sign
    and magnitude for signed integers). ``layout`` packs recoded codes, its tile is ``block`` columns.
    """

    format: Format
    target: FloatFormat | None
    layout: Layout
    log2: int
    recode: tuple[int, ...]
    left_out: tuple[int, ...]

    @property
    def block(self) -> int:
        """Columns of a tile: what one step of a kernel's loop decodes of a row."""
        return self.layout.tile[1]

    @property
    def words(self) -> tuple[Expr, ...]:
        """The words of a unit."""
        return self.layout.streams[0].words

    @property
    def run(self) -> int:
        """Units side by side in a tile; neighbours in memory, and in what is decoded."""
        return self.layout.sizes["r"]

    @property
    def slices(self) -> int:
        """Runs of neighbouring columns that a tile decodes to, each one dot."""
        return self.block // self.width

    @property
    def width(self) -> int:
        """Columns of a slice."""
        return self.run * (2 if self.target is None else 1)

    def every(self, padded: int) -> int:
        """Slices after which a kernel scales its sum: as many as divide a block and lie in one group.

        ``padded``: the columns that a group of scales takes when packed, 0 for a scale a row. For byte floats no more
        than ``EXACT`` columns either way.
        """
        columns = padded if self.target is None else math.gcd(padded, EXACT)
        return math.gcd(self.slices, columns // self.width) if columns else self.slices

    @cached_property
    def outputs(self) -> tuple[Expr, ...]:
        """Slice by slice what is decoded: for float16 registers of two, for a byte float bytes."""
        decode = self.layout.decode
        if self.target is not None or len(self.layout.lanes) == 2:
            return decode
        return tuple(half for t in decode for half in (permute(t, 0x2404), t & 0xFF00FF00))

    def codes(self, codes: Tensor) -> Tensor:
        """Recoded ``codes``, ready to pack. Raises FormatError for one that no kernel takes."""
        if self.left_out:
            bad = torch.isin(codes, torch.tensor(self.left_out, dtype=torch.uint8, device=codes.device))
            if bool(bad.any()):
                code = int(codes[bad][0])
                raise FormatError(f"kernels do not take code {code:#x} of {self.format}, which it has no value for")
        if self.recode == tuple(range(len(self.recode))):
            return codes
        return torch.tensor(self.recode, dtype=torch.uint8, device=codes.device)[codes.long()]


def decoding(format: Format, target: FloatFormat | None = None, *, group: int = 0, cols: int = 0) -> Decoding:
    """The decoding of ``format`` to float16 (``target`` None) or a byte float.

    ``group``: columns that share a scale, 0 for a scale a row; slices are no wider than a group. ``cols``: columns of
    the weight, where known; blocks are then no longer than fits it. Raises FormatError, saying why, for a format with
    no such decoding.
    """
    most = _widest(format, target)
    runs = [run for run in (most >> i for i in range(8)) if run >= SMALLEST_SLICE[target is None]]
    fitting = [run for run in runs if not group or group % _width(run, target) == 0] or runs[-1:]
    if cols:
        per = _made(format, target, runs[0]).block // runs[0]
        least = min(_padded(cols, per * run) for run in fitting)
        fitting = [run for run in fitting if _padded(cols, per * run) <= least * (1 + WASTE)]
    return _made(format, target, fitting[0])


def _padded(cols: int, block: int) -> int:
    return -(-cols // block) * block


def _width(run: int, target: FloatFormat | None) -> int:
    return run * (2 if target is None else 1)


@cache
def _made(format: Format, target: FloatFormat | None, run: int) -> Decoding:
    """The decoding with ``run`` units side by side."""
    places, log2, recode = _places(format, target)
    left_out = _check(format, target, places, log2, recode)
    made = _half_layout(format, places, run) if target is None else _byte_layout(format, target, places, run)
    return Decoding(format, target, made, log2, recode, left_out)


def _widest(format: Format, target: FloatFormat | None) -> int:
    """Units side by side that make a block of ``BLOCK`` columns, in slices of 32 to 64, of bytes to 128."""
    smallest = _made(format, target, SMALLEST_SLICE[target is None])
    fill = BLOCK * smallest.run // smallest.block
    low, high = (16, 32) if target is None else (32, 128)
    return min(max(1 << fill.bit_length() - 1, low), high)


def decodes(format: Format, target: FloatFormat | None = None) -> str | None:
    """Why ``format`` has no decoding to the target; None where it has one."""
    try:
        decoding(format, target)
    except FormatError as error:
        return str(error)
    return None


# --- places ----------------------------------------------------------------------------------------------------------
def _places(format: Format, target: FloatFormat | None) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The place of every bit of a recoded code, lowest first, log2 of the factor, and the recoding."""
    mbits, bias, sign = (10, 15, 15) if target is None else (target.mbits, int(target.bias), 7)
    same = tuple(range(2**format.bits))
    if isinstance(format, IntFormat):
        # a subnormal: mantissa * 2^(1 - bias - mbits)
        log2 = bias - 1 + mbits
        if not format.signed:
            return tuple(range(format.bits)), log2, same
        return (*range(format.bits - 1), sign), log2, _sign_and_magnitude(format)
    if isinstance(format, FloatFormat):
        if not isinstance(format.bias, int):
            raise FormatError(f"{format} has an exponent bias of {format.bias}; a shift of bits takes a whole one")
        up = mbits - format.mbits
        if up < 0:
            raise FormatError(f"{format} has more mantissa bits than {_name(target)}, {mbits}")
        magnitude = tuple(range(up, up + format.ebits + format.mbits))
        return (*magnitude, *([sign] if format.signed else [])), bias - format.bias, same
    raise FormatError(f"{format} is a table of values; only floats and integers are decoded by shifts")


def _sign_and_magnitude(format: IntFormat) -> tuple[int, ...]:
    """Code of two's complement -> sign and magnitude; the most negative, which has none, to 0."""
    values = [int(v) for v in format.table()]
    top = 1 << format.bits - 1
    return tuple(0 if abs(v) >= top else abs(v) | (top if v < 0 else 0) for v in values)


def _check(
    format: Format, target: FloatFormat | None, places: tuple[int, ...], log2: int, recode: tuple[int, ...]
) -> tuple[int, ...]:
    """The codes that are no finite number, or for which the equation of ``Decoding`` does not hold; FormatError where
    a finite value is among those, other than the most negative integer."""
    if any(not 0 <= p < (16 if target is None else 8) for p in places) or len(set(places)) < len(places):
        raise FormatError(f"{format} has more exponent bits than {_name(target)}")
    pattern = torch.tensor([sum((code >> i & 1) << p for i, p in enumerate(places)) for code in recode])
    if target is None:
        got = pattern.to(torch.int16).view(torch.float16).double()
    else:
        got = target.decode(pattern.to(torch.uint8), torch.float64)
    want = format.table()
    wrong = (got * math.ldexp(1.0, log2) != want).nonzero().flatten().tolist()
    spared = [2 ** (format.bits - 1)] if isinstance(format, IntFormat) and format.signed else []
    for code in wrong:
        if bool(want[code].isfinite()) and code not in spared:
            raise FormatError(f"code {code:#x} of {format}, {float(want[code]):g}, is not a {_name(target)} shifted")
    return tuple(sorted({*wrong, *(~want.isfinite()).nonzero().flatten().tolist()}))


def _name(target: FloatFormat | None) -> str:
    return "float16" if target is None else str(target)


# --- layouts ---------------------------------------------------------------------------------------------------------
def _half_layout(format: Format, places: tuple[int, ...], run: int) -> Layout:
    """Units of 32-bit words; slice ``2g + q`` of a byte-lane tiling, or ``2g + h``, has columns ``2r + j``."""
    lane = 8 if all(p >= 8 for p in places) else 16
    places = tuple(p - 8 for p in places) if lane == 8 else places
    words, decode = tile(places, lane).decode(32)
    if lane == 8:
        cols, slots = f"g{len(decode)} q2 r{run} j2", "g j q"
    else:  # the groups as two axes, so that four codes are packed at a time
        cols, slots = f"g{len(decode) // 2} h2 r{run} j2", "g h j"
    return Layout(
        f"kernel_{format}_half_r{run}", format.bits, decode, (Stream(words, "w r"),), cols=cols, slots=slots, units="r",
        lanes=tuple(range(0, 32, lane)), field=places,
    )  # fmt: skip


def _byte_layout(format: Format, target: FloatFormat, places: tuple[int, ...], run: int) -> Layout:
    """Units of bytes, each decoded for itself; slice g has columns ``r``."""
    words, decode = tile(places, 8, wrap=False).decode(8)
    return Layout(
        f"kernel_{format}_{target}_r{run}", format.bits, decode, (Stream(words, "w r"),), cols=f"g{len(decode)} r{run}",
        slots="g", units="r", field=places,
    )  # fmt: skip


KERNEL_FORMATS = tuple(
    parse_format(name) for name in (
        "e3m2", "e2m3", "e2m2", "e3m1", "e2m1", "e3m0", "e4m3", "e5m2", "int4", "int8", "uint4", "uint8",
    )
)  # fmt: skip
"""Formats that kernels are proven for; the others that ``decoding`` takes go the same way."""
