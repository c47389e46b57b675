"""tiles: the block sizes of a kernel, as a pure function of shape and device.

Decode (M <= 16) is bound by memory: small tiles, K split over so many programs that every multiprocessor has one or
two. Prefill is bound by the tensor core: larger tiles; Hopper's wgmma takes 64 rows of its left operand, so there W
stands left (``swap``). From ``DENSE`` rows on W is decoded once, and a product of dense matrices follows.

Shared memory of a pipeline, as compiled code has it: ``stages - 1`` copies of a block of W and of x, one more of x
where wgmma reads it from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.codegen.variants import ARCHS

DECODE = 16
"""Rows of x up to which a product is bound by reading W."""
DENSE = 256
"""Rows of x from which on W is decoded once for all of them."""
OLDEST = 80
"""The first architecture, as 10 * major + minor, whose tensor cores and copies the kernels use."""


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
    """A kernel's loop over K: ``blocks`` steps of ``block`` columns, a weight of ``bits`` bits."""

    blocks: int
    block: int
    bits: int


def tiles(M: int, N: int, K: Steps, *, sms: int, arch: int) -> Tiles:
    """The tiles of ``[M, K] @ [K, N]`` on a device of ``sms`` multiprocessors and architecture ``arch`` (90: sm_90)."""
    swap = M > DECODE and arch // 10 == 9
    if M <= DECODE:
        BM, BN, warps = 16, 64, 4
    else:
        BM, BN, warps = (32 if M <= 32 else 64 if M <= 64 else 128), 64, 4 if M <= 64 else 8
        BN = 128 if swap and 128 * sms <= N else BN
    limit = shared_limit(arch)
    stages = 4
    while stages > 2 and shared_bytes(BM, BN, K, stages=stages, swap=swap) > limit:
        stages -= 1
    while BM > 16 and shared_bytes(BM, BN, K, stages=stages, swap=swap) > limit:
        BM //= 2
    while BN > 32 and not swap and shared_bytes(BM, BN, K, stages=stages, swap=swap) > limit:
        BN //= 2
    programs = -(-M // BM) * -(-N // BN)
    return Tiles(BM, BN, _splits(programs, K.blocks, sms), swap, warps, stages)


def _splits(programs: int, blocks: int, sms: int) -> int:
    """The least number of parts of K that gives every multiprocessor a program; every part has a step to do."""
    splits = min(blocks, -(-sms // max(programs, 1)))
    return -(-blocks // -(-blocks // max(splits, 1))) if blocks else 1


def shared_bytes(BM: int, BN: int, K: Steps, *, stages: int, swap: bool) -> int:
    """Bytes of shared memory that a pipeline of ``stages`` takes."""
    x, w = BM * K.block * 2, BN * K.block * K.bits // 8
    return (stages - 1) * (x + w) + (x if swap else 0)


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a program may take; the least of all for an architecture that is not known."""
    known = ARCHS.get(arch)
    return known.block_shared if known else min(row.block_shared for row in ARCHS.values())
