"""fxquant in transformers: importing this makes ``from_pretrained`` and ``save_pretrained`` work on packed weights.

    import fxquant.hf

    model = AutoModelForCausalLM.from_pretrained(float_path, quantization_config=fxquant.hf.FxquantConfig("W6A16-E3M2"))
    fxquant.hf.save(model, "out", tokenizer=tokenizer)         # or model.save_pretrained("out"), without a README.md
    model = AutoModelForCausalLM.from_pretrained("out")        # packed weights as they are, no float ones
    model.generate(...)

Models are read from disk for ``fxquant.compile`` by ``load_model`` (``fxquant.checkpoints``).
"""

from __future__ import annotations

from fxquant.checkpoints import LoadedModel, load_model
from fxquant.kv_cache import with_cache

try:
    from fxquant.hf_quantizer import FxquantConfig, FxquantHfQuantizer
except ModuleNotFoundError as error:
    raise ImportError(f"fxquant.hf needs transformers ({error}); run: pip install 'fxquant[hf]'") from error

__all__ = ["FxquantConfig", "FxquantHfQuantizer", "LoadedModel", "load_model", "with_cache"]
