"""rounding: activations on the grid of a format, as operands of a product (W4A8, W6A8, W4A4, W8A8).

``linear(fake_quantize(x), W)`` is a product of codes, times a scale a row. Codes of a small float are numbers of FP8 or
of float16, exactly, and so are whole numbers up to 127 of float16. LLM-FP4's powers of two a channel, whether they are
taken back after rounding or were moved into W, are multiplied to the code where it still fits::

    x_j ~ code_j * 2^(after_j - down)  *  scale * 2^down
    after_j = -(own bias, unless shifted) - (bias of W's column)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fxquant.codegen.prepack import Declined, KernelWeight, Operands, prepare
from fxquant.codegen.remember import remember
from fxquant.errors import FormatError
from fxquant.formats import Format, parse_format
from fxquant.grids import FloatFormat
from fxquant.scheme import parse_spec
from fxquant.shifts import exact_window

BYTE_DOTS = 89
"""The first architecture whose tensor cores multiply FP8."""
_BYTES = tuple(f for f in (parse_format("e4m3"), parse_format("e5m2")) if isinstance(f, FloatFormat))
_HALF_LEAST, _HALF_MOST = 2.0**-24, 65504.0
Window = tuple[int, int]


@dataclass(frozen=True)
class InputRounding:
    """How the input of a packed linear is rounded (``ops.linear_wq_fused``): with ``scale`` where it is static."""

    spec: str
    scale: Tensor | None = None
    exponent_bias: Tensor | None = None
    shifted: bool = False


@dataclass(frozen=True)
class RoundedProduct:
    """A product of rounded activations: the weight, the FP8 of x's codes (None: float16), powers of two a channel."""

    weight: KernelWeight
    x: FloatFormat | None
    before: Tensor | None
    after: Tensor | None
    down: int


def plan(weight: Operands, rounding: InputRounding, *, arch: int) -> RoundedProduct | Declined:
    """How the kernels of an architecture take a weight with rounded input, or why they do not."""
    format = parse_spec(rounding.spec).format
    if isinstance(format, FloatFormat) and not isinstance(format.bias, int):
        return Declined(f"inputs are rounded to {format}, whose exponent bias is not whole")
    after = _after(weight, rounding)
    low, high = (0, 0) if after is None else _extremes(after)
    own = replace(weight, exponent_bias=None)
    reason = ""
    for target in (*(_BYTES if arch >= BYTE_DOTS else ()), None):
        window = _window(format, target)
        if window is None or high - low > window[1] - window[0]:
            reason = f"codes of {format} times 2^{low}..2^{high} are beyond {target or 'float16'}"
            continue
        down = min(max(0, high - window[1]), low - window[0])  # the least that brings both ends inside
        kernel = _for_target(own, target)
        if isinstance(kernel, KernelWeight):
            own_bias = rounding.exponent_bias
            before = None if own_bias is None else remember(own_bias.int, "before", own_bias)
            return RoundedProduct(kernel, target, before, after, down)
        reason = kernel.reason
    return Declined(reason)


def _for_target(weight: Operands, target: FloatFormat | None) -> KernelWeight | Declined:
    """The weight for products with float16, or with any FP8: tensor cores take two different ones."""
    if target is None:
        return prepare(weight)
    made: KernelWeight | Declined = Declined("")
    for own in _BYTES:
        made = prepare(weight, own)
        if isinstance(made, KernelWeight):
            break
    return made


def _after(weight: Operands, rounding: InputRounding) -> Tensor | None:
    """Powers of two that a channel's code is multiplied by, int32 [K]; None where all are 0."""
    taken_back = None if rounding.shifted else rounding.exponent_bias
    biases = [b for b in (taken_back, weight.exponent_bias) if b is not None]
    if not biases:
        return None
    return remember(lambda: -torch.stack([b.int() for b in biases]).sum(0).int(), "after", *biases)


def _extremes(after: Tensor) -> Window:
    return remember(lambda: (int(after.min()), int(after.max())), "extremes", after)


@cache
def _window(format: Format, target: FloatFormat | None) -> Window | None:
    """The powers of two that take every value of ``format`` to one of the target; None where there are none."""
    if target is not None:
        try:
            return exact_window(format, target) if isinstance(format, FloatFormat) else None
        except FormatError:
            return None
    if not isinstance(format, FloatFormat):
        return (0, 0) if format.max <= 2048 else None
    low = round(math.log2(_HALF_LEAST / format.smallest))
    return low, math.floor(math.log2(_HALF_MOST / format.max))
