"""GGUF files: gguf and transformers read back what was compiled, bit for bit; what no block type holds is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import compiled, llama, weight_of
from torch import nn

import fxquant
from fxquant.codegen.ggml import TYPES, blocks
from fxquant.errors import ExportError, ModelError, SaveError
from fxquant.export_check import check_gguf
from fxquant.hf import load_model

gguf = pytest.importorskip("gguf")


def decoded(kind: str, data: torch.Tensor) -> torch.Tensor:
    values = gguf.quants.dequantize(data.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(values))


# --- one weight -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("int8/group32:fp16", "Q8_0"), ("int8/channel:fp16", "Q8_0"), ("int8/tensor:fp16", "Q8_0"),
        ("int8/group64:e8m0", "Q8_0"), ("int5/group32:fp16", "Q5_0"), ("int4/group32:fp16", "Q4_0"),
        ("int4/block16x64:fp16", "Q4_0"), ("mxfp4", "MXFP4"), ("e2m1/group96:e8m0", "MXFP4"),
    ],
)  # fmt: skip
def test_gguf_decodes_every_block_type(spec: str, kind: str) -> None:
    weight = weight_of(spec)
    got, data = blocks(weight)
    assert got == kind
    assert torch.equal(decoded(got, data), weight.tensor.dequantize())


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "MXFP4"])
def test_every_code_of_a_block_type(kind: str) -> None:
    """Codes that rounding never chooses, such as -8, too."""
    spec = {"Q8_0": "int8/group32:fp16", "Q5_0": "int5/group32:fp16", "Q4_0": "int4/group32:fp16", "MXFP4": "mxfp4"}[
        kind
    ]
    weight = weight_of(spec)
    q = weight.tensor
    codes = (torch.arange(q.codes.numel()) % 2**q.spec.format.bits).to(torch.uint8).reshape(q.codes.shape)
    weight = replace(weight, tensor=replace(q, codes=codes))
    assert torch.equal(decoded(*blocks(weight)), weight.tensor.dequantize())


def test_q4_1_where_the_lowest_value_is_a_float16() -> None:
    weight = weight_of("uint4/group32:fp16")
    with pytest.raises(ExportError, match=r"Q4_1 cannot hold its scales exactly: .* more digits than that"):
        blocks(weight)
    short = weight.tensor.scale.view(torch.int16) & ~0xF  # 7 digits of 11: times a zero point of 4 it stays exact
    weight = replace(weight, tensor=replace(weight.tensor, scale=short.view(torch.float16)))
    kind, data = blocks(weight)
    assert kind == "Q4_1"
    assert torch.equal(decoded(kind, data), weight.tensor.dequantize())


@pytest.mark.parametrize(
    ("spec", "inputs", "said"),
    [
        (
            "int4/group32",
            None,
            "and Q4_0 cannot hold its scales exactly: it stores float16.*group32:fp16",
        ),
        ("e2m1/group32", None, "MXFP4 cannot hold its scales exactly: it stores E8M0"),
        ("e3m2/channel", None, "no block type of GGUF holds e3m2.*recipe MXFP4"),
        ("int4/group16:fp16", None, "192 columns in groups of 16; blocks of GGUF have 32"),
        ("int8/group32:fp16", "int8/token", "does not say that inputs are rounded.*compile without activation"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, inputs: str | None, said: str) -> None:
    with pytest.raises(ExportError, match=f"(?s)layer is {spec}.*{said}"):
        blocks(weight_of(spec, inputs))


def test_every_type_is_in_the_package() -> None:
    assert all(hasattr(gguf.GGMLQuantizationType, kind.name) for kind in TYPES)


# --- files ------------------------------------------------------------------------------------------------------------
def byte_tokenizer(folder: Path, size: int = 64) -> None:
    """A byte-level BPE of ``size`` tokens as SmolLM has it, whose last token is one of control."""
    letters = [chr(c) for c in range(33, 33 + size - 2)]
    words = {
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False},
        ]},
        "added_tokens": [{"id": size - 2, "content": "<end>", "special": True}],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": "hello"}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("models") / "source"
    model = llama(folder)
    byte_tokenizer(folder)
    return model, folder


RULES: list[dict[str, Any]] = [
    {"match": "*.q_proj", "weight": "int4/group32:fp16"},
    {"match": "*.v_proj", "keep": True},
    {"match": "*.mlp.*", "weight": "mxfp4"},
    {"match": "*", "weight": "int8/group32:fp16", "types": ["linear", "embedding"]},
]


def test_a_llama_in_several_types(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    q, path = compiled(model, "", rules=RULES), tmp_path / "model.gguf"
    fxquant.export_gguf(q, path, model=folder)
    found = check_gguf(q, path)
    assert found.ok
    assert not found.different
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.0.attn_v.weight"] == "F32"
    assert types["blk.0.ffn_up.weight"] == "MXFP4"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"


def test_metadata_and_tokenizer(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    q, path = compiled(model, "", rules=RULES), tmp_path / "model.gguf"
    fxquant.export_gguf(q, path, model=folder)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 64
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert fields["tokenizer.ggml.tokens"][:2] == ["!", '"']
    assert fields["tokenizer.ggml.tokens"][62:] == ["<end>", "[PAD63]"]
    assert fields["tokenizer.ggml.token_type"][61:] == [1, 3, 5]
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"] == 62
    assert fields["tokenizer.chat_template"] == "hello"
    with pytest.raises(SaveError, match=r"exists already.*--overwrite"):
        fxquant.export_gguf(q, path, model=folder)
    # from that file: its metadata are copied, but for what belongs to the weights
    again = tmp_path / "again.gguf"
    fxquant.export_gguf(q, again, model=path)
    assert {n: f.contents() for n, f in gguf.GGUFReader(again).fields.items()} == fields
    assert check_gguf(q, again).ok


def test_tied_and_exact_in_bfloat16_and_no_tokenizer(tmp_path: Path) -> None:
    model = llama(tmp_path / "source", tie_word_embeddings=True)
    for value in model.parameters():
        value.data = value.data.bfloat16().float()
    q, path = compiled(model, "", rules=[{"match": "*", "weight": "int8/group32:fp16"}]), tmp_path / "model.gguf"
    with pytest.warns(UserWarning, match="the file has no tokenizer"):
        fxquant.export_gguf(q, path, model=tmp_path / "source")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == "BF16"
    assert "output.weight" not in types
    assert types["output_norm.weight"] == "F32"
    assert check_gguf(q, path).ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer
        again = load_model(path)  # fxquant's own reader
    assert again.quantized == "GGUF Q8_0"
    with torch.no_grad():
        ids = torch.randint(0, 64, (2, 12))
        assert torch.allclose(again.model(ids).logits, q(input_ids=ids)["logits"], rtol=1e-4, atol=1e-5)


def test_models_that_are_refused(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    q = compiled(source[0], "", rules=RULES)
    config = json.loads((source[1] / "config.json").read_text())
    for change, said in [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "for Llama models, and this is a qwen2"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "of type linear are not written",
        ),
        ({"hidden_act": "gelu"}, "the activation is gelu"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match=said):
            fxquant.export_gguf(q, tmp_path / "model.gguf", model=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        fxquant.export_gguf(q, tmp_path / "model.gguf", model=tmp_path)
    assert not list(tmp_path.iterdir())
