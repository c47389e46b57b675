"""Folders of compressed-tensors: the library decodes what was compiled, bit for bit; what cannot be, is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import HEAD_IN_FLOAT, compiled, llama, weight_of
from safetensors.torch import load_file
from tiny_models import Convolutions, mlp
from torch import nn

import fxquant
from fxquant.codegen.checkpoint import read
from fxquant.codegen.compressed_tensors import share_outer_scales, stored
from fxquant.errors import ExportError, ModelError, SaveError
from fxquant.export_check import check_compressed_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("models") / "source"
    return llama(folder), folder


def written(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, load_file(folder / "model.safetensors")


# --- one weight -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "inputs", "format"),
    [
        ("e4m3/channel", None, "naive-quantized"),
        ("e4m3/tensor", None, "naive-quantized"),
        ("e4m3/channel:e8m0", "e4m3/token", "float-quantized"),
        ("e4m3/tensor:fp16", "e4m3/tensor", "float-quantized"),
        ("int8/channel", "int8/token", "int-quantized"),
        ("int8/tensor:m1", "int8/tensor", "int-quantized"),
        ("int8/channel", None, "pack-quantized"),
        ("int8/tensor", None, "pack-quantized"),
        ("int8/group32:bf16", None, "pack-quantized"),
        ("int4/channel", None, "pack-quantized"),
        ("int4/group64:fp16", None, "pack-quantized"),
        ("int4/group32:m2", None, "pack-quantized"),
        ("uint4/group32", None, "pack-quantized"),
        ("uint4/channel:fp16", None, "pack-quantized"),
        ("uint8/group64:bf16", None, "pack-quantized"),
        ("mxfp4", None, "mxfp4-pack-quantized"),
        ("e2m1/group16:e4m3.ceil", None, "nvfp4-pack-quantized"),
    ],
)
def test_the_library_decodes_every_format(spec: str, inputs: str | None, format: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = weight_of(spec, inputs)
    got = stored(weight)
    scheme = QuantizationScheme.model_validate(got.scheme.group(["Linear"]))
    assert got.scheme.format == format
    decoded = BaseCompressor.get_value_from_registry(format).decompress(got.tensors, scheme)["weight"]
    assert torch.equal(decoded.float(), weight.tensor.dequantize())
    assert scheme.weights.symmetric == (weight.tensor.zero_point is None)
    if inputs is not None:
        assert scheme.input_activations.dynamic == inputs.endswith("token")


@pytest.mark.parametrize(
    ("spec", "inputs", "said"),
    [
        (
            "e3m2/channel",
            None,
            "layer is e3m2/channel, which no format.*What fits: e4m3/channel.*Recipes that fit: W8A16",
        ),
        ("int3/group32", None, "int3/group32, which no format"),
        ("e4m3none/channel", None, "e4m3none/channel, which no format"),
        ("int4/group16", None, "int4/group16, which no format"),
        ("e4m3/block32x32", None, "e4m3/block32x32, which no format"),
        ("int4/group32", "int8/token", "int4/group32 with inputs int8/token, which no format"),
        ("e4m3/channel", "e4m3/token:e8m0", "with inputs e4m3/token:e8m0, which no format"),
        ("mxfp4", "mxfp4", "with inputs e2m1/group32:e8m0, which no format"),
        ("int4/group128", None, "192 columns are not whole groups of 128.*take a group size that divides 192"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, inputs: str | None, said: str) -> None:
    with pytest.raises(ExportError, match=f"(?s){said}"):
        stored(weight_of(spec, inputs))


def test_nvfp4_whose_reciprocal_is_not_exact_is_refused() -> None:
    with pytest.raises(ExportError, match=r"(?s)would change in their last bit.*compile with e2m1/group16:e4m3\.ceil"):
        stored(weight_of("nvfp4", size=0.9))


def test_nvfp4_layers_that_are_joined_share_their_global_scale() -> None:
    weights = [weight_of("e2m1/group16:e4m3.ceil", name=n, size=s) for n, s in (("q", 1.0), ("k", 0.3), ("v", 5.0))]
    alone = weight_of("e2m1/group16:e4m3.ceil", name="o", reads="other")
    before = [*weights, alone]
    after = share_outer_scales(before)
    outer = [float(w.tensor.tensor_scale) for w in after]  # type: ignore[arg-type]
    assert outer[:3] == [max(float(w.tensor.tensor_scale) for w in weights)] * 3  # type: ignore[arg-type]
    assert outer[3] == float(alone.tensor.tensor_scale)  # type: ignore[arg-type]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.tensor.dequantize(), new.tensor.dequantize())
    with pytest.raises(ExportError, match=r"(?s)joined with other layers.*compile with mxfp4"):
        share_outer_scales([*weights, weight_of("e2m1/group16:e4m3.ceil", size=1e-6)])
    with pytest.raises(ExportError, match=r"(?s)joined with other layers.*e2m1/group16:e4m3\.ceil"):
        share_outer_scales([weight_of("nvfp4"), weight_of("nvfp4", size=3.0)])


# --- graphs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([{"lorc": {"rank": 4, "weighting": "none"}}], r"adds thin factors .*\(lorc\)"),
        ([{"rotate": {"size": 4}}], "a constant that a method added"),
        ([{"pb_llm": {}}], r"keeps single weights in more bits \(gwq, pb_llm\)"),
    ],
)
def test_methods_that_a_checkpoint_cannot_hold(passes: list[Any], said: str) -> None:
    x = torch.randn(16, 20)
    weight = "lut(-1,1)/channel" if "pb_llm" in passes[0] else "int8/channel"
    q = fxquant.compile(mlp(), (x,), {"rules": [{"match": "*", "weight": weight}], "passes": passes})
    with pytest.raises(ExportError, match=f"(?s){said}.*only gptq, zq_local, zq_global, smooth.*ONNX"):
        read(q.program)


def test_layers_that_a_checkpoint_cannot_hold() -> None:
    q = fxquant.compile(mlp(), (torch.randn(4, 20),), {"rules": [{"match": "0", "activation": "int8/token"}]})
    with pytest.raises(ExportError, match=r"0 rounds what 0 \(aten.linear\) reads"):
        read(q.program)
    q = fxquant.compile(Convolutions().eval(), (torch.randn(2, 3, 8, 8),), "W8A16-INT")
    with pytest.raises(ExportError, match=r"stem\.0 is a quantized convolution"):
        read(q.program)


# --- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_of_rounded_inputs(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    q = compiled(model, "e4m3/tensor", "e4m3/token")
    fxquant.export_compressed_tensors(q, tmp_path / "out", model=folder)
    config, _ = written(tmp_path / "out")
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    found = check_compressed_tensors(q, tmp_path / "out")
    assert found.weights == 13  # 7 packed, embedding, head, 3 norms, inv_freq
    assert found.ok
    assert found.logits_error < 1e-5


def test_layers_of_several_formats(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    rules = [
        HEAD_IN_FLOAT,
        {"match": "*.down_proj", "weight": "e4m3/channel"},
        {"match": "*.gate_proj", "weight": "mxfp4"},
        {"match": "*.up_proj", "weight": "e2m1/group16:e4m3.ceil"},
        {"match": "*.o_proj", "keep": True},
        {"match": "*", "weight": "int4/group32"},
    ]
    q = compiled(model, "", rules=rules)
    fxquant.export_compressed_tensors(q, tmp_path / "out", model=folder)
    config, _ = written(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "naive-quantized", "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized",
    }  # fmt: skip
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    found = check_compressed_tensors(q, tmp_path / "out")
    assert found.ok
    assert "13 of 13 weights read back bit for bit" in str(found)


def test_norms_are_the_program_s_own(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """smooth divides norms and multiplies weights: both are written, neither is the source's."""
    model, folder = source
    q = compiled(model, "int8/channel", "int8/token", passes=["smooth", "gptq"])
    fxquant.export_compressed_tensors(q, tmp_path / "out", model=folder)
    _, tensors = written(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors[norm], model.get_parameter(norm))
    found = check_compressed_tensors(q, tmp_path / "out")
    assert found.ok
    assert found.logits_error > 1e-5  # the library divides a token's maximum by 127.5, not 127


