"""Tilings: where in whole words the bits of codes go, so that a few shifts and masks bring them out in place.

A kernel wants the bits of a code at given ``places`` of a lane, which are where the wider float has its fields. For a
6-bit code in lanes of a byte, E3M2 as the high byte of a float16, places are ``{7, 4, 3, 2, 1, 0}``. A piece of a code
is some of its places, stored in one word, rotated::

    places                 7 . . 4 3 2 1 0      the high byte of the float16
    two pieces             7 . . . . . . 0      4 groups of it fill the bits of one word
                           . . . 4 3 2 1 .      2 groups of it fill one word

    group g = rotl(word, by) & mask | rotl(other, by') & mask'

Bits of ``n`` places, in lanes of L bits, fill ``n / gcd(n, L)`` words with ``L / gcd(n, L)`` groups. ``tile`` looks
for the split into the fewest pieces whose translates tile those words without a gap (a cyclic exact cover): first with
every word full of one piece, which is a plane of bits (6 = 4 + 2, ZeroQuant(4+2)), then with words shared. It takes,
among those it meets, the one of fewest operations. This is how every format gets its layout for kernels: none is
listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from fxquant.bitops import Expr, rotl, word
from fxquant.errors import FormatError

NODES = 200
"""Steps after which the search gives a split up; raised to 20000, it found nothing better for any format."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Places ``mask`` of a lane, at ``word`` rotated left by ``by`` (negative where lanes do not wrap: right)."""

    word: int
    by: int
    mask: int


@dataclass(frozen=True)
class Tiling:
    """``groups[g]`` are the pieces of group g of ``words`` words, in lanes of ``lane`` bits. All bits are used."""

    lane: int
    words: int
    groups: tuple[tuple[Piece, ...], ...]

    def decode(self, bits: int) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
        """The words, of ``bits`` bits, and for each group the expression with its codes at their places."""
        stored = tuple(word(f"q{i}", bits) for i in range(self.words))
        return stored, tuple(self._group(stored, pieces, bits) for pieces in self.groups)

    def _group(self, stored: tuple[Expr, ...], pieces: tuple[Piece, ...], bits: int) -> Expr:
        parts = []
        for piece in pieces:
            mask = sum(piece.mask << at for at in range(0, bits, self.lane))
            moved = self._moved(stored[piece.word], piece)
            parts.append(moved if mask == (1 << bits) - 1 else moved & mask)
        whole = parts[0]
        for part in parts[1:]:
            whole = whole | part
        return whole

    def _moved(self, x: Expr, piece: Piece) -> Expr:
        """The word rotated; shifted where no bit that is wanted comes round, which is cheaper."""
        by = piece.by
        if by < 0:
            return x >> -by
        if piece.mask & (1 << by) - 1 == 0:
            return x << by
        if piece.mask >> by == 0:
            return x >> self.lane - by
        return rotl(x, by)


@cache
def tile(places: tuple[int, ...], lane: int, *, wrap: bool = True) -> Tiling:
    """The tiling for codes whose bits go to ``places`` of lanes of ``lane`` bits.

    ``wrap``: bits may come round from the neighbouring lane (a rotation of the whole word); without it, each lane
    depends on its own bits only. Raises FormatError for places outside the lane, or used twice, and where the search
    finds nothing.
    """
    if len(set(places)) != len(places) or not all(0 <= p < lane for p in places) or not places:
        raise FormatError(f"places {places} are not different bits of a lane of {lane}")
    shared = math.gcd(len(places), lane)
    groups, words = lane // shared, len(places) // shared
    splits = list(_splits(tuple(sorted(places, reverse=True))))
    for count, planes in itertools.product(range(1, len(places) + 1), (True, False)):
        covers = (_cover(s, groups, words, lane, wrap=wrap, planes=planes) for s in splits if len(s) == count)
        if found := [tiling for tiling in covers if tiling]:
            return min(found, key=_operations)
    raise FormatError(f"found no way to tile words of lanes of {lane} bits with places {places}")


def _splits(places: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to split places into pieces."""
    if not places:
        yield ()
        return
    first, rest = places[0], places[1:]
    for size in range(len(rest) + 1):
        for beside in itertools.combinations(rest, size):
            left = tuple(p for p in rest if p not in beside)
            for others in _splits(left):
                yield ((first, *beside), *others)


def _cover(
    split: tuple[tuple[int, ...], ...], groups: int, words: int, lane: int, *, wrap: bool, planes: bool
) -> Tiling | None:
    """Every piece of every group at a free place of some word, by depth-first search; None after ``NODES`` steps.

    ``planes``: a word holds translates of one piece only.
    """
    ways = [tuple(_ways(piece, lane, wrap)) for piece in split]
    wanted = [(group, i) for group in range(groups) for i in range(len(split))]
    used, chosen, steps = [0] * words, {}, 0
    owner: list[int | None] = [None] * words

    def place(k: int) -> bool:
        nonlocal steps
        steps += 1
        if steps > NODES:
            return False
        if k == len(wanted):
            return True
        group, i = wanted[k]
        for at in range(words):
            before = owner[at]
            if planes and before not in (None, i):
                continue
            for by, stored in ways[i]:
                if used[at] & stored:
                    continue
                used[at], owner[at] = used[at] | stored, i
                chosen[group, i] = Piece(at, by, sum(1 << p for p in split[i]))
                if place(k + 1):
                    return True
                used[at], owner[at] = used[at] & ~stored, before
        return False

    if not place(0):
        return None
    return Tiling(lane, words, tuple(_joined([chosen[g, i] for i in range(len(split))]) for g in range(groups)))


def _ways(piece: tuple[int, ...], lane: int, wrap: bool) -> Iterator[tuple[int, int]]:
    """(rotation, stored bits) of a piece, unmoved first."""
    for by in range(lane) if wrap else sorted(range(1 - lane, lane), key=abs):
        stored = [p - by for p in piece]
        if wrap or all(0 <= p < lane for p in stored):
            yield by, sum(1 << p % lane for p in stored)


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Pieces of one word and rotation as one."""
    masks: dict[tuple[int, int], int] = {}
    for piece in pieces:
        masks[piece.word, piece.by] = masks.get((piece.word, piece.by), 0) | piece.mask
    return tuple(Piece(at, by, mask) for (at, by), mask in masks.items())


def _operations(tiling: Tiling) -> int:
    """Masks and merges, one for each piece, and the different rotations."""
    pieces = [piece for group in tiling.groups for piece in group]
    return len(pieces) + len({(piece.word, piece.by) for piece in pieces if piece.by})
