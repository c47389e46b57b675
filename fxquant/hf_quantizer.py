"""fxquant as a quantization method of transformers: its ``HfQuantizer`` and the config that stands in config.json.

Importing this registers both, by transformers' own decorators. From then on ``from_pretrained`` knows ``quant_method:
fxquant``: it builds the modules on packed weights without values, on the meta device, and reads the bytes into them. No
float weight is made of them. Given a float model and a ``FxquantConfig`` it quantizes when the weights are there.

``import fxquant`` does not load this module, ``import fxquant.hf`` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxquant.config import RECIPES, Config, ConfigLike, load_config
from fxquant.errors import ConfigError, LoadError, ModelError
from fxquant.headers import safetensors_header
from fxquant.weight_table import (
    HELD,
    Entry,
    Table,
    build,
    check_stored,
    check_values,
    finish,
    holders,
    read_table,
    restore,
    stored_tensors,
    table_of,
    to_dict,
)

METHOD, VERSION = "fxquant", 1
_KEYS = ("quant_method", "version", "fxquant", "config", "weights")


@register_quantization_config(METHOD)
class FxquantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_pretrained(..., quantization_config=)`` takes: a fxquant config, as a recipe's name, dict or file.

    In a saved model ``weights`` says which weights are packed, and how (``fxquant.weight_table``).
    """

    def __init__(self, config: ConfigLike = "W6A16-E3M2", *, weights: Table | None = None) -> None:
        self.quant_method = METHOD
        self.config: Config = load_config(config)
        self.weights: Table | None = weights

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config in a model's config.json, which is not trusted. LoadError for what is none."""
        unknown = [str(key)[:60] for key in config_dict if key not in _KEYS]
        if unknown:
            raise LoadError(f"quantization_config has an unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
        if (version := config_dict.get("version", VERSION)) != VERSION:
            raise LoadError(
                f"quantization_config has version {str(version)[:60]}, this fxquant reads {VERSION}; upgrade fxquant, "
                f"or save the model again with this one"
            )
        weights = read_table(config_dict["weights"]) if "weights" in config_dict else None
        found = cls(_plain_config(config_dict.get("config")), weights=weights)
        return (found, kwargs) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in config.json."""
        found = {
            "quant_method": METHOD, "version": VERSION, "fxquant": metadata.version("fxquant"),
            "config": self.config.to_dict(),
        }  # fmt: skip
        return found if self.weights is None else {**found, "weights": to_dict(self.weights)}


def _plain_config(value: Any) -> Config:
    """The config in a file: a mapping or a recipe's name, never a path."""
    named = isinstance(value, str) and value.lower() in {name.lower() for name in RECIPES}
    try:
        if isinstance(value, (str, Mapping)) and (named or not isinstance(value, str)):
            return load_config(value)
    except ConfigError as error:
        raise LoadError(f"quantization_config: {error}") from None
    raise LoadError(f"quantization_config: config is {str(value)[:60]!r}; expected a mapping with rules, or one of "
                    f"{', '.join(RECIPES)}")  # fmt: skip


@register_quantizer(METHOD)
class FxquantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads, saves and makes models on packed weights. transformers calls it; users need not."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Before anything is loaded: whether the config can be done when loading. ConfigError, LoadError."""
        from fxquant.pipeline import check_modules

        given: FxquantConfig = self.quantization_config
        if self.pre_quantized:
            if given.weights is None:
                raise LoadError(
                    "quantization_config of this model has no weights: which are packed is not known. Save the model "
                    "again with save_pretrained; to quantize a float model, leave quantization_config out of its "
                    "config.json and give it to from_pretrained"
                )
            return
        check_modules(given.config)
        if needy := given.config.needs_data():
            raise ConfigError(
                f"{needy} needs calibration data, which from_pretrained has not: load the float model, call "
                f"fxquant.quantize_(model, config, calibration=batches), then model.save_pretrained(folder)"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """A packed checkpoint has the model's own names, so nothing of it is renamed, merged or split."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        stored = _headers(kwargs.get("checkpoint_files"))
        table, have = _named_as(model, self.quantization_config.weights, stored)
        dtype = model.dtype
        self._want = stored_tensors(build(model, table))
        check_stored(self._want, have)
        _keep_dtypes(model, dtype)
        _forget_ties(model)
        for name in (name for name, entry in table.items() if isinstance(entry, str)):  # they get their weight later
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        self._table = table

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from fxquant.pipeline import quantize_

        if not self.pre_quantized:
            quantize_(model, self.quantization_config.config)
            return model
        for name, (dtype, _) in self._want.items():  # transformers may have cast scales with what surrounds them
            module, _, part = name.rpartition(".")
            owner = model.get_submodule(module)
            owner._buffers[part] = owner._buffers[part].to(dtype)
        finish(model, self._table)
        check_values(model)
        attach(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is saved: packed weights that several names share, once; and the table of them in the config."""
        table = table_of(model)
        self.quantization_config.weights = table
        model.config.quantization_config = self.quantization_config
        again = tuple(f"{where}.{HELD}." for name, _, where in holders(model) if isinstance(table[name], str))
        state = model.state_dict()
        return {name: value for name, value in state.items() if not (again and name.startswith(again))}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        restore(model, wanted or model.dtype)
        for _, module in model.named_modules():  # the ties that its class declares
            if isinstance(module, PreTrainedModel):
                vars(module).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model.to(wanted) if wanted else model


def attach(model: nn.Module, config: FxquantConfig | Config) -> None:
    """Have transformers know that ``model`` is on packed weights, so that ``model.save_pretrained`` writes them."""
    if not isinstance(model, PreTrainedModel):
        return
    given = FxquantConfig(config.config if isinstance(config, FxquantConfig) else config, weights=table_of(model))
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, FxquantHfQuantizer):
        quantizer = FxquantHfQuantizer(given, pre_quantized=True)
    quantizer.quantization_config = model.config.quantization_config = given
    model.hf_quantizer, model.quantization_method, model.is_quantized = quantizer, METHOD, True
    model._weight_conversions = []  # packed weights are saved under the model's own names
    _forget_ties(model)


def whole(model: Any) -> None:
    """Where only parts of ``model`` were quantized, on their own, make it the model that is saved and loaded."""
    parts = [m for m in model.modules() if isinstance(getattr(m, "hf_quantizer", None), FxquantHfQuantizer)]
    if parts and model not in parts and getattr(model, "hf_quantizer", None) is None:
        config = parts[0].hf_quantizer.quantization_config.config
        for part in parts:
            part.hf_quantizer.remove_quantization_config(part)
        attach(model, config)


# --- names ------------------------------------------------------------------------------------------------------------
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _headers(files: Iterable[Any] | None) -> Stored:
    """Dtype and shape of every tensor in safetensors files, by name."""
    found: Stored = {}
    if files is None:
        raise LoadError("packed weights are read from a folder of safetensors; give from_pretrained the folder, not a "
                        "state_dict")  # fmt: skip
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise LoadError(f"{file} is no safetensors file, and packed weights are read from nothing else; {_AGAIN}")
        try:
            found |= {name: (part.dtype, part.shape) for name, part in safetensors_header(file).items()}
        except ModelError as error:
            raise LoadError(f"{error}; {_AGAIN}") from None
    return found


_AGAIN = "save the model again, or fetch all of its files anew"


def _named_as(model: Any, table: Table, given: Stored) -> tuple[Table, Stored]:
    """The table and the tensors by the names they have in ``model``, which may be the body of the model that was saved,
    or have it as its body. What belongs to another head is left out."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    body = f"{model.base_model_prefix}."
    same = any(name in own for name in table)
    has_body = not same and any(body + name in own for name in table)

    def named(name: str) -> str:
        return name if same else body + name if has_body else name.removeprefix(body)

    same_class = type(model).__name__ in (model.config.architectures or [])
    kept = {named(name): name for name in table if same_class or named(name) in own}
    if not kept:
        raise LoadError(f"{type(model).__name__} holds none of the packed weights; load the folder with the class that "
                        f"was saved, {', '.join(map(str, model.config.architectures or ['AutoModel']))}")  # fmt: skip
    found: Table = {}
    for new, old in kept.items():
        entry = table[old]
        if isinstance(entry, str) and named(entry) not in kept:
            raise LoadError(f"weight {old!r} is the same as {entry!r}, which {type(model).__name__} has not; load it "
                            f"with the class that was saved, {model.config.architectures}")  # fmt: skip
        found[new] = named(entry) if isinstance(entry, str) else entry
    left = tuple(_places(name) for name in table if named(name) not in kept)
    others = tuple(place for places in left for place in places)
    return found, {named(n): kind for n, kind in given.items() if not (others and n.startswith(others))}


def _places(name: str) -> tuple[str, str]:
    """How the tensors of a packed weight's name may begin."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{HELD}.", f"{owner}.parametrizations.{leaf}.0.{HELD}."


# --- what transformers assumes of weights -----------------------------------------------------------------------------
def _forget_ties(model: Any) -> None:
    """Ties between weights that are packed now are no longer transformers' to make."""
    for _, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        kept = {target: source for target, source in ties.items() if target in own and source in own}
        if kept != ties:
            module.all_tied_weights_keys = module._tied_weights_keys = kept


def _keep_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Weights that a model keeps in float32 decode to that, such as T5's ``wo`` in a float16 model."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for name, module, _ in holders(model):
        for pattern, kept in plan.items():
            if re.search(pattern, name):
                getattr(module, HELD).dtype = kept


__all__ = ["METHOD", "Entry", "FxquantConfig", "FxquantHfQuantizer", "attach", "whole"]
