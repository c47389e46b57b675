"""QuantizedTensor: codes and scales, and the round-to-nearest quantizer that makes one from a float tensor.

A weight is seen as a matrix: ``rows`` are output channels, ``cols`` all that is summed over. A linear weight is its
own matrix, a convolution kernel ``[out, in, kh, kw]`` becomes ``[out, in * kh * kw]``, expert weights ``[experts, out,
in]`` become ``[experts * out, in]``. Groups run along the columns, so one rule covers all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant import packing
from fxquant.errors import FormatError, WeightError
from fxquant.scheme import PerTensor, QuantSpec, parse_spec


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what they mean. Invariants (``check`` raises a FormatError when one is broken)::

    codes       uint8 [rows, cols], every code < 2**spec.format.bits,  rows * cols == prod(shape)
    scale       spec.scale_dtype, spec.scale_shape(rows, cols), finite and > 0
    zero_point  uint8, the shape of scale, exactly where spec.has_zero_point; else None
    real        = format.decode(codes) * scale            (each scale spread over its group)
                = (codes - zero_point) * scale            for unsigned integers
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    def check(self) -> None:
        """Raise a FormatError that names the first broken invariant."""
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or self.codes.numel() != math.prod(self.shape):
            raise FormatError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)} for a tensor of {self.shape}")
        if self.codes.numel() and int(self.codes.max()) >= 2**self.spec.format.bits:
            raise FormatError(f"a code is {int(self.codes.max())}, but {self.spec} has {self.spec.format.bits} bits")
        rows, cols = self.codes.shape
        check_scale(self.scale, self.zero_point, self.spec, rows=rows, cols=cols)

    @property
    def packed(self) -> Tensor:
        """The codes in the planar layout, uint8 ``[rows, packed]``."""
        return packing.pack(self.codes, self.spec.format.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, the scales and the zero points."""
        rows, cols = self.codes.shape
        codes = math.prod(packing.packed_shape((rows, cols), self.spec.format.bits))
        return codes + self.scale.nbytes + (self.zero_point.nbytes if self.zero_point is not None else 0)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values, of ``shape``, in ``dtype``."""
        return dequantize(self.codes, self.scale, self.zero_point, self.spec, dtype).reshape(self.shape)


def check_scale(scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, *, rows: int, cols: int) -> None:
    """Raise a FormatError unless scale and zero point are what ``spec`` wants for ``[rows, cols]`` codes."""
    want = spec.scale_shape(rows, cols)
    if tuple(scale.shape) != want or scale.dtype != spec.scale_dtype:
        raise FormatError(
            f"scale is {scale.dtype} {tuple(scale.shape)}; {spec} of {rows}x{cols} codes wants {spec.scale_dtype} "
            f"{want}"
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise FormatError("a scale is not a positive finite number")
    if spec.has_zero_point != (zero_point is not None):
        raise FormatError(f"{spec} {'needs a' if spec.has_zero_point else 'takes no'} zero point")
    if zero_point is not None and (zero_point.dtype != torch.uint8 or tuple(zero_point.shape) != want):
        raise FormatError(f"zero point is {zero_point.dtype} {tuple(zero_point.shape)}; wanted uint8 {want}")
    if zero_point is not None and zero_point.numel() and int(zero_point.max()) >= 2**spec.format.bits:
        raise FormatError(f"a zero point is {int(zero_point.max())}, but {spec} has {spec.format.bits} bits")


def quantize_tensor(
    x: Tensor, spec: QuantSpec | str, *, channel_dims: int = 1, name: str = "tensor"
) -> QuantizedTensor:
    """Round ``x`` to nearest: the scale from the absolute maximum of each group, then the codes of ``x / scale``.

    ``scale = absmax / format.max`` (symmetric) or ``(max - min) / (2^bits - 1)`` with
    ``zero_point = round(-min / scale)`` (unsigned integers, the range widened to hold 0). The scale is rounded to its
    storage dtype before the codes are chosen; a group of zeros gets scale 1. ZeroQuant-V2, section 3 (RTN).

    The first ``channel_dims`` dimensions of ``x`` are rows of its matrix view. Raises WeightError (with ``name`` in its
    text) for NaN, Inf, integers, no elements, a tensor with no dimension or no storage.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    check_weight(x, name)
    matrix = x.detach().reshape(math.prod(x.shape[:channel_dims]), -1)
    scale, zero_point = _choose_scale(matrix, spec, name)
    codes = quantize(matrix, scale, zero_point, spec)
    return QuantizedTensor(codes, scale, zero_point, spec, tuple(x.shape))


