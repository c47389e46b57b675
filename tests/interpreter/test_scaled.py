"""The kernels of MX and NVFP4 (``tl.dot_scaled``): exact on integers, and nothing is touched that is not theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import Guarded, guarded, load
from torch import Tensor
from triton_interpreter import within

from fxquant.codegen.triton_source import SCALED, Scaled, scaled
from fxquant.formats import parse_format
from fxquant.packing import pack

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Case:
    operands: Scaled
    M: int
    N: int
    K: int
    splits: int = 1
    swap: bool = False
    bias: bool = False
    out: torch.dtype = torch.float32
    gap: int = 0
    BM: int = 16
    BN: int = 32
    BK: int = 128


@dataclass
class Operand:
    """Elements and exponents as a kernel gets them; ``value`` is their float64 ``[rows, K]``."""

    elements: Guarded
    exponents: Guarded
    value: Tensor


def operand(format: str, size: int, rows: int, K: int, rng: torch.Generator, gap: int) -> Operand:
    """Codes of integers up to 6, scales 1/2, 1 and 2 (E8M0) or 1, 2 and 3 (E4M3)."""
    table = parse_format(format).table()
    good = (table.isfinite() & (table.abs() <= 6) & (table * 2 % 1 == 0)).nonzero().flatten().to(torch.uint8)
    codes = good[torch.randint(0, len(good), (rows, K), generator=rng)]
    blocks = -(-K // size)
    steps = torch.randint(0, 3, (rows, blocks), generator=rng)
    if size == 32:
        exponents, scale = (steps + 126).to(torch.uint8), torch.exp2(steps.double() - 1)
    else:
        exponents, scale = (steps + 1).to(torch.float8_e4m3fn), (steps + 1).double()
    elements = pack(codes, "planar4") if format == "e2m1" else codes.view(FLOATS[format])
    return Operand(
        guarded(elements, gap), guarded(exponents), table[codes.long()] * scale[:, torch.arange(K) // size]
    )  # fmt: skip


def check(case: Case) -> None:
    rng = torch.Generator().manual_seed(case.K)
    x = operand(case.operands.x, case.operands.size, case.M, case.K, rng, case.gap)
    w = operand(case.operands.w, case.operands.size, case.N, case.K, rng, case.gap)
    scale = guarded(torch.exp2(torch.randint(-1, 2, (case.N,), generator=rng).float()))
    bias = guarded(torch.randint(-9, 9, (case.N if case.bias else 1,), generator=rng).to(case.out))
    unused = guarded(torch.zeros(1))
    out = guarded(torch.full((case.M, case.N), 7.0, dtype=case.out), case.gap)
    partial = guarded(torch.full((case.splits, case.M, case.N), 7.0))
    inputs = [x.elements, x.exponents, w.elements, w.exponents, scale, unused, bias]
    grid = (-(-case.N // case.BN), -(-case.M // case.BM), case.splits)
    more = [unused.view, bias.view, unused.view, unused.view, unused.view]
    constants = {
        "BM": case.BM, "BN": case.BN, "SPLITS": case.splits, "ROW_SCALE": False, "BIAS": case.bias,
        "ACTIVATION": "none", "RESIDUAL": False, "RANK": 0,
    }  # fmt: skip
    to = out.view if case.splits == 1 else partial.view
    module = load(scaled(case.operands))
    with within([t.view for t in inputs], [out.view, partial.view]):
        module.gemm[grid](
            x.elements.view, x.exponents.view, w.elements.view, w.exponents.view, scale.view, *more, to,
            case.M, case.N, case.K, x.elements.view.stride(0), w.elements.view.stride(0), 0, out.view.stride(0),
            BK=case.BK, EVEN=case.K % case.BK == 0, SWAP=case.swap, **constants,
        )  # fmt: skip
        if case.splits > 1:
            module.reduce[grid[:2]](to, *more, out.view, case.M, case.N, 0, out.view.stride(0), **constants)
    assert all(t.untouched() for t in [*inputs, out, partial])
    want = x.value @ w.value.T * scale.view.double()
    want = want + bias.view.double() if case.bias else want
    # multiples of 1/2 * 1/2 (elements), 1/2 * 1/2 (exponents) and 1/2 (scale)
    assert float((x.value.abs() @ w.value.abs().T).max()) * 2 * 32 < 2**24
    assert torch.equal(out.view.double(), want.to(case.out).double())


IDS = [operands.name for operands in SCALED]


@pytest.mark.parametrize("operands", SCALED, ids=IDS)
@pytest.mark.parametrize("K", [128, 256, 200, 96, 33, 16, 1])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
def test_the_product(operands: Scaled, K: int, swap: bool) -> None:
    check(Case(operands, M=3, N=37, K=K, swap=swap, gap=5))


@pytest.mark.parametrize("operands", SCALED, ids=IDS)
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits(operands: Scaled, splits: int) -> None:
    """Of 4 blocks, so that some parts of K have fewer or none; with all of them within K, and not."""
    for K in (500, 512):
        check(Case(operands, M=17, N=5, K=K, splits=splits, bias=True))


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16], ids=str)
def test_outputs(out: torch.dtype) -> None:
    plain = Case(SCALED[0], M=2, N=9, K=64, out=out, bias=True, gap=3)
    for case in (plain, replace(plain, swap=True), replace(plain, splits=2)):
        check(case)
