"""The mended interpreter does what the hardware would, and refuses what would go unnoticed otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_interpreter import within

BYTEWISE = tl.constexpr("{ .reg .b32 t0; shl.b32 t0, $1, 1; and.b32 $0, t0, 0xfefefefe; }")
ACROSS = tl.constexpr("{ .reg .b32 t0; shl.b32 t0, $1, 1; mov.b32 $0, t0; }")
HALVES = tl.constexpr("{ .reg .b32 t0; mul.f16x2 t0, $1, $2; mov.b32 $0, t0; }")


@triton.jit
def run_bytes(x, out, ASM: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    y = tl.inline_asm_elementwise(ASM, "=r,r", [tl.load(x + at)], dtype=tl.uint8, is_pure=True, pack=4)
    tl.store(out + at, y)


@triton.jit
def run_halves(x, y, out, ASM: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    operands = [tl.load(x + at), tl.load(y + at)]
    tl.store(out + at, tl.inline_asm_elementwise(ASM, "=r,r,r", operands, dtype=tl.float16, is_pure=True, pack=2))


@triton.jit
def convert(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def add(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def dot(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def test_assembly_on_bytes_in_any_grouping() -> None:
    x, out = torch.arange(64, dtype=torch.uint8) * 4, torch.zeros(64, dtype=torch.uint8)
    run_bytes[(1,)](x, out, BYTEWISE, 64)
    assert torch.equal(out, x * 2)


def test_assembly_that_mixes_elements_is_refused() -> None:
    """A shift that carries bits of one byte into the next: right for one grouping of bytes, wrong for another."""
    x, out = torch.full((64,), 0x81, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    x[::3] = 0x01
    with pytest.raises(InterpreterError, match="depend on which 4 elements meet"):
        run_bytes[(1,)](x, out, ACROSS, 64)


def test_two_halves_of_a_register() -> None:
    x, y = torch.randn(64).half(), torch.randn(64).half() * 2.0**-15
    out = torch.zeros(64, dtype=torch.float16)
    run_halves[(1,)](x, y, out, HALVES, 64)
    assert torch.equal(out, x * y)  # subnormals too


ALL = torch.arange(256, dtype=torch.uint8)
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("of", SMALL, ids=str)
@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_byte_float_widens(of: torch.dtype, to: torch.dtype) -> None:
    out = torch.zeros(256, dtype=to)
    convert[(1,)](ALL.view(of), out, 256)
    assert torch.equal(out.nan_to_num(1.5e4), ALL.view(of).to(to).nan_to_num(1.5e4))


@pytest.mark.parametrize("to", [torch.bfloat16, *SMALL], ids=str)
def test_float32_rounds_to_nearest_even(to: torch.dtype) -> None:
    """Numbers of all sizes, ties among them; FP8 stops at its largest number."""
    grid = (ALL.view(torch.float8_e5m2).float()[:124].repeat(2) * (1 + torch.arange(248) % 16 / 128))[:248]
    x = torch.cat([grid, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1e9, -1e9, 0.0, 2**-10, 465.0, -70000.0])])
    out = torch.zeros(256, dtype=to)
    convert[(1,)](x, out, 256)
    most = torch.finfo(to).max
    want = x.clamp(-most, most).to(to)
    assert torch.equal(out.float(), want.float())
    assert bool((want.float() != x).any())


@pytest.mark.parametrize("of", [torch.bfloat16, *SMALL], ids=str)
def test_arithmetic_on_raw_bits_is_refused(of: torch.dtype) -> None:
    with pytest.raises(InterpreterError, match="would take the bits as integers"):
        add[(1,)](torch.ones(16).to(of), torch.ones(16).to(of), 16)


@pytest.mark.parametrize("of", [torch.bfloat16, *SMALL], ids=str)
def test_dot_widens(of: torch.dtype) -> None:
    x, y = torch.randn(16, 16).to(of), (torch.randn(16, 16) * torch.finfo(of).smallest_normal).to(of)
    out = torch.zeros(16, 16)
    dot[(1,)](x, y, out, 16)
    assert torch.allclose(out.double(), x.double() @ y.double(), rtol=1e-5, atol=torch.finfo(of).smallest_normal * 1e-5)
    assert bool(out.any())


@triton.jit
def overlap(out, back, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at + tl.program_id(0) * (N - 1), tl.full((N,), 1.0, tl.float32))
    tl.store(back + at + tl.program_id(0) * N, tl.load(out + at + tl.program_id(0)))


def test_what_two_programs_write_is_refused() -> None:
    """And what is read before it is written: neither shows where programs run one after the other."""
    out, back = torch.zeros(64), torch.zeros(64)
    with within([], [out, back]), pytest.raises(InterpreterError, match="1 of 16 addresses are written twice"):
        overlap[(2,)](out, back, 16)
    with within([], [out, back]), pytest.raises(InterpreterError, match="16 of 16 addresses read are outside, or not"):
        add[(1,)](out, back, 16)
    with within([], [out, back]):
        overlap[(1,)](out, back, 16)


@pytest.mark.parametrize(("kept", "what"), [(15, "read"), (16, "written")])
def test_what_is_outside_is_refused(kept: int, what: str) -> None:
    x, out = torch.ones(16), torch.zeros(16)
    given: dict[str, Any] = {"read": ([x[:kept]], [out]), "written": ([x], [out[1:]])}
    with within(*given[what]), pytest.raises(InterpreterError, match=f"1 of 16 addresses {what} are outside"):
        add[(1,)](x, out, 16)
    with within([x], [out]):
        add[(1,)](x, out, 16)
