"""Scales: from a matrix to the scale of every block, rounded to how it is stored, before any code is chosen.

::

    ideal    absmax / format.max, symmetric;  (max - min) / (2^bits - 1) with a zero point;  rms for Gaussian grids
    e8m0     2^k    floor: k = floor(log2 absmax) - floor(log2 format.max)      OCP MX v1.0, section 6.3
                    even:  floor of absmax rounded to the format's mantissa first
                    ceil, round: of log2 ideal      mse: of the two powers around it, the one with the smaller error
    m1       2^k    ceil (as printed), floor, round of log2 ideal, or mse       ZeroQuant-FP, section 3 (M1)
    m2       2^-k times the largest ideal scale of the row; k: ceil, floor, round of log2(largest / ideal), or mse  (M2)
    e4m3     E4M3 of ideal / tensor_scale, at least 2^-6; tensor_scale = absmax / (448 * format.max) (NVFP4)
             ceil: the power of two at or above that, which a reciprocal holds exactly (as checkpoints store it)

A block of zeros gets the scale 1 (2^-127 under e8m0, as MX tools have it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import bulk
from fxquant.errors import WeightError
from fxquant.grids import CodebookFormat, FloatFormat
from fxquant.scheme import Block, QuantSpec, parse_spec

Clip = Literal["absmax", "mse"]
Ranges = tuple[Tensor, Tensor]
"""Minimum and maximum of every block."""
CHUNK = 1 << 19
"""Elements that a pass over a matrix takes at a time, so that its intermediates stay in the cache."""
CLIPS = tuple(2.0 ** (-i / 12) for i in (*range(19), -1, -2, -3))
"""Ranges that ``clip="mse"`` tries, as parts of the absolute maximum: 1, down to 2^-1.5, and up to 2^(1/4).

