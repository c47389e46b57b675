"""quantize_ on whole models: their own code runs on packed weights and gives what the compiled model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import BothWays
from torch import Tensor, nn

import fxquant
from fxquant.errors import CaptureError
from fxquant.modules import PackedWeight, QuantizedConv2d, QuantizedEmbedding, QuantizedLinear

EVERYTHING = {"rules": [{"match": "*", "weight": "e3m2/channel", "types": ["linear", "conv", "matmul", "embedding"]}]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(20).reshape(2, 10)


def vit(hf: Any) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5))


def clip(hf: Any) -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4, projection_dim=16))


def t5(hf: Any) -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bert(hf: Any) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=32))


def gpt2(hf: Any) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def llama(hf: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=64, max_position_embeddings=64))


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("transformers")


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    flat_a, flat_b = ([t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (a, b))
    return len(flat_a) == len(flat_b) > 0 and all(
        x.dtype == y.dtype and torch.allclose(x, y, atol=tolerance, rtol=tolerance)
        for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.mark.parametrize("make", [vit, clip, t5, bert, gpt2, llama])
def test_a_hugging_face_model_runs_on_packed_weights(make: Callable[[Any], nn.Module], hf: Any) -> None:
    from fxquant.examples import example_inputs

    torch.manual_seed(0)
    model = make(hf).eval()
    inputs = example_inputs(model)
    compiled = fxquant.quantize_(model, EVERYTHING)
    assert len(compiled.summary().quantized) > 5
    with torch.no_grad():
        got = model(**inputs)
    assert close(got[0], compiled(**inputs)[0])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_runs_on_packed_weights(make: Callable[[Any], nn.Module], hf: Any) -> None:
    model: Any = make(hf).eval()
    compiled = fxquant.quantize_(model)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, -1], compiled(input_ids=tokens[:, :-1])["logits"][:, -1].argmax(-1))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)


@pytest.mark.parametrize("make", [encoder_layer, encoder])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_path_of_torch_runs_on_packed_weights(make: Callable[[], nn.Module], grad: bool) -> None:
    model, x = make().eval(), torch.randn(2, 5, 32)
    compiled = fxquant.quantize_(model, EVERYTHING, (x,))
    with torch.set_grad_enabled(grad):
        assert close(model(x), compiled(x))
    assert [q.name for q in compiled.summary().layers if q.spec is None] == []


def test_a_weight_under_weight_norm_is_replaced_by_its_value() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model, x = nn.Sequential(norm(nn.Conv1d(8, 6, 3, groups=2)), norm(nn.Linear(8, 4))), torch.randn(2, 8, 10)
    other = copy.deepcopy(model)
    compiled = fxquant.quantize_(model, EVERYTHING, (x,))
    assert [layer.name for layer in compiled.summary().quantized] == ["0", "1"]
    with torch.no_grad():
        assert close(model(x), compiled(x))
        assert not close(model(x), other(x))  # which shares the class of its modules
    assert {name: p.numel() for name, p in model.named_parameters() if p.numel()} == {"0.bias": 6, "1.bias": 4}


class Everything(nn.Module):
    """One module of each kind that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=3)
        self.conv = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1, bias=False)
        self.head = nn.Linear(12, 6)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.embed(ids)), self.conv(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_gives_what_compile_gives(dtype: torch.dtype) -> None:
    model, inputs = Everything().eval().to(dtype), (IDS, torch.randn(2, 1, 6, 6, dtype=dtype))
    compiled = fxquant.quantize_(model, EVERYTHING, inputs)
    with torch.no_grad():
        got = model(*inputs)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(got, compiled(*inputs), strict=True))
    assert model.embed.weight.dtype == dtype


def test_what_replaces_a_module_has_its_attributes_and_its_weight() -> None:
    model = Everything().eval()
    before = {name: (vars(m), m.weight.detach()) for name, m in model.named_children()}
    fxquant.quantize_(model, EVERYTHING, (IDS, torch.randn(2, 1, 6, 6)))
    kinds = {"embed": QuantizedEmbedding, "conv": QuantizedConv2d, "head": QuantizedLinear}
    for name, (attributes, weight) in before.items():
        new: Any = model.get_submodule(name)
        assert type(new) is kinds[name]
        assert {k: v for k, v in attributes.items() if k[0] != "_"}.items() <= vars(new).items()
        assert new.weight.shape == weight.shape
        assert 0 < float((new.weight - weight).norm() / weight.norm()) < 0.1
        with pytest.raises((AttributeError, KeyError)):
            new.weight = weight
    assert model.conv.bias is None
    assert model.embed.padding_idx == 3


def test_hooks_stay_and_their_handles_remove_them() -> None:
    model, seen = Everything().eval(), []
    handles = [
        model.head.register_forward_pre_hook(lambda m, a: seen.append("before")),
        model.head.register_forward_hook(lambda m, a, k, y: seen.append("after"), with_kwargs=True),
    ]
    inputs = (IDS, torch.randn(2, 1, 6, 6))
    fxquant.quantize_(model, EVERYTHING, inputs)
    seen.clear()
    model(*inputs)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(*inputs)
    assert seen == ["before", "after"]


def test_a_cast_changes_what_weights_decode_to_and_not_their_bytes() -> None:
    model, inputs = Everything().eval(), (IDS, torch.randn(2, 1, 6, 6))
    fxquant.quantize_(model, EVERYTHING, inputs)
    scale = model.head.weight_packed.scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.head.weight_packed.scale, scale)
    assert model.head.weight.dtype == torch.bfloat16
    assert all(y.dtype == torch.bfloat16 for y in model(IDS, inputs[1].bfloat16()))


class Square(nn.Module):
    """Expert weights [experts, in, out] with in == out, which a shape does not tell from their transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.experts)


def test_square_experts_keep_their_orientation() -> None:
    model, x = Square(), torch.randn(3, 5, 8)
    compiled = fxquant.quantize_(model, "W6A16-E3M2", (x,))
    with torch.no_grad():
        assert torch.equal(model(x), compiled(x))


def test_a_weight_used_both_ways_cannot_be_written_back() -> None:
    model = BothWays()
    before = model.w.detach().clone()
    with pytest.raises(CaptureError, match="w is used as it is and transposed"):
        fxquant.quantize_(model, "W6A16-E3M2", (torch.randn(2, 16),))
    assert torch.equal(model.w, before)


def test_a_module_with_two_paths_is_replaced_at_both() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2] = model[0]
    compiled = fxquant.quantize_(model, "W6A16-E3M2", (torch.randn(2, 8),))
    assert all(isinstance(model[i], QuantizedLinear) for i in (0, 2))
    x = torch.randn(3, 8)
    assert close(model(x), compiled(x))


def test_inputs_must_be_given_where_a_model_has_none() -> None:
    with pytest.raises(CaptureError, match="give example_inputs to quantize_"):
        fxquant.quantize_(nn.Linear(4, 4))


def test_a_packed_weight_is_shown_by_its_spec() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    fxquant.quantize_(model, "MXFP4", (torch.randn(2, 8),))
    assert isinstance(model[0].weight_packed, PackedWeight)
    assert "e2m1/group32:e8m0, 4x8" in repr(model)
