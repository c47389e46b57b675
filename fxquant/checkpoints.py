"""Models from disk: a Hugging Face folder with safetensors, or a GGUF file, as a float module with example inputs.

Everything is read from the given path: no network, no pickle, no code that came with the model. Needs the ``hf`` extra.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxquant import claims
from fxquant.downloads import check_complete
from fxquant.errors import FxquantError, LoadError, ModelError
from fxquant.examples import example_inputs
from fxquant.files import shown
from fxquant.gguf_header import check_gguf
from fxquant.headers import folder_tensors
from fxquant.kv_cache import CachedDecoder, with_cache
from fxquant.lazy import FromFile, real
from fxquant.memory import limited, ran_out
from fxquant.program import Progress, quiet


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and fp32, and what it takes to compile it.

    ``example_inputs`` are keyword tensors that suit the architecture. ``quantized`` says how the source was quantized
    before (``"GGUF Q4_1"``), None for float weights: such a model is the float form of a quantized grid, and accuracy
    measured against it flatters formats that lie on the same grid. ``dtype`` is what the floats of the source were.
    """

    model: nn.Module
    tokenizer: Any | None
    example_inputs: dict[str, Tensor]
    name: str
    quantized: str | None = None
    dtype: torch.dtype = torch.float32


@limited("load the model")
def load_model(
    path: str | Path, *, kv_cache: bool = False, lazy: bool = False, progress: Progress = quiet
) -> LoadedModel:
    """The model at ``path``: a folder with config.json and safetensors, or a ``.gguf`` file.

    ``kv_cache``: a decoder with its keys and values as inputs and outputs, as ``with_cache`` makes it. ``lazy``: its
    weights stay in the folder's files and are read, cast to fp32, when they are needed (``fxquant.lazy``).
    Raises ModelError for anything else, with a word on how to convert it.
    """
    path = Path(path)
    check_path(path)
    if lazy and path.is_file():
        raise ModelError(f"{path} is a GGUF file, whose weights are decoded in memory; only folders of safetensors can "
                         f"be streamed")  # fmt: skip
    hf = transformers()
    progress("load model", 0, 3)
    with no_bars(hf):
        model, quantized = _from_gguf(hf, path) if path.is_file() else (_from_folder(hf, path, lazy), None)
        dtype = torch.float32 if path.is_file() else _stored_dtype(_config(path))
        progress("load tokenizer", 1, 3)
        tokenizer = _tokenizer(hf, path)
    progress("make example inputs", 2, 3)
    model = with_cache(model.eval()) if kv_cache else model.eval()
    inputs = model.example_inputs() if isinstance(model, CachedDecoder) else example_inputs(model)
    inputs = of_text(inputs, tokenizer)
    _check_words(path, model, inputs)
    progress("load model", 3, 3)
    return LoadedModel(model, tokenizer, inputs, path.stem if path.is_file() else path.resolve().name, quantized, dtype)


TEXT = (
    "The river had been rising since the morning, and by noon the lower fields were under water. Nobody in the village "
    "was surprised: it had rained for nine days, and the old people said that it would rain for nine more. "
)
"""What example inputs of a language model say; errors on tokens that are no text say little of text."""


