"""The GEMM kernels compute what they say, exactly on integers, and touch nothing that is not theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, Case, bound, kernels, launch, operands, steps, wanted
from triton_interpreter import within

from fxquant.decodings import KERNEL_FORMATS, decodes
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat

BYTE_FLOATS = ("e4m3", "e5m2")


def pairs() -> list[tuple[str, str]]:
    """(format, what x is) for which there is a kernel; "" is float16."""
    targets: dict[str, FloatFormat | None] = {"": None}
    for name in BYTE_FLOATS:
        found = parse_format(name)
        assert isinstance(found, FloatFormat)
        targets[name] = found
    return [(str(f), x) for f in KERNEL_FORMATS for x, target in targets.items() if decodes(f, target) is None]


PAIRS = pairs()
IDS = [f"{f}-{x or 'float16'}" for f, x in PAIRS]


def check(case: Case) -> torch.Tensor:
    """Run a case; assert that it is right and that guards hold. Every address is checked when it is used."""
    o = operands(case)
    with within([t.view for t in o.inputs], [o.out.view, o.partial.view]):
        launch(case, o)
    assert all(t.untouched() for t in [*o.inputs, o.out, o.partial])
    want, got = wanted(case, o), o.out.view.double()
    if case.exact and case.activation in ("none", "relu"):
        assert steps(case, o) < 2**24
        assert torch.equal(got, want.to(case.out).double())
    else:
        assert bool(((got - want).abs() <= bound(case, o)).all())
    return o.out.view


@pytest.mark.parametrize(("name", "x"), PAIRS, ids=IDS)
def test_every_format(name: str, x: str) -> None:
    """On integers, exactly; on random numbers, within the bound; by assembly and by the Triton body, the same bits."""
    ragged = Case(name, x=x, M=3, N=37, K=300, exact=False)
    even = replace(ragged, K=2 * ragged.decoding.block, exact=True)
    assert even.even
    for case in (ragged, even):
        assert torch.equal(check(case), check(replace(case, asm=True)))


# groups of one to many slices, not multiples of one, longer than a block, with a ragged last one
@pytest.mark.parametrize("group", [16, 20, 32, 48, 64, 100, 128, 256, 320, 400])
@pytest.mark.parametrize("x", ["", "e4m3"], ids=["float16", "e4m3"])
def test_groups(group: int, x: str) -> None:
    check(Case("e3m2", x=x, M=3, N=18, K=512 if 512 % group == 0 else 400, group=group, BN=32, asm=True))
    check(Case("e2m1", x=x, M=2, N=17, K=383, group=group, BN=32, asm=True, fit=True, swap=True))


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("x", ["", "e5m2"], ids=["float16", "e5m2"])
def test_splits(splits: int, x: str) -> None:
    """Of 3 blocks, so that some parts of K have none from 4 on (and at 2 they differ)."""
    check(Case("e3m2", x=x, M=3, N=18, K=768, splits=splits, BN=32, asm=True, gap=5))
    check(Case("e3m2", x=x, M=3, N=18, K=700, splits=splits, BN=32, asm=True, group=64, swap=True))


@pytest.mark.parametrize("name", ["uint4", "uint8"])
@pytest.mark.parametrize("group", [0, 48, 128])
@pytest.mark.parametrize("swap", [False, True], ids=["", "swap"])
def test_zero_points(name: str, group: int, swap: bool) -> None:
    check(Case(name, M=3, N=18, K=300, zero=True, group=group, swap=swap, BN=32))


PLAIN = Case("e3m2", M=3, N=18, K=64, BN=32, gap=7, asm=True, fit=True)
WHOLE = replace(PLAIN, row_scale=True, bias=True, residual=True, rank=16)
WAYS = {"": {}, "swap": {"swap": True}, "splits": {"splits": 2}, "both": {"splits": 2, "swap": True}}


@pytest.mark.parametrize("part", [{"row_scale": True}, {"bias": True}, {"residual": True}, {"rank": 16}], ids=str)
def test_parts_of_the_epilogue(part: dict[str, Any]) -> None:
    """Out and residual have gaps between their rows."""
    for way in WAYS.values():
        check(replace(PLAIN, **part, **way))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_whole_epilogue(activation: str) -> None:
    for way in WAYS.values():
        check(replace(WHOLE, activation=activation, **way))
    check(replace(WHOLE, activation=activation, exact=False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_close(activation: str) -> None:
    """On sums that are given, from -12 to 12 and far beyond: within 4 roundings of the argument."""
    y = torch.cat([torch.linspace(-12, 12, 1920), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 3e4, -3e4])])
    y = y.reshape(1, 1, -1)
    out, unused, N = torch.zeros(1, y.shape[2]), torch.zeros(1), y.shape[2]
    kernels(PLAIN.decoding).reduce[(1, 1)](
        y, unused, unused, unused, unused, unused, out, 1, N, 0, N, BM=1, BN=2048, SPLITS=1, ROW_SCALE=False,
        BIAS=False, ACTIVATION=activation, RESIDUAL=False, RANK=0,
    )  # fmt: skip
    want = ACTIVATIONS[activation](y[0].double())
    assert bool(((out.double() - want).abs() <= 4 * 2.0**-24 * y[0].double().abs()).all())


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_are_rounded_once(out: torch.dtype) -> None:
    """Bias and residual are of the same dtype."""
    for way in WAYS.values():
        check(replace(WHOLE, out=out, **way))
    check(replace(WHOLE, out=out, exact=False, activation="gelu"))


@pytest.mark.parametrize("M", [1, 15, 16, 17, 33])
def test_rows(M: int) -> None:
    check(Case("e2m1", M=M, N=1, K=272, asm=True))
    check(Case("e2m1", M=M, N=65, K=16, asm=True, swap=True, gap=3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name, x = draw(st.sampled_from(PAIRS))
    exact = draw(st.booleans())
    return Case(
        name,
        x=x,
        M=draw(st.integers(1, 40)),
        N=draw(st.integers(1, 80)),
        K=draw(st.one_of(st.integers(1, 640), st.sampled_from([256, 512, 768]))),
        group=draw(st.sampled_from([0, 0, 16, 20, 32, 48, 64, 128, 256, 500])),
        fit=draw(st.booleans()),
        splits=draw(st.sampled_from([1, 1, 2, 3, 5, 8])),
        swap=draw(st.booleans()),
        zero=name.startswith("uint") and not x and draw(st.booleans()),
        row_scale=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        residual=draw(st.booleans()),
        rank=draw(st.sampled_from([0, 16])),
        # what float16 cannot hold is no matter of the kernel
        out=draw(st.sampled_from([torch.float32, torch.bfloat16, *([torch.float16] if exact else [])])),
        exact=exact,
        asm=draw(st.booleans()),
        BM=draw(st.sampled_from([16, 32])),
        BN=draw(st.sampled_from([32, 128])),
        gap=draw(st.sampled_from([0, 1, 8])),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(case=cases())
def test_many_cases(case: Case) -> None:
    check(case)
