"""Tiles: a pure function whose promises hold for every shape and device."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.codegen import triton_source
from fxquant.codegen.aot import compile_variant
from fxquant.codegen.sass import statistics
from fxquant.codegen.tiles import DENSE, Steps, shared_bytes, shared_limit, tiles
from fxquant.codegen.triton_kernels import E4M3, SIGNATURE, WITH_FP8
from fxquant.codegen.variants import ARCHS, Variant
from fxquant.decodings import decoding
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat

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


def test_decode_leaves_room_for_two_programs_side_by_side() -> None:
    for arch in (80, 86, 90, 120):
        K = Steps(16, 256, 6)
        found = tiles(1, 4096, K, sms=132, arch=arch)
        used = shared_bytes(found.BM, found.BN, K, stages=found.stages, arch=arch, swap=found.swap)
        assert 2 * used <= shared_limit(arch)


def test_bytes_are_multiplied_with_the_weight_on_the_left_where_instructions_want_it() -> None:
    K = Steps(16, 256, 4, x_bytes=1)
    found = {arch: tiles(1, 4096, K, sms=132, arch=arch) for arch in (89, 90, 100, 120)}
    assert [found[arch].swap for arch in found] == [False, True, True, False]
    assert [found[arch].BN for arch in found] == [64, 64, 128, 64]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("target", [None, E4M3])
@pytest.mark.parametrize("M", [1, 32, 64, 128])
def test_compiled_kernels_are_what_tiles_promises(
    tmp_path: Path, M: int, target: FloatFormat | None, arch: int
) -> None:
    if target is not None and arch not in WITH_FP8:
        pytest.skip("FP8 is not multiplied there")
    d = decoding(parse_format("e3m2"), target)
    source = triton_source.gemm(d)
    (tmp_path / f"{source.name}.py").write_text(source.text)
    K = Steps(16, d.block, 6, 2 if target is None else 1)
    t = tiles(M, 4096, K, sms=132, arch=arch)
    constants = {
        "BM": t.BM, "BN": t.BN, "RUN": d.run, "EVERY": d.every(0), "GROUP": 0, "PADDED": 0, "EVEN": True,
        "SPLITS": t.splits, "SWAP": t.swap, "ZERO": False, "ROW_SCALE": True, "BIAS": True, "ACTIVATION": "gelu",
        "RESIDUAL": True, "RANK": 16, "USE_ASM": True,
    }  # fmt: skip
    signature = SIGNATURE if target is None else {**SIGNATURE, "x": "*fp8e4nv", "w": "*u8"}
    if t.splits > 1:
        signature = {**signature, "out": "*fp32"}
    aligned = frozenset(signature) - {"M", "blocks"}
    made = Variant("launched", "decode", source.name, "gemm", signature, constants, aligned, t.warps, t.stages,
                   t.BN * d.block, 6.0)  # fmt: skip
    compiled = compile_variant(made, tmp_path / f"{source.name}.py", arch)
    figures = statistics(compiled)
    expected = shared_bytes(t.BM, t.BN, K, stages=t.stages, arch=arch, swap=t.swap)
    assert figures.spills == 0
    assert expected <= figures.shared <= max(expected, t.BN * t.BM * 4) + 1024
    assert figures.shared <= ARCHS[arch].block_shared
    want = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[arch] if target is None else "MMA"
    assert want in str(figures.mma) or (M == 1 and "HMMA" in str(figures.mma))


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_weight_stands_left_for_prefill_only(arch: int) -> None:
    K = Steps(16, 256, 6)
    assert not tiles(16, 4096, K, sms=132, arch=arch).swap
    assert tiles(33, 4096, K, sms=132, arch=arch).swap


def test_shared_memory_is_what_compiled_kernels_take() -> None:
    K = Steps(16, 256, 6)
    assert shared_bytes(16, 64, K, stages=4, arch=90, swap=False) == 60 * 1024
    assert shared_bytes(16, 64, K, stages=4, arch=90, swap=True) == 68 * 1024
    assert shared_bytes(64, 64, K, stages=4, arch=90, swap=True) == 164 * 1024
    assert shared_bytes(16, 128, K, stages=3, arch=90, swap=False) == 64 * 1024
    assert shared_bytes(128, 128, K, stages=2, arch=80, swap=True) == 88 * 1024
    assert shared_bytes(128, 128, K, stages=2, arch=90, swap=True) == 152 * 1024
    assert shared_bytes(64, 128, K, stages=2, arch=120, swap=True) == 56 * 1024
