"""cpu_codes: codes, their bytes, and rounded activations on a CPU, by the kernels of ``native/encode.cpp``.

What importing this registers for CPU tensors; the results are those of the reference bodies, bit for bit::

    extremes(x, high, wide)           blocks of one row; x float32, float16, bfloat16, as in all of these
    encode(x, scale, ...)             floats with a whole exponent bias, integers
    row_squares(x, codes, scale, ...) the same formats
    pack_planar, unpack_planar        every number of bits
    fake_quantize(x, scale)           the same formats, signed; scales in fp32, one for each row, group or for all
    fake_quantize_dynamic(x)

Everything else runs the reference: codebooks, float64, exponent biases of channels, coded scales of activations, NaN
and Inf in activations. No compiler is started for any of it (``cpu.at_hand``).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fxquant import ops, packing, qtensor, scales
from fxquant.bulk import NAMESPACE
from fxquant.codegen import cpu
from fxquant.codegen.cpu_library import Activations, Blocks, Encoding, Grid, Library, Matrix, parallel, threads
from fxquant.formats import FloatFormat, Format, IntFormat
from fxquant.scheme import QuantSpec, parse_spec

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_WORK = 8
"""Products that one value is worth, when threads are counted."""


# --- ranges -----------------------------------------------------------------------------------------------------------
def extremes(matrix: Tensor, high: int, wide: int) -> scales.Ranges:
    """``scales.block_extremes`` for CPU tensors."""
    kernels = cpu.at_hand(matrix.numel())
    if kernels is None or matrix.dtype not in _TYPES or high != 1 or not matrix.numel() or matrix.stride(1) != 1:
        return scales.block_extremes(matrix, high, wide)
    return ranges_of(kernels, matrix, wide)


def ranges_of(kernels: Library, x: Tensor, wide: int) -> scales.Ranges:
    """The least and the largest of every ``wide`` columns of x ``[rows, cols]``, float32."""
    low, most = (torch.empty(len(x), -(-x.shape[1] // wide)) for _ in "ab")
    kernels.extremes(
        x.data_ptr(), _TYPES[x.dtype], *x.shape, x.stride(0), wide, low.data_ptr(), most.data_ptr(), parallel(),
        threads(_WORK * x.numel()),
    )  # fmt: skip
    return low, most


# --- codes ------------------------------------------------------------------------------------------------------------
def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, spec: str) -> Tensor:
    """``scales.encode`` for CPU tensors."""
    kernels, parsed = cpu.at_hand(x.numel()), parse_spec(spec)
    if kernels is not None and x.dtype in _TYPES and x.dim() == 2 and x.numel() and encodes(parsed.format):
        codes = codes_of(kernels, x, scales.Scales(scale, zero_point, tensor_scale), parsed)
        if codes is not None:
            return codes
    return scales.encode(x, scale, zero_point, tensor_scale, spec)


def codes_of(kernels: Library, x: Tensor, given: scales.Scales, spec: QuantSpec) -> Tensor | None:
    """Codes uint8 ``[rows, cols]`` of x ``[rows, cols]``; None for scales that are not of the shape of its blocks."""
    to, multiply = encoding(spec.format), spec.kind.outer == "tensor" and given.tensor_scale is not None
    factor = (1 / given.tensor_scale) / given.scale if multiply else given.effective  # type: ignore[operator]
    given_as = matrix_of(x, factor.float(), given.zero_point, spec, multiply=multiply)
    if to is None or given_as is None:
        return None
    matrix, _held = given_as
    codes = torch.empty(x.shape, dtype=torch.uint8)
    kernels.encode(
        ctypes.addressof(matrix), ctypes.addressof(to), codes.data_ptr(), parallel(), threads(_WORK * x.numel())
    )
    return codes


def matrix_of(
    x: Tensor, factor: Tensor, zero: Tensor | None, spec: QuantSpec, *, multiply: bool = False
) -> tuple[Matrix, list[Tensor | None]] | None:
    """x ``[rows, cols]`` and its scales for a kernel, and the tensors to hold meanwhile; None for scales that are not
    of the shape of its blocks."""
    factor = factor.contiguous()
    at = blocks(factor, spec, x)
    if at is None or (zero is not None and (zero.shape != factor.shape or zero.dtype != torch.uint8)):
        return None
    x, zero = x.detach(), None if zero is None else zero.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    own = None if zero is None else zero.data_ptr()
    return Matrix(x.data_ptr(), *x.shape, x.stride(0), at, own, int(multiply), _TYPES[x.dtype]), [x, factor, zero]


def row_squares(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, spec: str
) -> Tensor:
    """``qtensor.row_squares`` for CPU tensors."""
    kernels, parsed = cpu.at_hand(x.numel()), parse_spec(spec)
    if kernels is not None and x.dtype in _TYPES and x.numel() and measures(parsed.format):
        sums = squares_of(kernels, x, codes, scales.Scales(scale, zero_point, tensor_scale), parsed)
        if sums is not None:
            return sums
    return qtensor.row_squares(x, codes, scale, zero_point, tensor_scale, spec)


def squares_of(kernels: Library, x: Tensor, codes: Tensor, given: scales.Scales, spec: QuantSpec) -> Tensor | None:
    """float64 ``[rows, 2]``; None for scales that are not float32 or not of the shape of x's blocks."""
    factor = given.effective
    given_as = matrix_of(x, factor, given.zero_point, spec) if factor.dtype == torch.float32 else None
    if given_as is None:
        return None
    (matrix, _held), table, codes = given_as, table_of(spec.format), codes.contiguous()
    sums = torch.empty(len(x), 2, dtype=torch.float64)
    kernels.row_squares(
        ctypes.addressof(matrix), codes.data_ptr(), table.data_ptr(), sums.data_ptr(), parallel(),
        threads(_WORK * x.numel()),
    )  # fmt: skip
    return sums


