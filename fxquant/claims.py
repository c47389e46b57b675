"""What the files of a model claim, checked against each other before anything of their size is allocated.

A folder's config.json says how large a model is, and so does a GGUF file's metadata; the headers of its weights say
what is there. A config that asks for more than the weights hold is refused, as is what would make transformers read a
file outside of the folder, fetch code, or wait for a FIFO.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

from fxquant import files
from fxquant.errors import FxquantError, ModelError
from fxquant.headers import INDEX, StoredTensor
from fxquant.memory import total as memory
from fxquant.rewrite import unwritable

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""What transformers may read for a tokenizer."""
MOST_TENSORS = 5_000
"""Tensors that a model is taken to have at most where its weights are not there to be counted."""
_MODEL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors", INDEX)
_MAX_CONFIG, _MAX_TOKENIZER = 1 << 23, 1 << 26
_MAX_NUMBER, _MAX_COUNT = 2**31, 100_000
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts|labels|heads|stages|depths?)$|^n_(layer|head)s?$")
_ATTENTION = (None, "eager", "sdpa")
_SLACK = 1 << 24
"""Elements that a model may have beyond those stored: small weights that turn out to be missing get a better error."""
_MAX_BUFFERS = 1 << 29


# --- files ------------------------------------------------------------------------------------------------------------
def check_folder(folder: Path) -> None:
    """Raise ModelError unless what transformers opens for the model are regular files of the folder itself."""
    if os.path.lexists(folder / "adapter_config.json"):
        raise ModelError(f"{folder} holds an adapter (adapter_config.json), which names another model to be loaded; "
                         f"merge the adapter into its model and save that to a folder of its own")  # fmt: skip
    _check_files(folder, [name for name in _MODEL_FILES if os.path.lexists(folder / name)], _MAX_CONFIG)


def has_tokenizer(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                                                           "vocab.txt"))  # fmt: skip


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError unless the files of the folder's tokenizer are regular ones of its own, each below 64 MiB."""
    _check_files(folder, [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)], _MAX_TOKENIZER)
    more = folder / "additional_chat_templates"
    if os.path.lexists(more):
        _check_files(folder, [f"{more.name}/{file.name}" for file in more.glob("*.jinja")], _MAX_TOKENIZER)


def _check_files(folder: Path, names: Iterable[str], most: int) -> None:
    for name in names:
        try:
            files.check_inside(folder, folder / name)
            size = (folder / name).stat().st_size
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read: {error}") from None
        if size > most and not name.endswith((".safetensors", INDEX)):
            raise ModelError(f"{folder / name} has {size} bytes, and at most {most} are read; fetch the file again, or "
                             f"take it out")  # fmt: skip


