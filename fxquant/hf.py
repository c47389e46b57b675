"""fxquant in transformers: importing this makes ``from_pretrained`` and ``save_pretrained`` work on packed weights.

    import fxquant.hf

    model = AutoModelForCausalLM.from_pretrained(float_path, quantization_config=fxquant.hf.FxquantConfig("W6A16-E3M2"))
    fxquant.hf.save(model, "out", tokenizer=tokenizer)         # or model.save_pretrained("out"), without a README.md
    model = AutoModelForCausalLM.from_pretrained("out")        # packed weights as they are, no float ones
    model.generate(...)

Models are read from disk for ``fxquant.compile`` by ``load_model`` (``fxquant.checkpoints``).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fxquant import outputs
from fxquant.checkpoints import LoadedModel, load_model
from fxquant.errors import SaveError
from fxquant.kv_cache import with_cache
from fxquant.model_card import model_card, write_card

try:
    from fxquant.hf_quantizer import FxquantConfig, FxquantHfQuantizer, whole
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(f"fxquant.hf needs transformers ({error}); run: pip install 'fxquant[hf]'") from error

__all__ = ["FxquantConfig", "FxquantHfQuantizer", "LoadedModel", "load_model", "model_card", "save", "with_cache"]


def save(model: Any, folder: str | Path, *, tokenizer: Any | None = None, base_model: str | None = None) -> None:
    """``model.save_pretrained(folder)``, the tokenizer beside it, and a README.md (``model_card``) if there is none.

    The folder is whole or as it was before; files in it that are not the model's stay. ``base_model`` is the float
    model's name on the hub. Where ``quantize_`` was given a part of the model, such as the
    language model in one that also sees, the whole is saved. ModelError where no weight of the model is packed,
    SaveError for what cannot be written.
    """
    whole(model)
    card, target = model_card(model, base_model=base_model), Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file; give a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with outputs.replacing_folder(target, overwrite=True) as temporary:
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))
            if target.exists():
                _keep_others(target, temporary)
            write_card(temporary, card)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def _keep_others(old: Path, new: Path) -> None:
    """Give the new folder what the old one has and it has not, but for the weights of an earlier model."""
    for entry in old.iterdir():
        if os.path.lexists(new / entry.name) or _WEIGHTS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_linked)
        else:
            _linked(entry, new / entry.name)


def _linked(old: str | Path, new: str | Path) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)
