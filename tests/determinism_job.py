"""Compile, save and export tiny models with every method, into the folder where this is run.

    python determinism_job.py [job ...]

``tests/test_determinism.py`` runs it in fresh processes and compares every byte that they wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_models import llama
from tiny_language import tiny_tokenizer

import fxquant
from fxquant.examples import example_inputs

FP6 = {"match": "*", "weight": "e3m2/channel"}
FP4 = {"match": "*", "weight": "e2m1/group32"}
BOTH = {"match": "*", "weight": "e2m1/channel", "activation": "e4m3/token"}
INT4 = {"match": "*", "weight": "int4/group32:fp16"}
HEAD = {"match": "lm_head", "keep": True}
CONFIGS: dict[str, Any] = {
    "rtn": {"rules": [HEAD, FP6]},
    "gptq": {"rules": [HEAD, FP4], "passes": [{"gptq": {}}]},
    "gptq_lorc": {"rules": [HEAD, FP4], "passes": [{"gptq": {}}, {"lorc": {"rounds": 1}}]},
    "zq_local": {"rules": [HEAD, FP4], "passes": [{"zq_local": {"iterations": 4}}]},
    "zq_global": {"rules": [HEAD, FP4], "passes": [{"zq_global": {"iterations": 4}}]},
    "rotate": {"rules": [HEAD, FP4], "passes": [{"rotate": {"size": 32}}]},
    "smooth": {"rules": [HEAD, BOTH], "passes": [{"smooth": {}}]},
    "search_formats": {"rules": [HEAD, BOTH], "passes": [{"search_formats": {"rounds": 1, "steps": 8}}]},
    "fisher": {
        "rules": [HEAD, BOTH],
        "passes": [{"search_formats": {"rounds": 1, "steps": 8, "loss": "fisher", "float_targets": True}}],
    },
    "pre_shift": {"rules": [HEAD, BOTH], "passes": [{"pre_shift": {}}, {"fold_activation_scales": {}}]},
    "gwq": {"rules": [HEAD, FP4], "passes": [{"gwq": {}}]},
    "pb_llm": {
        "rules": [HEAD, {"match": "*", "weight": "lut(-1,1)/channel"}],
        "passes": [{"pb_llm": {"criterion": "hessian"}}],
    },
    "attention": {"rules": [HEAD, FP6], "passes": [{"quantize_attention": {}}]},
    "int4": {"rules": [HEAD, INT4], "passes": [{"gptq": {}}]},
}


def compiled(name: str) -> fxquant.CompiledModel:
    model = llama(Path("model"))
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return fxquant.compile(model, example_inputs(model), CONFIGS[name], calibration=windows)


def method(name: str) -> None:
    """A saved model, its ONNX file and the report of what was saved, which knows no times."""
    result = compiled(name)
    result.save(name)
    result.export_onnx(f"{name}.onnx", external_data=name == "rtn")
    timings = Path(name) / "timings.json"
    kept = timings.read_bytes()
    timings.unlink()
    fxquant.load(name).report(f"{name}.html")
    timings.write_bytes(kept)


def exports(name: str) -> None:
    """The files of other programs, and a folder that from_pretrained reads."""
    import fxquant.hf

    result = compiled("int4")
    tiny_tokenizer().save_pretrained("model")
    result.model_explorer("graph.json")
    fxquant.export_compressed_tensors(result, "compressed", model="model")
    fxquant.export_gguf(result, "model.gguf", model="model")
    model = llama(Path("model"))
    fxquant.quantize_(model, CONFIGS["rtn"])
    fxquant.hf.save(model, "packed", tokenizer=tiny_tokenizer())


JOBS: dict[str, Callable[[str], None]] = {**dict.fromkeys(CONFIGS, method), "exports": exports}

if __name__ == "__main__":
    for job in sys.argv[1:] or JOBS:
        JOBS[job](job)