# --- configs ----------------------------------------------------------------------------------------------------------
def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. ModelError where it cannot be read, or asks for what no model is or for code to run."""
    file = folder / "config.json"
    try:
        files.check_inside(folder, file)
        config = files.strict_json(files.read(file, _MAX_CONFIG), infinite=True)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        check_numbers(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {str(error)[:300]}; fetch the file again") from None
    return config


def check_numbers(settings: Any, where: str = "", depth: int = 0) -> None:
    """Raise ValueError for sizes that no model has, and settings that make transformers fetch code or other files."""
    if depth > 32:
        raise ValueError(f"{where[:60]} is nested too deep")
    for key, value in settings.items() if isinstance(settings, Mapping) else ((where, v) for v in settings):
        name = str(key)
        if name.endswith("_implementation") and value not in _ATTENTION and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {str(value)[:60]!r}, which may name code to be fetched; expected eager or "
                             f"sdpa: take that key out")  # fmt: skip
        if name == "transformers_weights":
            raise ValueError("transformers_weights names another file of weights; take that key out")
        if isinstance(value, (dict, list)):
            check_numbers(value, name, depth + 1)
        elif type(value) is int and abs(value) >= _MAX_NUMBER and "theta" not in name:
            raise ValueError(f"{name} is {str(value)[:40]}; no setting of a model has {_MAX_NUMBER} or more")
        elif type(value) is int and _COUNTS.search(name):  # vision_feature_layer counts from the end: -2
            least = -1 if name.startswith(("num_", "n_")) else -_MAX_COUNT
            if not least <= value <= _MAX_COUNT:
                raise ValueError(f"{name} is {value}; expected a count from 0 to {_MAX_COUNT}")


# --- models without values --------------------------------------------------------------------------------------------
def check_names(path: Path, model: nn.Module) -> None:
    """Raise ModelError where a module has a name, taken from the config, that generated code may not hold."""
    if (bad := unwritable(model)) is not None:
        raise ModelError(f"the config of {path} gives a module the name {bad[:100]!r}, with quotes, backslashes or "
                         f"what cannot be printed, which may be code; fetch it again, or mend it")  # fmt: skip


@contextmanager
def building(path: Path, stored: int) -> Iterator[None]:
    """Modules are made inside, of no more parameters than ``stored`` tensors can fill; what fails is a ModelError."""
    made, most = 0, 2 * stored + 1000

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(f"{path}: its config asks for a model of more than {most} weights, and {stored} are "
                             f"there; fetch its config and its weights again, both of one model")  # fmt: skip

    hook = on_parameter(count)
    try:
        yield
    except FxquantError:
        raise
    except Exception as error:  # transformers' and torch's own, for settings that make no model
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"the config of {path} makes no model: {type(error).__name__}: {first[:200]}; fetch it again, "
                         f"or mend it") from error  # fmt: skip
    finally:
        hook.remove()


def check_weights(
    path: Path, model: nn.Module, stored: Mapping[str, StoredTensor], *, packed: bool = False, in_memory: bool = True
) -> None:
    """Raise ModelError unless the weights stored can be those of ``model``, whose parameters are on the meta device.

    Names may differ, since transformers renames and joins what older versions wrote: compared are the numbers of
    elements, and element types where names are the same. A float model that is to be ``in_memory`` must fit there in
    float32. A byte that is ``packed`` holds up to eight elements.
    """
    parameters = dict(model.named_parameters())
    check_size(path, model, sum((t.end - t.begin) * (8 if packed else 1) // t.dtype.itemsize for t in stored.values()))
    for name in parameters.keys() & stored.keys():
        if parameters[name].is_floating_point() and not stored[name].dtype.is_floating_point:
            kind = str(stored[name].dtype).removeprefix("torch.")
            raise ModelError(f"{stored[name].file}: tensor {name!r} holds {kind}, where the model has floats; it is "
                             f"quantized in a way its config does not say: start from the float model")  # fmt: skip
    if in_memory and not packed:
        check_memory(path, 4 * sum(p.numel() for p in parameters.values()))


def check_size(path: Path, model: nn.Module, stored: int) -> None:
    """Raise ModelError where ``stored`` elements cannot fill ``model``, or tables that it computes, such as masks, are
    larger than any model's."""
    check_names(path, model)
    if (wanted := sum(p.numel() for p in model.parameters())) > stored + _SLACK:
        raise ModelError(f"{path}: its config asks for a model of {wanted:,} weights, and its files hold {stored:,}; "
                         f"fetch its config and its weights again, both of one model")  # fmt: skip
    if (size := sum(b.numel() * b.element_size() for b in model.buffers())) > _MAX_BUFFERS:
        raise ModelError(f"{path}: its config asks for tables of {size:,} bytes beside the weights; mend its sizes, "
                         f"max_position_embeddings among them")  # fmt: skip


def check_memory(path: Path, nbytes: int) -> None:
    """Raise ModelError where a model of ``nbytes`` can never fit into this machine's memory."""
    if nbytes > (most := memory()):
        advice = "pack its weights one after the other: fxquant compile --stream"
        if path.is_file():
            advice = "use a larger machine, or compile the folder of safetensors that it was made from with --stream"
        raise ModelError(f"{path} takes {nbytes:,} bytes in float32, and this machine has {most:,} of memory; {advice}")
