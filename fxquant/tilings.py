"""Tilings: where in whole words the bits of codes go, so that a few shifts and masks bring them out in place.

A kernel wants the bits of a code at given ``places`` of a lane, which are where the wider float has its fields. For a
6-bit code in lanes of a byte, E3M2 as the high byte of a float16, places are ``{7, 4, 3, 2, 1, 0}``. A piece of a code
is some of its places, stored in one word, rotated::

    places                 7 . . 4 3 2 1 0      the high byte of the float16
    two pieces             7 . . . . . . 0      4 groups of it fill the bits of one word
                           . . . 4 3 2 1 .      2 groups of it fill one word

    group g = rotl(word, by) & mask | rotl(other, by') & mask'

Bits of ``n`` places, in lanes of L bits, fill ``n / gcd(n, L)`` words with ``L / gcd(n, L)`` groups without a gap (a
cyclic exact cover). ``tile`` looks for the tiling of fewest operations in two ways. All groups in the same pieces:
first with every word full of one piece, which is a plane of bits (6 = 4 + 2, ZeroQuant(4+2)), then with words shared.
Or each word holds one whole group in its place, which takes a mask and no shift, and the gaps between hold the pieces
of the others. E3M2 so takes 9 operations for 4 groups, and 13 in planes of 4 and 2 bits::

    groups 0, 1, 2         7 . . 4 3 2 1 0      one in each word, bits 6 and 5 are free
    group 3                7 . . . . . . 0      from word 0, rotated by 2
                           . . . 4 3 . . .      from word 1, shifted by 2
                           . . . . . 2 1 .      from word 2, shifted by 4

This is how every format gets its layout for kernels: none is listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fxquant.bitops import Expr, rotl, word
from fxquant.errors import FormatError

NODES = 200
"""Steps after which the search gives a split up; raised to 20000, it found nothing better for any format."""
STEPS, FOUND = 1000, 300
"""Steps after which filling gaps gives a number of pieces up, and how many fillings are compared; ten times as many
of both found nothing better for any format."""


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
    alike = _alike(places, groups, words, lane, wrap=wrap)
    most = _operations(alike) if alike else len(places) * groups
    at_home = _at_home(places, groups, words, lane, wrap=wrap, most=most)
    if found := [tiling for tiling in (alike, at_home) if tiling]:
        return min(found, key=_operations)
    raise FormatError(f"found no way to tile words of lanes of {lane} bits with places {places}")


def _alike(places: tuple[int, ...], groups: int, words: int, lane: int, *, wrap: bool) -> Tiling | None:
    """The split into the fewest pieces that is found to tile the words, every group in the same."""
    splits = list(_splits(tuple(sorted(places, reverse=True))))
    for count, planes in itertools.product(range(1, len(places) + 1), (True, False)):
        covers = (_cover(s, groups, words, lane, wrap=wrap, planes=planes) for s in splits if len(s) == count)
        if found := [tiling for tiling in covers if tiling]:
            return min(found, key=_operations)
    return None


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


def _at_home(places: tuple[int, ...], groups: int, words: int, lane: int, *, wrap: bool, most: int) -> Tiling | None:
    """A group whole and unmoved in each word, the others in as few pieces as are found to fill the gaps; None where
    that takes ``most`` operations."""
    whole = sum(1 << p for p in places)
    ways = {mask: tuple(_placed(mask, lane, wrap)) for mask in _subsets(whole)}
    home = tuple((Piece(at, 0, whole),) for at in range(min(words, groups)))
    gaps = tuple((1 << lane) - 1 & ~(whole if at < len(home) else 0) for at in range(words))
    for budget in range(2 * (groups - len(home)), most - len(home)):
        filled = itertools.islice(_fill(gaps, (), groups - len(home), budget, whole, ways, [STEPS], set()), FOUND)
        tilings = (Tiling(lane, words, home + tuple(_joined(list(pieces)) for pieces, _ in g)) for g in filled)
        if best := min(tilings, key=_operations, default=None):
            return best
    return None


_Begun = tuple[tuple[tuple[Piece, ...], int], ...]


def _fill(
    free: tuple[int, ...], begun: _Begun, left: int, budget: int, whole: int,
    ways: dict[int, tuple[tuple[int, int, int], ...]], steps: list[int], dead: set[Any],
) -> Iterator[_Begun]:  # fmt: skip
    """Ways to fill the ``free`` bits of words with groups: ``begun`` ones, each with its pieces and the bits that it
    lacks, and ``left`` new ones, in at most ``budget`` pieces. ``dead``: states that were seen to lead nowhere."""
    at = next((at for at, gap in enumerate(free) if gap), None)
    if at is None:
        yield begun
        return
    lacking = tuple(sorted(rest for _, rest in begun if rest))
    state = (free, lacking, left, budget)
    if steps[0] <= 0 or len(lacking) + 2 * left > budget or state in dead:
        return
    steps[0] -= 1
    bit, some = free[at] & -free[at], False
    for g, (pieces, rest) in enumerate((*begun, *([((), whole)] if left else []))):
        for mask, by, stored in ways.get(rest, ()):
            if stored & bit and not stored & ~free[at]:
                gap = (*free[:at], free[at] & ~stored, *free[at + 1 :])
                more = (*begun[:g], ((*pieces, Piece(at, by, mask)), rest & ~mask), *begun[g + 1 :])
                for found in _fill(gap, more, left - (g == len(begun)), budget - 1, whole, ways, steps, dead):
                    some = True
                    yield found
    if not some and steps[0] > 0:
        dead.add(state)


def _placed(mask: int, lane: int, wrap: bool) -> Iterator[tuple[int, int, int]]:
    """(piece, rotation, stored bits) of every piece of a mask, the large ones first."""
    for piece in sorted(_subsets(mask), key=lambda m: (-m.bit_count(), -m)):
        bits = tuple(p for p in range(lane) if piece >> p & 1)
        for by, stored in _ways(bits, lane, wrap):
            yield piece, by, stored


def _subsets(mask: int) -> Iterator[int]:
    """The non-empty subsets of the bits of a mask, the mask first."""
    part = mask
    while part:
        yield part
        part = (part - 1) & mask


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
