"""``export_compressed_tensors``: a compiled model as a Hugging Face folder that vLLM serves and transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fxquant import claims, files, outputs
from fxquant.checkpoints import transformers
from fxquant.codegen.checkpoint import complete, read
from fxquant.codegen.compressed_tensors import Scheme, share_outer_scales, stored
from fxquant.compiled import CompiledModel
from fxquant.errors import ExportError, ModelError, SaveError
from fxquant.program import Progress, quiet

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
"""Files of the source model that go along, where they are there."""
_METHOD = "compressed-tensors"


def export_compressed_tensors(
    compiled: CompiledModel, directory: str | Path, *, model: str | Path, overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9, progress: Progress = quiet,
) -> None:  # fmt: skip
    """Write the folder ``directory`` in the format of compressed-tensors: codes and scales as they are, repacked.

    ``model`` is the Hugging Face folder that was compiled: its config.json (with a ``quantization_config``), tokenizer
    and generation config go along. Norms, embeddings and layers in float are the compiled program's own, in the dtype
    that the config names where it holds every one of them exactly, else in float32.

    Raises ExportError for what the format cannot hold bit for bit, naming the layer, its spec and what fits;
    ModelError for a ``model`` that is no such folder; SaveError for a ``directory`` that cannot be written.
    """
    source, target = Path(model), Path(os.path.abspath(directory))
    config = source_config(source)
    _check_target(target, overwrite)
    progress("read the graph", 0, 0)
    skeleton = empty_model(model_config(source))
    packed, floats = complete(read(compiled.program), parameter_names(skeleton))
    if not packed:
        raise ExportError("the compiled model has no quantized weight; there is nothing to write but the source folder")
    schemes: dict[str, Scheme] = {}
    tensors: dict[str, Tensor] = {}
    for done, weight in enumerate(share_outer_scales(packed.values())):
        progress("repack weights", done, len(packed))
        written = stored(weight)
        schemes[weight.layer] = written.scheme
        tensors |= {f"{weight.layer}.{name}": value for name, value in written.tensors.items()}
    dtype = narrowest(floats.values(), str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    tensors |= {name: value.to(dtype).contiguous() for name, value in floats.items()}
    config["quantization_config"] = quantization_config(schemes, skeleton)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    progress("write", 0, 0)
    _write(target, source, config, tensors, max_shard_bytes, overwrite=overwrite)


# --- the source model -------------------------------------------------------------------------------------------------
def source_config(source: Path) -> dict[str, Any]:
    """The config.json of the folder that was compiled. ModelError where there is none, or of a quantized model."""
    if not (source / "config.json").is_file():
        raise ModelError(
            f"{source} has no config.json; give the Hugging Face folder that was compiled, whose architecture and "
            f"tokenizer the export needs: --model MODEL (model=... in Python)"
        )
    config = claims.read_config(source)
    if "quantization_config" in config:
        raise ModelError(f"{source} is a quantized model itself; give the float model that was compiled")
    return config


def model_config(source: Path) -> Any:
    """The transformers config of a folder, whose other files are checked too: some of them go along."""
    hf = transformers()
    claims.check_folder(source)
    claims.check_tokenizer(source)
    try:
        return hf.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        raise _no_model(source, hf.__version__, error) from error


def empty_model(config: Any) -> nn.Module:
    """The model of a transformers config, without values."""
    hf = transformers()
    try:
        cls: Any = getattr(hf, str((config.architectures or ["AutoModelForCausalLM"])[0]))
        make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
        with torch.device("meta"):
            return make(config)  # type: ignore[no-any-return]
    except Exception as error:
        raise _no_model(config.name_or_path, hf.__version__, error) from error


def _no_model(source: Any, version: str, error: Exception) -> ModelError:
    return ModelError(f"the config.json of {source} makes no model in transformers {version}: "
                      f"{type(error).__name__}: {str(error)[:200]}")  # fmt: skip


def parameter_names(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of every parameter and saved buffer; a tied one has several."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return [tuple(names) for names in groups.values()]


def narrowest(values: Any, wanted: str) -> torch.dtype:
    """The dtype called ``wanted`` where it holds all of ``values`` exactly, else float32."""
    dtype = getattr(torch, wanted, torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return torch.float32
    return dtype if all(torch.equal(v.to(dtype).to(v.dtype), v) for v in values) else torch.float32


# --- what is written --------------------------------------------------------------------------------------------------
def quantization_config(schemes: Mapping[str, Scheme], model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: a group for every scheme, layers that stay in float to be ignored."""
    groups: list[tuple[Scheme, list[str]]] = []
    for layer, scheme in schemes.items():
        same = next((layers for other, layers in groups if other == scheme), None)
        if same is None:
            groups.append((scheme, same := []))
        same.append(layer)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = {scheme.format for scheme, _ in groups}
    return {
        "quant_method": _METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme.group(["Linear"] if len(groups) == 1 else layers)
            for i, (scheme, layers) in enumerate(groups)
        },
        "ignore": [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise SaveError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise SaveError(f"{target} exists already; choose another folder, or pass overwrite (--overwrite)")
    method, why = None, ""
    try:
        method = files.read_json(target / "config.json")["quantization_config"]["quant_method"]
    except OSError as error:
        why = f" (config.json cannot be read: {error})"
    except (ValueError, KeyError, TypeError):
        pass
    if method != _METHOD or target.is_symlink():
        raise SaveError(
            f"{target} is not a folder of compressed-tensors, so it is not overwritten; choose another{why}"
        )


def _write(
    target: Path, source: Path, config: dict[str, Any], tensors: dict[str, Tensor], most: int, *, overwrite: bool
) -> None:
    """The whole folder, beside its place first and then moved into it."""
    try:
        with outputs.replacing_folder(target, overwrite=overwrite) as folder:
            write_shards(folder, tensors, most)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in COPIED:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error


def write_shards(folder: Path, tensors: Mapping[str, Tensor], most: int) -> None:
    """``model.safetensors``, or several files of at most ``most`` bytes (or one tensor) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, value in tensors.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = value
        room -= value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