def check_weight(x: Tensor, name: str) -> None:
    """Raise a WeightError unless ``x`` is a tensor of finite floats with at least one row and one column."""
    if not x.is_floating_point():
        raise WeightError(f"{name} has dtype {x.dtype}; only floating point weights can be quantized")
    if x.is_meta:
        raise WeightError(f"{name} is on the meta device and has no values; load the model's weights first")
    if x.dim() == 0 or x.numel() == 0:
        raise WeightError(f"{name} has shape {tuple(x.shape)}; a weight needs at least one row and one column")
    if bad := int((~x.isfinite()).sum()):
        nan = int(x.isnan().sum())
        raise WeightError(
            f"{name} holds {nan} NaN and {bad - nan} Inf among {x.numel()} values; repair the checkpoint, or keep this "
            f"layer in float with a rule {{match: ..., keep: true}}"
        )


def _choose_scale(matrix: Tensor, spec: QuantSpec, name: str) -> tuple[Tensor, Tensor | None]:
    group = spec.group_size(matrix.shape[1])
    whole = isinstance(spec.granularity, PerTensor)
    if not spec.has_zero_point:
        low, high = _extremes(matrix, group)
        absmax = torch.maximum(-low, high)
        absmax = absmax.amax().reshape(1, 1) if whole else absmax
        scale = _store(absmax / spec.format.max, spec, name)
        return torch.where(absmax > 0, scale, torch.ones_like(scale)), None
    low, high = _extremes(matrix, group)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if whole:
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    scale = _store((high - low) / spec.format.max, spec, name)
    scale = torch.where(high > low, scale, torch.ones_like(scale))
    zero_point = torch.round(-low / scale.to(low.dtype)).clamp(0, spec.format.max).to(torch.uint8)
    return scale, zero_point


def _extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every group of columns, float32 or float64 ``[rows, groups]``."""
    rows, cols = matrix.shape
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    full = cols // group * group
    low, high = torch.aminmax(x[:, :full].reshape(rows, -1, group), dim=2)
    if full < cols:  # a shorter last group
        tail_low, tail_high = torch.aminmax(x[:, full:], dim=1, keepdim=True)
        low, high = torch.cat([low, tail_low], dim=1), torch.cat([high, tail_high], dim=1)
    return low, high


def _store(scale: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """``scale`` in its storage dtype; what underflows there becomes the smallest value, what overflows is an error."""
    info = torch.finfo(spec.scale_dtype)
    if bool((scale > info.max).any()):
        raise WeightError(
            f"{name} needs a scale of {float(scale.max()):.3g}, above the {spec.scale} maximum {info.max}"
        )
    return scale.to(spec.scale_dtype).clamp(min=info.tiny)


def spread(scale: Tensor, group: int, cols: int) -> Tensor:
    """Scales ``[rows, groups]`` so that they broadcast over ``[rows, cols]``: each repeated over its group."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(group, dim=1)[:, :cols]


def quantize(matrix: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes (uint8) of ``[rows, cols]`` floats for given scales: ``encode(x / scale)``, or ``+ zero_point``."""
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    cols = x.shape[1]
    ratio = x / spread(scale.to(x.dtype), spec.group_size(cols), cols)
    if zero_point is not None:
        ratio = torch.round(ratio) + spread(zero_point.to(x.dtype), spec.group_size(cols), cols)
    return spec.format.encode(ratio)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Real values ``[rows, cols]`` of codes: computed in float32 (or float64) and rounded once to ``dtype``."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    cols = codes.shape[1]
    group = spec.group_size(cols)
    value = spec.format.decode(codes, inner)
    if zero_point is not None:
        value = value - spread(zero_point.to(inner), group, cols)
    return (value * spread(scale.to(inner), group, cols)).to(dtype)
