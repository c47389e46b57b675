"""The emulator of PTX: every instruction against its definition bit by bit, on arrays and as Boolean functions.

The definitions are those of the PTX ISA, section "Logic and Shift Instructions" and "Data Movement: prmt".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import NUMPY, PtxError, elementwise, parse, run
from ptx_proof import BITS, Function, functions, value

WORDS = st.integers(0, 2**32 - 1)
FULL = 2**32 - 1


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def _prmt(a: int, b: int, selector: int) -> int:
    result = 0
    for k in range(4):
        digit = selector >> 4 * k & 0xF
        byte = (b << 32 | a) >> 8 * (digit & 7) & 0xFF
        result |= (0xFF * (byte >> 7) if digit & 8 else byte) << 8 * k
    return result


DEFINITIONS: dict[str, tuple[int, Callable[..., int], tuple[int, ...]]] = {
    # sources in registers, what it computes, limits of the numbers after them
    "and.b32": (2, lambda a, b: a & b, ()),
    "or.b32": (2, lambda a, b: a | b, ()),
    "xor.b32": (2, lambda a, b: a ^ b, ()),
    "not.b32": (1, lambda a: a ^ FULL, ()),
    "shl.b32": (1, lambda a, n: a << n & FULL, (40,)),
    "shr.u32": (1, lambda a, n: a >> n, (40,)),
    "shr.b32": (1, lambda a, n: a >> n, (40,)),
    "shf.l.wrap.b32": (2, lambda a, b, n: (b << 32 | a) << (n & 31) >> 32 & FULL, (70,)),
    "shf.r.wrap.b32": (2, lambda a, b, n: (b << 32 | a) >> (n & 31) & FULL, (70,)),
    "lop3.b32": (3, _lop3, (255,)),
    "prmt.b32": (2, _prmt, (0xFFFF,)),
}


@pytest.mark.parametrize("opcode", DEFINITIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_instruction(opcode: str, data: st.DataObject) -> None:
    count, definition, limits = DEFINITIONS[opcode]
    sources = [data.draw(WORDS) for _ in range(count)]
    numbers = [data.draw(st.integers(0, limit)) for limit in limits]
    operands = ", ".join([*(f"${i + 1}" for i in range(count)), *map(str, numbers)])
    asm = f"{{\n.reg .b32 t0;\n{opcode} t0, {operands};\nmov.b32 $0, t0;\n}}"
    constraints = ",".join(["=r"] + ["r"] * count)
    inputs = [np.array([x], np.uint32) for x in sources]
    want = definition(*sources, *numbers)
    assert run(asm, constraints, inputs)[0].tolist() == [want]
    (bits,) = functions(asm, constraints)
    assert sum(int(value(bit, inputs)[0]) << i for i, bit in enumerate(bits)) == want


def test_all_instructions_are_defined_here() -> None:
    """And those on floats in the next test."""
    assert set(BITS.rows) == set(DEFINITIONS)
    assert set(NUMPY.rows) == {*DEFINITIONS, "add.f16x2", "sub.f16x2", "mul.f16x2"}


@pytest.mark.parametrize(("name", "operation"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_instructions_on_two_halves(name: str, operation: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**16, 4096, dtype=np.uint16) for _ in range(2))
    a[::2] &= 0x83FF  # subnormals
    asm = f"{{ .reg .b32 t0; {name}.f16x2 t0, $1, $2; mov.b32 $0, t0; }}"
    (got,) = run(asm, "=r,r,r", [a.view(np.uint32), b.view(np.uint32)])
    with np.errstate(all="ignore"):
        want = operation(a.view(np.float16), b.view(np.float16))
    assert np.array_equal(got.view(np.float16), want, equal_nan=True)


def test_words_are_cut_into_halves_and_joined() -> None:
    x = np.array([0xDEADBEEF], np.uint32)
    low, high = run("mov.b32 {$0, $1}, $2;", "=h,=h,r", [x])
    assert (low.tolist(), high.tolist()) == ([0xBEEF], [0xDEAD])
    (back,) = run("mov.b32 $0, {$1, $2};", "=r,h,h", [high, low])
    assert back.tolist() == [0xBEEFDEAD]


def test_what_is_read() -> None:
    declared, instructions = parse(
        "{ // nothing\n.reg .b32 t<2>, u; /* more */ shl.b32 t0, $1, 3;\n mov.b32 {$0, u}, t0; }"
    )
    assert declared == {"t0": 32, "t1": 32, "u": 32}
    assert instructions == [("shl.b32", ("t0", "$1", "3")), ("mov.b32", (("$0", "u"), "t0"))]


@pytest.mark.parametrize(
    ("asm", "constraints", "why"),
    [
        ("add.s32 $0, $1, $1;", "=r,r", r"unknown instruction add\.s32; known are mov, and\.b32"),
        ("mov.b32 $0, t0;", "=r,r", "t0 is no number and no register that is declared"),
        (".reg .b32 t0; mov.b32 $0, t0;", "=r,r", "t0 is read before it is written"),
        (".reg .b32 t0; mov.b32 t0, $1;", "=r,r", r"result \$0 is never written"),
        ("mov.b32 $1, $1; mov.b32 $0, $1;", "=r,r", r"\$1 is an input and is written"),
        ("mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", r"\$2 is read after a result was written"),
        ("mov.b32 $0, $1;", "=h,r", r"\$0 has 16 bits where 32 are taken"),
        ("mov.b32 {$0, $1}, $2;", "=r,=r,r", r"\$0 has 32 bits where 16 are taken"),
        ("{ mov.b32 $0, $1;", "=r,r", "braces are not balanced"),
        ("mov.b32 $0, $1;", "=r,f", "constraint 'f'; known are r, h"),
    ],
)
def test_wrong_assembly(asm: str, constraints: str, why: str) -> None:
    with pytest.raises(PtxError, match=why):
        run(asm, constraints, [np.zeros(1, np.uint32)])


def test_a_result_that_is_written_early_must_say_so() -> None:
    asm = "mov.b32 $0, $2; mov.b32 $1, $2;"
    one, other = run(asm, "=&r,=&r,r", [np.array([7], np.uint32)])
    assert (one.tolist(), other.tolist()) == ([7], [7])


def test_elements_are_packed_into_registers() -> None:
    """Four bytes or two halves of a tensor are a register, in their order."""
    x = np.arange(8, dtype=np.uint8)
    (got,) = elementwise("prmt.b32 $0, $1, 0, 0x0123;", "=r,r", [x], [np.dtype(np.uint8)], pack=4)
    assert got.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    (got,) = elementwise("mov.b32 $0, $1;", "=r,r", [x], [np.dtype(np.uint8)], 4, np.arange(8)[::-1].copy())
    assert got.tolist() == x.tolist()
    for pack, asm, constraints in ((4, "mov.b32 $0, $1;", "=r,r,r"), (2, "mov.b32 $0, $1;", "=r,r")):
        with pytest.raises(PtxError):
            elementwise(asm, constraints, [x], [np.dtype(np.uint8)], pack)


def test_functions_have_no_idle_variables() -> None:
    """x & 0, x ^ x and x | ~x are constants; x & x is x."""
    asm = ".reg .b32 t0; not.b32 t0, $1; {} mov.b32 $0, t0;"
    for text, want in (
        ("and.b32 t0, $1, 0;", Function((), 0)),
        ("xor.b32 t0, $1, $1;", Function((), 0)),
        ("or.b32 t0, $1, t0;", Function((), 1)),
        ("and.b32 t0, $1, $1;", Function(((0, 0),), 0b10)),
    ):
        assert functions(asm.format(text), "=r,r")[0][0] == want
