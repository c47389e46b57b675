"""tiles: the block sizes of a kernel, as a pure function of shape and device.

Decode (M <= 16) is bound by memory: small tiles, K split over so many programs that every multiprocessor has one or
two. Prefill is bound by the tensor core and by decoding: W stands left in the dot (``swap``), with so many of its rows
that warps lie side by side along them and none decodes what another has decoded; Hopper's wgmma wants it left anyway.
From ``DENSE`` rows on W is decoded once, and a product of dense matrices follows.

Shared memory of a pipeline, as compiled code has it: ``stages - 1`` copies of a block of W and of x, one more of x
where a warp group's instruction reads it from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fxquant.codegen.variants import ARCHS

DECODE = 16
"""Rows of x up to which a product is bound by reading W."""
DENSE = 256
"""Rows of x from which on W is decoded once for all of them."""
OLDEST = 80
"""The first architecture, as 10 * major + minor, whose tensor cores and copies the kernels use."""
_STAGES = 4
_BARRIERS = 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """``BM`` x ``BN`` values of y a program, K in ``splits`` parts; ``swap``: W is the left operand of the dot."""

    BM: int
    BN: int
    splits: int
    swap: bool
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Steps:
    """A kernel's loop over K: ``blocks`` steps of ``block`` columns, a weight of ``bits`` bits, x of ``x_bytes``."""

    blocks: int
    block: int
    bits: int
    x_bytes: int = 2


@lru_cache(maxsize=4096)
def tiles(M: int, N: int, K: Steps, *, sms: int, arch: int) -> Tiles:
    """The tiles of ``[M, K] @ [K, N]`` on a device of ``sms`` multiprocessors and architecture ``arch`` (90: sm_90)."""
    BM, BN, warps, swap = _shape(M, arch, byte=K.x_bytes == 1)
    limit, stages = shared_limit(arch) // (2 if M <= DECODE else 1), _STAGES  # two programs side by side hide latency
    while stages > 2 and shared_bytes(BM, BN, K, stages=stages, arch=arch, swap=swap) > limit:
        stages -= 1
    while BM > 16 and shared_bytes(BM, BN, K, stages=stages, arch=arch, swap=swap) > limit:
        BM, warps = BM // 2, max(warps // 2, 4)  # as many values a thread as before
    programs = -(-M // BM) * -(-N // BN)
    return Tiles(BM, BN, _splits(programs, K.blocks, sms), swap, warps, stages)


def _shape(M: int, arch: int, *, byte: bool) -> tuple[int, int, int, bool]:
    """BM, BN, warps and swap: such as fill registers without spilling, by the compiler's own count."""
    groups = 90 <= arch < 120  # instructions of a warp group, which take 64 or 128 rows on the left
    if M <= DECODE:
        if byte and groups:
            return 16, 64 if arch < 100 else 128, 4, True
        return 16, 64, 4 if byte else 2, False
    if M <= 32:
        return (32, 128, 4, True) if groups or byte else (32, 64, 4, False)
    if byte and not groups:
        return 64, 128, 8, True
    return (64, 128, 4, True) if M <= 64 else (128, 128, 8, True)


def _splits(programs: int, blocks: int, sms: int) -> int:
    """The least number of parts of K that gives every multiprocessor a program; every part has a step to do."""
    return _whole(blocks, -(-sms // max(programs, 1)))


def _whole(blocks: int, splits: int) -> int:
    """No more parts than ``splits``, and none without a step."""
    return -(-blocks // -(-blocks // min(blocks, splits))) if blocks else 1


def shared_bytes(BM: int, BN: int, K: Steps, *, stages: int, arch: int, swap: bool) -> int:
    """Bytes of shared memory that a pipeline of ``stages`` takes."""
    x, w = BM * K.block * K.x_bytes, BN * K.block * K.bits // 8
    read_from_there = swap and (90 <= arch < 100 or (100 <= arch < 120 and K.x_bytes == 2))
    return (stages - 1) * (x + w) + (x if read_from_there else 0)


def shared_limit(arch: int) -> int:
    """Bytes of shared memory for a pipeline, barriers aside; the least of all for an architecture that is not known."""
    known = ARCHS.get(arch)
    return (known.block_shared if known else min(row.block_shared for row in ARCHS.values())) - _BARRIERS


def candidates(M: int, N: int, K: Steps, *, sms: int, arch: int) -> list[Tiles]:
    """What is worth timing beside ``tiles``, which comes first: other splits, warps, stages and widths that fit."""
    first = tiles(M, N, K, sms=sms, arch=arch)
    found = [first]
    for BN in (32, 64, 128):
        for warps in (2, 4, 8):
            for stages in (2, 3, 4, 5):
                programs = -(-M // first.BM) * -(-N // BN)
                base = _splits(programs, K.blocks, sms)
                for splits in {_whole(K.blocks, base * more) for more in (1, 2, 4)}:
                    tried = replace(first, BN=BN, splits=splits, warps=warps, stages=stages)
                    used = shared_bytes(first.BM, BN, K, stages=stages, arch=arch, swap=first.swap)
                    if used <= shared_limit(arch) and not (first.swap and BN < 64) and tried not in found:
                        found.append(tried)
    return found
