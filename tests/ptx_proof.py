"""Proofs about inline PTX: each bit of each result as a Boolean function of the bits of the inputs.

``functions(asm, constraints)`` runs the assembly in a domain whose words are lists of functions. A ``Function`` is a
truth table over the few input bits that it truly depends on, in order: two are equal as values if and only if they are
equal as functions. So equal lists mean equal results for all inputs, all 2^96 of the three words of FP6, say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ptx import SIZES, Domain, PtxError, run

Variable = tuple[int, int]
"""(input, position of the bit)."""
MOST = 12
"""Input bits that one bit may depend on: no more are needed, and a table has 2^12 rows then."""


class Function(NamedTuple):
    """``table >> i & 1`` is the value where variable j has bit j of i. No variable is idle."""

    variables: tuple[Variable, ...]
    table: int


ZERO, ONE = Function((), 0), Function((), 1)


def variable(of: int, at: int) -> Function:
    return Function(((of, at),), 0b10)


@cache
def combine(rule: Callable[..., int], *bits: Function) -> Function:
    """The function ``rule(*bits)``; ``rule`` works on tables of the same rows, bit by bit."""
    variables = tuple(sorted({v for bit in bits for v in bit.variables}))
    if len(variables) > MOST:
        raise PtxError(f"a bit depends on {len(variables)} input bits, more than {MOST}")
    rows = 1 << len(variables)
    table = rule(*(_spread(bit, variables) for bit in bits)) & (1 << rows) - 1
    return _reduced(variables, table)


def _spread(bit: Function, variables: tuple[Variable, ...]) -> int:
    """The table of ``bit`` over more variables."""
    at = [variables.index(v) for v in bit.variables]
    table = 0
    for row in range(1 << len(variables)):
        inner = sum((row >> where & 1) << j for j, where in enumerate(at))
        table |= (bit.table >> inner & 1) << row
    return table


def _reduced(variables: tuple[Variable, ...], table: int) -> Function:
    """Without the variables that change nothing."""
    for j in range(len(variables)):
        rows = range(1 << len(variables))
        if all(table >> row & 1 == table >> (row ^ 1 << j) & 1 for row in rows):
            kept = [row for row in rows if not row >> j & 1]
            return _reduced(
                variables[:j] + variables[j + 1 :], sum((table >> row & 1) << i for i, row in enumerate(kept))
            )
    return Function(variables, table)


# --- the domain ------------------------------------------------------------------------------------------------------
Bits = tuple[Function, ...]


def _bits(x: Any, bits: int = 32) -> Bits:
    return tuple(ONE if x >> i & 1 else ZERO for i in range(bits)) if isinstance(x, int) else x


def _bitwise(rule: Callable[..., int]) -> Callable[..., Bits]:
    return lambda *words: tuple(combine(rule, *column) for column in zip(*map(_bits, words), strict=True))


def _shl(x: Any, by: int) -> Bits:
    return ((ZERO,) * by + _bits(x))[:32]


def _shr(x: Any, by: int) -> Bits:
    return (_bits(x)[by:] + (ZERO,) * by)[-32:] if by < 32 else (ZERO,) * 32


def _funnel_left(low: Any, high: Any, by: int) -> Bits:
    return (_bits(low) + _bits(high))[32 - by % 32 : 64 - by % 32]


def _funnel_right(low: Any, high: Any, by: int) -> Bits:
    return (_bits(low) + _bits(high))[by % 32 : by % 32 + 32]


def _lop3(a: Any, b: Any, c: Any, table: int) -> Bits:
    return _bitwise(_rule(table))(a, b, c)


@cache
def _rule(table: int) -> Callable[..., int]:
    """Three tables to that of lop3's result."""

    def rule(x: int, y: int, z: int) -> int:
        result = 0
        for i in range(8):
            if table >> i & 1:
                result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return result

    return rule


def _prmt(a: Any, b: Any, selector: int) -> Bits:
    both = _bits(a) + _bits(b)
    result: Bits = ()
    for k in range(4):
        digit = selector >> 4 * k & 0xF
        byte = both[8 * (digit & 7) : 8 * (digit & 7) + 8]
        result += byte if digit < 8 else (byte[7],) * 8
    return result


BITS = Domain(
    rows={
        "and.b32": _bitwise(lambda a, b: a & b),
        "or.b32": _bitwise(lambda a, b: a | b),
        "xor.b32": _bitwise(lambda a, b: a ^ b),
        "not.b32": _bitwise(lambda a: ~a),
        "shl.b32": _shl,
        "shr.u32": _shr,
        "shr.b32": _shr,
        "shf.l.wrap.b32": _funnel_left,
        "shf.r.wrap.b32": _funnel_right,
        "lop3.b32": _lop3,
        "prmt.b32": _prmt,
    },
    constant=_bits,
    join=lambda low, high: low + high,
    halves=lambda x: (x[:16], x[16:]),
)


def functions(asm: str, constraints: str) -> list[Bits]:
    """For each result the functions of its bits, lowest first."""
    sizes = [SIZES[text.strip()] for text in constraints.split(",") if "=" not in text]
    inputs = [tuple(variable(i, at) for at in range(bits)) for i, bits in enumerate(sizes)]
    return run(asm, constraints, inputs, BITS)


def value(function: Function, inputs: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """``function`` of words, elementwise: 0 or 1."""
    row = np.zeros(inputs[0].shape, np.int64)
    for j, (of, at) in enumerate(function.variables):
        row |= (inputs[of].astype(np.int64) >> at & 1) << j
    table = np.array([function.table >> i & 1 for i in range(1 << len(function.variables))], np.uint32)
    return table[row]
