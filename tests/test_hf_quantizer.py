"""fxquant as a quantization method of transformers: what is quantized, saved and loaded gives the same bits."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError, LoadError
from fxquant.examples import example_inputs
from fxquant.modules import PackedWeight, Quantized, QuantizedLinear

hf = pytest.importorskip("transformers")

import fxquant.hf  # noqa: E402
from fxquant.hf import FxquantConfig  # noqa: E402  it registers with transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {**SMALL, "vocab_size": 64, "max_position_embeddings": 64}
IDS = torch.arange(20).reshape(2, 10)
EVERYTHING = {"rules": [{"match": "*", "weight": "e3m2/channel", "types": ["linear", "conv", "matmul", "embedding"]}]}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def llama(**settings: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, num_key_value_heads=2, **settings))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4))


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**WORDS))


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def bart() -> Any:  # its embeddings are of a class of its own, and three names share one
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    )  # fmt: skip


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5))


def wav2vec2() -> Any:  # one convolution is under weight_norm
    small = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 9}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SMALL, **small))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**WORDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )


def made(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return make().eval().to(dtype)


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def inputs_of(model: Any) -> dict[str, Tensor]:
    found = example_inputs(model)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in found.items()}


# --- there and back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "config", "dtype"),
    [
        (llama, "NVFP4", torch.bfloat16), (gpt2, EVERYTHING, torch.float32), (bart, EVERYTHING, torch.float32),
        (vit, EVERYTHING, torch.bfloat16), (mixtral, EVERYTHING, torch.bfloat16),
        (wav2vec2, EVERYTHING, torch.float32),
    ],
)  # fmt: skip
def test_a_saved_model_gives_the_same_bits(
    make: Callable[[], Any], config: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(make, dtype)
    model.save_pretrained(tmp_path / "float")
    cls = type(model)
    quantized = cls.from_pretrained(tmp_path / "float", quantization_config=FxquantConfig(config), dtype="auto")
    quantized.save_pretrained(tmp_path / "packed")
    loaded, found = cls.from_pretrained(tmp_path / "packed", dtype="auto", output_loading_info=True)
    assert not any(found.values())
    inputs = inputs_of(model)
    assert torch.equal(run(loaded, inputs), run(quantized, inputs))
    assert run(loaded, inputs).dtype == dtype
    assert not any(b.is_meta for b in loaded.buffers())
    assert not list((tmp_path / "packed").glob("*.bin"))


def test_what_is_saved_are_codes_and_a_table_of_them(tmp_path: Path) -> None:
    model = made(llama)
    fxquant.quantize_(model, "MXFP4")
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    where = "model.layers.0.mlp.up_proj"
    assert {k: (v.dtype, v.shape) for k, v in tensors.items() if k.startswith(where)} == {
        f"{where}.weight_packed.packed": (torch.uint8, (48, 16)),
        f"{where}.weight_packed.scale": (torch.uint8, (48, 1)),
    }
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fxquant"
    entry = config["weights"][f"{where}.weight"]
    assert 0.05 < entry.pop("error") < 0.2
    assert entry == {"spec": "e2m1/group32:e8m0", "shape": [48, 32]}
    assert config["config"] == fxquant.RECIPES["MXFP4"].config.to_dict()


def test_generate_gives_the_tokens_it_gave_before(tmp_path: Path) -> None:
    model = made(llama)
    fxquant.quantize_(model)
    want = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "a")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), want)
    again = tmp_path / "b"
    loaded.save_pretrained(again)  # and once more
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_no_float_weight_is_made_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4)))
    fxquant.quantize_(model)  # CLIP's own initialization reads the weights of its linears
    model.save_pretrained(tmp_path / "a")
    ops = fxquant.modules.ops
    monkeypatch.setattr(fxquant.modules, "ops", None)
    for device_map in (None, "cpu"):
        loaded = hf.CLIPVisionModel.from_pretrained(tmp_path / "a", device_map=device_map)
        assert sum(isinstance(m, Quantized) for m in loaded.modules()) == 7
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    with pytest.raises(AttributeError):
        run(loaded, pixels)
    monkeypatch.setattr(fxquant.modules, "ops", ops)
    assert torch.equal(run(loaded, pixels), run(model, pixels))


def test_a_tied_pair_is_one_packed_weight(tmp_path: Path) -> None:
    model = made(lambda: llama(tie_word_embeddings=True))
    fxquant.quantize_(model, EVERYTHING)
    model.save_pretrained(tmp_path / "a")
    assert not any("lm_head" in k for k in load_file(tmp_path / "a" / "model.safetensors"))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.lm_head.weight_packed is loaded.model.embed_tokens.weight_packed
    assert torch.equal(run(loaded, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
    loaded.tie_weights()  # transformers may be asked to tie again
    assert isinstance(loaded.lm_head, QuantizedLinear)


def test_the_body_of_a_saved_model_and_a_head_on_a_saved_body(tmp_path: Path) -> None:
    model = made(llama)
    fxquant.quantize_(model, {"rules": [{"match": "*", "weight": "e3m2/channel"}]})
    assert "lm_head.weight" in model.config.quantization_config.weights
    model.save_pretrained(tmp_path / "whole")
    body = hf.AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(run(body, {"input_ids": IDS}), run(model.model, {"input_ids": IDS}))
    body.save_pretrained(tmp_path / "body")
    assert "layers.0.mlp.up_proj.weight" in body.config.quantization_config.weights
    head = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body")
    assert torch.equal(run(head.model, {"input_ids": IDS}), run(body, {"input_ids": IDS}))


def test_a_head_alone_and_a_config_that_is_used_twice(tmp_path: Path) -> None:
    config = FxquantConfig({"rules": [{"match": "lm_head", "weight": "e3m2/channel"}]})
    made(llama).save_pretrained(tmp_path / "float")
    first, second = (
        hf.LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config) for _ in range(2)
    )
    assert config.weights is None
    assert first.config.quantization_config is not second.config.quantization_config
    assert list(first.config.quantization_config.weights) == ["lm_head.weight"]
    first.save_pretrained(tmp_path / "a")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(run(loaded, {"input_ids": IDS}), run(second, {"input_ids": IDS}))
    with pytest.raises(LoadError, match="LlamaModel holds none of the packed weights"):
        hf.AutoModel.from_pretrained(tmp_path / "a")


def test_a_part_that_was_quantized_is_saved_with_the_whole(tmp_path: Path) -> None:
    model = made(bert)
    fxquant.quantize_(model.bert)
    fxquant.hf.save(model, tmp_path / "a")
    assert all(name.startswith("bert.") for name in model.config.quantization_config.weights)
    loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / "a")
    assert type(loaded.classifier) is nn.Linear
    assert torch.equal(run(loaded, inputs_of(model)), run(model, inputs_of(model)))


def test_dequantize_gives_float_modules_with_the_values_of_the_codes(tmp_path: Path) -> None:
    for make in (lambda: llama(tie_word_embeddings=True), gpt2, mixtral):
        model = made(make)
        classes = {name: type(m) for name, m in model.named_modules()}
        fxquant.quantize_(model, EVERYTHING)
        want = run(model, {"input_ids": IDS})
        weight = model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, Quantized))).weight
        model = model.dequantize()
        assert {name: type(m) for name, m in model.named_modules()} == classes
        assert torch.allclose(run(model, {"input_ids": IDS}), want, atol=1e-5)
        assert any(p.shape == weight.shape and torch.equal(p, weight) for p in model.parameters())
        model.save_pretrained(tmp_path / "float")
        assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
        again = type(model).from_pretrained(tmp_path / "float")
        assert torch.equal(run(again, {"input_ids": IDS}), run(model, {"input_ids": IDS}))


def test_a_float16_model_keeps_in_float32_what_its_class_keeps(tmp_path: Path) -> None:
    model = made(t5)
    fxquant.quantize_(model, "W6A16-E3M2")
    model.save_pretrained(tmp_path / "a")
    loaded = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.float16)
    block = loaded.encoder.block[0].layer
    assert block[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block[0].SelfAttention.q.weight.dtype == torch.float16
    assert block[1].DenseReluDense.wo.weight_packed.scale.dtype == torch.float32


# --- methods and activations ------------------------------------------------------------------------------------------
def test_codes_of_gptq_and_factors_of_lorc_come_back(tmp_path: Path) -> None:
    model, data = made(llama), torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    config = {
        "rules": [{"match": "*", "weight": "e2m1/group16"}],
        "passes": [{"gptq": {}}, {"lorc": {"rank": 4}}],
    }
    compiled = fxquant.quantize_(model, config, calibration=data)
    model.save_pretrained(tmp_path / "a")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert any(m.factors for m in loaded.modules() if isinstance(m, PackedWeight))
    got = run(loaded, {"input_ids": IDS})
    assert torch.equal(got, run(model, {"input_ids": IDS}))
    assert torch.allclose(got, compiled(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize("activation", ["e2m1/group16", "int8/tensor"])
def test_inputs_are_rounded_as_in_the_compiled_model(activation: str, tmp_path: Path) -> None:
    model, data = made(llama), torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    config = {
        "rules": [{"match": "*", "weight": "e2m1/group16", "activation": activation}],
        "passes": [{"lorc": {"rank": 2}}],
    }
    plain = made(llama)
    fxquant.quantize_(plain, {"rules": [{"match": "*", "weight": "e2m1/group16"}]})
    compiled = fxquant.quantize_(model, config, calibration=data)
    model.save_pretrained(tmp_path / "a")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    got = run(loaded, {"input_ids": IDS})
    assert torch.equal(got, run(model, {"input_ids": IDS}))
    assert torch.allclose(got, compiled(input_ids=IDS).logits, atol=1e-4)
    assert not torch.allclose(got, run(plain, {"input_ids": IDS}), atol=1e-3)
    loaded.to(torch.bfloat16)
    assert run(loaded, {"input_ids": IDS}).dtype == torch.bfloat16


class Attention(nn.Module):
    """Its in_proj_weight is a parameter of a module that is no linear, which rounds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def test_rounded_inputs_that_modules_cannot_hold_are_refused() -> None:
    model, x = Attention().eval(), torch.randn(2, 3, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"rounds what .* reads.*use fxquant.compile, or leave activation out"):
        fxquant.quantize_(model, "W8A8-FP8", (x,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("W4A16-GPTQ", "gptq needs calibration data, which from_pretrained has not: load the float model, call "),
        ("W4A16-HIGGS", "rotate changes more of the graph .* use fxquant.compile"),
    ],
)
def test_configs_that_loading_cannot_do_are_refused_at_once(config: str, message: str, tmp_path: Path) -> None:
    made(llama).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=FxquantConfig(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = made(lambda: llama(tie_word_embeddings=True))
    config = {
        "rules": [{"match": "*", "weight": "uint4/group16", "types": ["linear", "embedding"]}],
        "passes": [{"lorc": {"rank": 2, "weighting": "none"}}],
    }
    fxquant.quantize_(model, config)
    folder = tmp_path_factory.mktemp("saved") / "good"
    model.save_pretrained(folder)
    return folder


UP = "model.layers.0.mlp.up_proj"
PACKED, SCALE, ZERO = (f"{UP}.weight_packed.{part}" for part in ("packed", "scale", "zero_point"))
Change = Callable[[dict[str, Any]], Any]


def refused(good: Path, folder: Path, *, config: Change | None = None, tensors: Change | None = None) -> str:
    """The error for ``good`` with a change to its quantization_config or its tensors."""
    shutil.copytree(good, folder)
    if config is not None:
        document = json.loads((folder / "config.json").read_text())
        config(document["quantization_config"])
        (folder / "config.json").write_text(json.dumps(document))
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError) as error:
        hf.AutoModelForCausalLM.from_pretrained(folder)
    return str(error.value)


