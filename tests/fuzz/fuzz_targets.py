"""What is fuzzed: every loader with what it is given, and what is done with what it loaded."""

from __future__ import annotations

import ast
import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import fuzz_seeds as seeds
import torch
from fuzz_engine import Target
from fuzz_mutate import WORDS, Case

import fxquant
from fxquant import dims
from fxquant.compiled import CompiledModel
from fxquant.errors import FormatError
from fxquant.formats import parse_format
from fxquant.scheme import parse_spec


# --- texts -----------------------------------------------------------------------------------------------------------
def load_config(folder: Path) -> None:
    """A config file, its rules as specs, and itself as plain data again."""
    (file,) = folder.iterdir()
    config = fxquant.load_config(file)
    config.layer_rules()
    assert fxquant.load_config(config.to_dict()) == config


GRAMMAR = (
    "e3m2/channel", "e2m1/group32:e8m0", "nvfp4", "mxfp6_e2m3", "int4/block16x64:fp16",
    "uint3/tensor", "e4m3fnuz/token",
    "ue5m3", "lut(-1,-0.5,0,1)/group8", "higgs4/group64:fp16", "e2m1b3", "e5m2ieee", "nf4",
    "(batch + 1)//2", "TruncToInt(1.7*ToFloat(batch))", "Max(1, sequence - 3)*ModularIndexing(a, 2, 3)", "2**(n % 5)",
    "-b + CeilDiv(a, 4)", "batch % 2 != 0", "sequence <= 3 + past", "a*b*c == 0",
)  # fmt: skip


def grammar_seeds(folder: Path) -> list[Case]:
    return [{"text.txt": text.encode()} for text in GRAMMAR]


def load_grammar(folder: Path) -> None:
    """A text as format, as spec, as size and as condition: each takes it, or says that it is none."""
    text = (folder / "text.txt").read_bytes().decode("utf-8", "replace")
    errors = []
    for parse in (parse_format, _spec, _size, _condition):
        try:
            parse(text)
        except (FormatError, ValueError) as error:
            errors.append(error)
    if len(errors) == 4:
        raise FormatError(str(errors[0]))


def _spec(text: str) -> None:
    """A spec means the same when it is written again, and its format's numbers are finite."""
    spec = parse_spec(text)
    assert parse_spec(str(spec)) == spec, f"{text!r} is written {str(spec)!r}, which is another spec"
    spec.format.decode(torch.arange(2, dtype=torch.uint8))


def _size(text: str) -> None:
    sizes = dict.fromkeys(dims.names(text), 3)
    dims.evaluate(text, sizes)


def _condition(text: str) -> None:
    dims.holds(text, dict.fromkeys(dims.condition_names(text), 2))


# --- saved models ----------------------------------------------------------------------------------------------------
def load_saved(folder: Path) -> None:
    """A saved model, everything that is shown of it, and its graph's generated code."""
    model = fxquant.load(folder)
    show(model)
    check_code(model.program.gm.code)


def show(model: CompiledModel) -> None:
    summary = model.summary()
    json.dumps(summary.to_dict(), allow_nan=False)
    for layer in summary.layers[:1]:
        model.explain(layer.name)
    str(summary)
    model.diff()


_CALLED = {"getattr", "slice", "float", "complex"}


