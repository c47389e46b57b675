"""Formats by bit shifts: small floats to fp16, bf16 and fp32, and FP4 to FP8, without a table where it is exact.

**Bias shift** (ZeroQuant(4+2), section 4): the fields of an ExMy code, put where the wider float has them, are that
float times ``2^(bias - wide bias)``. One multiplication repairs it, subnormals included::

    E3M2 code     s eee mm                      E3M2 as fp16     s 00eee mm00000000  * 2^12
    E2M1 as bf16  s 000000ee m000000 * 2^126    E3M2 as bf16     s 00000eee mm00000  * 2^124

**FP4 to FP8** (ZeroQuant-FP, section 3): ``value * 2^n`` for a power-of-two scale is the code shifted to the wider
mantissa with ``n`` added to its exponent; 0 and the subnormals, which have no exponent to add to, go by value. The
result is exact for n in ``exact_window``, and only there.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.grids import FloatFormat

_WIDE: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float16: (torch.int16, 10, 15),
    torch.bfloat16: (torch.int16, 7, 127),
    torch.float32: (torch.int32, 23, 127),
}
"""dtype -> the integer of its width, its mantissa bits and its bias."""


def fits(format: FloatFormat, dtype: torch.dtype) -> bool:
    """Whether bias-shift decoding of ``format`` to ``dtype`` is exact: every code is finite, and in range there."""
    if dtype not in _WIDE or not isinstance(format.bias, int) or format.specials != "none" or not format.signed:
        return False
    _, mbits, bias = _WIDE[dtype]
    ebits, largest = torch.finfo(dtype).bits - 1 - mbits, torch.finfo(dtype).max
    factor = bias - format.bias
    return format.ebits < ebits and format.mbits <= mbits and -bias < factor <= bias and format.max <= largest


def denormals_flushed() -> bool:
    """Whether this thread's CPU arithmetic takes denormal floats for zero."""
    return float(torch.full((1,), 2.0**-127) * 2.0) == 0.0


def decode(codes: Tensor, format: FloatFormat, dtype: torch.dtype = torch.float16) -> Tensor:
    """The values of uint8 ``codes`` in ``dtype``, by bias shift; by table while denormals are flushed to zero.

    Raises FormatError for a format that does not fit (``fits``).
    """
    if not fits(format, dtype):
        raise FormatError(
            f"{format} cannot be decoded to {dtype} by shift: that takes finite codes only, and float16, bfloat16 or "
            f"float32 that holds all of its values; use format.decode"
        )
    if denormals_flushed():
        return format.decode(codes, dtype)
    integer, mbits, bias = _WIDE[dtype]
    sign_at = format.ebits + format.mbits
    wide = codes.to(integer)
    magnitude = (wide & (2**sign_at - 1)) << (mbits - format.mbits)
    sign = (wide >> sign_at) << (torch.iinfo(integer).bits - 1)
    value: Tensor = (magnitude | sign).view(dtype) * 2.0 ** (bias - int(format.bias))
    return value


@cache
def exact_window(source: FloatFormat, target: FloatFormat) -> tuple[int, int]:
    """The powers n (lowest, highest) for which every value of ``source`` times 2^n is a value of ``target``.

    Raises FormatError where there is none.
    """
    grid = set(target.table()[target.table().isfinite()].tolist())
    values = source.table()[source.table().isfinite()].tolist()
    reach = range(-160, 161)
    exact = [n for n in reach if all(math.ldexp(v, n) in grid for v in values)]
    if not exact:
        raise FormatError(f"no power of two takes every value of {source} to {target}")
    return exact[0], exact[-1]


def cast(
    codes: Tensor,
    exponents: Tensor | int,
    source: FloatFormat,
    target: FloatFormat,
    *,
    outside: Literal["error", "clamp"] = "error",
) -> Tensor:
    """Codes of ``target`` for ``decode(codes) * 2^exponents``, exactly.

    ``exponents`` is one integer or an integer tensor that broadcasts with ``codes``. Exponents outside ``exact_window``
    are an error, or with ``outside="clamp"`` taken for the nearest inside. Raises FormatError.
    """
    low, high = exact_window(source, target)
    n = torch.as_tensor(exponents, device=codes.device)
    if n.is_floating_point():
        raise FormatError(f"exponents are {n.dtype}; expected integers")
    if n.numel() and (int(n.min()) < low or int(n.max()) > high):
        if outside == "error":
            raise FormatError(
                f"exponents {int(n.min())}..{int(n.max())} leave the window {low}..{high} in which {source} to "
                f'{target} is exact; move a power of two into the outer scale, or pass outside="clamp"'
            )
        n = n.clamp(low, high)
    n, wide = n.to(torch.int32), codes.to(torch.int32)
    magnitude = wide & (2 ** (source.bits - 1) - 1)
    sign = (wide >> (source.bits - 1)) << (target.bits - 1)
    shift = target.mbits - source.mbits
    added = (magnitude << shift) + ((int(target.bias) - int(source.bias) + n) << target.mbits)
    has_exponent = (magnitude >= 1 << source.mbits) & (added >= 1 << target.mbits)
    by_value = target.encode(torch.ldexp(source.decode(magnitude.to(torch.uint8), torch.float64), n)).to(torch.int32)
    return (torch.where(has_exponent, added, by_value) | sign).to(torch.uint8)
