"""Tiles that were timed: kept, found again, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import cache
from fxquant.codegen import tuning
from fxquant.codegen.prepack import KernelWeight, Operands, prepare
from fxquant.codegen.tiles import Tiles, candidates, shared_bytes, shared_limit, tiles


@pytest.fixture
def weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelWeight:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.stored.cache_clear()
    q = fxquant.quantize_tensor(torch.randn(96, 512), "e3m2/channel")
    kernel = prepare(Operands(q.packed, q.scale, None, "e3m2/channel", q.shape))
    assert isinstance(kernel, KernelWeight)
    return kernel


def slowest_first(calls: list[object]) -> tuning.Timer:
    """A clock by which every candidate is faster than the one before."""

    def time(call: object) -> float:
        calls.append(call)
        return 1.0 / len(calls)

    return time


def test_the_fastest_is_kept_for_its_gpu_and_its_key_alone(weight: KernelWeight) -> None:
    calls: list[object] = []
    best = tuning.tune(5, weight, gpu="A", sms=132, arch=90, time=slowest_first(calls))
    tried = candidates(5, 96, tuning.steps(weight), sms=132, arch=90)
    assert best == tried[-1]
    assert len(calls) == len(tried)
    assert tuning.stored("A") == {tuning.key(16, weight): best}
    assert tuning.stored("B") == {}
    tuning.tune(17, weight, gpu="A", sms=132, arch=90, time=slowest_first([]))
    assert set(tuning.stored("A")) == {tuning.key(16, weight), tuning.key(32, weight)}


def test_candidates_fit_and_begin_with_the_rule(weight: KernelWeight) -> None:
    K = tuning.steps(weight)
    for M, arch in ((1, 80), (16, 120), (200, 90), (64, 89)):
        tried = candidates(M, 96, K, sms=100, arch=arch)
        assert tried[0] == tiles(M, 96, K, sms=100, arch=arch)
        assert len(set(tried)) == len(tried) > 3
        for t in tried:
            used = shared_bytes(t.BM, t.BN, K, stages=t.stages, arch=arch, swap=t.swap)
            assert used <= shared_limit(arch)
            assert 1 <= t.splits <= K.blocks


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"{",
        b"[]",
        b'{"gpu": "A"}',
        b'{"gpu": "A", "tiles": []}',
        b'{"gpu": "B", "tiles": {"k": [16, 64, 1, false, 4, 4]}}',
        b'{"gpu": "A", "tiles": {"k": [16, 64, 1, false, 4]}}',
        b'{"gpu": "A", "tiles": {"k": [17, 64, 1, false, 4, 4]}}',
        b'{"gpu": "A", "tiles": {"k": [16, 64, 0, false, 4, 4]}}',
        b'{"gpu": "A", "tiles": {"k": [16, 64, 1, 0, 4, 4]}}',
        b'{"gpu": "A", "tiles": {"k": [16, 64.0, 1, true, 4, 4]}}',
    ],
)
def test_a_file_that_is_not_sound_is_not_there(weight: KernelWeight, kept: bytes) -> None:
    cache.write_bytes(tuning._file("A"), kept)
    assert tuning.stored("A") == {}


def test_a_sound_file_is_read(weight: KernelWeight) -> None:
    document = {"gpu": "A", "tiles": {"good": [16, 64, 3, False, 4, 4], "bad": "text"}}
    cache.write_bytes(tuning._file("A"), json.dumps(document).encode())
    assert tuning.stored("A") == {"good": Tiles(16, 64, 3, False, 4, 4)}
