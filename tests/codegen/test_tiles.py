"""Tiles: a pure function whose promises hold for every shape and device."""

from __future__ import annotations

import pytest

from fxquant.codegen.tiles import DENSE, Steps, shared_bytes, shared_limit, tiles

SHAPES = [(M, N, blocks) for M in (1, 7, 16, 17, 64, 100, DENSE - 1) for N in (1, 64, 1000, 4096, 50000)
          for blocks in (1, 2, 16, 43)]  # fmt: skip
DEVICES = [(108, 80), (84, 86), (128, 89), (132, 90), (148, 100), (170, 120), (80, 77), (1, 90)]


@pytest.mark.parametrize(("sms", "arch"), DEVICES)
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_fit_and_cover(sms: int, arch: int, block: int, bits: int) -> None:
    for M, N, blocks in SHAPES:
        K = Steps(blocks, block, bits)
        found = tiles(M, N, K, sms=sms, arch=arch)
        assert found.BM >= 16
        assert found.BM & (found.BM - 1) == 0
        assert not found.swap or found.BN >= 64  # the rows that wgmma takes
        used = shared_bytes(found.BM, found.BN, K, stages=found.stages, arch=arch, swap=found.swap)
        assert used <= shared_limit(arch)
        assert 1 <= found.splits <= blocks
        per = -(-blocks // found.splits)
        assert (found.splits - 1) * per < blocks  # no part of K is empty
        programs = -(-M // found.BM) * -(-N // found.BN) * found.splits
        assert programs < 2 * sms or found.splits == 1


def test_decode_fills_an_h100() -> None:
    found = tiles(1, 4096, Steps(16, 256, 6), sms=132, arch=90)
    assert (found.BM, found.BN, found.splits, found.swap) == (16, 64, 3, False)
    assert 132 <= 64 * found.splits < 264


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_weight_stands_left_for_prefill_only(arch: int) -> None:
    K = Steps(16, 256, 6)
    assert not tiles(16, 4096, K, sms=132, arch=arch).swap
    assert tiles(17, 4096, K, sms=132, arch=arch).swap


def test_shared_memory_is_what_compiled_kernels_take() -> None:
    K = Steps(16, 256, 6)
    assert shared_bytes(16, 64, K, stages=4, arch=90, swap=False) == 60 * 1024
    assert shared_bytes(16, 64, K, stages=4, arch=90, swap=True) == 68 * 1024
    assert shared_bytes(64, 64, K, stages=4, arch=90, swap=True) == 164 * 1024
    assert shared_bytes(16, 128, K, stages=3, arch=90, swap=False) == 64 * 1024
    assert shared_bytes(128, 128, K, stages=2, arch=80, swap=True) == 88 * 1024
    assert shared_bytes(128, 128, K, stages=2, arch=90, swap=True) == 152 * 1024
    assert shared_bytes(64, 128, K, stages=2, arch=120, swap=True) == 56 * 1024
