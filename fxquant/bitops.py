"""A small language for bits: how codes come out of packed words, written once and read in several ways.

An expression works on unsigned words of 8, 16 or 32 bits and uses nothing but shifts, rotations, masks, merges and byte
permutations, which every back end has. It is built with Python's own operators, so it looks like what it means::

    a, b = word("a", 32), word("b", 32)
    t = a >> 4 & 0x0F0F0F0F | rotl(b, 2) & 0x90909090

    one byte of t   bit  7   6   5   4     3   2   1   0
    a >> 4 & 0x0F        0   0   0   0     a7  a6  a5  a4
    rotl(b, 2) & 0x90    b5  0   0   b2    0   0   0   0
    t                    b5  0   0   b2    a7  a6  a5  a4

``|`` is a merge: both sides must not hold the same bit, so that every bit of a result is one bit of one word, or 0.
Readings of an expression: ``evaluate`` on numpy arrays (the reference), ``trace`` bit by bit (``fxquant.layouts``
derives the packer from it), ``cost`` in operations, ``str`` as above. A back end that prints it is one more reading:
a table with one row for each of the kinds in ``KINDS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxquant.errors import FormatError

Array = NDArray[np.unsignedinteger[Any]]
Bit = tuple[str, int] | None
"""Where a bit comes from: (name of a word, position, 0 the lowest), or None for a bit that is always 0."""

DTYPES: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}


@dataclass(frozen=True, slots=True)
class Expr:
    """One operation on words of ``bits`` bits. Build it with ``word``, the operators, ``rotl`` and ``permute``.

    ``by`` is the distance of a shift or rotation (0 < by < bits), the mask of an ``and`` (0 < by < 2**bits), or the
    selector of a ``permute``. Raises FormatError for a number outside these ranges, or words of unequal sizes.
    """

    kind: str
    bits: int
    args: tuple[Expr, ...] = ()
    by: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.bits not in DTYPES:
            raise FormatError(f"a word has 8, 16 or 32 bits, not {self.bits}")
        if any(arg.bits != self.bits for arg in self.args):
            raise FormatError(f"{self.kind} of words of {' and '.join(str(arg.bits) for arg in self.args)} bits")
        if not KINDS[self.kind].allows(self.by, self.bits):
            raise FormatError(f"{self.kind} by {self.by:#x} on words of {self.bits} bits")

    def __lshift__(self, by: int) -> Expr:
        return Expr("shl", self.bits, (self,), by) if by else self

    def __rshift__(self, by: int) -> Expr:
        return Expr("shr", self.bits, (self,), by) if by else self

    def __and__(self, mask: int) -> Expr:
        return Expr("and", self.bits, (self,), mask)

    def __or__(self, other: Expr) -> Expr:
        return Expr("or", self.bits, (self, other))

    def __str__(self) -> str:
        return KINDS[self.kind].text.format(*self.args, by=self.by, name=self.name)


def word(name: str, bits: int) -> Expr:
    """A word that is read, the leaf of every expression."""
    return Expr("word", bits, name=name)


def rotl(x: Expr, by: int) -> Expr:
    """``x`` rotated left: bit i goes to bit (i + by) mod bits."""
    return Expr("rotl", x.bits, (x,), by) if by else x


def permute(x: Expr, selector: int) -> Expr:
    """Bytes of ``x`` in another order: byte k of the result is byte ``selector >> 4k & 0xF`` of x, and 0 where that
    digit is 4. ``permute(x, 0x2404)`` has bytes ``[0, x0, 0, x2]``, lowest first: PTX ``prmt.b32 d, x, 0, 0x2404``."""
    return Expr("permute", x.bits, (x,), selector)


def evaluate(expr: Expr, words: Mapping[str, Array]) -> Array:
    """The value of ``expr``, elementwise over ``words``: for each name an unsigned array of the word's size, all of
    one shape."""
    if expr.kind == "word":
        value = words[expr.name]
        if value.dtype != DTYPES[expr.bits]:
            raise FormatError(f"word {expr.name!r} has {expr.bits} bits, got an array of {value.dtype}")
        return value
    return KINDS[expr.kind].value([evaluate(arg, words) for arg in expr.args], expr.by)


def trace(expr: Expr) -> tuple[Bit, ...]:
    """Where each bit of ``expr`` comes from, lowest first. Raises FormatError when a merge overlaps."""
    if expr.kind == "word":
        return tuple((expr.name, i) for i in range(expr.bits))
    if expr.kind == "or":
        left, right = (trace(arg) for arg in expr.args)
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            if one and other:
                raise FormatError(f"bit {i} of {expr} is merged from {one[0]}[{one[1]}] and {other[0]}[{other[1]}]")
        return tuple(one or other for one, other in zip(left, right, strict=True))
    return KINDS[expr.kind].moved(trace(expr.args[0]), expr.by)


def cost(*exprs: Expr) -> dict[str, int]:
    """How many operations of each kind ``exprs`` take together; what they share is counted once."""
    return dict(Counter(node.kind for node in nodes(*exprs) if node.kind != "word"))


def widen(expr: Expr, bits: int = 32) -> Expr:
    """``expr`` on all lanes of words of ``bits`` bits at once, of which each lane is one word of ``expr``.

    A shift brings in bits of the neighbouring lane, which are masked away; masks that follow each other become one.
    Raises FormatError for rotations and permutations, which do not stay inside a lane.
    """
    if expr.kind in ("rotl", "permute") or bits % expr.bits:
        raise FormatError(f"{expr.kind} of {expr.bits} bits has no form on lanes of a word of {bits}")
    if expr.kind == "word":
        return word(expr.name, bits)
    args = [widen(arg, bits) for arg in expr.args]
    if expr.kind == "or":
        return args[0] | args[1]
    one = sum(1 << at for at in range(0, bits, expr.bits))
    full = (1 << expr.bits) - 1
    if expr.kind == "and":
        return _masked(args[0], one * expr.by)
    shifted = args[0] << expr.by if expr.kind == "shl" else args[0] >> expr.by
    return _masked(shifted, one * (full << expr.by & full if expr.kind == "shl" else full >> expr.by))


def _masked(x: Expr, mask: int) -> Expr:
    both = x.by & mask if x.kind == "and" else 0
    return x.args[0] & both if both else x & mask  # masks with no bit in common stay two: there is no mask 0


def nodes(*exprs: Expr) -> list[Expr]:
    """Every operation and word of ``exprs``, once, each after what it needs."""
    found: dict[Expr, None] = {}

    def visit(expr: Expr) -> None:
        if expr not in found:
            for arg in expr.args:
                visit(arg)
            found[expr] = None

    for expr in exprs:
        visit(expr)
    return list(found)


class Kind(NamedTuple):
    """What one operation means: its text, which ``by`` it allows, its value on arrays, where it moves bits."""

    text: str
    allows: Callable[[int, int], bool]
    value: Callable[[list[Array], int], Array]
    moved: Callable[[tuple[Bit, ...], int], tuple[Bit, ...]]


def _distance(by: int, bits: int) -> bool:
    return 0 < by < bits


def _mask(by: int, bits: int) -> bool:
    return 0 < by < 1 << bits


def _selector(by: int, bits: int) -> bool:
    return 0 <= by < 1 << bits // 2 and all(d < bits // 8 or d == 4 for d in _digits(by, bits // 8))


def _nothing(by: int, bits: int) -> bool:
    return by == 0


def _digits(selector: int, count: int) -> list[int]:
    return [selector >> 4 * k & 0xF for k in range(count)]


def _rotate(args: list[Array], by: int) -> Array:
    (x,) = args
    return x << x.dtype.type(by) | x >> x.dtype.type(x.dtype.itemsize * 8 - by)


def _permute(args: list[Array], selector: int) -> Array:
    (x,) = args
    size, of = x.dtype.itemsize, x.dtype.type
    moved = [(x >> of(8 * d) & of(0xFF)) << of(8 * k) for k, d in enumerate(_digits(selector, size)) if d != 4]
    result = np.zeros_like(x)
    for byte in moved:
        result = result | byte
    return result


def _permute_bits(bits: tuple[Bit, ...], selector: int) -> tuple[Bit, ...]:
    zero: tuple[Bit, ...] = (None,) * 8
    return sum((zero if d == 4 else bits[8 * d : 8 * d + 8] for d in _digits(selector, len(bits) // 8)), ())


def _same(bits: tuple[Bit, ...], by: int) -> tuple[Bit, ...]:
    return bits


KINDS: dict[str, Kind] = {
    "word": Kind("{name}", _nothing, lambda x, by: x[0], _same),
    "or": Kind("({} | {})", _nothing, lambda x, by: x[0] | x[1], _same),  # trace merges its two sides itself
    "and": Kind("({} & {by:#x})", _mask, lambda x, by: x[0] & x[0].dtype.type(by),
                lambda bits, by: tuple(bit if by >> i & 1 else None for i, bit in enumerate(bits))),
    "shl": Kind("({} << {by})", _distance, lambda x, by: x[0] << x[0].dtype.type(by),
                lambda bits, by: (None,) * by + bits[:-by]),
    "shr": Kind("({} >> {by})", _distance, lambda x, by: x[0] >> x[0].dtype.type(by),
                lambda bits, by: bits[by:] + (None,) * by),
    "rotl": Kind("rotl({}, {by})", _distance, _rotate, lambda bits, by: bits[-by:] + bits[:-by]),
    "permute": Kind("permute({}, {by:#x})", _selector, _permute, _permute_bits),
}  # fmt: skip
