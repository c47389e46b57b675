"""fxquant in transformers: importing this makes ``from_pretrained`` and ``save_pretrained`` work on packed weights.

    import fxquant.hf

    model = AutoModelForCausalLM.from_pretrained(float_path, quantization_config=fxquant.hf.FxquantConfig("W6A16-E3M2"))
    fxquant.hf.save(model, "out", tokenizer=tokenizer)         # or model.save_pretrained("out"), without a README.md
    model = AutoModelForCausalLM.from_pretrained("out")        # packed weights as they are, no float ones
    model.generate(...)

Models are read from disk for ``fxquant.compile`` by ``load_model`` (``fxquant.checkpoints``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

    ``base_model`` is the float model's name on the hub. Where ``quantize_`` was given a part of the model, such as the
    language model in one that also sees, the whole is saved. ModelError where no weight of the model is packed,
    SaveError for what cannot be written.
    """
    whole(model)
    card, target = model_card(model, base_model=base_model), Path(folder)
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file; give a folder")
    try:
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(target))
        write_card(target, card)
    except OSError as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error
