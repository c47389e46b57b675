"""compare: the difference of two graph texts, in which a line that only moved is not a change.

Every line of a graph defines another node, so lines are unique and the longest common subsequence is the longest
increasing run of positions (patience diff): n log n, where a general diff would take minutes on a large graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Line = tuple[str, str]
"""Kind and text: ``+`` added, ``-`` removed, a blank for context; ``@`` with how many unchanged lines were left out."""
Key = tuple[str, int]
"""A line and how often it came before, which is 0 in a graph."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``lines`` to show, and how many were added, removed, or moved without another change (those are not shown)."""

    lines: tuple[Line, ...]
    added: int
    removed: int
    moved: int

    @property
    def headline(self) -> str:
        """``+630 -210 lines, 94 moved``."""
        if not (self.added or self.removed or self.moved):
            return "the graph did not change"
        return f"+{self.added} -{self.removed} lines" + (f", {self.moved} moved" if self.moved else "")


def compare(before: str | Sequence[str], after: str | Sequence[str], *, context: int = 1) -> Difference:
    """What ``after`` changed, with ``context`` unchanged lines around each change."""
    old, new = (_unique(t.splitlines() if isinstance(t, str) else t) for t in (before, after))
    place = {line: i for i, line in enumerate(old)}
    shared = [line for line in new if line in place]
    kept = [shared[i] for i in _increasing([place[line] for line in shared])]
    lines = list(_merge(old, new, set(shared), kept))
    removed, added = (sum(kind == k for kind, _ in lines) for k in "-+")
    return Difference(tuple(_fold(lines, context)), added, removed, len(shared) - len(kept))


def _unique(lines: Sequence[str]) -> list[Key]:
    seen: dict[str, int] = {}
    found: list[Key] = []
    for line in lines:
        found.append((line, seen.get(line, 0)))
        seen[line] = seen.get(line, 0) + 1
    return found


def _increasing(values: list[int]) -> list[int]:
    """Positions of a longest increasing subsequence of distinct ``values``."""
    tails: list[int] = []
    ends: list[int] = []
    previous = [-1] * len(values)
    for i, value in enumerate(values):
        at = bisect_left(tails, value)
        tails[at : at + 1], ends[at : at + 1] = [value], [i]
        previous[i] = ends[at - 1] if at else -1
    chain, i = [], ends[-1] if ends else -1
    while i >= 0:
        chain.append(i)
        i = previous[i]
    return chain[::-1]


def _merge(old: list[Key], new: list[Key], shared: set[Key], kept: list[Key]) -> Iterator[Line]:
    """All lines: between two that stayed, first what was removed, then what was added. A moved one is no change."""
    i, stays = 0, {*kept}
    for line in new:
        if line not in shared or line in stays:  # all that was removed since the last line that stayed comes first
            while i < len(old) and old[i] not in stays:
                if old[i] not in shared:
                    yield "-", old[i][0]
                i += 1
        i += line in stays
        yield (" " if line in shared else "+"), line[0]
    yield from (("-", line[0]) for line in old[i:] if line not in shared)


def _fold(lines: list[Line], context: int) -> Iterator[Line]:
    """Only the changes and their neighbours; each run left out as one ``@`` line."""
    near: set[int] = set()
    for i, (kind, _) in enumerate(lines):
        if kind != " ":
            near.update(range(i - context, i + context + 1))
    skipped = 0
    for i, line in enumerate(lines):
        if i not in near:
            skipped += 1
            continue
        if skipped:
            yield "@", str(skipped)
        skipped = 0
        yield line
    if skipped and near:
        yield "@", str(skipped)
