"""A hostile, damaged or foreign folder gives a LoadError that says what is wrong, and nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from test_store import CONFIG, net

from fxquant import document
from fxquant.errors import LoadError, SaveError
from fxquant.rewrite import tensors
from fxquant.store import load, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that tests copy and damage."""
    folder = tmp_path_factory.mktemp("store") / "model"
    save(net("uint4/group8")[0], folder, config=CONFIG)
    return folder


Change = Callable[[Any], None]


def at(*path: Any, to: Any) -> Change:
    """The document with the value at ``path`` replaced."""

    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = to

    return change


def node(which: str, /, **changes: Any) -> Change:
    """The document with some fields of a node replaced."""

    def change(found: Any) -> None:
        next(n for n in found["nodes"] if n["name"] == which).update(changes)

    return change


def argument(name: str, i: int, value: Any) -> Change:
    def change(found: Any) -> None:
        next(n for n in found["nodes"] if n["name"] == name)["args"][i] = value

    return change


def renamed(old: str, new: str) -> Change:
    """The document with the tensor ``old`` called ``new`` in its table."""

    def change(found: Any) -> None:
        found["tensors"][new] = found["tensors"].pop(old)

    return change


def relu_first(found: Any) -> None:
    found["nodes"].sort(key=lambda n: n["name"] != "relu")


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def weight(key: str, value: Any) -> Change:
    """The document with one figure of a quantized weight replaced."""

    def change(found: Any) -> None:
        next(n for n in found["nodes"] if "weight" in n.get("info", {}))["info"]["weight"][key] = value

    return change


