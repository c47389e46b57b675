"""verify names the node and the invariant that a broken graph violates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import mlp

from fxquant.capture import capture
from fxquant.codegen.lower import LOWER
from fxquant.errors import VerifyError
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Program, Stage, run
from fxquant.rewrite import attach, detach, fetch
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify


def program(*, lowered: bool) -> Program:
    rules = (LayerRule("*", parse_spec("e3m2/group8")),)
    stages = [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules})] + ([Stage(LOWER)] if lowered else [])
    return run(capture(mlp().eval(), (torch.randn(2, 20),)), stages, check=verify)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], None]:
    def apply(p: Program) -> None:
        value = edit(fetch(p.gm, name))
        detach(p.gm, name)
        attach(p.gm, name, value)

    return apply


def respec(p: Program) -> None:
    node = next(n for n in p.gm.graph.nodes if "linear_wq" in str(n.target))
    node.args = (*node.args[:5], "e2m1/group8", node.args[6])


@pytest.mark.parametrize(
    ("lowered", "break_it", "message"),
    [
        (False, change("0.weight_codes", lambda c: c | 64), "a code is .*has 6 bits"),
        (False, change("0.weight_scale", lambda s: s * torch.nan), "not a positive finite number"),
        (False, change("0.weight_scale", lambda s: -s), "not a positive finite number"),
        (True, change("0.weight_scale", lambda s: s.half()), "0.weight_scale is float16"),
        (True, change("2.weight_packed", lambda c: c[:, :-1]), "2.weight_packed is uint8"),
        (True, lambda p: detach(p.gm, "2.weight_scale"), "has no tensor '2.weight_scale'"),
        (True, respec, "wants uint8"),
    ],
)  # fmt: skip
def test_broken_graphs(lowered: bool, break_it: Callable[[Program], None], message: str) -> None:
    p = program(lowered=lowered)
    verify(p.gm)
    break_it(p)
    with pytest.raises(VerifyError, match=message):
        verify(p.gm)


def test_methods_and_modules_are_refused() -> None:
    gm = torch.fx.symbolic_trace(mlp())
    with pytest.raises(VerifyError, match="call_module"):
        verify(gm)
