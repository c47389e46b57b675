"""Random expressions of ``fxquant.bitops``, and words for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxquant.bitops import DTYPES, Expr, permute, rotl, word


def random_words(bits: int, seed: int, count: int = 16) -> dict[str, NDArray[Any]]:
    """Words a and b."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**bits, count, dtype=np.uint64).astype(DTYPES[bits]) for name in "ab"}


@st.composite
def moved(draw: st.DrawFn, x: Expr, kinds: tuple[str, ...] = ("shl", "shr", "rotl", "and", "permute")) -> Expr:
    """One operation on ``x``."""
    kind, bits = draw(st.sampled_from(kinds)), x.bits
    if kind == "and":
        return x & draw(st.integers(1, 2**bits - 1))
    if kind == "permute":
        digits = draw(st.lists(st.sampled_from([*range(bits // 8), 4]), min_size=bits // 8, max_size=bits // 8))
        return permute(x, sum(d << 4 * k for k, d in enumerate(digits)))
    distance = draw(st.integers(1, bits - 1))
    return {"shl": lambda: x << distance, "shr": lambda: x >> distance, "rotl": lambda: rotl(x, distance)}[kind]()


@st.composite
def expressions(draw: st.DrawFn) -> Expr:
    """A few operations on one or two words, merged where they do not overlap."""
    bits = draw(st.sampled_from([8, 16, 32]))
    parts = []
    for name in draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=2)):
        x = word(name, bits)
        for _ in range(draw(st.integers(0, 4))):
            x = draw(moved(x))
        parts.append(x)
    half = 2 ** (bits // 2) - 1
    return parts[0] & half | parts[1] & (half << bits // 2) if len(parts) == 2 else parts[0]


@st.composite
def lanewise(draw: st.DrawFn) -> Expr:
    """A few shifts, masks and merges of words of 8 or 16 bits."""
    bits = draw(st.sampled_from([8, 16]))
    whole = None
    for name in draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=3)):
        x = word(name, bits)
        for _ in range(draw(st.integers(0, 4))):
            x = draw(moved(x, ("shl", "shr", "and")))
        whole = x if whole is None else whole | x
    assert whole
    return whole


@st.composite
def graphs(draw: st.DrawFn, sizes: tuple[int, ...] = (8, 16, 32)) -> tuple[Expr, ...]:
    """A few expressions that share parts. Their merges may overlap, which only ``trace`` minds."""
    bits = draw(st.sampled_from(sizes))
    made = [word("a", bits), word("b", bits)]
    for _ in range(draw(st.integers(1, 12))):
        x = made[draw(st.integers(0, len(made) - 1))]
        if draw(st.booleans()):
            made.append(draw(moved(x)))
        else:
            made.append(x | made[draw(st.integers(0, len(made) - 1))])
    return tuple(made[draw(st.integers(2, len(made) - 1))] for _ in range(draw(st.integers(1, 4))))