@cache
def table_of(format: Format) -> Tensor:
    """The values of all 256 bytes as codes, float32; those of no code are 0."""
    table = torch.zeros(256)
    own = format.table().float()
    table[: len(own)] = own
    return table


@cache
def measures(format: Format) -> bool:
    """Whether the kernels find what a format loses, and as the reference does on this machine."""
    kernels = cpu.available()
    if kernels is None or encoding(format) is None:
        return False
    x = trial(format)
    x, spec = (x[x.isfinite() & (x.abs() <= 2 * format.max)] * 0.7).reshape(1, -1), parse_spec(f"{format}/tensor")
    given = scales.Scales(
        torch.full((1, 1), 0.3), torch.full((1, 1), 1, dtype=torch.uint8) if spec.has_zero_point else None
    )
    codes = scales.quantize(x, given, spec)
    got = squares_of(kernels, x, codes, given, spec)
    want = qtensor.row_squares(x, codes, given.scale, given.zero_point, None, str(spec))
    return got is not None and torch.equal(got, want)


def blocks(scale: Tensor, spec: QuantSpec, x: Tensor) -> Blocks | None:
    """Where the scale of every value of x is, for scales as ``scales.spread`` takes them; None for others."""
    (rows, cols), (high, wide) = x.shape, spec.block(*x.shape)
    if scale.device != x.device or scale.dim() != 2 or scale.shape[0] not in (1, rows, -(-rows // high)):
        return None
    if scale.shape[1] not in (1, cols, -(-cols // wide)):
        return None
    high = 1 if scale.shape[0] == rows else high
    group = cols if scale.shape[1] == 1 else 1 if scale.shape[1] == cols else wide
    return Blocks(scale.data_ptr(), *scale.shape, high, group)


@cache
def encoding(format: Format) -> Encoding | None:
    """How the kernels encode a format, None where they do not."""
    if isinstance(format, IntFormat):
        return Encoding(2, format.bits, 0, 0, 0, 0, -1, -format.max if format.signed else 0.0, format.max)
    if not isinstance(format, FloatFormat) or not format.signed or not isinstance(format.bias, int):
        return None
    fnuz, top = format.specials == "fnuz", format.magnitudes
    nan = -1 if format.specials == "none" else top if fnuz else top - 1
    most = int(format.encode(torch.tensor([format.max])))
    kind = 0 if format.mbits else 1
    return Encoding(
        kind, format.bits, format.mbits, 1 - format.bias, most, nan, top if fnuz else -1, 0.0, format.max
    )  # fmt: skip


@cache
def encodes(format: Format) -> bool:
    """Whether the kernels encode a format, and as its reference does on this machine."""
    kernels = cpu.available()
    if kernels is None or encoding(format) is None:
        return False
    x, spec = trial(format), parse_spec(f"{format}/tensor")
    zero = torch.zeros(1, 1, dtype=torch.uint8) if spec.has_zero_point else None
    got = codes_of(kernels, x, scales.Scales(torch.ones(1, 1), zero), spec)
    return got is not None and torch.equal(got, format.encode(x))


def trial(format: Format) -> Tensor:
    """float32 ``[1, n]``: all values of a format, the middles between neighbours, what is beside each of these, zeros,
    the largest and smallest floats, Inf and NaN, each with both signs."""
    grid = format.table()
    grid = grid[grid.isfinite()].abs().unique()
    near = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([0.0, format.max + 0.5, 3e38, 1e-40])]).float()
    up, down = (torch.nextafter(near, torch.full_like(near, to)) for to in (torch.inf, -torch.inf))
    x = torch.cat([near, up, down, torch.tensor([torch.inf, torch.nan, 2.0**-126])])
    return torch.cat([x, -x]).reshape(1, -1)


# --- bytes ------------------------------------------------------------------------------------------------------------
def pack_planar(codes: Tensor, bits: int) -> Tensor:
    """``packing.pack_planar`` for CPU tensors."""
    if codes.numel() and (kernels := cpu.at_hand(codes.numel())) and packs(bits):
        packed, fits = packed_codes(kernels, codes, bits)
        if fits:
            return packed
    return packing.pack_planar(codes, bits)


def packed_codes(kernels: Library, codes: Tensor, bits: int) -> tuple[Tensor, bool]:
    """The bytes of codes ``[rows, cols]``, and whether all codes fit in so many bits."""
    rows, cols = codes.shape
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    packed = codes.new_empty(packing.packed_shape((rows, cols), packing.planar(bits)))
    seen = kernels.pack(
        codes.data_ptr(), rows, cols, codes.stride(0), bits, packed.data_ptr(), parallel(), threads(codes.numel())
    )
    return packed, not seen >> bits


def unpack_planar(packed: Tensor, bits: int, cols: int) -> Tensor:
    """``packing.unpack_planar`` for CPU tensors."""
    kernels = cpu.at_hand(len(packed) * cols)
    if kernels is None or not packed.numel() or not packs(bits):
        return packing.unpack_planar(packed, bits, cols)
    return unpacked_codes(kernels, packed, bits, cols)


def unpacked_codes(kernels: Library, packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes ``[rows, cols]`` of bytes."""
    packed, codes = packed if packed.stride(1) == 1 else packed.contiguous(), packed.new_empty(len(packed), cols)
    kernels.unpack(
        packed.data_ptr(), len(packed), cols, packed.stride(0), bits, codes.data_ptr(), parallel(),
        threads(codes.numel()),
    )  # fmt: skip
    return codes


@cache
def packs(bits: int) -> bool:
    """Whether the kernels pack and unpack codes of so many bits as the reference does on this machine."""
    kernels, codes = cpu.available(), (torch.arange(3 * 333).reshape(3, 333) * 37 % 2**bits).to(torch.uint8)
    if kernels is None:
        return False
    packed, _ = packed_codes(kernels, codes, bits)
    return torch.equal(packed, packing.pack_planar(codes, bits)) and torch.equal(
        unpacked_codes(kernels, packed, bits, 333), codes
    )


# --- activations ------------------------------------------------------------------------------------------------------
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, tensor_scale: Tensor | None = None,
    exponent_bias: Tensor | None = None, shifted: bool = False,
) -> Tensor:  # fmt: skip
    """``ops.fake_quantize`` for CPU tensors."""
    plain = zero_point is None and tensor_scale is None and exponent_bias is None and scale.dtype == torch.float32
    parsed = parse_spec(spec)
    if plain and (kernels := cpu.at_hand(x.numel())) and rounds(parsed.format):
        y = rounded(kernels, x, scale.contiguous(), parsed)
        if y is not None:
            return y
    return ops.fake_quantize(x, scale, zero_point, spec, tensor_scale, exponent_bias, shifted)


def fake_quantize_dynamic(x: Tensor, spec: str, exponent_bias: Tensor | None = None, shifted: bool = False) -> Tensor:
    """``ops.fake_quantize_dynamic`` for CPU tensors."""
    parsed = parse_spec(spec)
    if exponent_bias is None and (kernels := cpu.at_hand(x.numel())) and rounds(parsed.format):
        y = rounded(kernels, x, None, parsed)
        if y is not None:
            return y
    return ops.fake_quantize_dynamic(x, spec, exponent_bias, shifted)


def rounded(kernels: Library, x: Tensor, scale: Tensor | None, spec: QuantSpec) -> Tensor | None:
    """x ``[..., K]`` rounded to the grid of ``spec``, by these scales or such as are found; None where no kernel does
    it, and where x or a scale is not finite."""
    to = grid(spec.format)
    if to is None or x.dtype not in _TYPES or not x.numel() or spec.scale != "fp32":
        return None
    matrix = x.detach().reshape(-1, x.shape[-1] if x.dim() else 1).contiguous()
    high, wide = spec.block(*matrix.shape)
    at = Blocks(None, 0, 0, 1, wide) if scale is None else blocks(scale, spec, matrix)
    if at is None or (scale is None and high != 1):
        return None
    y = torch.empty_like(matrix)
    no_minus = isinstance(spec.format, IntFormat) or (
        isinstance(spec.format, FloatFormat) and spec.format.specials == "fnuz"
    )
    every = Activations(
        matrix.data_ptr(), y.data_ptr(), *matrix.shape, at, Grid(*to), 0.0 if no_minus else -0.0, _TYPES[x.dtype]
    )
    finite = kernels.round(ctypes.addressof(every), parallel(), threads(_WORK * x.numel()))
    return y.reshape(x.shape) if finite else None


@cache
def rounds(format: Format) -> bool:
    """Whether the kernels round to a format, and as its reference does on this machine."""
    kernels = cpu.available()
    if kernels is None or grid(format) is None:
        return False
    x, spec = trial(format), parse_spec(f"{format}/tensor")
    x, scale = x[x.isfinite()].reshape(1, -1), torch.ones(1, 1)
    y = rounded(kernels, x, scale, spec)
    return y is not None and torch.equal(y, ops.fake_quantize(x, scale, None, str(spec)))


def grid(format: Format) -> tuple[int, int, float] | None:
    """The magnitudes that activations are rounded to: mantissa bits, exponent of the smallest normal one, the largest;
    None where they are not. Integers are multiples of 1, in a binade that none of them reaches."""
    if isinstance(format, FloatFormat) and format.signed and isinstance(format.bias, int):
        return format.mbits, 1 - format.bias, format.max
    if isinstance(format, IntFormat) and format.signed:
        return 23, 23, format.max
    return None


_library = torch.library.Library(NAMESPACE, "IMPL")
for _body in (extremes, encode, row_squares, pack_planar, unpack_planar, fake_quantize, fake_quantize_dynamic):
    _library.impl(_body.__name__, _body, "CPU")
