"""tuning: tiles that were timed on the GPU at hand, on request only, and kept in the private cache.

``tiles`` is a rule of thumb; ``tune`` times what is worth trying beside it. The winner is kept in a file of the cache,
by GPU, and launches look it up. The file is data: what in it is not a sound tile is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxquant import cache as kernel_cache
from fxquant.codegen.gemm import run_gemm
from fxquant.codegen.prepack import KernelWeight
from fxquant.codegen.tiles import DENSE, Steps, Tiles, candidates

ROWS = (16, 32, 64, 128, DENSE)
"""Rows of x are rounded up to one of these: tiles are timed for it, and looked up by it."""
Timer = Callable[[Callable[[], Tensor]], float]
"""Seconds that a call takes."""


def steps(weight: KernelWeight) -> Steps:
    """The loop over K of a weight's kernel."""
    made = weight.decoding
    return Steps(weight.blocks, made.block, made.format.bits, 2 if made.target is None else 1)


def key(M: int, weight: KernelWeight) -> str:
    """What tiles are kept for: the format and group of a weight, its shape, and the rows of x rounded up."""
    rows = min(rows for rows in ROWS if rows >= M)
    return f"{weight.decoding.layout.name} group{weight.group} {weight.rows}x{weight.cols} M{rows}"


def tune(M: int, weight: KernelWeight, *, gpu: str, sms: int, arch: int, time: Timer) -> Tiles:
    """Time the candidates for ``M`` rows, keep the fastest for GPUs of that name, and return it."""
    x = torch.randn(M, weight.cols, device=weight.words.device).half()
    x = x if weight.decoding.target is None else x.to(torch.float8_e4m3fn)
    tried = candidates(M, weight.rows, steps(weight), sms=sms, arch=arch)
    best = min(tried, key=lambda chosen: time(lambda: run_gemm(x, weight, chosen, dtype=torch.float16)))
    kept = {**stored(gpu), key(M, weight): best}
    text = json.dumps({"gpu": gpu, "tiles": {k: astuple(v) for k, v in sorted(kept.items())}}, indent=1)
    kernel_cache.write_bytes(_file(gpu), text.encode())
    stored.cache_clear()
    return best


def cuda_time(call: Callable[[], Tensor], *, runs: int = 20) -> float:
    """Median seconds of a call on the current GPU, its L2 cache cleared before each."""
    call()
    clear = torch.empty(_L2, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        clear.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[runs // 2]


_L2 = 1 << 28
"""Bytes that no L2 cache holds."""


@cache
def stored(gpu: str) -> Mapping[str, Tiles]:
    """The tiles that were timed on GPUs of that name, by ``key``; read once."""
    content = kernel_cache.read_bytes(_file(gpu))
    try:
        document = json.loads(content) if content else {}
        found: dict[str, Any] = document["tiles"] if document.get("gpu") == gpu else {}
        return {k: Tiles(*v) for k, v in found.items() if _sound(v)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _file(gpu: str) -> str:
    return f"tiles_{hashlib.sha256(gpu.encode()).hexdigest()[:16]}.json"


def _sound(value: Any) -> bool:
    """Whether six numbers are tiles that a kernel takes; a wrong one may be slow, not wrong."""
    if not (isinstance(value, list) and len(value) == 6 and type(value[3]) is bool):
        return False
    BM, BN, splits, _, warps, stages = value
    if not all(type(v) is int for v in (BM, BN, splits, warps, stages)):
        return False
    return (
        BM in (16, 32, 64, 128)
        and BN in (32, 64, 128)
        and 1 <= splits <= 1024
        and warps in (2, 4, 8)
        and 1 <= stages <= 5
    )
