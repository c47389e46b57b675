"""Models of one node of the fxquant domain, with the function that spells it out or without it; weights for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from fxquant.codegen import onnx_functions
from fxquant.packing import pack, planar, planes
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scheme import parse_spec

Array = np.ndarray[Any, Any]
KINDS = {
    torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE, torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64, torch.int32: onnx.TensorProto.INT32, torch.uint8: onnx.TensorProto.UINT8,
}  # fmt: skip


def weight(spec: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize_tensor(torch.randn(rows, cols, generator=generator), parse_spec(spec))


def weight_inputs(q: QuantizedTensor, *, half: bool = False) -> dict[str, Tensor]:
    """packed, scale, and a zero point where the format has one; ``half``: scales in float16."""
    found = {"packed": pack(q.codes, planar(q.spec.format.bits)), "scale": q.scale.half() if half else q.scale.float()}
    return found if q.zero_point is None else {**found, "zero_point": q.zero_point}


def attributes(q: QuantizedTensor) -> dict[str, int]:
    return {"cols": q.codes.shape[1], "group_size": q.spec.group_size(q.codes.shape[1])}


def model(
    op: str, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, y: torch.dtype = torch.float32,
    function: onnx.FunctionProto | None = None, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """One node called "the.node": ``inputs`` of any sizes are the graph's, ``weights`` initializers."""
    node = helper.make_node(op, [*inputs, *weights], ["y"], name="the.node", domain="fxquant", **attributes)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(n, KINDS[t.dtype], [None] * t.dim()) for n, t in inputs.items()],
        [helper.make_tensor_value_info("y", KINDS[y], None)], [initializer(n, t) for n, t in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fxquant", onnx_functions.VERSION)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if function is not None:
        made.functions.append(function)
    return made


def initializer(name: str, tensor: Tensor) -> onnx.TensorProto:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, KINDS[tensor.dtype], list(tensor.shape), raw, raw=True)


def function(op: str, q: QuantizedTensor, x: torch.dtype = torch.float32, *, half: bool = False) -> onnx.FunctionProto:
    """The function of ``op`` as the exporter writes it for such a weight."""
    cols, size = q.codes.shape[1], q.spec.group_size(q.codes.shape[1])
    asks = {
        "grouped": size < cols, "ragged": bool(cols % (8 // min(planes(q.spec.format.bits))) or cols % size),
        "cast": x != torch.float32 and op.startswith("Linear"), "scale": half,
    }  # fmt: skip
    needs = frozenset(name for name, asked in asks.items() if asked)
    return ir.serde.serialize_function(onnx_functions.function(op, q.spec.format, needs, 21))


def session(made: onnx.ModelProto, library: str | None = None, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(made: onnx.ModelProto, inputs: Mapping[str, Tensor], library: str | None = None, threads: int = 1) -> Tensor:
    """y of the model."""
    return run_session(session(made, library, threads), inputs)


def run_session(loaded: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> Tensor:
    values = {n: _value(t) for n, t in inputs.items()}
    found = loaded.run_with_ort_values(["y"], values)[0]
    if found.element_type() == KINDS[torch.bfloat16]:
        return torch.from_dlpack(found._ortvalue.to_dlpack()).clone()  # numpy has no bfloat16
    return torch.from_numpy(found.numpy())


def _value(tensor: Tensor) -> onnxruntime.OrtValue:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, KINDS[torch.bfloat16])
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
