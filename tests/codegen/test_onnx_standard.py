"""Layers as operators that onnxruntime has: which become which, and that they compute what torch does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from test_onnx_export import Cnn, Mlp, Tokens, compiled, difference, exported, tiny_llama, tokens
from torch import nn

from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.errors import ExportError
from fxquant.program import Program
from fxquant.scheme import LayerRule, parse_spec

GRANULARITIES = ("tensor", "channel", "group16", "group32", "group48", "group128", "block2x32")
EVERYTHING = ("embedding", "linear", "conv")


def operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)


def attributes(path: Path, op_type: str) -> list[dict[str, Any]]:
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == op_type]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in nodes]


def run(program: Program, path: Path, *names: str, **options: Any) -> onnxruntime.InferenceSession:
    return exported(program, path, options=Options(*names, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_matmulnbits_is_exact(format: str, granularity: str, tmp_path: Path) -> None:
    """K that fills blocks and K that does not; scales that are repeated over blocks, zero points that are packed."""
    model = nn.Sequential(nn.Linear(130, 64), nn.Linear(64, 5, bias=False))
    program = compiled(model, (torch.randn(3, 130),), f"{format}/{granularity}")
    session = run(program, tmp_path / "m.onnx", "standard")
    assert operators(tmp_path / "m.onnx") == {"MatMulNBits": 2}
    for rows in (1, 5):
        assert difference(program, session, torch.randn(rows, 130)) < 4e-6
    found = attributes(tmp_path / "m.onnx", "MatMulNBits")[0]
    assert found["accuracy_level"] == 1
    assert (found["K"], found["N"], found["bits"]) == (130, 64, parse_spec(format).format.bits)


def test_coded_scales_are_decoded(tmp_path: Path) -> None:
    for spec in ("int4/group32:e8m0", "int4/group16:e4m3", "int4/group64:m2", "int8/group32:e5m3", "mxint8",
                 "int8/channel:fp16", "uint4/group32:bf16", "uint2/tensor:fp16"):  # fmt: skip
        program = compiled(nn.Linear(96, 9), (torch.randn(3, 96),), spec)
        session = run(program, tmp_path / "m.onnx", "standard")
        assert operators(tmp_path / "m.onnx") == {"MatMulNBits": 1}
        assert difference(program, session, torch.randn(4, 96)) < 2e-6, spec


def test_auto_takes_what_is_exact_and_fast(tmp_path: Path) -> None:
    """At float32 activations 4 bits, at int8 activations every width; groups that are no blocks stay ours."""
    for bits, taken in (
        (32, {"int4", "uint4"}),
        (16, {"int4", "uint4"}),
        (8, {"int2", "int4", "uint4", "int8", "uint8"}),
    ):
        for format in ("int2", "int3", "int4", "uint4", "int8", "uint8", "e2m1", "nf4"):
            program = compiled(nn.Linear(64, 9), (torch.randn(3, 64),), f"{format}/group32")
            export_onnx(program, tmp_path / "m.onnx", options=Options(activation_bits=bits))  # type: ignore[arg-type]
            want = "MatMulNBits" if format in taken else f"LinearBias_{format}"
            assert set(operators(tmp_path / "m.onnx")) == {want}, (bits, format)
    program = compiled(nn.Linear(64, 9), (torch.randn(3, 64),), "int4/group24")
    export_onnx(program, tmp_path / "m.onnx")
    assert set(operators(tmp_path / "m.onnx")) == {"LinearBias_int4"}
    for group in (16, 256):  # level 4 has no kernel for these blocks of 2 bits
        program = compiled(nn.Linear(512, 9), (torch.randn(3, 512),), f"int2/group{group}")
        export_onnx(program, tmp_path / "m.onnx", options=Options(activation_bits=8))
        assert set(operators(tmp_path / "m.onnx")) == {"LinearBias_int2"}, group


def test_fxquant_is_always_our_nodes(tmp_path: Path) -> None:
    rules = (LayerRule("*", parse_spec("int4/group32"), types=EVERYTHING),)
    program = compiled(Tokens(), (torch.randint(0, 31, (2, 7)),), rules=rules)
    session = run(program, tmp_path / "m.onnx", "fxquant", activation_bits=8)
    assert set(operators(tmp_path / "m.onnx")) == {"Embedding_int4", "Tanh", "Linear_int4"}
    assert attributes(tmp_path / "m.onnx", "Linear_int4")[0]["activation_bits"] == 8
    assert difference(program, session, torch.randint(0, 31, (1, 4))) < 1e-5  # the function rounds nothing


def test_activations_rounded_to_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for format in ("int2", "int4", "uint4", "int8", "uint8"):
        program = compiled(nn.Linear(256, 64), (torch.randn(3, 256),), f"{format}/group64")
        session = run(program, tmp_path / "m.onnx", activation_bits=8)
        assert attributes(tmp_path / "m.onnx", "MatMulNBits")[0]["accuracy_level"] == 4
        x = torch.randn(8, 256)
        want = program.gm(x)[0]
        got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        assert float((got - want).norm() / want.norm()) < 1.5e-2, format


def test_float16_stays_with_our_nodes(tmp_path: Path) -> None:
    x = torch.randn(3, 64).half()
    program = compiled(nn.Linear(64, 9).half(), (x,), "int4/group32")
    for name in ("auto", "standard"):
        session = run(program, tmp_path / "m.onnx", name)
        assert set(operators(tmp_path / "m.onnx")) == {"LinearBias_int4"}
        assert difference(program, session, x) < 2e-3


@pytest.mark.parametrize("format", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("granularity", ["tensor", "group32", "group48", "block2x32"])
def test_embeddings_are_gathered_exactly(format: str, granularity: str, tmp_path: Path) -> None:
    for width in (32, 40):
        model = nn.Embedding(23, width)
        rules = (LayerRule("*", parse_spec(f"{format}/{granularity}"), types=EVERYTHING),)
        ids = torch.randint(0, 23, (2, 7))
        program = compiled(model, (ids,), rules=rules)
        session = run(program, tmp_path / "m.onnx")
        assert operators(tmp_path / "m.onnx")["GatherBlockQuantized"] == 1
        assert difference(program, session, torch.arange(23)[None].repeat(2, 1)) == 0.0
        assert session.run(None, {"input": ids[:, :0].numpy()})[0].shape == (2, 0, width)


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    rules = (LayerRule("*", parse_spec("int4/group16"), types=EVERYTHING),)

    class Wide(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(31, 64), nn.Linear(64, 31, bias=False)
            self.head.weight = self.embed.weight

    program = compiled(Wide(), (torch.randint(0, 31, (2, 7)),), rules=rules)
    session = run(program, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert sorted(len(t.raw_data) for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8) == [
        31 * 32
    ]
    assert difference(program, session, torch.randint(0, 31, (1, 4))) < 1e-5


@pytest.mark.parametrize(
    "spec", ["e4m3/channel", "e5m2/tensor", "e4m3fnuz/group8", "int8/channel", "uint8/group9", "mxfp8"]
)
def test_dequantize_linear_where_nothing_else_is(spec: str, tmp_path: Path) -> None:
    image = torch.randn(2, 3, 16, 16)
    program = compiled(Cnn(), (image,), spec)
    session = run(program, tmp_path / "m.onnx", "standard")
    found = operators(tmp_path / "m.onnx")
    assert found["DequantizeLinear"] >= 2
    assert not [n for n in found if n.partition("_")[0] in ("Linear", "LinearBias", "Conv2d")]
    assert difference(program, session, torch.randn(3, 3, 16, 16)) < 2e-5


def test_fp8_linears_by_standard_operators(tmp_path: Path) -> None:
    for spec in ("e4m3/channel", "e5m2/group8", "e4m3fnuz/group5", "e4m3/tensor"):
        program = compiled(Mlp(), (torch.randn(3, 22),), spec)
        session = run(program, tmp_path / "m.onnx", "standard")
        assert set(operators(tmp_path / "m.onnx")) <= {"DequantizeLinear", "Transpose", "MatMul", "Add", "Gelu"}
        assert difference(program, session, torch.randn(4, 22)) < 1e-5


def test_formats_without_an_operator_stay_ours(tmp_path: Path) -> None:
    program = compiled(Mlp(), (torch.randn(3, 22),), "e3m2/channel")
    session = run(program, tmp_path / "m.onnx", "standard")
    assert set(operators(tmp_path / "m.onnx")) == {"LinearBias_e3m2", "Linear_e3m2", "Gelu"}
    assert difference(program, session, torch.randn(4, 22)) < 1e-5


@pytest.mark.parametrize(("spec", "name"), [("int4/group16", "auto"), ("uint8/channel", "standard")])
def test_llama(spec: str, name: str, tmp_path: Path) -> None:
    program = compiled(tiny_llama(), {"input_ids": tokens(2, 8)}, spec)
    session = run(program, tmp_path / "m.onnx", name)
    for batch, length in ((1, 1), (3, 37)):
        assert difference(program, session, input_ids=tokens(batch, length)) < 1e-5


# --- memory ---------------------------------------------------------------------------------------------------------
def folded(path: Path) -> dict[str, int]:
    """Bytes of every initializer once onnxruntime has optimized the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".folded"))
    onnxruntime.InferenceSession(str(path), options)
    held = onnx.load(path.with_suffix(".folded")).graph.initializer
    return {t.name: len(t.raw_data) for t in held}


@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group8", "uint5/group8", "e4m3/channel"])
def test_weights_stay_packed_where_memory_counts(spec: str, tmp_path: Path) -> None:
    program = compiled(nn.Linear(512, 64), (torch.randn(3, 512),), spec)
    sessions = {name: run(program, tmp_path / f"{name}.onnx", optimize_for=name) for name in ("speed", "memory")}
    for session in sessions.values():
        assert difference(program, session, torch.randn(4, 512)) < 1e-5
    packed = folded(tmp_path / "memory.onnx")
    assert packed["weight_packed"] == 512 * 64 * parse_spec(spec).format.bits // 8
    assert max(packed.values()) < 512 * 64 * 4 // 2
    assert max(folded(tmp_path / "speed.onnx").values()) == 512 * 64 * 4


# --- options --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "value"), [("operators", "native"), ("activation_bits", 4), ("optimize_for", "size")])
def test_unknown_options(name: str, value: Any) -> None:
    with pytest.raises(ExportError, match=f"{name} is {value!r}; expected"):
        Options(**{name: value})
