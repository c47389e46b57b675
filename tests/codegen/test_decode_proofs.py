"""All codes in all slots decode to their values, by every way in which the bit expressions are written.

Ways: ``evaluate``, the assembly that ships (emulated), C++ (compiled here) and ONNX (onnxruntime). The Triton body has
its turn in ``tests/interpreter``. For the assembly, more than all codes: its results are proven equal to the
expressions as Boolean functions of the stored bits, that is for all words there are.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from decode_cases import (
    DECODINGS,
    IDS,
    all_codes,
    expected,
    numbers,
    packed,
    registers_to_words,
    shipped_asm,
    wide,
    wide_outputs,
    words_of,
)
from onnx import TensorProto, helper
from ptx import run
from ptx_proof import ZERO, functions, variable

from fxquant.bitops import evaluate, trace
from fxquant.codegen import bit_printers
from fxquant.decodings import Decoding
from fxquant.layouts import reference_unpack
from fxquant.packing import unpack

every_decoding = pytest.mark.parametrize("d", DECODINGS, ids=IDS)


def check(d: Decoding, codes: torch.Tensor, outputs: list[Any]) -> None:
    assert np.array_equal(numbers(d, outputs), expected(d, codes))


@every_decoding
def test_every_slot_has_every_code(d: Decoding) -> None:
    """Of the test data: no code is left out in any column, so none in any slot."""
    codes = all_codes(d)
    good = 2**d.format.bits - len(d.left_out)
    assert all(len(column.unique()) == good for column in codes.T)


@every_decoding
def test_packed_words_hold_the_codes(d: Decoding) -> None:
    codes = all_codes(d)
    shape = (len(codes), d.block)
    recoded = d.codes(codes)
    assert np.array_equal(reference_unpack(packed(d, codes).numpy(), d.layout, shape), recoded.numpy())
    assert torch.equal(unpack(packed(d, codes), d.layout, shape), recoded)


@every_decoding
def test_expressions(d: Decoding) -> None:
    codes = all_codes(d)
    words = words_of(d, codes)
    check(d, codes, [evaluate(expr, words) for expr in d.outputs])
    check(d, codes, [evaluate(expr, wide(d, words)) for expr in wide_outputs(d)])


@every_decoding
def test_shipped_asm(d: Decoding) -> None:
    codes = all_codes(d)
    words = wide(d, words_of(d, codes))
    asm, constraints = shipped_asm(d)
    results = run(asm, constraints, list(words.values()))
    check(d, codes, registers_to_words(d, results, next(iter(words.values()))))


@every_decoding
def test_shipped_asm_is_right_for_all_words(d: Decoding) -> None:
    """Bit i of each result is, as a function of the stored bits, the bit that the expression's trace names."""
    names = [word.name for word in d.words]
    wanted = [
        tuple(variable(names.index(bit[0]), bit[1]) if bit else ZERO for bit in trace(expr))
        for expr in wide_outputs(d)
    ]  # fmt: skip
    got = functions(*shipped_asm(d))
    if d.target is None:
        got = [low + high for low, high in zip(got[::2], got[1::2], strict=True)]
    assert got == wanted


# --- C++ -------------------------------------------------------------------------------------------------------------
def cpp_function(d: Decoding, name: str) -> str:
    """``name(words, outputs, count)``: decode ``count`` units, word i at ``words[i]``."""
    steps = bit_printers.steps_of(d.outputs)
    kind = f"uint{d.words[0].bits}_t"
    read = [f"const {kind} {word.name} = words[{i}][n];" for i, word in enumerate(d.words)]
    written = [f"outputs[{i}][n] = {result};" for i, result in enumerate(steps.results)]
    body = "\n        ".join([*read, *bit_printers.cpp(steps), *written])
    return f"""
extern "C" void {name}(const {kind}* const* words, {kind}* const* outputs, long count) {{
    for (long n = 0; n < count; ++n) {{
        {body}
    }}
}}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Functions ``decode0``, ``decode1`` ... for all decodings, compiled."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) on this machine: the C++ printer is not checked")
    folder: Path = tmp_path_factory.mktemp("cpp")
    source = "#include <cstdint>\n" + "".join(cpp_function(d, f"decode{i}") for i, d in enumerate(DECODINGS))
    (folder / "decode.cpp").write_text(source)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    made = subprocess.run(
        [compiler, *flags, str(folder / "decode.cpp"), "-o", str(folder / "decode.so")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return ctypes.CDLL(str(folder / "decode.so"))


@every_decoding
def test_cpp(d: Decoding, library: ctypes.CDLL) -> None:
    codes = all_codes(d)
    words = list(words_of(d, codes).values())
    outputs = [np.zeros_like(words[0]) for _ in d.outputs]
    pointers = [(ctypes.c_void_p * len(a))(*(x.ctypes.data for x in a)) for a in (words, outputs)]
    library[f"decode{DECODINGS.index(d)}"](*pointers, ctypes.c_long(words[0].size))
    check(d, codes, outputs)


# --- ONNX ------------------------------------------------------------------------------------------------------------
def onnx_model(d: Decoding) -> onnx.ModelProto:
    steps = bit_printers.steps_of(d.outputs)
    kind = {8: TensorProto.UINT8, 32: TensorProto.UINT32}[d.words[0].bits]
    constants: dict[str, onnx.TensorProto] = {}
    nodes = []
    for node in bit_printers.onnx(steps):
        inputs = [f"c{x}" if isinstance(x, int) else x for x in node.inputs]
        constants |= {f"c{x}": helper.make_tensor(f"c{x}", kind, [], [x]) for x in node.inputs if isinstance(x, int)}
        extra = {"direction": node.direction} if node.direction else {}
        nodes.append(helper.make_node(node.op, inputs, [node.output], **extra))
    # a word that comes out as it is would be an output that no node makes
    nodes += [helper.make_node("Identity", [name], [f"out{i}"]) for i, name in enumerate(steps.results)]
    graph = helper.make_graph(
        nodes, "decode",
        [helper.make_tensor_value_info(word.name, kind, [None, None]) for word in d.words],
        [helper.make_tensor_value_info(f"out{i}", kind, [None, None]) for i in range(len(d.outputs))],
        list(constants.values()),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


@every_decoding
def test_onnx(d: Decoding) -> None:
    codes = all_codes(d)
    session = onnxruntime.InferenceSession(onnx_model(d).SerializeToString(), providers=["CPUExecutionProvider"])
    check(d, codes, session.run(None, words_of(d, codes)))
