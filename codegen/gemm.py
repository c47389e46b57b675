"""gemm: calls of the generated kernels. Importing this loads no triton; calling it does.

What a kernel takes has been settled before (``prepack``, ``tiles``): here are the grids, the buffers and the order of
arguments. CPU tensors go through Triton's interpreter where that is on, which is how this is tested without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import cache as kernel_cache
from fxquant.codegen import triton_source
from fxquant.codegen.prepack import KernelWeight
from fxquant.codegen.rounding import RoundedProduct
from fxquant.codegen.tiles import Tiles
from fxquant.codegen.variants import FP_FUSION
from fxquant.decodings import Decoding
from fxquant.formats import Format
from fxquant.grids import FloatFormat

_RANK = 16
"""What the inner dimension of the compensation is a multiple of: a dot's least."""


@dataclass(frozen=True)
class Epilogue:
    """``y = activation(y * row_scale + thin @ wide^T + bias) + residual``; what is None is left out.

    row_scale  float32 [M]    bias [N]    residual [M, N]    thin [M, R] and wide [N, R] of one dtype of 16 bits
    """

    bias: Tensor | None = None
    activation: str = "none"
    residual: Tensor | None = None
    thin: Tensor | None = None
    wide: Tensor | None = None

    def flattened(self, M: int, N: int) -> Epilogue:
        """The same for rows ``[M, ...]``, each value contiguous along its last dimension."""

        def rows(value: Tensor | None, width: int) -> Tensor | None:
            if value is None:
                return None
            value = value.reshape(M, width)
            return value if value.stride(1) == 1 else value.contiguous()

        rank = 0 if self.thin is None else self.thin.shape[-1]
        return replace(self, residual=rows(self.residual, N), thin=rows(self.thin, rank))


def run_gemm(
    x: Tensor, weight: KernelWeight, tiles: Tiles, *, row_scale: Tensor | None = None, epilogue: Epilogue | None = None,
    dtype: torch.dtype | None = None, use_asm: bool = True,
) -> Tensor:  # fmt: skip
    """``epilogue(x @ W^T)``, ``[M, N]`` in ``dtype`` (x's own where None), of x ``[M, K]``: float16, or FP8 where
    the weight was prepared for it."""
    kernels = _weight_kernels(weight.decoding)
    more = epilogue or Epilogue()
    (M, K), N, splits = x.shape, weight.rows, tiles.splits
    out = x.new_empty(M, N, dtype=dtype or x.dtype)
    target = out if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    pointers, constants = _epilogue(more, row_scale, weight.scale)
    grid = (-(-N // tiles.BN), -(-M // tiles.BM), splits)
    residual_stride = 0 if more.residual is None else more.residual.stride(0)
    with _on(x):
        kernels.gemm[grid](
            x, weight.words, weight.scale, weight.scale if weight.zero is None else weight.zero, *pointers, target,
            M, N, K, weight.blocks, x.stride(0), residual_stride, N,
            BM=tiles.BM, BN=tiles.BN, RUN=weight.decoding.run, EVERY=weight.every, GROUP=weight.group,
            PADDED=weight.padded, EVEN=weight.even, SPLITS=splits, SWAP=tiles.swap, ZERO=weight.zero is not None,
            **constants, USE_ASM=use_asm, num_warps=tiles.warps, num_stages=tiles.stages,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        if splits > 1:
            kernels.reduce[(-(-N // _REDUCE), -(-M // tiles.BM))](
                target, *pointers, out, M, N, residual_stride, N, BM=tiles.BM, BN=_REDUCE, SPLITS=splits, **constants,
                enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    return out


_REDUCE = 64
"""Columns that a program sums up."""


def _epilogue(
    more: Epilogue, row_scale: Tensor | None, nothing: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Pointers in the order of a kernel's arguments (``nothing`` where there is none), and its constants."""
    thin, wide = more.thin, more.wide
    rank = 0
    if thin is not None and wide is not None:
        rank = max(_RANK, 1 << (thin.shape[1] - 1).bit_length())
        thin, wide = (F.pad(t, (0, rank - t.shape[1])).contiguous() for t in (thin, wide))
    given = (row_scale, None if more.bias is None else more.bias.contiguous(), more.residual, thin, wide)
    constants = {
        "ROW_SCALE": row_scale is not None, "BIAS": more.bias is not None, "ACTIVATION": more.activation,
        "RESIDUAL": more.residual is not None, "RANK": rank,
    }  # fmt: skip
    return tuple(nothing if t is None else t for t in given), constants


def run_dense(weight: KernelWeight, dtype: torch.dtype, *, use_asm: bool = True) -> Tensor:
    """W itself, ``[N, K]``, decoded and rounded once to ``dtype``."""
    kernels = _weight_kernels(weight.decoding)
    N, K = weight.rows, weight.cols
    out = weight.scale.new_empty(N, K, dtype=dtype)
    with _on(out):
        kernels.dense[(-(-N // _DENSE), weight.blocks)](
            weight.words, weight.scale, weight.scale if weight.zero is None else weight.zero, out, N, K, weight.blocks,
            K, BN=_DENSE, RUN=weight.decoding.run, GROUP=weight.group, PADDED=weight.padded,
            ZERO=weight.zero is not None, USE_ASM=use_asm, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


_DENSE = 16
"""Rows of W that a program decodes."""


def run_to_half(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[M, K]`` as float16, and the power of two of each row it was divided by, float32 ``[M]``."""
    M, K = x.shape
    out, row_scale = x.new_empty(M, K, dtype=torch.float16), x.new_empty(M, dtype=torch.float32)
    with _on(x):
        _row_kernels().to_half[(M,)](x, out, row_scale, K, x.stride(0), BK=_chunk(K), enable_fp_fusion=FP_FUSION)
    return out, row_scale


def run_round(x: Tensor, format: Format, given: Tensor | None, product: RoundedProduct) -> tuple[Tensor, Tensor]:
    """x ``[M, K]`` rounded to ``format`` with the scale ``given``, or one found for each row, as ``product`` takes it:
    float16 or FP8 ``[M, K]``, and the scale of each row, float32 ``[M]``."""
    M, K = x.shape
    out = x.new_empty(M, K, dtype=torch.float16 if product.x is None else torch.uint8)
    row_scale, to = x.new_empty(M, dtype=torch.float32), product.x
    small = format if isinstance(format, FloatFormat) else None
    with _on(x):
        _row_kernels().round_rows[(M,)](
            x, x if given is None else given, x if product.before is None else product.before,
            x if product.after is None else product.after, out, row_scale, K, x.stride(0), 2.0**product.down,
            2.0**-product.down, MBITS=small.mbits if small else 0, BIAS=int(small.bias) if small else 0,
            MAX=format.max, INTEGER=small is None, STATIC=given is not None, BEFORE=product.before is not None,
            AFTER=product.after is not None, TO_MBITS=to.mbits if to else 0, TO_BIAS=int(to.bias) if to else 0,
            BK=_chunk(K), enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out if to is None else out.view(_TORCH_BYTES[str(to)]), row_scale


_TORCH_BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _chunk(K: int) -> int:
    """Columns that a program of a row takes at a time."""
    return min(1024, 1 << max(K - 1, 15).bit_length())


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _weight_kernels(decoding: Decoding) -> ModuleType:
    source = triton_source.gemm(decoding)
    return kernel_cache.load(source.name, source.text)


@cache
def _row_kernels() -> ModuleType:
    source = triton_source.rows()
    return kernel_cache.load(source.name, source.text)
