"""Every printer writes what ``evaluate`` computes: random expressions that share parts, printed and run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bit_expressions import graphs, random_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from printed import compile_cpp, run_onnx
from ptx import run

from fxquant.bitops import Expr, evaluate, permute, rotl, word
from fxquant.codegen import bit_printers

A, B = word("a", 32), word("b", 32)
many = settings(max_examples=150, deadline=None)


def check(outputs: Sequence[Expr], words: dict[str, NDArray[Any]], got: Sequence[Any]) -> None:
    for expr, value in zip(outputs, got, strict=True):
        assert np.array_equal(np.broadcast_to(value, words["a"].shape), evaluate(expr, words)), str(expr)


@many
@given(outputs=graphs(), seed=st.integers(0, 9))
def test_triton_text(outputs: tuple[Expr, ...], seed: int) -> None:
    """Its operators mean on unsigned numpy arrays what they mean in Triton."""
    words = random_words(outputs[0].bits, seed)
    steps = bit_printers.steps_of(outputs)
    names: dict[str, Any] = dict(words)
    exec("\n".join(bit_printers.triton(steps)), names)
    check(outputs, words, [names[result] for result in steps.results])


@many
@given(outputs=graphs((32,)), seed=st.integers(0, 9), halves=st.booleans())
def test_ptx(outputs: tuple[Expr, ...], seed: int, halves: bool) -> None:
    words = random_words(32, seed)
    results = len(outputs) * (2 if halves else 1)
    steps = bit_printers.steps_of(outputs, {"a": f"${results}", "b": f"${results + 1}"})
    constraints = ",".join(["=h" if halves else "=r"] * results + ["r", "r"])
    got = run(bit_printers.ptx(steps, halves=halves), constraints, list(words.values()))
    if halves:
        got = [low | high << np.uint32(16) for low, high in zip(got[::2], got[1::2], strict=True)]
    check(outputs, words, got)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases=st.lists(graphs(), min_size=20, max_size=30))
def test_cpp(cases: list[tuple[Expr, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    text = []
    for i, outputs in enumerate(cases):
        kind, steps = f"uint{outputs[0].bits}_t", bit_printers.steps_of(outputs)
        written = [f"out[{k}] = {result};" for k, result in enumerate(steps.results)]
        body = "\n".join([*bit_printers.cpp(steps), *written])
        text.append(f'extern "C" void f{i}({kind} a, {kind} b, {kind}* out) {{ (void)a; (void)b;\n{body}\n}}')
    library = compile_cpp("\n".join(text), tmp_path_factory.mktemp("cpp"))
    for i, outputs in enumerate(cases):
        words = random_words(outputs[0].bits, i, count=1)
        number = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32}[outputs[0].bits]
        out = (number * len(outputs))()
        library[f"f{i}"](number(int(words["a"][0])), number(int(words["b"][0])), out)
        check(outputs, words, [np.array([value]) for value in out])


@settings(max_examples=60, deadline=None)
@given(outputs=graphs((8, 32)), seed=st.integers(0, 9))
def test_onnx(outputs: tuple[Expr, ...], seed: int) -> None:
    """On 8 and 32 bits: onnxruntime shifts no uint16."""
    words = random_words(outputs[0].bits, seed)
    check(outputs, words, run_onnx(outputs, words))


def test_shared_parts_are_printed_once() -> None:
    shared = A >> 4
    assert bit_printers.triton(bit_printers.steps_of([shared & 1, shared & 2])) == [
        "t0 = a >> 4", "t1 = t0 & 0x1", "t2 = t0 & 0x2",
    ]  # fmt: skip


def test_a_mask_and_a_merge_are_one_instruction() -> None:
    """Unless the masked word is needed elsewhere: then it is kept."""
    masked = A & 0xF0
    once = bit_printers.ptx(bit_printers.steps_of([masked | B >> 4], {"a": "$1", "b": "$2"}))
    assert [line for line in once.split("\n") if line.startswith(("and", "or", "lop3"))] == [
        "lop3.b32 t2, $1, 0x000000f0, t1, 0xea;"
    ]
    twice = bit_printers.ptx(bit_printers.steps_of([masked | B >> 4, masked], {"a": "$2", "b": "$3"}))
    assert "lop3" not in twice


def test_words_can_be_called_by_other_names() -> None:
    steps = bit_printers.steps_of([rotl(A, 3)], {"a": "$1"})
    assert bit_printers.ptx(steps) == "{\n.reg .b32 t0;\nshf.l.wrap.b32 t0, $1, $1, 3;\nmov.b32 $0, t0;\n}"


def test_a_permutation_to_nothing_is_zero() -> None:
    steps = bit_printers.steps_of([permute(A, 0x4444)])
    assert bit_printers.triton(steps) == ["t0 = (a & 0)"]
    assert [node.op for node in bit_printers.onnx(steps)] == ["BitwiseAnd"]
