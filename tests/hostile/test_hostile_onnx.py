"""ONNX files whose protobuf lies: tensors without values, weights elsewhere, graphs and functions without end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import CommandError, Row, check, command

from fxquant.errors import FxquantError, ModelError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fxquant.codegen.onnx_metadata import summarize  # noqa: E402
from fxquant.codegen.ort_library import onnx_session  # noqa: E402
from fxquant.evaluate import OnnxModel  # noqa: E402

OWN = "own"


def model(
    nodes: list[Any] | None = None, weights: list[Any] | None = None, functions: list[Any] | None = None
) -> Any:  # fmt: skip
    """y = x + w, with other parts in the place of those given."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])] if nodes is None else nodes
    weights = [numpy_helper.from_array(np.ones(4, np.float32), "w")] if weights is None else weights
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [4])], [value("y", TensorProto.FLOAT, [4])], weights
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OWN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])


def weight(dims: list[int], data: bytes | None = b"", kind: int = 1, **place: str) -> Any:
    found = TensorProto(name="w", data_type=kind, dims=dims)
    if place:
        found.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            found.external_data.add(key=key, value=value)
    elif data is not None:
        found.raw_data = data
    return found


def function(name: str, *calls: str) -> Any:
    """y = calls of x, one after the other."""
    names = ["x", *(f"v{i}" for i in range(len(calls) - 1)), "y"]
    nodes = [
        helper.make_node(op, [names[i]], [names[i + 1]], domain=OWN if op.startswith("F") else "")
        for i, op in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OWN, 1)]
    return helper.make_function(OWN, name, ["x"], ["y"], nodes, opsets)


def calling(*functions: Any) -> Any:
    return model([helper.make_node("F0", ["x"], ["y"], domain=OWN)], [], list(functions))


def nested(depth: int) -> Any:
    """Conditions inside conditions."""
    value = helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])
    node = helper.make_node("Identity", ["x"], ["c"])
    for _ in range(depth):
        graph = helper.make_graph([node], "inner", [], [value])
        node = helper.make_node("If", ["x"], ["c"], then_branch=graph)
    node.output[0] = "y"
    return model([node])


def bad_property(found: Any, key: str, value: str) -> Any:
    found.metadata_props.add(key=key, value=value)
    return found


def written(content: Any) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        data = content if isinstance(content, bytes) else content.SerializeToString()
        (place / "m.onnx").write_bytes(data)
        return place / "m.onnx"

    return make


def beside(name: str, size: int, **place: str) -> Callable[[Path], Path]:
    """A weight in the file ``name``, which has ``size`` bytes."""

    def make(folder: Path) -> Path:
        (folder / "sub").mkdir()
        target = folder / "sub" / name
        if name and target.resolve().is_relative_to(folder):
            target.write_bytes(bytes(size))
        path = written(model(weights=[weight([4], location=name, **place)]))(folder)
        return Path(shutil.move(path, folder / "sub" / "m.onnx"))

    return make


def device(folder: Path) -> Path:
    (folder / "w.bin").symlink_to("/dev/zero")
    return written(model(weights=[weight([4], location="w.bin")]))(folder)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