def of_text(inputs: dict[str, Tensor], tokenizer: Any | None) -> dict[str, Tensor]:
    """The example inputs with a text in the place of made-up token ids, where there is a tokenizer."""
    ids = inputs.get("input_ids")
    if tokenizer is None or ids is None or not ids.numel():
        return inputs
    try:
        words = list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    except Exception:  # a tokenizer of another kind, which takes no plain text
        return inputs
    words = words * (ids.numel() // max(1, len(words)) + 1)
    text = torch.tensor(words[: ids.numel()]).reshape(ids.shape).to(ids) if words else ids
    return {**inputs, "input_ids": text}


def _check_words(path: Path, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raise ModelError where the tokenizer gives tokens that the model does not have."""
    config: Any = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    ids = inputs.get("input_ids")
    if isinstance(known, int) and ids is not None and ids.numel() and int(ids.max()) >= known:
        raise ModelError(f"the tokenizer of {path} gives token {int(ids.max())}, and the model has {known} tokens; "
                         f"fetch both again, from one model")  # fmt: skip


def load_packed(path: str | Path, *, progress: Progress = quiet) -> tuple[Any, Any | None]:
    """The transformers model on packed weights in a folder that ``save_pretrained`` wrote, and its tokenizer.

    In eval mode; what is not packed is in fp32. ModelError for another folder, LoadError for one that was changed.
    """
    path = Path(path)
    check_path(path)
    hf = transformers()
    if not is_packed(path):
        raise ModelError(f"{path} holds no weights that fxquant packed; {_KINDS}: fxquant compile takes those")
    from fxquant import hf_quantizer  # noqa: F401  it registers with transformers

    progress("load model", 0, 2)
    with no_bars(hf):
        try:
            folder_tensors(path)
        except ModelError as error:
            raise LoadError(str(error)) from None
        model = _loaded(hf, path, _config(path))
        progress("load tokenizer", 1, 2)
        tokenizer = _tokenizer(hf, path)
    progress("load model", 2, 2)
    return model.eval(), tokenizer


def empty_model(path: str | Path) -> nn.Module | None:
    """The model at ``path`` in eval mode and fp32, its parameters on the meta device: no weights are read.

    None for a GGUF file whose header does not say which model it is. Raises ModelError as ``load_model`` does.
    """
    path = Path(path)
    check_path(path)
    hf = transformers()
    if path.is_file():
        with _parsing(path):
            header, config = _gguf_header(path)
            return None if config is None else _gguf_empty(hf, header, config).eval()
    return _empty(hf, path, _float_config(path), _count(path))


def _count(path: Path) -> int:
    """How many tensors the folder's weights are; of weights that cannot be read, the most that a model has."""
    try:
        return len(folder_tensors(path))
    except ModelError:
        return claims.MOST_TENSORS


def _empty(hf: ModuleType, path: Path, config: dict[str, Any], stored: int) -> nn.Module:
    """The model of a folder's config, without values. ModelError for one that ``stored`` tensors cannot fill."""
    cls = _model_class(hf, path, config)
    with claims.building(path, stored), torch.device("meta"):
        made = hf.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        build = getattr(cls, "_from_config", None) or cls.from_config  # AutoModel has the latter
        model: nn.Module = build(made, dtype=torch.float32).eval()
    claims.check_names(path, model)
    return model


def is_packed(path: str | Path) -> bool:
    """Whether it is a Hugging Face folder whose weights fxquant packed."""
    try:
        method = _config(Path(path)).get("quantization_config")
    except ModelError:
        return False
    return isinstance(method, dict) and method.get("quant_method") == "fxquant"


def transformers() -> ModuleType:
    """The transformers package; ModelError with the command that installs it where it is missing."""
    try:
        import transformers as package
    except ImportError as error:
        raise ModelError(
            f"reading a model from disk needs transformers, which is not installed ({error}); "
            f"run: pip install 'fxquant[hf]'"
        ) from error
    return package  # type: ignore[no-any-return]


@contextmanager
def no_bars(hf: ModuleType) -> Iterator[None]:
    """transformers' own progress bars off, restored afterwards: progress goes to the caller's Progress."""
    logging = hf.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- what a path is ---------------------------------------------------------------------------------------------------
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TO_SAFETENSORS = (
    "where you trust the file, convert it once: load it with torch.load into the model's own class and call "
    "model.save_pretrained(FOLDER), which writes config.json and model.safetensors; then give FOLDER"
)
_KINDS = "expected a Hugging Face folder (config.json and *.safetensors) or a .gguf file"


def check_path(path: Path) -> None:
    """ModelError unless ``path`` is a ``.gguf`` file or a folder with config.json and safetensors."""
    if not path.exists():
        raise ModelError(f"{path} does not exist; {_KINDS} on this machine (a model's hub name is not looked up; "
                         f"hf download NAME --local-dir FOLDER fetches one)")  # fmt: skip
    if path.is_file():
        _check_file(path)
        check_complete(path)
    elif (path / "graph.json").exists():
        raise ModelError(f"{path} is a model that fxquant compiled already (fxquant inspect shows it, fxquant.load "
                         f"reads it); give the float model that it was compiled from")  # fmt: skip
    elif not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; {_KINDS}{_inside(path)}")
    else:
        check_complete(path)
        _check_weights(path)


def _check_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        pickles = sorted(f.name for suffix in _PICKLES for f in path.glob(f"*{suffix}"))
        if pickles:
            raise ModelError(f"{path} holds pickled weights ({', '.join(pickles)}), which may run code when read and "
                             f"are refused; {_TO_SAFETENSORS}")  # fmt: skip
        raise ModelError(f"{path} has a config.json and no weights; expected model.safetensors next to it")


def _check_file(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return
    if suffix == ".pt2":
        raise ModelError(
            f"{path} is a saved ExportedProgram, whose loader may run code from the file; load it yourself where you "
            f"trust it and give the object: fxquant.compile(torch.export.load({path.name!r}), config=...)"
        )
    if suffix in _PICKLES:
        raise ModelError(f"{path} is a pickle, which may run code when read, and is refused; {_TO_SAFETENSORS}")
    hint = "give the folder it lies in, with its config.json" if suffix == ".safetensors" else _KINDS
    raise ModelError(f"{path} is not a model that can be read; {hint}")


def _inside(path: Path) -> str:
    """`` (found in it: 'a.gguf')`` for the GGUF files and model folders one level down, or an empty string."""
    found = sorted([*path.glob("*.gguf"), *(f.parent for f in path.glob("*/config.json"))])
    return f" (found in it: {', '.join(repr(f.name) for f in found[:3])})" if found else ""


# --- Hugging Face folders ---------------------------------------------------------------------------------------------
def _config(path: Path) -> dict[str, Any]:
    """What config.json in the folder says; ModelError where it cannot be read."""
    return claims.read_config(path)


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """What a config says its weights are; float32 where it does not."""
    names = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return names.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)


def _float_config(path: Path) -> dict[str, Any]:
    """config.json of a float model; ModelError where it cannot be read, or is that of a quantized one."""
    config = _config(path)
    if is_packed(path):
        raise ModelError(
            f"{path} was quantized by fxquant already; start from the float model it was made from. It runs as it is, "
            f"in fxquant eval, in fxquant generate, and in Python after import fxquant.hf: from_pretrained(FOLDER)"
        )
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(f"{path} is already quantized ({kind}); start from the float model it was made from")
    return config


def _from_folder(hf: ModuleType, path: Path, lazy: bool) -> nn.Module:
    return _loaded(hf, path, _float_config(path), lazy)


def _loaded(hf: ModuleType, path: Path, config: dict[str, Any], lazy: bool = False) -> nn.Module:
    """The model of the class that the config names, in fp32; nothing of it may be missing."""
    cls = _model_class(hf, path, config)
    claims.check_folder(path)
    stored = folder_tensors(path)
    empty = _empty(hf, path, config, len(stored))
    claims.check_weights(path, empty, stored, packed=is_packed(path), in_memory=not lazy)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    source: Path | None = path
    try:
        if lazy:
            cls, source = type(empty), None
            state = {name: FromFile(t.file, t.begin, t.dtype, t.shape).lazy() for name, t in stored.items()}
            made = hf.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            options = {"state_dict": state, "config": made}
        model, loaded = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except FxquantError:
        raise
    except Exception as error:  # transformers, safetensors and huggingface_hub raise many types here
        if ran_out(error):
            raise
        raise ModelError(f"{path} cannot be loaded as {cls.__name__}: {_first_line(error)}; fetch its files again, or "
                         f"mend config.json") from error  # fmt: skip
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(missing)} weights of {cls.__name__}, such as {missing[0]!r}, which would be random; "
            f"fetch all of its *.safetensors files, or name the class that was saved in config.json's architectures"
        )
    for module in model.modules():  # what is traced may look at buffers
        module._buffers.update({name: real(value) for name, value in module._buffers.items()})
    return model  # type: ignore[no-any-return]


