"""The table of the ONNX exporter: an fx target and the converter that says it in ONNX."""

from __future__ import annotations

from typing import Any

from fxquant.codegen.onnx_activations import ACTIVATIONS
from fxquant.codegen.onnx_elementwise import ELEMENTWISE, Converter
from fxquant.codegen.onnx_kv import KV
from fxquant.codegen.onnx_layers import LAYERS, grouped_product
from fxquant.codegen.onnx_packed import PACKED
from fxquant.codegen.onnx_reduce import REDUCE
from fxquant.codegen.onnx_shape import SHAPE
from fxquant.rewrite import aten

CONVERTERS: dict[Any, Converter] = {**ELEMENTWISE, **SHAPE, **REDUCE, **LAYERS, **PACKED, **ACTIVATIONS, **KV}

BY_NAME: dict[str, Converter] = {"transformers.grouped_mm_fallback.default": grouped_product}
"""Operators of other packages, which exist only once those are imported."""

NO_VALUE = (
    aten._assert_scalar.default, aten._assert_async.msg, aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip
"""Checks that torch makes while it runs: nothing of them is exported."""
