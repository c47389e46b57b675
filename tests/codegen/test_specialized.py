"""Triton makes an argument that is 1 a constant of the kernel: every kernel compiles with any of its sizes so."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from kernel_cases import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxquant.codegen.triton_kernels import SIGNATURE
from fxquant.codegen.variants import FP_FUSION
from fxquant.decodings import decoding
from fxquant.formats import parse_format

SIZES = ("M", "N", "K", "blocks", "x_stride", "residual_stride", "out_stride")
FINISH: dict[str, Any] = {
    "BM": 16, "BN": 32, "ROW_SCALE": True, "BIAS": True, "ACTIVATION": "gelu", "RESIDUAL": True, "RANK": 16,
}  # fmt: skip


def compiles(function: Any, signature: dict[str, str], constants: dict[str, Any], ones: tuple[str, ...]) -> None:
    values = {**constants, **dict.fromkeys(ones, 1)}
    whole = {**signature, **dict.fromkeys(constants, "constexpr"), **dict.fromkeys(ones, "constexpr")}
    made = triton.compile(
        ASTSource(function, whole, values), target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": FP_FUSION}
    )
    assert made.asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("ones", [(), ("M",), ("N", "out_stride"), ("K", "blocks", "x_stride"), SIZES], ids=str)
def test_sizes_of_one(ones: tuple[str, ...]) -> None:
    d = decoding(parse_format("uint4"), group=64)
    module = kernels(d)
    constants = {
        **FINISH, "RUN": d.run, "EVERY": 1, "GROUP": 64, "PADDED": 64, "EVEN": False, "SPLITS": 1, "SWAP": False,
        "ZERO": True, "USE_ASM": True,
    }  # fmt: skip
    compiles(module.gemm, SIGNATURE, constants, ones)
    partial = {"partial": "*fp32", **{k: v for k, v in SIGNATURE.items() if k not in ("x", "w", "scale", "zero")}}
    for name in ("K", "blocks", "x_stride"):
        del partial[name]
    compiles(module.reduce, partial, {**FINISH, "SPLITS": 3}, tuple(n for n in ones if n in partial))
    whole = {k: SIGNATURE[k] for k in ("w", "scale", "zero", "out", "N", "K", "blocks", "out_stride")}
    decoded = {"BN": 16, "RUN": d.run, "GROUP": 64, "PADDED": 64, "ZERO": True, "USE_ASM": True}
    compiles(module.dense, whole, decoded, tuple(n for n in ones if n in whole))
