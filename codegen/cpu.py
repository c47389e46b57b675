"""cpu: the packed linear on a CPU, by compiled kernels. Importing this registers them; the first call compiles them.

What runs for ``linear_wq`` on CPU tensors; every other operator runs its reference body::

    x float32                    kernel, sums in float32
    x float16, bfloat16          kernel on x as float32, y rounded once
    a weight without a kernel    reference (``prepack`` says why)
    no compiler, no cache        reference; said once, as a warning

A kernel reads the packed words and never makes a float matrix of W: of 24 rows of it at a time, where x has several.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import ops
from fxquant.codegen.cpu_library import Library, library, threads
from fxquant.codegen.cpu_source import NUMBERS, RUN, cpu_decoding
from fxquant.codegen.prepack import KernelWeight, Operands, prepare
from fxquant.codegen.remember import remember
from fxquant.errors import FxquantError
from fxquant.formats import Format
from fxquant.packing import pack

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_wq(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, spec: str,
    shape: Sequence[int], tensor_scale: Tensor | None = None, exponent_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``ops.linear_wq`` for CPU tensors."""
    if (
        not _REFERENCE.get()
        and x.dtype in _DTYPES
        and x.numel()
        and x.shape[-1] == shape[-1]
        and (kernels := available())
    ):
        operands = Operands(packed, scale, zero_point, spec, tuple(shape), tensor_scale, exponent_bias)
        weight = prepare(operands, run=RUN)
        if isinstance(weight, KernelWeight) and works(weight.decoding.format):
            return linear(x, weight, bias, kernels)
    return ops.linear_wq(x, packed, scale, zero_point, bias, spec, shape, tensor_scale, exponent_bias)


_REFERENCE: ContextVar[bool] = ContextVar("reference", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """Operators run their reference bodies inside: for a call or two of a graph, for which no weight is prepared."""
    before = _REFERENCE.set(True)
    try:
        yield
    finally:
        _REFERENCE.reset(before)


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
    """Whether the kernels have a format, and give the right products for it on this machine; a warning where not."""
    kernels = available()
    if kernels is None or format not in NUMBERS:
        return False
    if not gives_products(kernels, format):
        warnings.warn(f"the CPU kernel for {format} gives wrong results on this machine; not used", stacklevel=4)
        return False
    return True


def linear(x: Tensor, weight: KernelWeight, bias: Tensor | None, kernels: Library) -> Tensor:
    """``x @ W^T + bias`` for x ``[..., K]``; ``[..., N]`` in x's dtype."""
    rows = _arranged(x.reshape(-1, x.shape[-1]).float(), weight)
    y = torch.empty(len(rows), weight.rows)
    per_scale = weight.padded // weight.decoding.width if weight.group else weight.blocks * weight.decoding.slices
    scale = _by_row(weight.scale)
    zero = None if weight.zero is None else _by_row(weight.zero)
    failed = kernels.linear(
        NUMBERS[weight.decoding.format], weight.words.data_ptr(), scale.data_ptr(),
        None if zero is None else zero.data_ptr(), weight.rows, weight.blocks, scale.shape[1], per_scale,
        rows.data_ptr(), len(rows), rows.stride(0), y.data_ptr(), y.stride(0),
        threads(len(rows) * weight.rows * weight.cols),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a panel of decoded weights (96 KB a thread)")
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def _by_row(value: Tensor) -> Tensor:
    """Values of groups ``[groups, N]`` as float32 ``[N, groups]``, as the kernels read them; made once."""
    return remember(lambda: value.T.float().contiguous(), "by row", value)


def _arranged(rows: Tensor, weight: KernelWeight) -> Tensor:
    """x in the columns of the packed words: groups filled up, and zeros to whole blocks."""
    if not weight.even:
        if weight.group and weight.padded != weight.group:
            rows = F.pad(rows, (0, -rows.shape[1] % weight.group)).reshape(len(rows), -1, weight.group)
            rows = F.pad(rows, (0, weight.padded - weight.group)).flatten(1)
        rows = F.pad(rows, (0, weight.blocks * weight.decoding.block - rows.shape[1]))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def gives_products(kernels: Library, format: Format) -> bool:
    """Whether the kernels multiply all codes of a format with small integers as float64 does, for 1 and 3 rows of x."""
    of = cpu_decoding(format)
    good = torch.tensor([c for c in range(2**format.bits) if c not in of.left_out], dtype=torch.uint8)
    codes = good[torch.arange(5 * of.block) % len(good)].reshape(5, of.block)
    words, scale = pack(of.codes(codes), of.layout).view(torch.int32), torch.full((1, 5), 2.0**of.log2)
    x = torch.arange(3 * of.block).reshape(3, of.block).remainder(5).sub(2).float()
    values = format.table()[codes.long()]
    want, bound = x.double() @ values.T, 1e-5 * (x.abs().double() @ values.abs().T)
    for M in (1, 3):
        y = torch.empty(M, 5)
        failed = kernels.linear(
            NUMBERS[format], words.data_ptr(), scale.data_ptr(), None, 5, 1, 1, of.slices,
            x.data_ptr(), M, of.block, y.data_ptr(), 5, 1,
        )  # fmt: skip
        if failed or not bool(((y.double() - want[:M]).abs() <= bound[:M]).all()):
            return False
    return True


_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("linear_wq", linear_wq, "CPU")