def check_code(code: str) -> None:
    """Raise AssertionError unless the code of a graph is nothing but assignments of calls with plain arguments."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Lambda, ast.ClassDef, ast.JoinedStr, ast.While, ast.For)):
            raise AssertionError(f"generated code has a {type(node).__name__}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            plain = called in _CALLED or called.startswith(("torch.", "operator.", "math.", "_operator_", "builtins."))
            assert plain or called.isidentifier(), f"generated code calls {called[:200]}"
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__"), f"generated code reads {node.attr[:200]}"


# --- hostile names ---------------------------------------------------------------------------------------------------
_MARK = "<img src=x onerror=alert(1)>"


@cache
def _named() -> dict[str, Any]:
    return {key: json.loads(value) for key, value in _one_saved().items() if key == "graph.json"}


@cache
def _one_saved() -> Case:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        return seeds.saved(Path(name))[0]


def names_seeds(folder: Path) -> list[Case]:
    plain = [word for word in WORDS if len(word) < 256 and word.isprintable()]
    return [{"names.json": json.dumps(["0", "2", "input", "linear", "layer", word]).encode()} for word in plain]


def load_names(folder: Path) -> None:
    """A model whose layers, inputs, nodes and tensors have names from a file: its code, page, ONNX file and text."""
    try:
        names = json.loads((folder / "names.json").read_bytes().decode())
    except ValueError as error:
        raise FormatError("not JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) < 6:
        raise FormatError("not six names")
    document = json.dumps(_named()["graph.json"])
    tensors = _one_saved()["model.safetensors"]
    place = folder / "saved"
    place.mkdir()
    graph = json.loads(document)
    _rename(graph, names)
    (place / "graph.json").write_text(json.dumps(graph))
    (place / "model.safetensors").write_bytes(tensors)
    model = fxquant.load(place)
    check_code(model.program.gm.code)
    show(model)
    model.report(folder / "report.html", title=names[0])
    page = (folder / "report.html").read_text()
    for name in names:
        if "<" in name or "&" in name:
            assert f">{name}<" not in page, f"the page holds {name[:100]!r} as it is"
    assert _MARK not in page
    model.model_explorer(folder / "explorer.json")
    model.export_onnx(folder / "model.onnx")
    assert sorted(f.name for f in folder.iterdir() if not f.name.startswith("explorer")) == [
        "model.onnx", "names.json", "report.html", "saved",
    ]  # fmt: skip


def _rename(graph: Any, names: list[str]) -> None:
    """Give layers' paths, modules, sources and rules of the trace the names, in turn."""
    count = 0
    for node in graph["nodes"]:
        about = node.get("info", {})
        for key in ("path", "module", "source"):
            if key in about:
                about[key] = names[count % len(names)]
                count += 1
    for step in graph["trace"]["steps"]:
        step["name"] = names[count % len(names)][:200]
        for row in (*step["rewrites"], *step["declines"]):
            row[2:4] = names[count % len(names)], names[(count + 1) % len(names)]
        count += 1
    graph["trace"]["lines"] = [f"{line}{names[i % len(names)]}" for i, line in enumerate(graph["trace"]["lines"])]


# --- models of others ------------------------------------------------------------------------------------------------
def load_folder(folder: Path) -> None:
    """A Hugging Face folder, and one call of the model."""
    from fxquant.checkpoints import load_model

    load_model(folder)


def load_packed(folder: Path) -> None:
    """A folder of packed weights, and what they are as floats."""
    from fxquant.checkpoints import load_packed as load

    load(folder)


def load_gguf(folder: Path) -> None:
    from fxquant.checkpoints import load_model

    load_model(folder / "model.gguf")


def load_onnx(folder: Path) -> None:
    """What an ONNX file says of itself, and a session of it."""
    from fxquant.codegen.onnx_metadata import summarize
    from fxquant.evaluate import OnnxModel

    found = summarize(folder / "model.onnx")
    str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    OnnxModel(folder / "model.onnx", threads=1)


# --- data ------------------------------------------------------------------------------------------------------------
@cache
def _model() -> CompiledModel:
    return next(seeds.models())


def load_data(folder: Path) -> None:
    """What ``--data`` gives, and the accuracy of a model on it."""
    from fxquant import evaluate
    from fxquant.cli_measure import read_tensors

    found = read_tensors(folder / "data.safetensors")
    labels = found.pop("labels", None)
    if labels is None:
        evaluate.cosine(_model(), _model(), found)
    else:
        evaluate.accuracy(_model(), found, labels)


# --- unfinished jobs -------------------------------------------------------------------------------------------------
def load_journal(folder: Path) -> None:
    """A job that is continued: what it is, its results, its facts, and that it can be written on."""
    from fxquant.journal import Journal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Journal(folder, seeds.JOB, start="resume")
        try:
            for name in ("plain", "tensor", "quantized", "outer"):
                if (done := found.find(name)) is not None:
                    repr(done.result())
            for i in range(3):
                found.noted(f"layer.{i}")
            found.note("more", {"at": 3})
            found.record("new", [1])
            assert found.find("new") is not None
        finally:
            found.close()


TARGETS = {
    target.name: target
    for target in (
        Target("config", seeds.configs, load_config),
        Target("grammar", grammar_seeds, load_grammar),
        Target("graph", seeds.saved, load_saved, chosen=("graph.json", "timings.json", "manifest.json")),
        Target("weights", seeds.saved, load_saved, chosen=("model.safetensors",)),
        Target("names", names_seeds, load_names),
        Target("folder", seeds.language_model, load_folder),
        Target("packed", seeds.packed, load_packed),
        Target("gguf", seeds.gguf, load_gguf),
        Target("onnx", seeds.onnx, load_onnx),
        Target("data", seeds.data, load_data),
        Target("journal", seeds.journal, load_journal),
    )
}
"""Every loader by its name."""
