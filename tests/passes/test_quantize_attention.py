"""quantize_attention: attention spelt out as products, and both operands of each rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.capture import capture
from fxquant.ops import operators as ops
from fxquant.passes.quantize_attention import spell_out
from fxquant.rewrite import Decline, aten

G = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(2, 6, 16, generator=G) for _ in range(3)]


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (
            nn.Linear(16, 16), nn.Linear(16, 8 if kind == "gqa" else 16), nn.Linear(16, 8 if kind == "gqa" else 16),
            nn.Linear(16, 16),
        )  # fmt: skip
        self.register_buffer("mask", torch.rand(6, 6, generator=G) > 0.4)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], -1, 4).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.kind == "products":
            y = ((q * 0.5) @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            options: dict[str, Any] = {
                "causal": {"is_causal": True}, "bool": {"attn_mask": self.mask}, "gqa": {"enable_gqa": True},
                "float": {"attn_mask": self.mask.float() * 3}, "scale": {"scale": 0.3},
            }[self.kind]  # fmt: skip
            y = F.scaled_dot_product_attention(q, k, v, **options)
        return self.out(y.transpose(1, 2).flatten(2))


KINDS = ["causal", "bool", "float", "gqa", "scale", "products"]


@pytest.mark.parametrize("kind", KINDS)
def test_spelt_out_it_computes_the_same(kind: str) -> None:
    model = Attention(kind).eval()
    program = capture(model, (BATCHES[0],))
    with torch.no_grad():
        want = program(BATCHES[1])
        for node in program.gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            assert not isinstance(spell_out(program.gm.graph, node), Decline)
        program.gm.graph.lint()
        program.gm.recompile()
        assert torch.allclose(program(BATCHES[1]), want, atol=1e-6)
    left = program.gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert not left


@pytest.mark.parametrize("spec", ["e4m3/tensor", "e4m3/token"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_operands_are_rounded(kind: str, spec: str, tmp_path: Path) -> None:
    model = Attention(kind).eval()
    config = {"rules": [{"match": "*", "weight": "e4m3/channel"}], "passes": [{"quantize_attention": {"spec": spec}}]}
    compiled = fxquant.compile(model, (BATCHES[0],), config, calibration=BATCHES)
    nodes = [n for n in compiled.program.gm.graph.nodes if n.target in (
        ops.fake_quantize.default, ops.fake_quantize_dynamic.default)]  # fmt: skip
    assert len(nodes) == 4
    x = torch.cat(BATCHES)
    with torch.no_grad():
        want = model(x)
    assert 0 < float((compiled(x) - want).norm() / want.norm()) < 0.1
    compiled.save(tmp_path / "out")
    assert torch.equal(fxquant.load(tmp_path / "out")(x), compiled(x))


def test_scales_are_those_of_the_data() -> None:
    """By hand, all four operands of one attention."""
    model = Attention("scale").eval()
    config = {"rules": [{"match": "out", "keep": True}, {"match": "*", "weight": "e5m2/channel"}],
              "passes": [{"quantize_attention": {"spec": "e2m3/tensor"}}]}  # fmt: skip
    compiled = fxquant.compile(model, (BATCHES[0],), config, calibration=BATCHES)
    gm, x = compiled.program.gm, torch.cat(BATCHES)
    with torch.no_grad():
        q, k, v = (y(x).view(6, 6, 4, 4).transpose(1, 2) for y in (model.q, model.k, model.v))
        p = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    want = sorted(float(t.abs().max()) / 7.5 for t in (q, k, v, p))
    nodes = gm.graph.find_nodes(op="call_function", target=ops.fake_quantize.default)
    got = sorted(float(gm.get_buffer(n.args[1].target)) for n in nodes)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_onnx_computes_the_same(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Attention(kind).eval()
    config = {"rules": [{"match": "*", "weight": "e4m3/channel"}], "passes": ["quantize_attention"]}
    compiled = fxquant.compile(model, (BATCHES[0],), config, calibration=BATCHES)
    compiled.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: BATCHES[1].numpy()})
    close = (torch.from_numpy(got) - compiled(BATCHES[1])).abs() < 1e-4
    assert float(close.float().mean()) > 0.98


def test_the_search_finds_formats_of_operands() -> None:
    """Probabilities crowd near zero, so at four bits they want more exponent than queries do."""
    model = Attention("products").eval()
    rules = [{"match": "*", "weight": "e4m3/channel"}]
    passes: list[Any] = [{"quantize_attention": {"spec": "e2m1/tensor"}}]
    plain, found = (
        fxquant.compile(model, (BATCHES[0],), {"rules": rules, "passes": [*passes, *more]}, calibration=BATCHES)
        for more in ([], ["search_formats"])
    )
    x = torch.cat(BATCHES)
    with torch.no_grad():
        want = model(x)
        assert (found(x) - want).norm() < (plain(x) - want).norm()
    step = next(s for s in found.program.trace if s.name == "search_formats")
    assert sum("error of the products" in r.detail for r in step.rewrites) == 4
