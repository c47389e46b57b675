"""Whether memory is what a kernel waits for, from its instruction counts: a bound, not a timing.

At few rows of x a layer takes as long as reading its weights. With B bytes a clock that memory gives an SM,

    weights a clock  w = 8 B / bits
    share of the ALU   = integer * w / 64        64 integer results a clock: 4 quadrants of 16 lanes
    share of the issue = issued * w / 128        128 thread instructions a clock: 4 schedulers of 32 lanes

and a kernel is bound by memory where both shares are below 1. B is 90 % of the peak bandwidth. ``integer`` counts
IMAD on the ALU too, although it has a pipe of its own: "memory" is safe to believe, "ALU" may be too strict. Not in it:
latency, bank conflicts, L2, waves of blocks that do not fill the GPU, launches, and the traffic of x and of the result.

SMs, boost clock and bandwidth are from NVIDIA's data sheets and architecture white papers (A100 80 GB SXM, H100 SXM5,
H200 SXM, HGX B200, GeForce RTX 3090, 4090 and 5090).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_EFFICIENCY = 0.9
_ALU, _ISSUE = 64, 128

Bound = Literal["memory", "ALU", "issue"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """``clock`` in Hz, ``bandwidth`` of the memory in bytes a second, both at their peak."""

    name: str
    arch: int
    sms: int
    clock: float
    bandwidth: float

    @property
    def bytes_per_clock(self) -> float:
        """Bytes that memory gives one SM a clock."""
        return self.bandwidth * _EFFICIENCY / self.sms / self.clock


GPUS = (
    Gpu("A100-80", 80, 108, 1.410e9, 2.039e12),
    Gpu("RTX 3090", 86, 82, 1.695e9, 0.936e12),
    Gpu("RTX 4090", 89, 128, 2.520e9, 1.008e12),
    Gpu("H100", 90, 132, 1.755e9, 3.35e12),
    Gpu("H200", 90, 132, 1.755e9, 4.8e12),
    Gpu("B200", 100, 148, 1.850e9, 8.0e12),
    Gpu("RTX 5090", 120, 170, 2.407e9, 1.792e12),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a kernel is bound by on a GPU, and the shares of the ALU's and the schedulers' time it needs (1: all)."""

    gpu: str
    bound: Bound
    alu: float
    issue: float

    def __str__(self) -> str:
        return f"{self.bound} ({self.alu:.0%} ALU, {self.issue:.0%} issue)"


def verdict(gpu: Gpu, *, bits: float, integer: float, issued: float) -> Verdict:
    """The verdict for a kernel with that many integer and issued instructions a weight of ``bits`` bits in memory."""
    weights = gpu.bytes_per_clock * 8 / bits
    alu, issue = integer * weights / _ALU, issued * weights / _ISSUE
    bound: Bound = "memory" if max(alu, issue) < 1 else "ALU" if alu >= issue else "issue"
    return Verdict(gpu.name, bound, alu, issue)


def gpus(arch: int) -> Iterable[Gpu]:
    """The GPUs of ``GPUS`` that have an architecture."""
    return (gpu for gpu in GPUS if gpu.arch == arch)
