"""quantize_activations: the inputs of linears rounded token by token, once for layers that share them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Convolutions, Tied, mlp
from torch import nn

import fxquant
from fxquant.ops import operators as ops
from fxquant.qtensor import fake_quantize
from fxquant.scheme import parse_spec

W8A8 = {"rules": [{"match": "*", "weight": "e4m3/channel", "activation": "e4m3/token"}]}


def test_linears_see_rounded_inputs() -> None:
    model, x = mlp().eval(), torch.randn(3, 20)
    compiled = fxquant.compile(model, (x,), W8A8)
    spec = parse_spec("e4m3/token")
    first, second = (fxquant.quantize_tensor(model[i].weight, "e4m3/channel").dequantize() for i in (0, 2))
    with torch.no_grad():
        hidden = nn.functional.gelu(nn.functional.linear(fake_quantize(x, spec, None), first, model[0].bias))
        want = nn.functional.linear(fake_quantize(hidden, spec, None), second, model[2].bias)
    assert torch.allclose(compiled(x), want, rtol=1e-6, atol=1e-6)


def test_equals_float8_rounding_written_into_the_float_model() -> None:
    """Bit for bit what torch.float8_e4m3fn gives, put into a Hugging Face model with hooks."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, use_cache=False, **sizes)
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 64, (2, 9))
    compiled = fxquant.compile(model, {"input_ids": tokens}, W8A8)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    with torch.no_grad():
        assert torch.equal(compiled(tokens).logits, model(tokens).logits)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def test_layers_that_read_one_tensor_share_its_rounding() -> None:
    compiled = fxquant.compile(Fork(), (torch.randn(2, 8),), W8A8)
    nodes = compiled.program.gm.graph.find_nodes(op="call_function", target=ops.fake_quantize_dynamic.default)
    assert len(nodes) == 1
    step = next(s for s in compiled.program.trace if s.name == "quantize_activations")
    assert [r.layer for r in step.rewrites] == ["q", "k", "v"]


def test_a_head_that_stays_in_float_reads_its_input_as_it_is() -> None:
    compiled = fxquant.compile(Tied(), (torch.randint(0, 50, (2, 5)),), W8A8)
    step = next(s for s in compiled.program.trace if s.name == "quantize_activations")
    assert {r.layer for r in step.rewrites} == {"up", "down"}


def test_convolutions_decline() -> None:
    compiled = fxquant.compile(Convolutions(), (torch.randn(2, 3, 12, 12),), W8A8)
    step = next(s for s in compiled.program.trace if s.name == "quantize_activations")
    assert {d.layer for d in step.declines} == {"stem.0", "depthwise", "line"}
    assert all("for linears" in d.reason for d in step.declines)


def test_activations_alone_leave_the_weights_in_float() -> None:
    config = {"rules": [{"match": "*", "activation": "int8/token"}]}
    compiled = fxquant.compile(mlp(), (torch.randn(2, 20),), config)
    assert compiled.summary().weight_bytes_after == 0
    assert 0 < compiled.program.trace[-1].error < 0.05
