"""A kernel of three lines of arithmetic, and a catalogue of it: what the tests of compiling and counting work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxquant.codegen.variants import Variant

E5M2_GEMM = '''
import triton
import triton.language as tl


@triton.jit
def gemm(x, w, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr):
    """out = x w^T, x fp16 [M, K], w e5m2 bytes [N, K]: a byte is the high byte of the fp16 number."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, KB)
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, KB):
        xs = tl.load(x + (rm % M)[:, None] * K + (at + k)[None, :])
        ws = tl.load(w + rn[:, None] * K + (at + k)[None, :])
        acc = tl.dot(xs, (ws.to(tl.int16) << 8).to(tl.float16, bitcast=True).T, acc)
    tl.store(out + rm[:, None] * N + rn[None, :], acc.to(tl.float16), mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def double(x, out, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + at, 2 * tl.load(x + at))


@triton.jit
def broken(x, out, B: tl.constexpr):
    tl.store(out, tl.load(x) + no_such_name)
'''

GEMM = Variant(
    "e5m2_decode", "decode", "e5m2", "gemm",
    signature={"x": "*fp16", "w": "*i8", "out": "*fp16", "M": "i32", "N": "i32", "K": "i32"},
    constants={"BM": 16, "BN": 32, "KB": 64},
    aligned=frozenset(("x", "w", "out", "M", "N", "K")),
    weights=32 * 64, bits=8.0,
)  # fmt: skip
DOUBLE = Variant(
    "double", "quantize", "e5m2", "double", signature={"x": "*fp16", "out": "*fp16"}, constants={"B": 256},
    aligned=frozenset(("x", "out")),
)  # fmt: skip
HOPPER = replace(GEMM, name="e5m2_swap", kind="prefill", archs=(90,), needs="wgmma")


@dataclass
class TinyCatalogue:
    """Stands for ``fxquant.codegen.triton_kernels``."""

    formats: Sequence[str] = ("e5m2", "e3m2")

    def variants(self, formats: Sequence[str]) -> Sequence[Variant]:
        return [GEMM, DOUBLE, HOPPER] if "e5m2" in formats else [replace(GEMM, family="e3m2", name="e3m2_decode")]

    def emit(self, family: str) -> str:
        assert family in ("e5m2", "e3m2")
        return E5M2_GEMM
