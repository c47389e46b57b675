"""The kernels on rows of activations: guarded, strided, of any length."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import guarded, load
from triton_interpreter import within

from fxquant.codegen.triton_source import rows


@pytest.mark.parametrize("K", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("gap", [0, 7])
def test_to_half(K: int, gap: int) -> None:
    """Integers of at most eight bits come back exactly, from rows of any size; the largest then is in [2^14, 2^15)."""
    rng = torch.Generator().manual_seed(K)
    sizes = torch.exp2(torch.tensor([0.0, -100.0, 60.0, 3.0]))[:, None]
    numbers = torch.randint(-255, 256, (4, K), generator=rng)
    numbers[:, 0] = 255
    x = guarded((numbers * sizes).bfloat16(), gap)
    half, power = guarded(torch.zeros(4, K).half()), guarded(torch.zeros(4))
    with within([x.view], [half.view, power.view]):
        load(rows()).to_half[(4,)](x.view, half.view, power.view, K, x.view.stride(0), BK=16)
    assert all(t.untouched() for t in (x, half, power))
    assert torch.equal(half.view.double() * power.view.double()[:, None], x.view.double())
    largest = half.view.abs().amax(1)
    assert bool(((largest >= 2.0**14) & (largest < 2.0**15)).all())
