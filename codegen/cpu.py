"""cpu: packed operators on a CPU, by compiled kernels. Importing this registers them; the first call compiles them.

What runs for ``linear_wq`` and ``embedding_wq`` on CPU tensors; every other operator runs its reference body::

    x float32                    kernel, sums in float32
    x float16, bfloat16          kernel on x as float32, y rounded once
    float64, 1 bit, scales of    reference
    input channels
    no compiler, no cache        reference; said once, as a warning

Kernels read the packed bytes as they are: nothing is prepared but scales of unusual form. ``activation_bits`` lets them
round x, for speed.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fxquant import ops, packing
from fxquant.bulk import LARGE
from fxquant.codegen import cpu_library
from fxquant.codegen.cpu_library import Library, Weight, library, parallel, threads
from fxquant.codegen.prepack import Operands
from fxquant.codegen.remember import remember
from fxquant.errors import FxquantError, InputError
from fxquant.formats import Format
from fxquant.qtensor import load_scale
from fxquant.scales import Scales, power_of_two
from fxquant.scheme import PerChannel, parse_spec

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATION_BITS = (32, 16, 8)
"""What x may be rounded to; 32 is not at all."""


def linear_wq(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, spec: str,
    shape: Sequence[int], tensor_scale: Tensor | None = None, exponent_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``ops.linear_wq`` for CPU tensors."""
    fits = x.dtype in _DTYPES and x.numel() and x.shape[-1] == shape[-1] and len(shape) == 2
    if fits and (kernels := kernels_here()):
        operands = Operands(packed, scale, zero_point, spec, tuple(shape), tensor_scale, exponent_bias)
        weight = packed_weight(operands)
        if weight is not None and works(weight.format):
            return linear(x, weight, bias, kernels)
    return ops.linear_wq(x, packed, scale, zero_point, bias, spec, shape, tensor_scale, exponent_bias)


