"""``export_gguf``: a compiled Llama as a GGUF file, in block types that hold its weights exactly."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant import files, outputs
from fxquant.checkpoints import transformers
from fxquant.codegen.checkpoint import complete, read
from fxquant.codegen.ggml import blocks
from fxquant.compiled import CompiledModel
from fxquant.errors import ExportError, ModelError, SaveError
from fxquant.export_folder import empty_model, model_config, narrowest, parameter_names, source_config
from fxquant.gguf_header import check_gguf
from fxquant.program import Progress, quiet


def export_gguf(
    compiled: CompiledModel, path: str | Path, *, model: str | Path, overwrite: bool = False,
    progress: Progress = quiet,
) -> None:  # fmt: skip
    """Write the GGUF file ``path`` of a compiled Llama: its own codes and scales, in blocks of 32.

    ``model`` is what was compiled, a Hugging Face folder or a GGUF file: the metadata and the tokenizer are its.
    Tensors in float are written as BF16 or F16 where that is exact, else as F32.

    Raises ExportError for what no block type holds exactly, naming the layer, its spec and what fits, and for
    architectures other than Llama; ModelError for a ``model`` that cannot be read; SaveError for a file that exists.
    """
    gguf = _package()
    source, target = Path(model), Path(os.path.abspath(path))
    if os.path.lexists(target) and not overwrite:
        raise SaveError(f"{target} exists already; choose another file, or pass overwrite (--overwrite)")
    if not target.parent.is_dir():
        raise SaveError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    progress("read the graph", 0, 0)
    if source.is_file():
        config = _config_in_gguf(source)
    else:
        source_config(source)
        config = model_config(source)
    _check_architecture(config)
    tensors = _tensors(gguf, compiled, config, progress)
    progress("write", 0, 0)
    try:
        with outputs.replacing(target) as temporary:
            writer = gguf.GGUFWriter(temporary, "llama")
            if source.is_file():
                _copy_fields(gguf, writer, source)
            else:
                _add_fields(writer, config, source)
                add_tokenizer(gguf, writer, source, config.vocab_size)
            _write(gguf, writer, tensors)
    except OSError as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another file") from error


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ExportError(f"writing GGUF needs the package gguf ({error}); run: pip install 'fxquant[hf]'") from error
    return gguf  # type: ignore[no-any-return]


def _config_in_gguf(source: Path) -> Any:
    check_gguf(source, _package().GGML_QUANT_SIZES)
    try:
        return transformers().AutoConfig.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:  # transformers and gguf raise many types
        raise ModelError(f"{source} cannot be read as GGUF: {type(error).__name__}: {str(error)[:200]}") from error


def _check_architecture(config: Any) -> None:
    if config.model_type != "llama":
        raise ExportError(f"GGUF is written for Llama models, and this is a {config.model_type}\n"
                          f"What to do: export to compressed-tensors or ONNX")  # fmt: skip
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ExportError(f"rotary embeddings of type {rope['rope_type']} are not written to GGUF; only the default is")
    if config.hidden_act != "silu":
        raise ExportError(f"the activation is {config.hidden_act}; the llama architecture of GGUF has silu")


# --- tensors ----------------------------------------------------------------------------------------------------------
def _tensors(
    gguf: ModuleType, compiled: CompiledModel, config: Any, progress: Progress
) -> list[tuple[str, str, Tensor]]:
    """Name, type and bytes of every tensor of the file."""
    packed, floats = complete(read(compiled.program), parameter_names(empty_model(config)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = []
    for done, name in enumerate([*packed, *floats]):
        progress("repack weights", done, len(packed) + len(floats))
        path, _, leaf = name.rpartition(".")
        kind, data = blocks(packed[name]) if name in packed else _plain(floats[name])
        if order := _row_order(path, config):
            data = data[order]
        found.append((f"{names.get_name(path)}.{leaf}", kind, data.contiguous()))
    return found


def _plain(value: Tensor) -> tuple[str, Tensor]:
    """Vectors in F32; matrices in two bytes a value where that is exact."""
    value = value.detach().float()
    if value.dim() == 1:
        return "F32", value
    for kind, dtype in (("BF16", "bfloat16"), ("F16", "float16")):
        if (found := narrowest([value], dtype)) != torch.float32:
            return kind, value.to(found)
    return "F32", value


def _row_order(path: str, config: Any) -> list[int] | None:
    """The rows of q and k as llama.cpp rotates them: pairs side by side, not half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rpartition(".")[2])
    if heads is None:
        return None
    rows = torch.arange(heads * config.head_dim).reshape(heads, 2, -1)
    return rows.transpose(1, 2).flatten().tolist()


def _write(gguf: ModuleType, writer: Any, tensors: list[tuple[str, str, Tensor]]) -> None:
    counts = Counter[str]()
    for _, kind, data in tensors:
        counts[kind] += data.nbytes
    main = max((k for k in counts if k not in ("F32", "F16", "BF16")), key=lambda k: counts[k], default="F32")
    types = {"MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE, "F32": gguf.LlamaFileType.ALL_F32}
    writer.add_file_type(types[main] if main in types else gguf.LlamaFileType[f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, kind, data in tensors:
        if kind == "F32":
            writer.add_tensor(name, data.numpy())
        else:
            array: np.ndarray[Any, Any] = data.view(torch.uint8).numpy()
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- metadata ---------------------------------------------------------------------------------------------------------
_OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "split.")


def _copy_fields(gguf: ModuleType, writer: Any, source: Path) -> None:
    """The metadata of the GGUF file that was compiled, tokenizer included."""
    for name, field in gguf.GGUFReader(source).fields.items():
        if not name.startswith(_OWN):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _add_fields(writer: Any, config: Any, source: Path) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(source.resolve().name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(config.vocab_size)


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splitting(before: Any) -> str | None:
    """llama.cpp's name for a byte-level tokenizer's way to split text into words; None for one it is not known of."""
    steps = before.get("pretokenizers", [before]) if isinstance(before, dict) else []
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own and steps[0].get("behavior") == "Isolated":
        return {
            _LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
        }.get(steps[0].get("pattern", {}).get("Regex"))  # fmt: skip
    return None


def add_tokenizer(gguf: ModuleType, writer: Any, source: Path, size: int) -> None:
    """The byte-level BPE tokenizer of ``source``; a warning, and none in the file, where it has another or none."""
    try:
        words = files.read_json(source / "tokenizer.json", 1 << 26)
    except (OSError, ValueError):
        words = {}
    try:
        kind, splitting = words.get("model", {}).get("type"), _splitting(words.get("pre_tokenizer"))
    except (AttributeError, TypeError):  # of another kind than any tokenizer
        kind = splitting = None
    if kind != "BPE" or splitting is None:
        warnings.warn(
            f"{source} has no tokenizer.json of a byte-level BPE whose way to split words llama.cpp knows (gpt-2, "
            f"smollm, llama-bpe, qwen2), so the file has no tokenizer; give the tokenizer to what runs it",
            stacklevel=3,
        )
        writer.add_tokenizer_model("none")
        return
    tokens, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    try:
        for token, i in words["model"]["vocab"].items():
            tokens[i], types[i] = token, gguf.TokenType.NORMAL
        for added in words.get("added_tokens", ()):
            special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], special
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{source / 'tokenizer.json'} is not a tokenizer of {size} tokens: {type(error).__name__}: "
                         f"{str(error)[:100]}; fetch it again, from the same model") from None  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(source, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