def _model_class(hf: ModuleType, path: Path, config: dict[str, Any]) -> Any:
    """The class named in ``architectures``; AutoModel where the config names none."""
    names = config.get("architectures") or ["AutoModel"]
    if not isinstance(names, list) or not isinstance(names[0], str) or not names[0].isidentifier():
        raise ModelError(f"{path}: architectures in config.json is {str(names)[:60]!r}; expected a list with the "
                         f"name of a class of transformers, such as ['LlamaForCausalLM']")  # fmt: skip
    found = getattr(hf, names[0], None)
    if isinstance(found, type) and (issubclass(found, nn.Module) or names[0].startswith("AutoModel")):
        return found
    if "auto_map" in config:
        raise ModelError(f"{path} needs Python code of its own ({names[0]}), which fxquant never runs; "
                         f"load the model yourself and give the module to fxquant.compile")  # fmt: skip
    raise ModelError(f"{path} is a {names[0]}, which transformers {hf.__version__} does not have; upgrade it, "
                     f"or load the model yourself and give the module to fxquant.compile")  # fmt: skip


def _tokenizer(hf: ModuleType, path: Path) -> Any | None:
    """The tokenizer that came with the model, or None; one that is there and cannot be read is a warning."""
    try:
        if not path.is_file():
            return read_tokenizer(path) if claims.has_tokenizer(path) else None
        claims.check_tokenizer(path.parent)  # transformers looks beside the file too
        with _reading(path):  # AutoTokenizer would read the vocabulary again, for a config that is known by now
            return hf.PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except ModelError as error:  # a model without a tokenizer can still be compiled
        warnings.warn(str(error), stacklevel=3)
        return None


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers reads it; no code that came with it is run, no template rendered.

    ModelError for one that cannot be read, is above 64 MiB, or lies elsewhere (a link out of the folder).
    """
    claims.check_tokenizer(folder)
    with _reading(folder):
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever the libraries that read tokenizers raise becomes a ModelError; a panic of Rust is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {_first_line(error)}; fetch its files "
                         f"again") from None  # fmt: skip


def _first_line(error: BaseException) -> str:
    text = shown(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


# --- GGUF files -------------------------------------------------------------------------------------------------------
def _from_gguf(hf: ModuleType, path: Path) -> tuple[nn.Module, str | None]:
    """The model in a GGUF file with its weights decoded to fp32, and how they were quantized."""
    with _parsing(path):
        import gguf

        header, config = _gguf_header(path)
        state = None if config is None else _gguf_weights(hf, gguf, header, config)
        model = _gguf_by_transformers(hf, path, header) if state is None else _plain_model(hf, config, state)
        return model, _gguf_note(gguf, header)


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """What the libraries that read a GGUF file raise becomes a ModelError."""
    try:
        yield
    except FxquantError:
        raise
    except ImportError as error:
        raise ModelError(f"reading {path} needs more packages ({error}); run: pip install 'fxquant[hf]'") from error
    except Exception as error:  # a damaged file fails anywhere in the libraries that parse it
        if ran_out(error):
            raise
        raise ModelError(f"{path} cannot be read as GGUF: {_first_line(error)}; fetch the file again, or convert the "
                         f"original model's folder instead") from error  # fmt: skip


def _gguf_header(path: Path) -> tuple[Any, Any | None]:
    """The tensor table and, for a plain Llama, the config. transformers' general way reads the vocabulary three times
    and takes four times as long (measured: 24 s against 6 s for SmolLM2-135M)."""
    import gguf
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

    check_gguf(path, gguf.GGML_QUANT_SIZES)
    header = GgufHeader.from_file(str(path))
    metadata, names = read_gguf_metadata(str(path))
    if header.architecture != "llama" or metadata.get("general.name") == "mistral":
        return header, None
    settings: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
    for key, value in metadata.items():
        prefix, _, rest = key.partition(".")
        if setting := GGUF_CONFIG_MAPPING.get(prefix, {}).get(rest):
            settings[setting] = value
    settings.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    return header, AutoConfig.for_model(**settings)


def _gguf_empty(hf: ModuleType, header: Any, config: Any) -> nn.Module:
    """The model of a config without values; ModelError for one that the file's tensors cannot fill."""
    path = Path(header.path)
    with claims.building(path, len(header.tensors)):
        model = _without_values(hf, config)
    claims.check_size(path, model, sum(math.prod(t.shape) for t in header.tensors))
    claims.check_memory(path, 4 * sum(p.numel() for p in model.parameters()))
    return model