def embedding_wq(
    indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, shape: Sequence[int],
    tensor_scale: Tensor | None = None, *, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``ops.embedding_wq`` for CPU tensors."""
    if indices.numel() and len(shape) == 2 and (kernels := kernels_here()):
        weight = packed_weight(Operands(packed, scale, zero_point, spec, tuple(shape), tensor_scale))
        if weight is not None and works(weight.format):
            index = indices.reshape(-1).long().contiguous()
            if int(index.min()) >= 0 and int(index.max()) < shape[0]:
                to = torch.empty(*indices.shape, shape[1])
                count = threads(to.numel())
                kernels.rows(weight.pointer, index.data_ptr(), len(index), to.data_ptr(), parallel(), count)
                return to.to(dtype or torch.float32)
    return ops.embedding_wq(indices, packed, scale, zero_point, spec, shape, tensor_scale, dtype=dtype)


_REFERENCE: ContextVar[bool] = ContextVar("reference", default=False)
_BITS: ContextVar[int] = ContextVar("activation_bits", default=32)


@contextmanager
def reference_only() -> Iterator[None]:
    """Operators run their reference bodies inside: for a call or two of a graph, for which no kernel is compiled."""
    before = _REFERENCE.set(True)
    try:
        yield
    finally:
        _REFERENCE.reset(before)


@contextmanager
def activation_bits(bits: int) -> Iterator[None]:
    """Kernels may round x to so many bits inside, a scale for each row and 8 columns, where they are faster by that.

    ||y - y64|| / ||y64|| on normal data, 4096 columns: 2e-7 for 32 bits, 2e-5 for 16, 5e-3 for 8.
    """
    if bits not in ACTIVATION_BITS:
        raise InputError(f"activation_bits is {bits}; allowed are {', '.join(map(str, ACTIVATION_BITS))}")
    before = _BITS.set(bits)
    try:
        yield
    finally:
        _BITS.reset(before)


def kernels_here() -> Library | None:
    """The kernels, None where operators are to run their reference bodies."""
    return None if _REFERENCE.get() else available()


def at_hand(values: int) -> Library | None:
    """The kernels where nothing needs to be compiled for them: loaded already, or, for LARGE values, in the cache.

    For steps that take torch a second or less, which a compiler's half a minute would never pay for.
    """
    if _REFERENCE.get() or not (available.cache_info().currsize or (values >= LARGE and cpu_library.made())):
        return None
    return available()


@cache
def available() -> Library | None:
    """The kernels; None, with a warning that says why, where there are none."""
    try:
        return library()
    except FxquantError as error:
        warnings.warn(f"packed layers are decoded by torch at every call, which is slow: {error}", stacklevel=4)
        return None


@cache
def works(format: Format) -> bool:
    """Whether the kernels give the right products for a format on this machine; a warning where not."""
    kernels = available()
    if kernels is None:
        return False
    if not gives_products(kernels, format):
        warnings.warn(f"the CPU kernel for {format} gives wrong results on this machine; not used", stacklevel=4)
        return False
    return True


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernels take it, and the tensors that its addresses are of. ``factor`` is float32 ``[cols]``:
    what x is multiplied by first, 2^-exponent bias."""

    format: Format
    struct: Weight
    held: tuple[Tensor | None, ...]
    factor: Tensor | None

    @property
    def pointer(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def rows(self) -> int:
        return int(self.struct.rows)

    @property
    def cols(self) -> int:
        return int(self.struct.cols)


def packed_weight(weight: Operands) -> PackedWeight | None:
    """The weight for a kernel, None for one of codes that no kernel has. Kept as long as ``packed`` lives.

    Raises InputError for tensors that do not fit the spec and the shape.
    """
    return remember(lambda: _packed_weight(weight), ("cpu", weight.spec, weight.shape), *weight.tensors)


def _packed_weight(weight: Operands) -> PackedWeight | None:
    spec, (rows, cols) = parse_spec(weight.spec), weight.shape
    if not 2 <= spec.format.bits <= 8 or (isinstance(spec.granularity, PerChannel) and spec.granularity.axis):
        return None
    weight.check()
    high, wide = spec.block(rows, cols)
    scale, zero = weight.scale, weight.zero_point
    plain = spec.kind.format is None and scale.dtype in (torch.float32, torch.float16) and weight.tensor_scale is None
    if not plain:
        scale = Scales(load_scale(scale, spec), None, weight.tensor_scale).effective.float()
    if len(scale) not in (1, rows):
        scale = scale.repeat_interleave(high, 0)[:rows]
        zero = None if zero is None else zero.repeat_interleave(high, 0)[:rows]
    scale, packed = scale.contiguous(), weight.packed.contiguous()
    zero = None if zero is None else zero.contiguous()
    values = table(spec.format)
    factor = None if weight.exponent_bias is None else power_of_two(-weight.exponent_bias.int()).reshape(-1)
    struct = Weight(
        packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(), values.data_ptr(), rows, cols,
        min(wide, cols), spec.format.bits, scale.dtype == torch.float16, len(scale) == 1,
    )  # fmt: skip
    return PackedWeight(spec.format, struct, (packed, scale, zero, values), factor)


@cache
def table(format: Format) -> Tensor:
    """The number of every code, float32 ``[2^bits]``."""
    return format.table().float().contiguous()


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, kernels: Library) -> Tensor:
    """``x @ W^T + bias`` for x ``[..., K]``; ``[..., N]`` in x's dtype."""
    rows = x.reshape(-1, weight.cols).float()
    if weight.factor is not None:
        rows = rows * weight.factor
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    y = torch.empty(*x.shape[:-1], weight.rows)
    failed = kernels.linear(
        weight.pointer, rows.data_ptr(), len(rows), rows.stride(0), None if bias is None else bias.data_ptr(),
        y.data_ptr(), weight.rows, _BITS.get(), parallel(), threads(len(rows) * weight.rows * weight.cols),
    )  # fmt: skip
    if failed:
        raise MemoryError(failed.decode())
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def gives_products(kernels: Library, format: Format) -> bool:
    """Whether the kernels multiply all codes of a format with small integers as float64 does, for 1, 3 and 9 rows of x
    and every rounding of x."""
    rows, cols = 5, 2 * 2**format.bits + 24
    values = format.table()
    good = values.isfinite().nonzero().flatten().to(torch.uint8)
    codes = good[torch.arange(rows * cols) % len(good)].reshape(rows, cols)
    packed, scale, held = packing.pack(codes, packing.planar(format.bits)), torch.ones(rows, 1), table(format)
    weight = Weight(
        packed.data_ptr(), scale.data_ptr(), None, held.data_ptr(), rows, cols, cols, format.bits, False, False
    )
    x = torch.arange(9 * cols).reshape(9, cols).remainder(5).sub(2).float()
    real = values[codes.long()]
    want, bound = x.double() @ real.T, x.abs().double() @ real.abs().T
    for M in (1, 3, 9):
        for bits, error in ((32, 1e-5), (16, 1e-4), (8, 2e-2)):
            y = torch.empty(M, rows)
            failed = kernels.linear(
                ctypes.addressof(weight), x.data_ptr(), M, cols, None, y.data_ptr(), rows, bits, None, 1
            )
            if failed or not bool(((y.double() - want[:M]).abs() <= error * bound[:M]).all()):
                return False
    return True


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("linear_wq", linear_wq, "CPU")
_library.impl("embedding_wq", embedding_wq, "CPU")
