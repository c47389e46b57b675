"""The bound, against figures worked out by hand from the GPUs' data sheets."""

from __future__ import annotations

import pytest

from fxquant.codegen.roofline import GPUS, Gpu, gpus, verdict
from fxquant.codegen.variants import ARCHS

BY_NAME = {gpu.name: gpu for gpu in GPUS}


def test_shares_by_hand() -> None:
    """1 GHz, 1 SM, 100 GB/s: 90 bytes a clock, 120 six-bit weights; of 64 and 128 a clock."""
    gpu = Gpu("made up", 90, 1, 1e9, 100e9)
    found = verdict(gpu, bits=6, integer=0.4, issued=0.8)
    assert found.alu == pytest.approx(120 * 0.4 / 64)
    assert found.issue == pytest.approx(120 * 0.8 / 128)
    assert (found.gpu, found.bound) == ("made up", "memory")
    assert str(found) == "memory (75% ALU, 75% issue)"


@pytest.mark.parametrize(("integer", "issued", "bound"), [(2, 1, "ALU"), (1, 4, "issue"), (0.1, 0.1, "memory")])
def test_the_larger_share_binds(integer: float, issued: float, bound: str) -> None:
    gpu = Gpu("made up", 90, 1, 1e9, 100e9)
    assert verdict(gpu, bits=8, integer=integer, issued=issued).bound == bound


@pytest.mark.parametrize(
    ("name", "alu", "issue"),
    [("A100-80", 0.40, 0.29), ("H100", 0.43, 0.32), ("H200", 0.62, 0.45), ("B200", 0.87, 0.64)],
)
def test_fp6_decode_is_bound_by_memory(name: str, alu: float, issue: float) -> None:
    """1.59 integer and 2.33 issued instructions a weight, as the FP6 decode kernel has on sm_90."""
    found = verdict(BY_NAME[name], bits=6, integer=1.59, issued=2.33)
    assert found.bound == "memory"
    assert (round(found.alu, 2), round(found.issue, 2)) == (
        pytest.approx(alu, abs=0.011),
        pytest.approx(issue, abs=0.011),
    )


def test_more_instructions_a_weight_never_help() -> None:
    for gpu in GPUS:
        found = [verdict(gpu, bits=4, integer=n / 2, issued=n) for n in range(1, 20)]
        assert [q.alu for q in found] == sorted(q.alu for q in found)
        assert [q.bound == "memory" for q in found] == sorted((q.bound == "memory" for q in found), reverse=True)


def test_every_gpu_has_a_known_architecture() -> None:
    assert {gpu.arch for gpu in GPUS} <= set(ARCHS)
    assert [gpu.name for gpu in gpus(90)] == ["H100", "H200"]
    assert len(BY_NAME) == len(GPUS)