def entry(**changes: Any) -> Change:
    """Changes of the entry of one weight; None takes a key out."""

    def change(config: dict[str, Any]) -> None:
        found = config["weights"][f"{UP}.weight"]
        found.update(changes)
        for key in [key for key, value in found.items() if value is None]:
            del found[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(spec="e3m2/group16"), f"tensor '{PACKED}' is torch.uint8 (48, 16) in the checkpoint; its spec wants"),
        (entry(spec="uint4/group32"), f"tensor '{SCALE}' is torch.float32 (48, 2) in the checkpoint; its spec wants"),
        (entry(spec="int4/group16"), f"tensor '{ZERO}' belongs to a packed weight that quantization_config does not"),
        (entry(spec="uint4/group16:fp16"), f"tensor '{SCALE}' is torch.float32 (48, 2)"),
        (entry(spec="e9m9"), f"weight '{UP}.weight': "),
        (entry(spec="uint4/token"), "which is none for weights"),
        (entry(spec=["x"]), f"the spec of weight '{UP}.weight' is a list"),
        (entry(shape=[32, 48], factors=None), "is said to be [32, 48], and LlamaForCausalLM has [48, 32] there"),
        (entry(shape=[2**30, 2**30]), "expected one to eight sizes below 2^48"),
        (entry(shape=[48, 32.5]), "expected a whole number"),
        (entry(shape=[]), f"weight '{UP}.weight' has the shape []"),
        (entry(rows=48 * 32), "has 1536 rows for [48, 32]"),
        (entry(rows=7), "has 7 rows; expected a product of its first sizes"),
        (entry(transposed=True, shape=[32, 48], factors=None), "is transposed, and Linear is otherwise"),
        (entry(transposed=1), "expected true or false"),
        (entry(activation="e4m3/channel"), "which is none for activations"),
        (entry(activation="e4m3/tensor"), f"tensor '{UP}.input_rounding.scale' of a packed weight is missing"),
        (entry(factors=[]), f"factors of [] do not make weight '{UP}.weight'"),
        (entry(pickle="x"), "has an unknown key 'pickle'"),
        (lambda c: c["weights"].pop(f"{UP}.weight"), "belongs to a packed weight that quantization_config does not"),
        (lambda c: c["weights"].update({"model.nothing.weight": {"spec": "int4", "shape": [4, 4]}}), "has no weight"),
        (lambda c: c["weights"].update({"lm_head.weight": {"same_as": "nothing"}}), "which is no packed weight"),
        (lambda c: c.pop("weights"), "has no weights: which are packed is not known"),
        (lambda c: c.update(weights=[]), "not an object with an entry for each packed weight"),
        (lambda c: c.update(version=2), "has version 2, this fxquant reads 1; upgrade fxquant"),
        (lambda c: c.update(config="/etc/passwd.yaml"), "expected a mapping with rules, or one of"),
        (lambda c: c.update(config={"rules": 3}), "quantization_config: config: rules"),
        (lambda c: c.update(code="import os"), "has an unknown key 'code'"),
    ],
)
def test_a_changed_config_is_refused(good: Path, tmp_path: Path, change: Change, message: str) -> None:
    assert message in refused(good, tmp_path / "a", config=change)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return put


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PACKED), f"tensor '{PACKED}' of a packed weight is missing from the checkpoint"),
        (lambda t: t.pop(f"{UP}.weight_packed.factors.1.scale"), "factors.1.scale' of a packed weight is missing"),
        (put(PACKED, lambda t: t[:-1]), f"tensor '{PACKED}' is torch.uint8 (47, 16)"),
        (put(PACKED, lambda t: t.view(torch.int8)), f"tensor '{PACKED}' is torch.int8"),
        (put(PACKED, lambda t: t.to(torch.int64)), f"tensor '{PACKED}' is torch.int64"),
        (put(SCALE, lambda t: t.half()), f"tensor '{SCALE}' is torch.float16"),
        (put(SCALE, lambda t: t * float("nan")), f"weight '{UP}.weight': a scale is not a positive finite number"),
        (put(SCALE, lambda t: -t), "a scale is not a positive finite number"),
        (put(ZERO, lambda t: t + 16), f"weight '{UP}.weight': a zero point is "),
    ],
)
def test_changed_tensors_are_refused(good: Path, tmp_path: Path, change: Change, message: str) -> None:
    assert message in refused(good, tmp_path / "a", tensors=change)


def test_a_truncated_file_is_refused(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError, match="is not a valid safetensors file"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_shards_are_read(good: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(good)
    model.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(run(loaded, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
