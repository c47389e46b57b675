"""QuantizedTensor: codes and scales, and the round-to-nearest quantizer that makes one from a float tensor.

A weight is seen as a matrix: ``rows`` are output channels, ``cols`` all that is summed over. A linear weight is its
own matrix, a convolution kernel ``[out, in, kh, kw]`` becomes ``[out, in * kh * kw]``, expert weights ``[experts, out,
in]`` become ``[experts * out, in]``. Groups run along the columns, so one rule covers all of them.

Policies: a weight with NaN or Inf is an error, as are integers, a tensor with no element and one without a dimension;
an activation that is NaN makes its row NaN. Input may be float16, bfloat16, float32 or float64, contiguous or not;
float64 is computed in float64, all else in float32. Denormal input is a value like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import fxquant.packing as packing  # "from fxquant import" would load the kernels, which import this module
from fxquant import bulk
from fxquant.errors import FormatError, WeightError
from fxquant.grids import CodebookFormat
from fxquant.scales import Clip, Ranges, Scales, choose, chunks, dequantize, extremes, power_of_two, quantize
from fxquant.scheme import PerChannel, PerToken, QuantSpec, parse_spec


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what they mean. Invariants (``check`` raises a FormatError when one is broken)::

    codes         uint8 [rows, cols], every code < 2**spec.format.bits,  rows * cols == prod(shape)
    scale         spec.scale_dtype, spec.scale_shape(rows, cols), finite and > 0
    zero_point    uint8, the shape of scale, exactly where spec.has_zero_point; else None
    tensor_scale  float32, spec.outer_shape(rows): the scale of scales (NVFP4, M2); else None
    exponent_bias int8 [cols], -64..64, or None: of each input channel, above that of the format (LLM-FP4, section 4)
    real          = format.decode(codes) * scale * tensor_scale * 2^-exponent_bias    (each spread over its block)
                  = (codes - zero_point) * scale                                      for unsigned integers
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    tensor_scale: Tensor | None = None
    exponent_bias: Tensor | None = None

    def check(self) -> None:
        """Raise a FormatError that names the first broken invariant."""
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or self.codes.numel() != math.prod(self.shape):
            raise FormatError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)} for a tensor of {self.shape}")
        if self.codes.numel() and int(self.codes.max()) >= 2**self.spec.format.bits:
            raise FormatError(f"a code is {int(self.codes.max())}, but {self.spec} has {self.spec.format.bits} bits")
        rows, cols = self.codes.shape
        check_scale(self.scale, self.zero_point, self.spec, rows=rows, cols=cols, tensor_scale=self.tensor_scale)
        check_exponent_bias(self.exponent_bias, cols)

    @property
    def scales(self) -> Scales:
        return Scales(self.scale, self.zero_point, self.tensor_scale)

    @property
    def codebook(self) -> Tensor | None:
        """The table of a codebook format, float32 ``[2**bits]``; None for other formats."""
        return self.spec.format.table().float() if isinstance(self.spec.format, CodebookFormat) else None

    @property
    def packed(self) -> Tensor:
        """The codes in the planar layout, uint8 ``[rows, packed]``."""
        return packing.pack(self.codes, packing.planar(self.spec.format.bits))

    @property
    def stored_scale(self) -> Tensor:
        """The scales as they are stored: codes of the scale's own format (uint8), or ``scale`` itself."""
        return store_scale(self.scale, self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, the stored scales, the zero points and the scale of scales."""
        own = 0 if self.exponent_bias is None else self.exponent_bias.nbytes
        return packed_nbytes(self.spec, *self.codes.shape) + own

    def rows(self, some: Tensor) -> QuantizedTensor:
        """The rows ``some`` (int64) of the matrix, as a matrix of its own whose scales are one a row of blocks."""
        high = self.spec.block(*self.codes.shape)[0]

        def of(values: Tensor | None) -> Tensor | None:
            if values is None or len(values) == 1:
                return values
            return values[some // high] if len(values) < len(self.codes) else values[some]

        scale = of(self.scale)
        assert scale is not None
        shape = (len(some), self.codes.shape[1])
        return replace(
            self, codes=self.codes[some], scale=scale, zero_point=of(self.zero_point),
            tensor_scale=of(self.tensor_scale), shape=shape,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values, of ``shape``, in ``dtype``."""
        return from_matrix(decode(self.codes, self.scales, self.spec, self.exponent_bias, dtype), self.spec, self.shape)


def packed_nbytes(spec: QuantSpec, rows: int, cols: int) -> int:
    """Bytes of a matrix ``[rows, cols]`` quantized as ``spec``: codes, stored scales, zero points, outer scale."""
    codes = math.prod(packing.packed_shape((rows, cols), packing.planar(spec.format.bits)))
    count = math.prod(spec.scale_shape(rows, cols))
    each = (1 if spec.kind.format is not None else spec.scale_dtype.itemsize) + spec.has_zero_point
    return codes + count * each + 4 * math.prod(spec.outer_shape(rows) or (0,))


def decode(codes: Tensor, given: Scales, spec: QuantSpec, exponent_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Real values ``[rows, cols]`` of codes, each column j times ``2^-exponent_bias[j]``; rounded once to ``dtype``."""
    if exponent_bias is None:
        return dequantize(codes, given, spec, dtype)
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    return (dequantize(codes, given, spec, inner) * power_of_two(-exponent_bias.int(), inner)).to(dtype)


def check_scale(
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    *,
    rows: int,
    cols: int,
    tensor_scale: Tensor | None = None,
) -> None:
    """Raise a FormatError unless scales, zero point and scale of scales are what ``spec`` wants for these codes.

    ``scale`` may be in its stored form, uint8 codes of the scale's own format.
    """
    want, stored = spec.scale_shape(rows, cols), scale.dtype == torch.uint8 and spec.kind.format is not None
    if tuple(scale.shape) != want or not (stored or scale.dtype == spec.scale_dtype):
        raise FormatError(
            f"scale is {scale.dtype} {tuple(scale.shape)}; {spec} of {rows}x{cols} codes wants {spec.scale_dtype} "
            f"{want}"
        )
    values = load_scale(scale, spec)
    if not bool((values.isfinite() & ~values.signbit() & (values.double() != 0)).all()):
        raise FormatError("a scale is not a positive finite number")
    if spec.has_zero_point != (zero_point is not None):
        raise FormatError(f"{spec} {'needs a' if spec.has_zero_point else 'takes no'} zero point")
    if zero_point is not None and (zero_point.dtype != torch.uint8 or tuple(zero_point.shape) != want):
        raise FormatError(f"zero point is {zero_point.dtype} {tuple(zero_point.shape)}; wanted uint8 {want}")
    if zero_point is not None and zero_point.numel() and int(zero_point.max()) >= 2**spec.format.bits:
        raise FormatError(f"a zero point is {int(zero_point.max())}, but {spec} has {spec.format.bits} bits")
    _check_tensor_scale(tensor_scale, spec, rows)


def _check_tensor_scale(tensor_scale: Tensor | None, spec: QuantSpec, rows: int) -> None:
    want = spec.outer_shape(rows)
    if (want is None) != (tensor_scale is None):
        raise FormatError(f"{spec} {'takes no' if want is None else 'needs a'} tensor scale")
    if tensor_scale is None:
        return
    if tensor_scale.dtype != torch.float32 or tuple(tensor_scale.shape) != want:
        raise FormatError(f"tensor scale is {tensor_scale.dtype} {tuple(tensor_scale.shape)}; wanted float32 {want}")
    if not bool((tensor_scale.isfinite() & (tensor_scale > 0)).all()):
        raise FormatError("a tensor scale is not a positive finite number")


def check_exponent_bias(exponent_bias: Tensor | None, cols: int) -> None:
    """Raise a FormatError unless the exponent biases are int8, one for each of ``cols`` columns, in -64..64."""
    if exponent_bias is None:
        return
    if exponent_bias.dtype != torch.int8 or tuple(exponent_bias.shape) != (cols,):
        raise FormatError(
            f"exponent bias is {exponent_bias.dtype} {tuple(exponent_bias.shape)}; wanted int8 ({cols},), one a column"
        )
    if bool((exponent_bias.int().abs() > 64).any()):
        raise FormatError("an exponent bias lies outside -64..64")


def store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales as stored: uint8 codes where the scale kind has a format of its own, else as they are."""
    return scale if spec.kind.format is None or scale.dtype == torch.uint8 else spec.kind.format.encode(scale)


def load_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The inverse of ``store_scale``; scales that are not stored codes pass through."""
    return scale if spec.kind.format is None or scale.dtype != torch.uint8 else spec.kind.format.decode(scale)


def quantize_tensor(
    x: Tensor, spec: QuantSpec | str, *, clip: Clip = "absmax", channel_dims: int = 1, name: str = "tensor"
) -> QuantizedTensor:
    """Round ``x`` to nearest: a scale for each block (``scales``), stored, then the codes of ``x / scale``.

    ``scale = absmax / format.max`` (symmetric) or ``(max - min) / (2^bits - 1)`` with
    ``zero_point = round(-min / scale)`` (unsigned integers, the range widened to hold 0). The scale is rounded to its
    storage format before the codes are chosen; a block of zeros gets scale 1. ZeroQuant-V2, section 3 (RTN). With
    ``clip="mse"`` the range of each block is the part of its absolute maximum with the least squared error.

    The first ``channel_dims`` dimensions of ``x`` are rows of its matrix view. Raises WeightError (with ``name`` in its
    text) for NaN, Inf, integers, no elements, a tensor with no dimension or no storage.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    check_kind(x, name)
    matrix = to_matrix(x.detach(), spec, channel_dims)
    ranges = extremes(matrix, spec.block(*matrix.shape))
    _check_finite(x, ranges, name)
    scales = choose(matrix, spec, clip=clip, name=name, ranges=ranges)
    codes = quantize(matrix, scales, spec)
    return QuantizedTensor(codes, scales.scale, scales.zero_point, spec, tuple(x.shape), scales.tensor_scale)


def error_squares(matrix: Tensor, q: QuantizedTensor) -> Tensor:
    """||w_i - w'_i||^2 and ||w_i||^2 of the rows of a matrix ``[rows, cols]`` and its codes, float64 ``[rows, 2]``."""
    plain = q.exponent_bias is None and not isinstance(q.spec.format, CodebookFormat)  # whose text is not all of it
    if plain and matrix.numel() >= bulk.LARGE:
        return _ROW_SQUARES(matrix, q.codes, q.scale, q.zero_point, q.tensor_scale, str(q.spec))  # type: ignore[no-any-return]
    return _row_squares(matrix, q)


def relative_error(squares: Tensor) -> float:
    """||W - W'|| / ||W|| from the ``error_squares`` of all rows; 0 for a weight of zeros.

    They are added up exactly: neither threads nor how rows were cut change a bit of it.
    """
    lost, whole = (math.fsum(column.tolist()) for column in squares.unbind(1))
    return math.sqrt(lost / whole) if whole else 0.0


def row_squares(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, spec: str
) -> Tensor:
    """The reference of ``fxquant::row_squares``: ``sum_j (w_ij - w'_ij)^2`` and ``sum_j w_ij^2`` of x and its codes
    ``[rows, cols]``, float64 ``[rows, 2]``. Differences are float32, squares exact, and added in the order of _RUN."""
    parsed = parse_spec(spec)
    return _row_squares(x, QuantizedTensor(codes, scale, zero_point, parsed, tuple(x.shape), tensor_scale))


_ROW_SQUARES = bulk.define(
    "row_squares",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, str spec) -> Tensor",
    row_squares,
    lambda x, *rest: x.new_empty(len(x), 2, dtype=torch.float64),
)
_LANES, _RUN = 16, 1024
"""A row is added up in runs of 1024 columns, each by 16 sums, of its columns j, j + 16 and so on; to the sums of
the first run those of the second are added, and so on; then the upper half to the lower, until one is left.
"""


def _row_squares(matrix: Tensor, q: QuantizedTensor) -> Tensor:
    found = []
    for where, part, own in chunks(matrix, q.scales, q.spec.block(*matrix.shape)[0]):
        x = part.float()
        difference = decode(q.codes[where], own, q.spec, q.exponent_bias, torch.float32).sub_(x)
        found.append(torch.stack([_sum_of_squares(difference), _sum_of_squares(x)], dim=1))
    return torch.cat(found)


def _sum_of_squares(x: Tensor) -> Tensor:
    length = min(_RUN, -(-x.shape[1] // _LANES) * _LANES)  # of narrow rows only what is not zeros
    wide = F.pad(x, (0, -x.shape[1] % length)) if x.shape[1] % length else x
    squares = wide.double().square_().view(len(x), -1, length // _LANES, _LANES)
    runs = squares[:, :, 0].clone()
    for part in squares.unbind(2)[1:]:
        runs += part
    total = runs[:, 0]
    for run in runs.unbind(1)[1:]:
        total += run
    while (half := total.shape[1] // 2) > 0:
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def fake_quantize(
    x: Tensor, spec: QuantSpec, given: Scales | None, exponent_bias: Tensor | None = None, *, shifted: bool = False
) -> Tensor:
    """Activations ``[..., K]`` rounded to a grid, with the scales ``given`` or with such as are found row by row.

    ``exponent_bias`` (int8 ``[K]``) multiplies channel j by ``2^exponent_bias[j]`` before rounding, and by its inverse
    afterwards unless ``shifted``. Where scales are found, ``scale = absmax(row) / format.max`` for ``token`` and a NaN
    makes its row NaN. ZeroQuant-FP, section 3 (token-wise); LLM-FP4, section 4 (pre-shifted exponent bias).
    """
    if not x.numel():
        return x.clone()
    matrix = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    if exponent_bias is not None:
        matrix = matrix.to(inner) * power_of_two(exponent_bias, inner)
    scales = choose(matrix, spec, name="activation") if given is None else given
    value = dequantize(quantize(matrix, scales, spec), scales, spec, inner)
    if exponent_bias is not None and not shifted:
        value = value * power_of_two(-exponent_bias.int(), inner)
    return value.to(x.dtype).reshape(x.shape)


def to_matrix(x: Tensor, spec: QuantSpec, channel_dims: int = 1) -> Tensor:
    """``x`` as ``[rows, cols]``; rows are its first dimensions, the axis of ``channel<axis>``, or tokens."""
    if isinstance(spec.granularity, PerToken):
        return x.reshape(-1, x.shape[-1])
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis:
        if spec.granularity.axis >= x.dim():
            raise FormatError(f"{spec} names dimension {spec.granularity.axis} of a tensor of {tuple(x.shape)}")
        x = x.movedim(spec.granularity.axis, 0)
    return x.reshape(math.prod(x.shape[:channel_dims]), -1)


def from_matrix(matrix: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``to_matrix`` for a tensor of logical ``shape``."""
    axis = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else 0
    if not axis:
        return matrix.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return matrix.reshape(moved).movedim(0, axis)


def check_kind(x: Tensor, name: str) -> None:
    """Raise a WeightError unless ``x`` is a tensor of floats with at least one row and one column."""
    if not x.is_floating_point():
        raise WeightError(f"{name} has dtype {x.dtype}; only floating point weights can be quantized")
    if x.is_meta:
        raise WeightError(f"{name} is on the meta device and has no values; load the model's weights first")
    if x.dim() == 0 or x.numel() == 0:
        raise WeightError(f"{name} has shape {tuple(x.shape)}; a weight needs at least one row and one column")


def _check_finite(x: Tensor, ranges: Ranges, name: str) -> None:
    """Raise a WeightError where the extremes of its blocks show that ``x`` holds NaN or Inf."""
    if all(bool(r.isfinite().all()) for r in ranges):
        return
    nan, bad = int(x.isnan().sum()), int((~x.isfinite()).sum())
    raise WeightError(
        f"{name} holds {nan} NaN and {bad - nan} Inf among {x.numel()} values; repair the checkpoint, or keep this "
        f"layer in float with a rule {{match: ..., keep: true}}"
    )
