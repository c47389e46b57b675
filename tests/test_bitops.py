"""The bit language: every operation's value is its trace; layouts are bijections, and a wrong constant is caught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from bit_expressions import expressions, graphs, lanewise, random_words
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bitops import DTYPES, Bit, Expr, cost, evaluate, nodes, permute, rotl, trace, widen, word
from fxquant.errors import FormatError
from fxquant.layouts import LAYOUTS, Block, Layout, Stream, reference_unpack
from fxquant.packing import pack

PLAIN = {row.name: row for row in (r.codes if isinstance(r, Block) else r for r in LAYOUTS.values())}
A, B = word("a", 32), word("b", 32)


@settings(max_examples=200, deadline=None)
@given(expr=expressions(), seed=st.integers(0, 99))
def test_the_value_is_what_the_trace_says(expr: Expr, seed: int) -> None:
    """Bit i of the value is the bit of the word that the trace names, for random words."""
    rng = np.random.default_rng(seed)
    words = {n: rng.integers(0, 2**expr.bits, 16, dtype=np.uint64).astype(DTYPES[expr.bits]) for n in "ab"}
    value = evaluate(expr, words)
    assert value.dtype == DTYPES[expr.bits]
    for i, source in enumerate(trace(expr)):
        want = int(words[source[0]][3]) >> source[1] & 1 if source else 0
        assert int(value[3]) >> i & 1 == want, (str(expr), i)


@settings(max_examples=50, deadline=None)
@given(expr=expressions())
def test_text_is_python(expr: Expr) -> None:
    """The text of an expression, evaluated with ``word`` s for names, is the expression."""
    names = {"a": word("a", expr.bits), "b": word("b", expr.bits), "rotl": rotl, "permute": permute}
    assert eval(str(expr), names) == expr


def test_the_picture_of_the_module() -> None:
    t = A >> 4 & 0x0F0F0F0F | rotl(B, 2) & 0x90909090
    assert trace(t)[:8] == (("a", 4), ("a", 5), ("a", 6), ("a", 7), ("b", 2), None, None, ("b", 5))


def test_permute_is_prmt_with_zero() -> None:
    """PTX prmt.b32 d, x, 0, 0x2404: bytes [0, x0, 0, x2], lowest first."""
    x = np.array([0xDDCCBBAA], np.uint32)
    assert evaluate(permute(A, 0x2404), {"a": x}).tolist() == [0xCC00AA00]


def test_overlapping_merge_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"bit 4 of .* is merged from a\[4\] and b\[0\]"):
        trace(A & 0x1F | B << 4 & 0xF0)


def test_bad_numbers() -> None:
    for build in (
        lambda: A << 32, lambda: A >> -1, lambda: rotl(A, 40), lambda: A & 0, lambda: A & 2**32,
        lambda: permute(A, 0x5), lambda: word("x", 24), lambda: A | word("x", 8),
        lambda: evaluate(A, {"a": np.zeros(1, np.uint8)}),
    ):  # fmt: skip
        with pytest.raises(FormatError):
            build()


def test_cost_counts_shared_work_once() -> None:
    shifted = A >> 4
    assert cost(shifted & 0x0F, shifted & 0xF0, A & 0x0F | B & 0xF0) == {"shr": 1, "and": 4, "or": 1}


def test_split42_decodes_four_codes_with_two_masks_and_a_merge() -> None:
    """16 codes: 8 masks, 4 merges (a mask and a merge are one lop3), 2 shifts and 3 rotations."""
    layout = PLAIN["split42"]
    assert cost(*layout.decode) == {"and": 8, "or": 4, "shr": 2, "rotl": 3}


@settings(max_examples=200, deadline=None)
@given(expr=lanewise(), seed=st.integers(0, 99))
def test_widened_expressions_work_on_each_lane(expr: Expr, seed: int) -> None:
    """On words of 32 bits, each lane of the value is the value of the lanes."""
    words = random_words(expr.bits, seed, count=32)
    wide = {name: x.view(np.uint32) for name, x in words.items()}
    assert np.array_equal(evaluate(widen(expr), wide).view(DTYPES[expr.bits]), evaluate(expr, words))


def test_widening_joins_masks() -> None:
    x = word("x", 8)
    assert str(widen(x >> 2 & 0x15)) == "((x >> 2) & 0x15151515)"
    assert widen(x & 0x0F) == word("x", 32) & 0x0F0F0F0F


def test_widening_takes_no_rotation() -> None:
    x = word("x", 8)
    for expr in (rotl(x, 1), permute(x, 0) & 1):
        with pytest.raises(FormatError, match="has no form on lanes"):
            widen(expr)
    with pytest.raises(FormatError, match="has no form on lanes"):
        widen(word("x", 32), 16)


@settings(max_examples=100, deadline=None)
@given(outputs=graphs())
def test_nodes_come_once_and_after_what_they_need(outputs: tuple[Expr, ...]) -> None:
    found = nodes(*outputs)
    assert len(set(found)) == len(found)
    assert set(outputs) <= set(found)
    for i, node in enumerate(found):
        assert all(arg in found[:i] for arg in node.args)


# --- layouts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLAIN)
def test_every_stored_bit_is_one_bit_of_one_code(name: str) -> None:
    layout = PLAIN[name]
    stored = {(w.name, i) for stream in layout.streams for w in stream.words for i in range(w.bits)}
    mapped = [bit for slot in layout.bit_map for bit in slot]
    assert len(mapped) == len(set(mapped)) == layout.bits * layout.unit_slots
    assert set(mapped) == stored


def mutants(expr: Expr) -> Iterator[tuple[str, Expr | None]]:
    """``expr`` with one bit of one mask or distance flipped, None where that is no expression."""
    for i in range(expr.bits if expr.kind == "and" else 5 if expr.by else 0):
        by = expr.by ^ 1 << i
        try:
            yield f"{expr.kind} {by:#x}", replace(expr, by=by)
        except FormatError:
            yield f"{expr.kind} {by:#x}", None
    for at, arg in enumerate(expr.args):
        for label, changed in mutants(arg):
            args = (*expr.args[:at], changed, *expr.args[at + 1 :])
            yield label, replace(expr, args=args) if changed else None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["split42", "split42r8", "tc", "planar6", "bits6", "bits5", "planar7"])
def test_a_wrong_constant_in_a_decode_is_caught(name: str) -> None:
    """Each flipped bit of a mask or distance breaks the bijection, or decodes true bytes to other codes.

    Or it is equivalent: every bit of the result is the same bit of the same word (a mask over a bit that is 0 anyway).
    """
    layout = PLAIN[name]
    shape = (layout.tile[0], layout.tile[1])
    codes = np.random.default_rng(0).integers(0, 2**layout.bits, shape, dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), layout).numpy()
    survivors = []
    for k, expr in enumerate(layout.decode):
        for label, changed in mutants(expr):
            if changed is None or traced(changed) == trace(expr):
                continue
            try:
                wrong = replace(layout, decode=(*layout.decode[:k], changed, *layout.decode[k + 1 :]))
            except FormatError:
                continue
            if (reference_unpack(packed, wrong, shape) == codes).all():
                survivors.append((k, label))
    assert not survivors


def test_the_idle_constants_of_split42() -> None:
    """The only bits of constants that change nothing: four mask bits above ``a >> 4``, where there is 0 anyway."""
    for g, expr in enumerate(PLAIN["split42"].decode):
        idle = [label for label, changed in mutants(expr) if traced(changed) == trace(expr)]
        assert idle == ([f"and {0x0F0F0F0F ^ 1 << i:#x}" for i in (28, 29, 30, 31)] if g % 2 else [])


def traced(expr: Expr | None) -> tuple[Bit, ...] | None:
    """The trace, None where there is none."""
    try:
        return trace(expr) if expr else None
    except FormatError:
        return None


def broken(**changes: object) -> Layout:
    return replace(PLAIN["planar6"], **changes)  # type: ignore[arg-type]


def test_layouts_that_are_no_bijection_cannot_be_made() -> None:
    x, y = word("x", 8), word("y", 8)
    nibbles = {"bits": 4, "cols": "s2", "slots": "s"}
    cases = {
        r"x\[0\] is in slots 0 and 1": {"decode": (x & 0x0F, x & 0x0F), "streams": (Stream((x,), "w"),)},
        r"y\[0\] is not a stored bit": {"decode": (x & 0x0F, x >> 4), "streams": (Stream((x, y), "w"),)},
        "bit 3 of slot 0 is always 0": {"decode": (x & 0x07, x >> 4), "streams": (Stream((x,), "w"),)},
        "bits outside the fields": {"decode": (x, x >> 4), "streams": (Stream((x,), "w"),)},
        "not in the order of columns": {"decode": (x >> 4, x & 0x0F), "streams": (Stream((x,), "w"),)},
        "decodes 1 slots": {"decode": (x & 0x0F,), "streams": (Stream((x,), "w"),)},
        "not ordered by": {"decode": (x & 0x0F, x >> 4), "streams": (Stream((x,), "w r"),)},
    }
    for text, changes in cases.items():
        with pytest.raises(FormatError, match=text):
            broken(**nibbles, **changes)
    with pytest.raises(FormatError, match="are not the axes"):
        broken(slots="s t")
