"""Valid files for every loader, written by the library itself from tiny models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz_engine import read
from fuzz_mutate import Case
from tiny_models import Convolutions, Tied, mlp

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.config import RECIPES

_FP6, _FP4 = {"match": "*", "weight": "e3m2/channel"}, {"match": "*", "weight": "e2m1/group8"}
_ROUNDED = {"match": "*", "weight": "e2m1/channel", "activation": "e4m3/token"}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"rules": [_FP6]},
    {"rules": [{"match": "*", "weight": "uint4/group8", "types": ["linear", "conv", "embedding"]}]},
    {"rules": [{"match": "*", "weight": "nvfp4"}], "passes": [{"lorc": {"rank": 2, "weighting": "none"}}]},
    {"rules": [_ROUNDED], "passes": [{"pre_shift": {}}, {"fold_activation_scales": {}}]},
    {"rules": [{"match": "*", "weight": "lut(-1,1)/channel"}], "passes": [{"pb_llm": {}}]},
    {"rules": [{"match": "0", "keep": True}, _FP4], "passes": [{"rotate": {"size": 4}}]},
)


def models() -> Iterator[CompiledModel]:
    """Compiled models that differ in operators, tensors and passes."""
    torch.manual_seed(0)
    x = torch.randn(4, 20)
    for config in CONFIGS:
        yield fxquant.compile(mlp(), (x,), config, calibration=[x])
    yield fxquant.compile(Convolutions().eval(), (torch.randn(2, 3, 6, 6),), {"rules": [_FP6]})
    tokens = torch.randint(50, (2, 5))
    both = {"match": "*", "weight": "int4/group8:fp16", "types": ["linear", "embedding"]}
    yield fxquant.compile(Tied(), {"tokens": tokens}, {"rules": [both]})


def saved(folder: Path) -> list[Case]:
    """Folders that ``CompiledModel.save`` writes."""
    found = []
    for i, model in enumerate(models()):
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / str(i), overwrite=True)
        found.append(read(folder / str(i)))
        if i:
            del found[-1]["manifest.json"]  # whose checksums find every change
    return found


def journal(folder: Path) -> list[Case]:
    """The folder of an unfinished job: results of several types, facts, and what the job is."""
    from fxquant.journal import Journal

    folder.mkdir(parents=True)
    kept = Journal(folder / "out.job", JOB, start="new")
    x = torch.arange(48, dtype=torch.float32).reshape(4, 12)
    for name, value in (
        ("plain", {"a": 1, "b": [None, True, 0.5, "c"], "d": (1, 2)}),
        ("tensor", (x, x.to(torch.bfloat16).t().contiguous(), torch.zeros(0, 3))),
        ("quantized", fxquant.quantize_tensor(x, "e2m1/group4")),
        ("outer", fxquant.quantize_tensor(torch.randn(4, 32), "nvfp4")),
    ):
        kept.record(name, value)
    for i in range(3):
        kept.note(f"layer.{i}", {"seconds": 0.5 * i, "names": ["a", "b"], "at": i})
    kept.close()
    found = read(folder / "out.job")
    del found["lock"]
    return [found]


JOB = {"config": {"rules": []}, "model": {"sha256": "0" * 64}, "versions": {"torch": "2"}}
"""What the job of ``journal`` is."""


def configs(folder: Path) -> list[Case]:
    """The recipes as YAML and JSON, and one config with everything as TOML."""
    plain = [recipe.config.to_dict() for recipe in RECIPES.values()][:12] + list(CONFIGS)
    toml = (
        '[[rules]]\nmatch = "*.down"\nkeep = true\n[[rules]]\nmatch = "*"\n'
        'weight = {format = "e2m1", granularity = "group32", scale = "e8m0"}\nactivation = "e4m3/token"\n'
        "[[passes]]\ngptq = {act_order = true, damp_percent = 0.1}\n[[passes]]\nlorc = {rank = 4}\n"
    )
    return [
        *({"config.yaml": yaml.safe_dump(config).encode()} for config in plain),
        *({"config.json": json.dumps(config, indent=1).encode()} for config in plain),
        {"config.toml": toml.encode()},
    ]


def language_model(folder: Path) -> list[Case]:
    """A Hugging Face folder with its tokenizer, in one file of weights and in shards with their index."""
    from tiny_language import save_tiny, tiny_language_model, tiny_tokenizer

    save_tiny(folder / "one")
    tiny_language_model(torch.bfloat16).save_pretrained(folder / "shards", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder / "shards")
    return [read(folder / "one"), read(folder / "shards")]


def packed(folder: Path) -> list[Case]:
    """Folders of packed weights that from_pretrained reads."""
    from tiny_language import tiny_language_model, tiny_tokenizer

    import fxquant.hf

    found = []
    for i, weight in enumerate(("e3m2/channel", "nvfp4", "uint4/group16:fp16")):
        model = tiny_language_model()
        fxquant.quantize_(model, {"rules": [{"match": "*", "weight": weight}]})
        fxquant.hf.save(model, folder / str(i), tokenizer=tiny_tokenizer())
        found.append(read(folder / str(i)))
    return found


def gguf(folder: Path) -> list[Case]:
    """GGUF files of two block types."""
    from checkpoint_models import compiled, llama

    found = []
    for i, weight in enumerate(("int4/group32:fp16", "int8/group32:fp16")):
        model = llama(folder / str(i))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fxquant.export_gguf(compiled(model, weight), folder / f"{i}.gguf", model=folder / str(i), overwrite=True)
        found.append({"model.gguf": (folder / f"{i}.gguf").read_bytes()})
    return found


def onnx(folder: Path) -> list[Case]:
    """Exported files, one with its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i, model in enumerate(models()):
        if i == 4:
            continue  # sparse weights, which have no ONNX
        file = folder / str(i) / "model.onnx"
        file.parent.mkdir()
        model.export_onnx(file, external_data=i == 1)
        found.append(read(file.parent))
    return found


def data(folder: Path) -> list[Case]:
    """Inputs for ``--data``."""
    from safetensors.torch import save

    tensors = {"input": torch.randn(6, 20), "labels": torch.randint(6, (6,))}
    wide = {"input": torch.randn(3, 20)}
    return [{"data.safetensors": save(tensors)}, {"data.safetensors": save(wide)}]
