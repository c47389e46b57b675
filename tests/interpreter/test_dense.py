"""``decode`` and ``dense``: all codes in all slots come out exactly, by the Triton body and by the assembly."""

from __future__ import annotations

import pytest
import torch
from decode_cases import DECODINGS, IDS, all_codes, expected, packed
from kernel_cases import Case, guarded, kernels, operands
from triton_interpreter import within

from fxquant.decodings import Decoding


@pytest.mark.parametrize("asm", [False, True], ids=["body", "asm"])
@pytest.mark.parametrize("d", DECODINGS, ids=IDS)
def test_all_codes_in_all_slots(d: Decoding, asm: bool) -> None:
    codes = all_codes(d)
    N, K = codes.shape
    w = packed(d, codes)
    w = w if d.target else w.view(torch.int32)
    out, unused = torch.zeros(N, K), torch.zeros(1)
    kernels(d).dense[1, 1](
        w, torch.ones(N), unused, out, N, K, 1, K,
        BN=256, RUN=d.run, GROUP=0, PADDED=0, ZERO=False, USE_ASM=asm,
    )  # fmt: skip
    assert torch.equal(out.double(), torch.from_numpy(expected(d, codes)))


@pytest.mark.parametrize("group", [0, 16, 20, 48, 128, 400])
@pytest.mark.parametrize(("name", "x", "zero"), [("e3m2", "", False), ("uint4", "", True), ("e2m1", "e4m3", False)])
def test_dense(name: str, x: str, zero: bool, group: int) -> None:
    """W as the kernel writes it is W, rounded once; rows of it with gaps, which stay as they were."""
    out = {0: torch.float32, 16: torch.float16}.get(group, torch.bfloat16)
    case = Case(name, x=x, M=1, N=37, K=400, group=group, zero=zero, exact=False, asm=True)
    d, o = case.decoding, operands(case)
    to = guarded(torch.full((case.N, case.K), 7.0, dtype=out), 9)
    with within([o.w.view, o.scale.view, o.zero.view], [to.view]):
        kernels(d).dense[2, o.blocks](
            o.w.view, o.scale.view, o.zero.view, to.view, case.N, case.K, o.blocks, to.view.stride(0),
            BN=32, RUN=d.run, GROUP=group, PADDED=case.padded, ZERO=zero, USE_ASM=True,
        )  # fmt: skip
    assert all(t.untouched() for t in (o.w, o.scale, o.zero, to))
    # the product of a decoded number of few bits and a float32, rounded to float32 and then to out
    assert torch.equal(to.view, o.weight.float().to(out))
