"""Whole graphs through the kernels: the operators of a compiled model run what they would run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.codegen import launch
from fxquant.codegen.fuse import fused


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as if it were a small Hopper."""
    monkeypatch.setattr(launch, "device", lambda index: launch.Device("a stand-in", sms=4, arch=90))
    with torch.library._scoped_library("fxquant", "IMPL") as library:
        library.impl("linear_wq", launch.linear_wq, "CPU")
        library.impl("linear_wq_fused", launch.linear_wq_fused, "CPU")
        yield


class Block(nn.Module):
    """What a transformer has around its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.gate = nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))
        return x + F.silu(self.gate(x))[..., :64]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ("W6A16-E3M2", torch.bfloat16), ("W4A8-FP", torch.float16), ("W4A16-GPTQ-LoRC", torch.float16),
        ("W4A4-FPQ", torch.float16),
    ],
)  # fmt: skip
def test_a_fused_graph_computes_what_the_reference_does_but_for_rounding(
    config: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 5, 64).to(dtype),) for _ in range(4)]
    model = fxquant.compile(Block().eval().to(dtype), data[0], config, calibration=data)
    quick = fused(model.program)
    x = torch.randn(2, 9, 64).to(dtype)
    want = model(x)
    request.getfixturevalue("stand_in")
    got = quick(x)
    assert not torch.equal(got, want)  # kernels ran: they round less often
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert float(error) < 4 * torch.finfo(dtype).eps
