"""All codes in all slots decode to their values, by every way in which the bit expressions are written.

Ways: ``evaluate``, the assembly that ships (emulated), C++ (compiled here) and ONNX (onnxruntime). The Triton body has
its turn in ``tests/interpreter``. For the assembly, more than all codes: its results are proven equal to the
expressions as Boolean functions of the stored bits, that is for all words there are.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
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
from printed import compile_cpp, run_onnx
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
    text = "".join(cpp_function(d, f"decode{i}") for i, d in enumerate(DECODINGS))
    return compile_cpp(text, tmp_path_factory.mktemp("cpp"))


@every_decoding
def test_cpp(d: Decoding, library: ctypes.CDLL) -> None:
    codes = all_codes(d)
    words = list(words_of(d, codes).values())
    outputs = [np.zeros_like(words[0]) for _ in d.outputs]
    pointers = [(ctypes.c_void_p * len(a))(*(x.ctypes.data for x in a)) for a in (words, outputs)]
    library[f"decode{DECODINGS.index(d)}"](*pointers, ctypes.c_long(words[0].size))
    check(d, codes, outputs)


# --- ONNX ------------------------------------------------------------------------------------------------------------
@every_decoding
def test_onnx(d: Decoding) -> None:
    codes = all_codes(d)
    check(d, codes, run_onnx(d.outputs, words_of(d, codes)))
