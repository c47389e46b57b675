"""Lowering: packed operators compute what the QDQ form computes, bit for bit, and no float weight is left."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_models import BothWays, Conv1D, Convolutions, Experts, Tied, mlp

from fxquant.capture import capture
from fxquant.codegen.lower import LOWER
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.program import Stage, run
from fxquant.rewrite import tensors
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify

ops = torch.ops.fxquant
CASES = {
    "mlp": (mlp, torch.randn(2, 20), {ops.linear_wq.default: 2}),
    "conv1d": (Conv1D, torch.randn(2, 3, 10), {ops.linear_wq.default: 1}),
    "convolutions": (Convolutions, torch.randn(2, 3, 12, 12),
                     {ops.conv2d_wq.default: 2, ops.dequantize_packed.default: 1, ops.linear_wq.default: 1}),
    "experts": (Experts, torch.randn(3, 5, 8), {ops.dequantize_packed.default: 2}),
    "both ways": (BothWays, torch.randn(2, 16), {ops.linear_wq.default: 2}),
    "tied": (Tied, torch.randint(0, 50, (2, 5)), {ops.embedding_wq.default: 1, ops.linear_wq.default: 3}),
}  # fmt: skip


@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group16", "uint4/group8:fp16", "e4m3/tensor"])
@pytest.mark.parametrize("name", CASES)
def test_lowered_equals_qdq_bit_for_bit(name: str, spec: str) -> None:
    make, x, expected = CASES[name]
    rules = (LayerRule("*", parse_spec(spec), types=("linear", "conv", "matmul", "embedding")),)
    program = capture(make().eval(), (x,))
    with torch.no_grad():
        run(program, [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules})], check=verify)
        before = program.gm(x)
        run(program, [Stage(LOWER), Stage(REMOVE_DEAD)], check=verify)
        after = program.gm(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found = Counter(n.target for n in program.gm.graph.nodes if n.op == "call_function")
    assert {t: found[t] for t in expected} == expected
    assert ops.dequantize.default not in found
    quantized = {w.weight for n in program.gm.graph.nodes if (w := info(n).weight)}
    assert not quantized & set(tensors(program.gm))
    assert all(v.dtype == torch.uint8 for k, v in tensors(program.gm).items() if k.endswith("_packed"))


def test_half_precision_weights_are_cast_after_decoding() -> None:
    x = torch.randn(2, 20).bfloat16()
    program = capture(mlp().eval().bfloat16(), (x,))
    rules = (LayerRule("*", parse_spec("e3m2/channel")),)
    run(program, [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules})], check=verify)
    before = program(x)
    run(program, [Stage(LOWER), Stage(REMOVE_DEAD)], check=verify)
    assert torch.equal(program(x), before)
    found = Counter(n.target for n in program.gm.graph.nodes if n.op == "call_function")
    assert found[ops.linear_wq.default] == 2
