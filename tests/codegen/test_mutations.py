"""Mutation score of the decode proofs: every constant of the assembly that ships is changed, and a proof must fail.

Constants are masks, distances of shifts and rotations, selectors of ``prmt`` and tables of ``lop3``. Each is changed in
every bit, and by one up and down. The proof is that of all codes in all slots (``test_decode_proofs``), run on the
changed string by the emulator. A mutant that it does not catch must be equivalent, which is proven: all its results are
the same Boolean functions of the stored bits. ``PYTHONPATH=tests python tests/codegen/test_mutations.py`` prints the
score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
from decode_cases import (
    DECODINGS,
    IDS,
    all_codes,
    expected,
    numbers,
    registers_to_words,
    shipped_asm,
    wide,
    words_of,
)
from ptx import PtxError, run
from ptx_proof import functions

from fxquant.decodings import KERNEL_FORMATS, Decoding

SHIPPED = [(d, i) for d, i in zip(DECODINGS, IDS, strict=True) if d.format in KERNEL_FORMATS]


class Constant(NamedTuple):
    """What a number of an instruction is, which operand (0 is the result), and its bits."""

    what: str
    operand: int
    bits: int


CONSTANTS = {
    "and.b32": (Constant("mask", 2, 32),),
    "shl.b32": (Constant("distance", 2, 5),),
    "shr.u32": (Constant("distance", 2, 5),),
    "shf.l.wrap.b32": (Constant("distance", 3, 5),),
    "prmt.b32": (Constant("second word", 2, 32), Constant("selector", 3, 16)),
    "lop3.b32": (Constant("mask", 2, 32), Constant("table", 4, 8)),
    "or.b32": (),
}


class Mutant(NamedTuple):
    asm: str
    what: str
    line: str
    """The line as it is, and the changed number."""


def mutants(asm: str) -> Iterator[Mutant]:
    """The assembly with one constant changed. An instruction that is not in ``CONSTANTS`` is an error."""
    lines = asm.split("\n")
    for n, line in enumerate(lines):
        opcode, _, rest = line.partition(" ")
        if opcode in ("{", "}", ".reg", "mov.b32"):
            continue
        operands = [part.strip() for part in rest.rstrip(";").split(",")]
        numbers = {i for i, text in enumerate(operands) if re.fullmatch(r"0x[0-9a-f]+|\d+", text)}
        assert numbers == {c.operand for c in CONSTANTS[opcode]}, line
        for constant in CONSTANTS[opcode]:
            was = int(operands[constant.operand], 0)
            changed = {was ^ 1 << i for i in range(constant.bits)} | {was - 1, was + 1}
            for number in sorted(x for x in changed if 0 <= x < 1 << constant.bits):
                mutated = [*operands]
                mutated[constant.operand] = hex(number)
                text = f"{opcode} {', '.join(mutated)};"
                yield Mutant("\n".join([*lines[:n], text, *lines[n + 1 :]]), constant.what, f"{line} -> {number:#x}")


@dataclass
class Score:
    """Caught, equivalent (proven) and missed mutants of one decoding, each as (what was changed, the line)."""

    caught: list[tuple[str, str]] = field(default_factory=list)
    equivalent: list[tuple[str, str]] = field(default_factory=list)
    missed: list[tuple[str, str]] = field(default_factory=list)


def score(d: Decoding) -> Score:
    asm, constraints = shipped_asm(d)
    codes = all_codes(d)[:64]  # enough: what passes is proven equivalent, or counts as missed
    words = wide(d, words_of(d, codes))
    want, like = expected(d, codes), next(iter(words.values()))
    truth = functions(asm, constraints)
    result = Score()
    for mutant in mutants(asm):
        try:
            got = numbers(d, registers_to_words(d, run(mutant.asm, constraints, list(words.values())), like))
            passes = np.array_equal(got, want)
        except PtxError:
            passes = False
        if not passes:
            found = result.caught
        elif functions(mutant.asm, constraints) == truth:
            found = result.equivalent
        else:
            found = result.missed
        found.append((mutant.what, mutant.line))
    return result


def slow(name: str) -> bool:
    """Many instructions, and no format that a kernel of FP8 is likely to be asked for."""
    return name.startswith(("e2m2-e", "e3m1-e"))


ROWS = [pytest.param(d, id=name, marks=[pytest.mark.slow] * slow(name)) for d, name in SHIPPED]


@pytest.mark.parametrize("d", ROWS)
def test_every_mutant_is_caught_or_equivalent(d: Decoding) -> None:
    """50 and more are caught, except where a byte is the float already and is just moved."""
    result = score(d)
    assert not result.missed
    asm, _ = shipped_asm(d)
    assert len(result.caught) >= (0 if asm == "{\nmov.b32 $0, $1;\n}" else 50)


def test_an_equivalent_mutant_is_told_from_one_that_is_not() -> None:
    """A mask over bits that are 0 anyway may change; where the words have such a bit, it may not."""
    asm, constraints = "{{\n.reg .b32 t0, t1;\nshr.u32 t0, $1, 4;\nand.b32 t1, t0, {};\nmov.b32 $0, t1;\n}}", "=r,r"
    truth = functions(asm.format("0x0f0f0f0f"), constraints)
    assert functions(asm.format("0x8f0f0f0f"), constraints) == truth
    assert functions(asm.format("0x0f8f0f0f"), constraints) != truth


def main() -> None:
    """Print the score of every decoding, and what the equivalent mutants change."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for d, name in SHIPPED:
        result = score(d)
        total.update(caught=len(result.caught), equivalent=len(result.equivalent), missed=len(result.missed))
        print(
            f"{name:15} {len(result.caught):5} caught {len(result.equivalent):5} equivalent {len(result.missed)} missed"
        )
        reasons.update(what for what, _ in result.equivalent)
        for what, line in result.equivalent[:3]:
            print(f"    equivalent, {what}: {line}")
    print(dict(total), "equivalent:", dict(reasons))


if __name__ == "__main__":
    main()
