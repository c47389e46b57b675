"""What ``fxquant.codegen.bit_printers`` prints as C++ and ONNX, compiled and run."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fxquant.bitops import Expr
from fxquant.codegen import bit_printers

FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wno-unused-variable", "-Werror", "-shared", "-fPIC")


def compile_cpp(text: str, folder: Path) -> ctypes.CDLL:
    """The library made of ``text``. The test is skipped where there is no compiler."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) on this machine: the C++ printer is not checked")
    source, library = folder / "printed.cpp", folder / "printed.so"
    source.write_text(f"#include <cstdint>\n{text}")
    made = subprocess.run([compiler, *FLAGS, str(source), "-o", str(library)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return ctypes.CDLL(str(library))


def run_onnx(outputs: Sequence[Expr], words: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The values of ``outputs`` by onnxruntime; words of 8 or 32 bits, for it shifts no uint16."""
    steps = bit_printers.steps_of(outputs)
    kind = {8: TensorProto.UINT8, 32: TensorProto.UINT32}[outputs[0].bits]
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    for node in bit_printers.onnx(steps):
        constants |= {f"c{x}": helper.make_tensor(f"c{x}", kind, [], [x]) for x in node.inputs if isinstance(x, int)}
        inputs = [f"c{x}" if isinstance(x, int) else x for x in node.inputs]
        extra = {"direction": node.direction} if node.direction else {}
        nodes.append(helper.make_node(node.op, inputs, [node.output], **extra))
    # a result may be a word itself, or be asked for twice
    nodes += [helper.make_node("Identity", [name], [f"out{i}"]) for i, name in enumerate(steps.results)]
    dims = [None] * next(iter(words.values())).ndim
    graph = helper.make_graph(
        nodes, "printed",
        [helper.make_tensor_value_info(name, kind, dims) for name in words],
        [helper.make_tensor_value_info(f"out{i}", kind, dims) for i in range(len(outputs))],
        list(constants.values()),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, dict(words))
    return found
