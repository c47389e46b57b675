"""The weight-only kernels compute what they say, exactly on integers, and touch nothing that is not theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import ACTIVATIONS, Case, bound, launch, operands, steps, wanted
from triton_interpreter import within

from fxquant.decodings import KERNEL_FORMATS

FORMATS = [str(f) for f in KERNEL_FORMATS]


def check(case: Case) -> None:
    """Run a case; assert that it is right and that guards hold. Every address is checked when it is used."""
    o = operands(case)
    writable = [o.out.view, o.partial.view]
    with within([t.view for t in o.inputs], writable):
        launch(case, o)
    guards = [*o.inputs, o.out, *([o.partial] if case.splits > 1 else [])]
    assert all(t.untouched() for t in guards)
    want, got = wanted(case, o), o.out.view.double()
    if case.exact and case.activation in ("none", "relu"):
        assert steps(case, o) < 2**24
        assert torch.equal(got, want.to(case.out).double())
    else:
        assert bool(((got - want).abs() <= bound(case, o)).all())


@pytest.mark.parametrize("asm", [False, True], ids=["body", "asm"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, asm: bool) -> None:
    check(Case(name, M=3, N=37, K=300, asm=asm))