def _gguf_weights(hf: ModuleType, gguf: ModuleType, header: Any, config: Any) -> dict[str, Tensor] | None:
    """Every parameter of the model by its transformers name, decoded; None if the file's tensors do not cover them."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    wanted = _gguf_empty(hf, header, config).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    by_gguf = {f"{names.get_name(n.removesuffix('.weight'))}.weight": n for n in wanted if n.endswith(".weight")}
    processor = TENSOR_PROCESSORS["llama"](config=config.to_dict())
    data, state = np.memmap(header.path, mode="r", dtype=np.uint8), {}
    for tensor in header.tensors:
        if tensor.name not in by_gguf:
            continue
        begin = header.data_start + tensor.offset
        raw = data[begin : begin + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.ggml_type))
        decoded = processor.process(weights=decoded, name=tensor.name).weights  # undoes the permutation of q and k
        state[by_gguf[tensor.name]] = torch.from_numpy(np.array(decoded, dtype=np.float32))
    missing = wanted.keys() - state.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return None if missing else state


def _plain_model(hf: ModuleType, config: Any, state: dict[str, Tensor]) -> nn.Module:
    """The float model of a config and its weights, without a trace of the quantization it came from."""
    cls: Any = type(_without_values(hf, config))
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)  # type: ignore[no-any-return]


def _without_values(hf: ModuleType, config: Any) -> nn.Module:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def _gguf_by_transformers(hf: ModuleType, path: Path, header: Any) -> nn.Module:
    """The general way, for architectures whose tensors transformers rearranges on its own."""
    claims.check_folder(path.parent)
    _gguf_empty(hf, header, hf.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True))
    model = hf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True,
        quantization_config=hf.GgufConfig(dequantize=True),
    )  # fmt: skip
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return _plain_model(hf, config, model.state_dict())


def _gguf_note(gguf: ModuleType, header: Any) -> str | None:
    """``"GGUF Q4_1"``: the block type that holds most bytes of the file, None where every tensor is plain floats."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        name = gguf.GGMLQuantizationType(tensor.ggml_type).name
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    blocks = {name: size for name, size in sizes.items() if name not in ("F32", "F16", "BF16", "F64")}
    return f"GGUF {max(blocks, key=lambda name: blocks[name])}" if blocks else None