On a grid with uneven steps it can pay to leave the largest values unused.
"""
ROW_SCALES = tuple(2.0 ** (i / 16) for i in range(16))
"""What M2 tries for the one real scale of a row, as multiples of the largest ideal scale of its groups: an octave."""


@dataclass(frozen=True)
class Scales:
    """Stored scales of a matrix: ``scale`` and ``zero_point`` one a block, ``tensor_scale`` above them or None."""

    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        """What a decoded code is multiplied with, float32 or wider."""
        wide = self.scale if self.scale.dtype == torch.float64 else self.scale.float()
        return wide if self.tensor_scale is None else wide * self.tensor_scale


def choose(
    matrix: Tensor, spec: QuantSpec, *, clip: Clip = "absmax", name: str = "tensor", ranges: Ranges | None = None,
    column_weight: Tensor | None = None,
) -> Scales:  # fmt: skip
    """Scales for every block of ``[rows, cols]`` floats.

    ``absmax`` keeps the largest value of a block in range; ``mse`` tries other ranges too (CLIPS) and keeps, block by
    block, the one with the least squared error, columns weighted by ``column_weight [cols]``. So do the ways to a power
    of two that are called mse. ``ranges`` are the ``extremes`` of the blocks where they are known. Raises WeightError
    where a scale overflows its storage.
    """
    low, high = ranges or extremes(matrix, spec.block(*matrix.shape))
    searched = spec.kind.outer == "row" and spec.rounding == "mse"  # every group's whole octave already
    if clip == "absmax" or searched:
        return _stored(matrix, low, high, spec, name, weight=column_weight)
    most = torch.finfo(spec.scale_dtype).max * spec.format.max / max(float(torch.maximum(-low, high).amax()), 1e-30)
    parts = (c for c in CLIPS if c <= max(1.0, most))
    tries = (_stored(matrix, low, high, spec, name, part=c, weight=column_weight) for c in parts)
    return _least_error(matrix, spec, tries, column_weight)[0]


def _stored(
    matrix: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, name: str, *, part: float = 1.0,
    weight: Tensor | None = None,
) -> Scales:  # fmt: skip
    """Scales for ``part`` of the range ``low..high`` of every block, as they are stored."""
    if spec.has_zero_point:
        return _with_zero_point(part * low.clamp(max=0), part * high.clamp(min=0), spec, name)
    absmax = part * torch.maximum(-low, high)
    ideal = absmax / spec.format.max
    if isinstance(spec.format, CodebookFormat) and spec.format.unit == "rms":
        ideal = part * _rms(matrix, spec.block(*matrix.shape))
    if spec.kind.outer == "row":
        return _relative_powers(matrix, ideal, part, spec, weight)
    if spec.kind.roundings and spec.kind.outer is None:
        return _powers(matrix, absmax, ideal, spec, weight)
    if spec.kind.format is None:
        return Scales(_where_positive(_cast(ideal, spec, name), ideal))
    grid = spec.kind.format
    if spec.kind.outer == "tensor":
        largest = ideal.amax().reshape(1, 1) / part  # the whole range, whatever part of it a block uses
        outer = largest / grid.max
        if spec.rounding == "ceil":
            outer = power_of_two(_ceil_log2(_where_positive(outer, outer)))
        outer = _where_positive(outer, largest).float()
        scale = grid.round((ideal / outer).float().clamp(min=2.0**-6, max=grid.max))
        return Scales(scale, tensor_scale=outer)
    return Scales(_where_positive(grid.round(ideal.float()).clamp(min=grid.smallest), ideal))


def _where_positive(scale: Tensor, ideal: Tensor) -> Tensor:
    """``scale``, and 1 for blocks of zeros; NaN stays."""
    return torch.where(ideal == 0, torch.ones_like(scale), scale)


def _cast(ideal: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """``ideal`` in its storage dtype; what underflows becomes the smallest normal, what overflows is an error."""
    info = torch.finfo(spec.scale_dtype)
    if bool(((ideal > info.max) & ideal.isfinite()).any()):
        raise WeightError(
            f"{name} needs a scale of {float(ideal.max()):.3g}, above the {spec.scale} maximum {info.max}"
        )
    return ideal.to(spec.scale_dtype).clamp(min=info.tiny)


def _with_zero_point(low: Tensor, high: Tensor, spec: QuantSpec, name: str) -> Scales:
    ideal = (high - low) / spec.format.max
    scale = _where_positive(_cast(ideal, spec, name), ideal)
    zero_point = torch.round(-low / scale.to(low.dtype)).clamp(0, spec.format.max)
    return Scales(scale, zero_point.nan_to_num(0).to(torch.uint8))


# --- powers of two ----------------------------------------------------------------------------------------------------
def _floor_log2(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent - 1


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    return exponent - (mantissa == 0.5).to(exponent.dtype)


def _round_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    below: Tensor = mantissa < math.sqrt(0.5)
    return exponent - below.to(exponent.dtype)


_LOG2: dict[str, Callable[[Tensor], Tensor]] = {"floor": _floor_log2, "ceil": _ceil_log2, "round": _round_log2}


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponent, exact; exponents limited to E8M0's."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.int().clamp(-127, 127)).to(dtype)


def _powers(matrix: Tensor, absmax: Tensor, ideal: Tensor, spec: QuantSpec, weight: Tensor | None) -> Scales:
    if spec.rounding == "mse":
        low = _floor_log2(ideal)
        scales = (Scales(_or_zero_block(power_of_two(low + up), absmax, spec)) for up in (0, 1))
        return _least_error(matrix, spec, scales, weight)[0]
    if spec.scale == "e8m0" and spec.rounding in ("floor", "even"):
        top = int(torch.frexp(torch.tensor(spec.format.max, dtype=torch.float64)).exponent) - 1
        exponent = _floor_log2(absmax) - top
        if spec.rounding == "even":
            mbits = spec.format.mbits if isinstance(spec.format, FloatFormat) else spec.format.bits - 2
            exponent = exponent + (torch.frexp(absmax).mantissa >= 1 - 2.0 ** -(mbits + 2)).to(exponent.dtype)
    else:
        exponent = _LOG2[spec.rounding](ideal)
    return Scales(_or_zero_block(power_of_two(exponent), absmax, spec))


def _or_zero_block(scale: Tensor, absmax: Tensor, spec: QuantSpec) -> Tensor:
    zero = 2.0**-127 if spec.scale == "e8m0" else 1.0
    scale = torch.where(absmax == 0, torch.full_like(scale, zero), scale)
    return torch.where(absmax.isfinite(), scale, torch.full_like(scale, torch.nan))


def _relative_powers(matrix: Tensor, ideal: Tensor, part: float, spec: QuantSpec, weight: Tensor | None) -> Scales:
    """M2: powers of two below one real scale of the row, the largest ideal one (of the whole range) or an mse search's.

    The search tries ROW_SCALES; for each the two powers of two around every group's ideal scale, and the row keeps the
    one with the least error in all.
    """
    largest = ideal.amax(dim=1, keepdim=True) / part
    outer = _where_positive(largest, largest).float()
    high = spec.block(*matrix.shape)[0]
    if spec.rounding != "mse":
        ratio = torch.where(ideal > 0, outer / ideal, torch.ones_like(ideal))
        return Scales(power_of_two(-_LOG2[spec.rounding](ratio)), tensor_scale=_of_rows(outer, high, len(matrix)))
    best, least = outer, torch.full_like(outer, torch.inf)
    powers = torch.ones_like(ideal, dtype=torch.float32)
    for step in ROW_SCALES if ideal.shape[1] > 1 else (1.0,):
        real = (outer * step).clamp(max=torch.finfo(torch.float32).max)
        low = _floor_log2(torch.where(ideal > 0, real / ideal, torch.ones_like(ideal)))
        tall = _of_rows(real, high, len(matrix))
        tries = (Scales(power_of_two(-(low + up)), tensor_scale=tall) for up in (0, 1))
        found, errors = _least_error(matrix, spec, tries, weight)
        error = errors.sum(1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, real, best)
        powers = torch.where(better, found.scale, powers)
    return Scales(powers, tensor_scale=_of_rows(best, high, len(matrix)))


def _of_rows(outer: Tensor, high: int, rows: int) -> Tensor:
    """One scale for every row of a matrix, from one for every ``high`` of them."""
    return outer.repeat_interleave(high, dim=0)[:rows]


# --- the least error --------------------------------------------------------------------------------------------------
def _least_error(
    matrix: Tensor, spec: QuantSpec, candidates: Iterator[Scales], weight: Tensor | None = None
) -> tuple[Scales, Tensor]:
    """Block by block, the candidate with the least squared error, the first of equals; and these errors."""
    best = next(candidates)
    least = squared_error(matrix, best, spec, weight)
    for other in candidates:
        error = squared_error(matrix, other, spec, weight)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other.scale, best.scale)
        zero = None
        if best.zero_point is not None and other.zero_point is not None:
            zero = torch.where(better, other.zero_point, best.zero_point)
        best = Scales(scale, zero, best.tensor_scale)
    return best, least


def squared_error(matrix: Tensor, scales: Scales, spec: QuantSpec, weight: Tensor | None = None) -> Tensor:
    """``sum weight_j (W_ij - W'_ij)^2`` of every block; ``weight [cols]`` is 1 where it is not given."""
    high = spec.block(*matrix.shape)[0]
    sums = []
    for _, part, own in chunks(matrix, scales, high):
        x = part if part.dtype == torch.float64 else part.float()
        restored = dequantize(quantize(x, own, spec), own, spec, x.dtype)
        squares = (x - restored).square_()
        if weight is not None:
            squares.mul_(weight.to(x.dtype))
        sums.append(block_reduce(squares, spec.block(*x.shape), "sum"))
    return torch.cat(sums)


def chunks(matrix: Tensor, scales: Scales, high: int) -> Iterator[tuple[slice, Tensor, Scales]]:
    """Runs of whole blocks of rows with their scales, about CHUNK elements each."""
    rows, cols = matrix.shape
    step = max(1, CHUNK // max(cols * high, 1)) * high
    for start in range(0, rows, step):
        where = slice(start, min(start + step, rows))
        own = slice(start // high, -(-where.stop // high))
        outer = scales.tensor_scale
        part = outer[where] if outer is not None and len(outer) == rows and rows > 1 else outer
        zero = None if scales.zero_point is None else scales.zero_point[own]
        yield where, matrix[where], Scales(scales.scale[own], zero, part)


# --- codes for given scales -------------------------------------------------------------------------------------------
def quantize(matrix: Tensor, scales: Scales, spec: QuantSpec) -> Tensor:
    """Codes (uint8) of ``[rows, cols]`` floats: ``encode(x / scale)``, or ``+ zero_point``.

    Under a tensor scale (NVFP4) x is multiplied by ``(1 / tensor_scale) / scale``, as the hardware's tools do it.
    """
    if matrix.numel() < bulk.LARGE or isinstance(spec.format, CodebookFormat):  # whose text is not all of its table
        return _in_chunks(matrix, scales, spec)
    return _ENCODE(matrix, scales.scale, scales.zero_point, scales.tensor_scale, str(spec))  # type: ignore[no-any-return]


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, spec: str) -> Tensor:
    """The reference of ``fxquant::encode``, which is ``quantize`` for many values."""
    return _in_chunks(x, Scales(scale, zero_point, tensor_scale), parse_spec(spec))


_ENCODE = bulk.define(
    "encode",
    "(Tensor x, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, str spec) -> Tensor",
    encode,
    lambda x, *rest: x.new_empty(x.shape, dtype=torch.uint8),
)


def _in_chunks(matrix: Tensor, scales: Scales, spec: QuantSpec) -> Tensor:
    (rows, cols), high = matrix.shape, spec.block(*matrix.shape)[0]
    if rows * cols <= CHUNK or len(scales.scale) != -(-rows // high):
        return _quantize(matrix, scales, spec)
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    for where, part, own in chunks(matrix, scales, high):
        codes[where] = _quantize(part, own, spec)
    return codes


def _quantize(matrix: Tensor, scales: Scales, spec: QuantSpec) -> Tensor:
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    block = spec.block(*x.shape)
    if spec.kind.outer == "tensor" and scales.tensor_scale is not None:
        ratio = x * spread((1 / scales.tensor_scale) / scales.scale, block, x.shape)
    else:
        ratio = x / spread(scales.effective.to(x.dtype), block, x.shape)
    if scales.zero_point is not None:
        ratio = torch.round(ratio) + spread(scales.zero_point.to(x.dtype), block, x.shape)
    return spec.format.encode_(ratio)


def dequantize(codes: Tensor, scales: Scales, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Real values ``[rows, cols]`` of codes: computed in float32 (or float64) and rounded once to ``dtype``."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    block = spec.block(*codes.shape)
    value = spec.format.decode(codes, inner)
    if scales.zero_point is not None:
        value = value - spread(scales.zero_point.to(inner), block, codes.shape)
    return (value * spread(scales.effective.to(inner), block, codes.shape)).to(dtype)


# --- blocks of a matrix -----------------------------------------------------------------------------------------------
def spread(scale: Tensor, block: Block, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Scales of blocks so that they broadcast over the matrix: each repeated over its block."""
    (high, wide), (rows, cols) = block, shape
    if scale.shape[0] not in (1, rows):
        scale = scale.repeat_interleave(high, dim=0)[:rows]
    if scale.shape[1] not in (1, cols):
        scale = scale.repeat_interleave(wide, dim=1)[:, :cols]
    return scale


def extremes(matrix: Tensor, block: Block) -> Ranges:
    """Minimum and maximum of every block, float32 or float64; NaN where a block holds one."""
    if matrix.numel() < bulk.LARGE:
        return block_extremes(matrix, *block)
    return _EXTREMES(matrix, *block)  # type: ignore[no-any-return]


def block_extremes(matrix: Tensor, high: int, wide: int) -> Ranges:
    """The reference of ``fxquant::extremes``, which is ``extremes`` for many values."""
    block, x = (high, wide), matrix if matrix.dtype == torch.float64 else matrix.float()
    return block_reduce(x, block, "min"), block_reduce(x, block, "max")


_EXTREMES = bulk.define(
    "extremes",
    "(Tensor matrix, int high, int wide) -> (Tensor, Tensor)",
    block_extremes,
    lambda x, high, wide: tuple(x.new_empty(-(-x.shape[0] // high), -(-x.shape[1] // wide)) for _ in "ab"),
)


def _rms(matrix: Tensor, block: Block) -> Tensor:
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    total = block_reduce(x.square(), block, "sum")
    return (total / block_reduce(torch.ones_like(x), block, "sum")).sqrt()


def block_reduce(x: Tensor, block: Block, how: Literal["min", "max", "sum"]) -> Tensor:
    """Reduce every block of ``[rows, cols]`` to one value; blocks at the edges may be smaller."""
    (rows, cols), (high, wide) = x.shape, block
    if x.numel() == 0:
        return x.new_zeros(-(-rows // max(high, 1)), -(-cols // max(wide, 1)))
    down, across = -rows % high, -cols % wide
    if down or across:  # repeat the edge, or fill with zeros for a sum
        mode, value = ("constant", 0.0) if how == "sum" else ("replicate", None)
        x = F.pad(x[None, None], (0, across, 0, down), mode=mode, value=value)[0, 0]
    view = x.reshape((rows + down) // high, high, (cols + across) // wide, wide)
    if how == "sum":
        return view.sum(dim=(1, 3))
    return view.amin(dim=(1, 3)) if how == "min" else view.amax(dim=(1, 3))
