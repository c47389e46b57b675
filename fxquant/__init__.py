"""fxquant: compile PyTorch models to low-bit floating point that runs packed, and says what happened to it.

    q = fxquant.compile(model, example_inputs, config="W6A16-E3M2")
    q(**inputs); q.save("out/"); q = fxquant.load("out/"); q.export_onnx("m.onnx"); q.report("report.html")

Public names resolve on first use, so ``import fxquant`` is light: it loads neither onnx nor triton nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.allocation import allocate as allocate
    from fxquant.codegen.ort_library import custom_ops_library as custom_ops_library
    from fxquant.codegen.ort_library import onnx_session as onnx_session
    from fxquant.compiled import CompiledModel as CompiledModel
    from fxquant.config import RECIPES as RECIPES
    from fxquant.config import Config as Config
    from fxquant.config import load_config as load_config
    from fxquant.engines import executor as executor
    from fxquant.errors import FxquantError as FxquantError
    from fxquant.export_folder import export_compressed_tensors as export_compressed_tensors
    from fxquant.export_ggml import export_gguf as export_gguf
    from fxquant.formats import FloatFormat as FloatFormat
    from fxquant.formats import IntFormat as IntFormat
    from fxquant.formats import parse_format as format  # noqa: F401
    from fxquant.pipeline import compile as compile
    from fxquant.pipeline import load as load
    from fxquant.pipeline import quantize_ as quantize_
    from fxquant.qtensor import QuantizedTensor as QuantizedTensor
    from fxquant.qtensor import quantize_tensor as quantize_tensor
    from fxquant.scheme import QuantSpec as QuantSpec
    from fxquant.stream import compile_to as compile_to

_PUBLIC = {
    "CompiledModel": ("fxquant.compiled", "CompiledModel"),
    "Config": ("fxquant.config", "Config"),
    "FloatFormat": ("fxquant.formats", "FloatFormat"),
    "FxquantError": ("fxquant.errors", "FxquantError"),
    "IntFormat": ("fxquant.formats", "IntFormat"),
    "QuantSpec": ("fxquant.scheme", "QuantSpec"),
    "QuantizedTensor": ("fxquant.qtensor", "QuantizedTensor"),
    "RECIPES": ("fxquant.config", "RECIPES"),
    "allocate": ("fxquant.allocation", "allocate"),
    "compile": ("fxquant.pipeline", "compile"),
    "compile_to": ("fxquant.stream", "compile_to"),
    "custom_ops_library": ("fxquant.codegen.ort_library", "custom_ops_library"),
    "executor": ("fxquant.engines", "executor"),
    "export_compressed_tensors": ("fxquant.export_folder", "export_compressed_tensors"),
    "export_gguf": ("fxquant.export_ggml", "export_gguf"),
    "format": ("fxquant.formats", "parse_format"),
    "load": ("fxquant.pipeline", "load"),
    "load_config": ("fxquant.config", "load_config"),
    "onnx_session": ("fxquant.codegen.ort_library", "onnx_session"),
    "quantize_": ("fxquant.pipeline", "quantize_"),
    "quantize_tensor": ("fxquant.qtensor", "quantize_tensor"),
}  # public name -> module and name there
_MODULES = ("errors", "evaluate", "formats", "hf", "ops", "packing", "qtensor", "scheme", "sensitivity")

_NATIVE = ("quantize_tensor", "packing")  # names with which come the CPU kernels of what they do

__all__ = sorted((*_PUBLIC, *_MODULES))


def __getattr__(name: str) -> Any:
    if name in _NATIVE:
        importlib.import_module("fxquant.codegen.cpu_codes")
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _MODULES:
        return importlib.import_module(f"fxquant.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("fxquant")
    raise AttributeError(f"module 'fxquant' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return __all__