BIG = 2**62
HOSTILE: dict[str, tuple[Change, str]] = {
    "os.system": (node("relu", target="os.system"), r"'os\.system' is not one"),
    "torch.load": (node("relu", target="torch.load"), r"'torch\.load' is not one"),
    "eval": (node("relu", target="builtins.eval"), "is not one"),
    "from_file": (node("relu", target="aten.from_file.default"), r"aten\.from_file\.default.* is not one"),
    "in-place": (node("relu", target="aten.relu_.default"), "is not one"),
    "out=": (node("relu", target="aten.relu.out"), "writes to its arguments"),
    "overload": (node("relu", target="aten.relu.__class__"), "has no operator"),
    "packet": (node("relu", target="aten.relu"), "is not one"),
    "namespace": (node("relu", target="fxquant.__class__.x"), "is not one"),
    "call_module": (node("relu", op="call_module"), "unknown op 'call_module'"),
    "call_method": (node("relu", op="call_method", target="backward"), "unknown op"),
    "node named __class__": (node("relu", name="__class__"), "has the name '__class__'"),
    "node named by code": (node("relu", name="x = __import__('os')"), "has the name"),
    "node named print": (node("relu", name="print"), "reserved or was used before"),
    "node named twice": (node("relu", name="x"), "reserved or was used before"),
    "node named for": (node("relu", name="for"), "has the name 'for'"),
    "input named self": (node("x", target="self"), "cannot be called 'self'"),
    "attribute path": (renamed("mix", "a.__class__.b"), r"tensor name 'a\.__class__\.b'"),
    "attribute with quote": (renamed("mix", 'a");print("'), "tensor name"),
    "attribute up": (renamed("mix", "../mix"), "tensor name"),
    "attribute of a module": (renamed("mix", "forward"), "reserved"),
    "attribute of a graph module": (renamed("mix", "_graph"), "reserved"),
    "attribute in modules": (renamed("mix", "conv._modules.x"), "reserved"),
    "attribute in a tensor": (renamed("mix", "conv.bias.x"), "has the name of a module"),
    "long attribute": (renamed("mix", "a." * 5000 + "a"), "tensor name"),
    "keyword attribute": (renamed("mix", "a.class.b"), "tensor name"),
    "forward reference": (argument("relu", 0, {"node": "linear"}), "does not come earlier"),
    "own reference": (argument("relu", 0, {"node": "relu"}), "does not come earlier"),
    "no such node": (argument("relu", 0, {"node": ["x"]}), "does not come earlier"),
    "order": (relu_first, "does not come earlier"),
    "too many arguments": (node("relu", args=[{"node": "x"}, 1]), "takes 1 positional"),
    "too few arguments": (node("relu", args=[]), "missing its argument 'self'"),
    "unknown argument": (node("relu", kwargs={"**{}": 1}), "has no argument"),
    "argument given twice": (node("relu", kwargs={"self": 1}), "twice"),
    "argument kind": (argument("relu", 0, {"code": "1"}), "unknown kind 'code'"),
    "two kinds": (argument("relu", 0, {"dtype": "float32", "node": "x"}), "expected one key"),
    "deep argument": (argument("relu", 0, deep(100)), "nested deeper"),
    "dtype": (argument("relu", 0, {"dtype": "Storage"}), "unknown dtype 'Storage'"),
    "device": (argument("relu", 0, {"device": "fpga"}), "unknown kind 'device'"),
    "huge number": (argument("relu", 0, 10**30), "whole number"),
    "unknown key": (at("extra", to=1), "unknown key 'extra'"),
    "unknown key of a node": (node("relu", code="x"), "unknown key 'code'"),
    "missing key": (lambda d: d.pop("trace") and None, "has no 'trace'"),
    "version 99": (at("version", to=99), "format version 99.*upgrade"),
    "version text": (at("version", to="1"), "format version is '1'"),
    "not ours": (at("format", to="onnx"), "not the graph of a saved fxquant model"),
    "no nodes": (at("nodes", to=[]), "no nodes"),
    "no output": (lambda d: d["nodes"].pop() and None, "output must be the last"),
    "nodes is text": (at("nodes", to="x"), "expected a list"),
    "node is a list": (at("nodes", 0, to=[]), "expected an object"),
    "input renamed": (at("signature", "inputs", 0, "name", to="y"), "inputs"),
    "input retyped": (at("signature", "inputs", 0, "type", "dtype", to="int64"), "int64"),
    "size code": (at("signature", "inputs", 0, "type", "shape", 0, to="__import__('os')"), "a size of input 'x'"),
    "size power": (at("signature", "inputs", 0, "type", "shape", 0, to="9**9**9**9"), "a size of input 'x'"),
    "size negative": (at("signature", "inputs", 0, "type", "shape", 0, to=-1), "whole number from 0"),
    "output index": (at("signature", "output", "items", 0, to=7), "whole number from 0 to 2"),
    "output kind": (at("signature", "output", "kind", to="type"), "expected dict with keys, list or tuple"),
    "output keys": (at("signature", "output", "keys", to=["a"]), "keys for"),
    "fixed": (at("signature", "fixed", to={"a": [1]}), "fixed inputs"),
    "config": (at("config", to=[1]), "config is not an object"),
    "tie to nothing": (at("tensors", "mix", to={"same_as": "x"}), "is tied to 'x'"),
    "tie to itself": (at("tensors", "mix", to={"same_as": "mix"}), "is tied to 'mix'"),
    "missing tensor": (at("tensors", "more", to={"dtype": "float32", "shape": [1]}), "'more' is missing"),
    "extra tensor": (lambda d: d["tensors"].pop("mix") and None, "'mix' is there, but not in the graph"),
    "unread tensor": (at("tensors", "more", to={"same_as": "mix"}), "'more' is in the table.*no node reads it"),
    "order of dimensions": (at("tensors", "mix", "order", to=[0, 0]), "expected the dimensions"),
    "other order": (at("tensors", "mix", "order", to=[0, 1]), r"'mix' is float32\[5, 7\]"),
    "wrong dtype": (at("tensors", "mix", "dtype", to="float16"), r"'mix' is float32.*says float16\[5, 7\]"),
    "wrong shape": (at("tensors", "mix", "shape", to=[5, 7]), r"'mix' is .*; the graph says float32\[7, 5\]"),
    "huge tensor": (at("tensors", "mix", "shape", to=[BIG, BIG]), "the graph says"),
    "symbolic tensor": (at("tensors", "mix", "shape", to=["n", 5]), "the graph says"),
    "huge weight": (argument("linear", 6, [5, BIG]), "weight shape"),
    "overflowing weight": (argument("linear", 6, [2**39, 2**39]), "weight shape"),
    "negative weight": (argument("linear", 6, [-5, -8]), "weight shape"),
    "empty weight": (argument("linear", 6, [0, 8]), "weight shape"),
    "wider weight": (argument("linear", 6, [5, 16]), r"packed codes have shape \[5, 4\].*wants \[5, 8\]"),
    "more rows": (argument("linear", 6, [10, 4]), "5 rows do not make a weight"),
    "other rank": (argument("linear", 6, [5, 2, 4]), "5 rows do not make a weight"),
    "other bits": (argument("linear", 5, "uint6/group8"), "packed codes have shape"),
    "other granularity": (argument("linear", 5, "uint4/group4"), "scale is"),
    "no zero point": (argument("linear", 3, None), "needs a zero point"),
    "spec code": (argument("linear", 5, "e3m2/__import__('os')"), "unknown granularity"),
    "long spec": (argument("linear", 5, "int" + "9" * 5000), "at most 4096 characters"),
    "weight not constant": (argument("linear", 1, {"node": "relu"}), "not a tensor of the model"),
    "weight info": (at("nodes", -2, "info", to={"weight": {}}), "has no 'weight'"),
    "None for a tensor": (argument("relu", 0, None), "takes Tensor as 'self', got 'None'"),
    "text for a tensor": (argument("relu", 0, "x"), "takes Tensor as 'self', got 'x'"),
    "list for a tensor": (argument("relu", 0, [{"node": "x"}]), "takes Tensor as 'self'"),
    "dtype for a tensor": (argument("relu", 0, {"dtype": "float32"}), "takes Tensor as 'self'"),
    "text for a number": (argument("masked_fill", 2, "x"), "as 'value', got 'x'"),
    "tensor for a size": (argument("mean", 1, {"node": "x"}), "as 'dim', got 'x'"),
    "None in a list": (argument("mean", 1, [2, None]), "as 'dim'"),
    "number for a dtype": (argument("to", 1, 1), "as 'dtype', got '1'"),
    "number for a spec": (argument("linear", 5, 3), "as 'spec', got '3'"),
    "text for a bias": (argument("linear", 4, "x"), "as 'bias', got 'x'"),
    "three strides": (argument("conv2d", 7, [1, 1, 1]), "its stride is .*expected two sizes of at least 1"),
    "stride of 0": (argument("conv2d", 7, [0, 1]), "its stride is"),
    "negative padding": (argument("conv2d", 8, [-1, 1]), "its padding is"),
    "no groups": (argument("conv2d", 10, 0), "its groups are 0"),
    "operand by name": (node("relu", args=[], kwargs={"self": {"node": "x"}}), "missing its argument 'self'"),
    "nested output": (at("nodes", -1, "args", 0, "tuple", 0, to=[{"node": "x"}]), "output 0 is .*expected one value"),
    "output too many": (lambda d: d["nodes"][-1]["args"][0]["tuple"].append(1), r"holds the outputs .*the graph gives"),
    "output twice": (at("signature", "output", "items", 1, "items", 0, to=0), "holds the outputs"),
    "output left out": (at("signature", "output", to=0), "holds the outputs"),
    "output key": (at("signature", "output", "keys", to=[1.5, "a"]), "a key of the output"),
    "no float bytes": (weight("float_nbytes", 0), "whole number from 1"),
    "negative bytes": (weight("nbytes", -1), "whole number from 0"),
    "negative error": (weight("error", -0.5), "is -0.5; expected a finite number, at least 0"),
    "endless error": (weight("error", {"float": "inf"}), "is inf; expected a finite number"),
    "error of nothing": (weight("error", {"float": "nan"}), "is nan; expected a finite number"),
    "a time": (at("trace", "steps", 0, "seconds", to=0.5), "a step has an unknown key 'seconds'"),
    "no times of version 1": (at("version", to=1), "a step has no 'seconds'"),
    "trace line": (at("trace", "steps", 0, "text", to=[10**6]), "a line of step"),
    "trace blow-up": (lambda d: d["trace"].update(lines=["x" * 10**6], steps=[
        {**s, "text": [0] * 400} for s in d["trace"]["steps"]]), "more than"),
    "many nodes": (lambda d: d.update(nodes=d["nodes"][:1] * 50_001), "nodes; at most 50000 are read"),
    "many tensors": (lambda d: d["tensors"].update({f"t{i}": None for i in range(100_001)}), "tensors; at most 100000"),
    "trace rows": (at("trace", "steps", 0, "rewrites", to=[["a"]]), "not four texts"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    found = json.loads((saved / "graph.json").read_text())
    change(found)
    shutil.copytree(saved, tmp_path / "m")
    (tmp_path / "m" / "graph.json").write_text(json.dumps(found))
    with pytest.raises(LoadError, match=message) as caught:
        load(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    assert "cannot be read" not in str(caught.value)  # each is foreseen, none is caught by the last net


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "nested too deep|not valid JSON"),
        ('{"format": "fxquant", "format": "fxquant"}', "key twice"),
        ("[" + "[]," * (1 << 22) + "0]", "4194305 brackets; at most 4194304"),
        ('{"format": NaN}', "NaN"),
        ('{"format": ' + "9" * 5000 + "}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("[]", "not the graph of"),
        ("null", "not the graph of"),
    ],
)
def test_a_graph_that_is_no_document_is_refused(
    content: str | bytes, message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "m")
    (tmp_path / "m" / "graph.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m")


def test_a_number_too_large_for_a_float_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    content = (saved / "graph.json").read_text().replace('"ratio":0.5', '"ratio":1e999')
    (tmp_path / "m" / "graph.json").write_text(content)
    with pytest.raises(LoadError, match="config"):
        load(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.3, 0.9, -1])