def test_tied_embeddings_and_a_narrower_dtype(tmp_path: Path) -> None:
    model = llama(tmp_path / "source", tie_word_embeddings=True)
    said = tmp_path / "source" / "config.json"
    said.write_text(said.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    for value in model.parameters():
        value.data = value.data.bfloat16().float()
    q = compiled(model, "", rules=[{"match": "*", "weight": "e4m3/channel"}])
    fxquant.export_compressed_tensors(q, tmp_path / "out", model=tmp_path / "source")
    config, tensors = written(tmp_path / "out")
    assert config["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert check_compressed_tensors(q, tmp_path / "out").ok
    other = fxquant.compile(mlp(), (torch.randn(2, 20),), "W8A16-FP8")
    with pytest.raises(ExportError, match=r"no weight model\.embed_tokens"):
        fxquant.export_compressed_tensors(other, tmp_path / "other", model=tmp_path / "source")


@pytest.mark.slow
def test_a_decoder_with_a_cache(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    from fxquant.hf import with_cache

    model, folder = source
    cached = with_cache(model)
    config: dict[str, Any] = {"rules": [HEAD_IN_FLOAT, {"match": "*", "weight": "e4m3/channel"}]}
    q = fxquant.compile(cached, cached.example_inputs(), config)
    fxquant.export_compressed_tensors(q, tmp_path / "out", model=folder)
    assert check_compressed_tensors(q, tmp_path / "out").ok
    spec = {"quantize_kv_cache": {"key": "int8/token", "value": "int8/token"}}
    q = fxquant.compile(cached, cached.example_inputs(), {**config, "passes": [spec]})
    with pytest.raises(ExportError, match="quantizes the KV cache"):
        fxquant.export_compressed_tensors(q, tmp_path / "other", model=folder)


def test_shards_places_and_models(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    q, out = compiled(model, "e4m3/channel"), tmp_path / "out"
    (folder / "tokenizer_config.json").write_text("{}")
    fxquant.export_compressed_tensors(q, out, model=folder, max_shard_bytes=40_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert check_compressed_tensors(q, out).ok
    with pytest.raises(SaveError, match=r"exists already.*--overwrite"):
        fxquant.export_compressed_tensors(q, out, model=folder)
    fxquant.export_compressed_tensors(q, out, model=folder, overwrite=True)
    assert not list(out.glob("model-*-of-*.safetensors"))
    with pytest.raises(SaveError, match="not a folder of compressed-tensors"):
        fxquant.export_compressed_tensors(q, folder, model=folder, overwrite=True)
    assert (folder / "model.safetensors").is_file()
    (folder / "tokenizer_config.json").unlink()
    llama(tmp_path / "deeper", num_hidden_layers=2)
    with pytest.raises(ExportError, match=r"(?s)no weight model\.layers\.1.*give the folder of the model that was"):
        fxquant.export_compressed_tensors(q, tmp_path / "other", model=tmp_path / "deeper")
    with pytest.raises(ModelError, match=r"has no config\.json.*--model MODEL"):
        fxquant.export_compressed_tensors(q, tmp_path / "other", model=tmp_path)
    with pytest.raises(ModelError, match="a quantized model itself"):
        fxquant.export_compressed_tensors(q, tmp_path / "other", model=out)
