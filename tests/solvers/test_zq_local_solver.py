"""ZQ-Local: never worse than its start, close to the optimum where that is known, and scales that stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxquant.qtensor import quantize_tensor
from fxquant.solvers.gptq import loss
from fxquant.solvers.gptq import solve as gptq
from fxquant.solvers.zq_local import solve


def problem(rows: int = 24, cols: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    return torch.randn(rows, cols, generator=g), 2 / 200 * X.T @ X


@pytest.mark.parametrize(
    "spec", ["e2m1/group16", "int4/channel", "uint4/group16", "nf4/group16", "mxfp4", "nvfp4", "e2m1/block8x16"]
)
@pytest.mark.parametrize("from_gptq", [False, True])
def test_it_is_better_than_its_start_and_keeps_the_scales(spec: str, from_gptq: bool) -> None:
    W, H = problem()
    start = quantize_tensor(W, spec)
    start = gptq(W, H, start.spec).quantized if from_gptq else start
    found = solve(W, start, H)
    found.quantized.check()
    after, before = (loss(W - q.dequantize(), H) for q in (found.quantized, start))
    assert after < before * (1.0 if from_gptq else 0.75)
    assert found.after / found.before == pytest.approx(after / before, rel=1e-3)
    assert torch.equal(found.quantized.scale, start.scale)


def test_no_row_is_worse() -> None:
    W, H = problem()
    start = quantize_tensor(W, "e2m1/group16")
    before, after = (W - q.dequantize() for q in (start, solve(W, start, H, iterations=3).quantized))
    assert bool((((after @ H) * after).sum(1) <= ((before @ H) * before).sum(1)).all())


def test_small_problems_come_near_the_optimum() -> None:
    """Against all 3^6 choices of codes for a row."""
    W, H = problem(rows=12, cols=6)
    start = quantize_tensor(W, "int2/channel")
    found = solve(W, start, H, iterations=200)
    choices = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    left = W[:, None] - choices * start.scale[:, None]
    least = ((left @ H) * left).sum(2).amin(1).sum()
    assert least <= loss(W - found.quantized.dequantize(), H) * 1.0001
    assert loss(W - found.quantized.dequantize(), H) < least + 0.5 * (loss(W - start.dequantize(), H) - least)


def test_held_out_inputs_judge() -> None:
    W, H = problem()
    start = quantize_tensor(W, "e2m1/group16")
    found = solve(W, start, H, held_out=torch.eye(40))  # where round-to-nearest is the best there is
    assert found.fell_back
    assert torch.equal(found.quantized.codes, start.codes)


def test_drift_aims_at_the_float_inputs() -> None:
    W, H = problem()
    g = torch.Generator().manual_seed(5)
    change = 0.05 * torch.randn(40, 40, generator=g)  # X_float = X + X change
    target = W @ (torch.eye(40) + change).T
    start = quantize_tensor(W, "int4/channel")
    aimed, plain = (solve(W, start, H, drift=d, damp_percent=1e-6).quantized for d in (change.T @ H, None))
    assert loss(target - aimed.dequantize(), H) < 0.9 * loss(target - plain.dequantize(), H)