def test_truncated_tensors_are_refused(keep: float, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    content = (saved / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(
        content[: keep if isinstance(keep, int) else int(keep * len(content))]
    )
    with pytest.raises(LoadError, match=r"model\.safetensors.*not a valid safetensors file"):
        load(tmp_path / "m")


def test_every_truncation_of_the_graph_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    content = (saved / "graph.json").read_bytes()
    for keep in range(0, len(content), len(content) // 40):
        (tmp_path / "m" / "graph.json").write_bytes(content[:keep])
        with pytest.raises(LoadError, match=r"graph\.json"):
            load(tmp_path / "m")


HEADERS = {
    "huge header": (struct.pack("<Q", 2**63), "claims"),
    "no header": (struct.pack("<Q", 2) + b"{}", "is missing"),
    "header is a list": (struct.pack("<Q", 2) + b"[]", "not a valid safetensors"),
    "overflow": ({"mix": {"dtype": "F32", "shape": [BIG, BIG], "data_offsets": [0, 4]}}, "not a valid safetensors"),
    "negative": ({"mix": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "not a valid safetensors"),
    "hole": ({"mix": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "not a valid safetensors"),
    "64-bit size": ({"mix": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, "not a valid safetensors"),
    "misaligned": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                    "mix": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}, "multiple of its element size"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_tensor_file_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    shutil.copytree(saved, tmp_path / "m")
    if isinstance(header, dict):
        text_ = json.dumps(header).encode()
        text_ += b" " * (-len(text_) % 8)
        header = struct.pack("<Q", len(text_)) + text_ + bytes(8 if case != "misaligned" else 5)
    (tmp_path / "m" / "model.safetensors").write_bytes(header)
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("head.weight_scale", float("nan"), "positive finite"),
        ("head.weight_scale", float("inf"), "positive finite"),
        ("head.weight_scale", -1.0, "positive finite"),
        ("head.weight_scale", 0.0, "positive finite"),
        ("head.weight_zero_point", 200, "a zero point is 200"),
    ],
)
def test_values_outside_their_range_are_refused(
    tensor: str, value: float, message: str, saved: Path, tmp_path: Path
) -> None:
    program, config = load(saved)
    stored = document.encode(program, config)[1]
    stored[tensor] = stored[tensor].clone()
    stored[tensor][-1, -1] = value
    shutil.copytree(saved, tmp_path / "m")
    save_file(stored, tmp_path / "m" / "model.safetensors")
    with pytest.raises(LoadError, match=f"weight 'head.weight_packed': .*{message}"):
        load(tmp_path / "m")


def test_codes_outside_their_format_are_refused(tmp_path: Path) -> None:
    program, _ = net(lowered=False)
    tensors(program.gm)["head.weight_codes"][0, 0] = 64
    with pytest.raises(SaveError, match=r"head\.weight_codes.*a code is 64"):
        save(program, tmp_path / "m", config={})


def test_a_planted_pickle_is_never_loaded(saved: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    for name in ("model.safetensors", "graph.json"):
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(saved, folder)
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(LoadError, match=name):
            load(folder)
    shutil.copytree(saved, tmp_path / "beside")
    for name in ("model.pt", "pytorch_model.bin", "model.pkl"):
        (tmp_path / "beside" / name).write_bytes(pickle.dumps(Payload()))
    load(tmp_path / "beside")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("timings", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "a list of 0; expected an object with seconds"),
        ('{"seconds": [], "more": 1}', "unknown key 'more'"),
        ('{"seconds": []}', "not those of the passes"),
        ('{"seconds": [["normalize"], ["insert_qdq"], ["remove_dead"], ["lower"], ["remove_dead"]]}', "not those of"),
        ('{"seconds": [["a", 0.5], ["b", 0.5], ["c", 0.5], ["d", 0.5], ["e", 0.5]]}', "not those of the passes"),
        ('{"seconds": [["FIRST", -0.5], ...]}', "is -0.5; expected a finite number"),
        ('{"seconds": [["FIRST", 1e999], ...]}', "expected a number"),
        ('{"seconds": [["FIRST", "1"], ...]}', "is '1'; expected a number"),
    ],
)
def test_damaged_times_are_refused(timings: str, message: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    names = [step["name"] for step in json.loads((saved / "graph.json").read_text())["trace"]["steps"]]
    rest = ", ".join(f'["{name}", null]' for name in names[1:])
    (tmp_path / "m" / "timings.json").write_text(timings.replace("...", rest).replace("FIRST", names[0]))
    with pytest.raises(LoadError, match=f"timings.json: .*{message}"):
        load(tmp_path / "m")
    (tmp_path / "m" / "timings.json").write_text(f'{{"seconds": [["{names[0]}", 0.5], {rest}]}}')
    assert load(tmp_path / "m")[0].trace[0].seconds == 0.5


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "timings.json"])
def test_links_out_of_the_folder_are_not_followed(name: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    (tmp_path / "m" / name).rename(tmp_path / name)
    (tmp_path / "m" / name).symlink_to(tmp_path / name)
    with pytest.raises(LoadError, match=f"{name} is a symbolic link"):
        load(tmp_path / "m")


def test_what_is_not_a_saved_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="does not exist; give a folder"):
        load(tmp_path / "none")
    with pytest.raises(LoadError, match=r"graph\.json does not exist; give a folder"):
        load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match="is not a folder"):
        load(tmp_path / "file")
    with pytest.raises(LoadError, match="cannot be read"):
        load("nul\0byte")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "graph.json")
    with pytest.raises(LoadError, match="not a regular file"):
        load(tmp_path / "fifo")