def fifo_beside(folder: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return written(model(weights=[weight([4], location="w.bin")]))(folder)


def sparse(folder: Path) -> Path:
    (folder / "m.onnx").touch()
    os.truncate(folder / "m.onnx", 1 << 33)
    return folder / "m.onnx"


BIG = 2**62
GOOD = model().SerializeToString()
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (written(b""), "it has 0 bytes"),
    "text": (written(b"no model at all"), "is no protobuf|beyond its message"),
    "zip": (written(b"PK\x03\x04" + bytes(100)), "is no protobuf|beyond its message"),
    "cut": (written(GOOD[:-10]), "truncated"),
    "nothing but a length": (written(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), "beyond its message"),
    "endless varint": (written(b"\x08" + b"\xff" * 100), "is no protobuf"),
    "8 GB of zeros": (sparse, "it has 8589934592 bytes"),
    "FIFO": (fifo, "not a regular file"),
    "million of fields": (written(b"\x08\x01" * 1_200_000), "more than 1000000 fields"),
    "no graph": (written(b"\x08\x0a"), "holds 0 graphs"),
    "two graphs": (written(GOOD + GOOD), "holds 2 graphs"),
    "tensor of 2^40": (written(model(weights=[weight([2**40 - 1])])), "takes 4398046511100 bytes and has 0"),
    "sizes that overflow": (written(model(weights=[weight([2**33, 2**33])])), "takes 295147905179352825856 bytes"),
    "size of 2^62": (written(model(weights=[weight([BIG])])), "expected at most 64 below"),
    "negative size": (written(model(weights=[weight([-1])])), "expected at most 64 below"),
    "100 sizes": (written(model(weights=[weight([1] * 100, bytes(4))])), "expected at most 64"),
    "no values": (written(model(weights=[weight([4], None)])), "has no such values"),
    "too few values": (written(model(weights=[weight([4], bytes(8))])), "takes 16 bytes and has 8"),
    "unknown type": (written(model(weights=[weight([4], bytes(16), kind=99)])), "element type 99"),
    "texts that are missing": (written(model(weights=[weight([9], None, kind=8)])), "and 0 texts"),
    "values in an attribute": (
        written(model([helper.make_node("Constant", [], ["y"], value=weight([2**39]))])), "takes 2199023255552 bytes"),
    "weights above": (beside("../../etc/passwd", 16), r"lies in the file '\.\./\.\./etc/passwd'"),
    "weights with a root": (beside("/etc/passwd", 16), "lies in the file '/etc/passwd'"),
    "weights nowhere": (beside("", 16), "lies in the file ''"),
    "weights on a device": (device, "out of the folder"),
    "weights are a FIFO": (fifo_beside, "not a regular file"),
    "weights beyond their file": (beside("w.bin", 8), "ends beyond 'w.bin' of 8 bytes"),
    "offset beyond": (beside("w.bin", 16, offset="8"), "ends beyond"),
    "offset negative": (beside("w.bin", 16, offset="-8"), "its place in 'w.bin' is"),
    "offset in words": (beside("w.bin", 16, offset="__import__('os')"), "its place in 'w.bin' is"),
    "length of 2^62": (beside("w.bin", 16, length=str(BIG)), "its place in 'w.bin' is"),
    "function of itself": (written(calling(function("F0", "F0"))), "function 'F0' calls itself"),
    "functions in a circle": (
        written(calling(function("F0", "F1"), function("F1", "F2"), function("F2", "F0"))), "calls itself"),
    "functions doubling": (
        written(calling(*(function(f"F{i}", f"F{i + 1}", f"F{i + 1}") for i in range(40)), function("F40", "Neg"))),
        "nodes come of it"),
    "20 graphs inside each other": (written(nested(20)), "graphs inside each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_an_onnx_file_that_lies(case: str, tmp_path: Path) -> None:
    make, message = FILES[case]
    check(Row(make, OnnxModel, ModelError, message), tmp_path)


LOADED: dict[str, tuple[Any, str]] = {
    "unknown domain": (model([helper.make_node("Evil", ["x"], ["y"], domain="evil")], []), "cannot load"),
    "unknown operator": (model([helper.make_node("Evil", ["x"], ["y"])], []), "cannot load"),
    "no such input": (model([helper.make_node("Neg", ["z"], ["y"])], []), "cannot load"),
    "circle of nodes": (
        model([helper.make_node("Neg", ["z"], ["y"]), helper.make_node("Neg", ["y"], ["z"])], []), "cannot load"),
    "property is no JSON": (bad_property(model(), "empty", "{"), "property 'empty'"),
    "property is a list": (bad_property(model(), "empty", "[]"), "expected a dict of texts"),
    "property is deep": (bad_property(model(), "empty", "[" * 100_000), "nested too deep|property"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_what_onnxruntime_refuses_is_our_error(case: str, tmp_path: Path) -> None:
    found, message = LOADED[case]
    check(Row(written(found), OnnxModel, ModelError, message), tmp_path)
    if message == "cannot load":
        check(Row(written(found), lambda p: onnx_session(p, library=False), ModelError, message), tmp_path)


@pytest.mark.parametrize("case", ["cut", "weights above", "tensor of 2^40", "million of fields"])
@pytest.mark.parametrize("words", [("inspect", "FILE"), ("eval", "FILE", "--tokenizer", ".")])
def test_commands_say_the_same(case: str, words: tuple[str, ...], tmp_path: Path) -> None:
    make, message = FILES[case]
    check(Row(make, command(*words), CommandError, message if words[0] == "inspect" else "."), tmp_path)


def test_inspect_shows_no_escape_codes(tmp_path: Path) -> None:
    found = model([helper.make_node("Evil\x1b[2J", ["x"], ["y"], domain="\x1b]0;x\x07")])
    found.producer_name = "\x1b[31mred"
    bad_property(found, "fxquant.weights", '["\x1b[2J"]')
    bad_property(found, "fxquant.config", "\x1b[2J\u202e")
    told = str(summarize(written(found)(tmp_path)))
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert r"\x1b[31mred" in told
    assert r"\x1b[2J" in told


def test_the_file_that_they_are_made_of_is_good(tmp_path: Path) -> None:
    found = OnnxModel(written(model())(tmp_path))
    assert found.outputs == ["y"]
    (tmp_path / "w.bin").write_bytes(np.full(4, 2, np.float32).tobytes())
    path = written(model(weights=[weight([4], location="w.bin", offset="0", length="16")]))(tmp_path)
    feed = {"x": np.ones(4, np.float32)}
    assert OnnxModel(path).session.run(None, feed)[0].tolist() == [3, 3, 3, 3]
    (tmp_path / "w.bin").unlink()
    assert summarize(path).weights == {"FLOAT": 16}  # inspect reads no weights
    with pytest.raises(FxquantError, match=r"'w\.bin' is not there.*fetch it too"):
        OnnxModel(path)
