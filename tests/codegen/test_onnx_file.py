"""Files: weights beside the graph, failed writes, what is not a model, and what is wrong when a file runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_onnx_export import Mlp, Tokens, compiled, difference, exported
from torch import nn

from fxquant.codegen import onnx_file
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.errors import ExportError, SaveError
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.rewrite import attach, detach
from fxquant.scheme import LayerRule, parse_spec


def program(width: int = 64) -> Program:
    return compiled(Mlp(width), (torch.randn(3, width),))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- weights beside the graph -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_more_than_2_gb(tmp_path: Path) -> None:
    """A table of 2.2 GB in float32 and a packed linear: weights go to a file of their own without being asked to."""
    model = nn.Sequential(nn.Embedding(540_000, 1024, _weight=torch.zeros(540_000, 1024)), nn.Linear(1024, 8))
    with torch.no_grad():
        model[0].weight[[0, 1, 539_999]] = torch.randn(3, 1024)
    ids = torch.tensor([[0, 1], [539_999, 7]])
    big = compiled(model, (ids,))
    session = exported(big, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1e5
    assert (tmp_path / "m.onnx.data").stat().st_size > 2**31
    assert difference(big, session, ids) < 1e-5
    with pytest.raises(SaveError, match="do not fit into one file"):
        export_onnx(big, tmp_path / "n.onnx", external_data=False)
    del session
    (tmp_path / "m.onnx.data").unlink()  # pytest keeps folders of several runs


def test_weights_of_standard_operators_go_there_too(tmp_path: Path) -> None:
    given = compiled(nn.Linear(512, 64), (torch.randn(3, 512),), "int4/group32:e8m0")
    session = exported(given, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size >= 512 * 64 // 2
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    assert difference(given, session, torch.randn(2, 512)) < 1e-5


@pytest.mark.parametrize("call", ["save", "first", "second"])
def test_a_failed_write_leaves_the_old_file_and_its_weights(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the new files are written, while the weights are moved, and while the graph is."""
    export_onnx(program(), tmp_path / "m.onnx", external_data=True)
    before, replace, calls = contents(tmp_path), os.replace, list[Path]()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    def fails_once(source: Path, target: Path) -> None:
        moves_new = Path(source).suffix != ".old" and Path(target).parent == tmp_path
        calls.extend([Path(target)] if moves_new else [])
        if moves_new and len(calls) == ("first", "second").index(call) + 1:
            fail()
        replace(source, target)

    if call == "save":
        monkeypatch.setattr(onnx_file.ir, "save", fail)
    else:
        monkeypatch.setattr(onnx_file.os, "replace", fails_once)
    with pytest.raises(SaveError, match="no space left"):
        export_onnx(program(96), tmp_path / "m.onnx", external_data=True)
    assert contents(tmp_path) == before


def test_weights_of_a_replaced_file_go_with_it(tmp_path: Path) -> None:
    export_onnx(program(), tmp_path / "m.onnx", external_data=True)
    export_onnx(program(), tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    (tmp_path / "m.onnx.data").write_text("something else")  # this file does not name it
    export_onnx(program(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_text() == "something else"


# --- what is wrong when a file is made --------------------------------------------------------------------------------
def packed_linear(given: Program) -> Any:
    return next(n for n in given.gm.graph.nodes if n.target is ops.linear_wq.default)


def test_bytes_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    given = program()
    node = packed_linear(given)
    node.args = (*node.args[:6], [17, 60])
    with pytest.raises(
        ExportError, match=rf"node '{node.name}'.*cannot be written in ONNX: a weight of shape \[17, 60\]"
    ):
        export_onnx(given, tmp_path / "m.onnx")


def test_columns_that_do_not_fit_the_weight(tmp_path: Path) -> None:
    given = compiled(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), (torch.randn(3, 8),))
    first, second = [n for n in given.gm.graph.nodes if n.target is ops.linear_wq.default]
    second.args = (first.args[0], *second.args[1:])
    with pytest.raises(ExportError, match=rf"node '{second.name}'.*x has 8 columns, its weight 6"):
        export_onnx(given, tmp_path / "m.onnx")


def test_a_spec_that_does_not_parse(tmp_path: Path) -> None:
    given = program()
    node = packed_linear(given)
    node.args = (*node.args[:5], "e9m9/channel", node.args[6])
    with pytest.raises(ExportError, match=rf"node '{node.name}'.*unknown format 'e9m9'"):
        export_onnx(given, tmp_path / "m.onnx")


def test_packed_bytes_that_are_no_matrix(tmp_path: Path) -> None:
    given = program()
    target = str(packed_linear(given).args[1].target)
    value = given.gm.get_buffer(target).reshape(-1)
    detach(given.gm, target)
    attach(given.gm, target, value)
    with pytest.raises(ExportError, match="expected a matrix with a fixed number of rows"):
        export_onnx(given, tmp_path / "m.onnx")


# --- what is wrong when a file runs -----------------------------------------------------------------------------------
@pytest.mark.parametrize("operators", ["auto", "standard"])
@pytest.mark.parametrize("spec", ["e3m2/channel", "int4/group16"])
def test_inputs_that_do_not_fit_are_named(spec: str, operators: str, tmp_path: Path) -> None:
    given = compiled(nn.Linear(22, 5), (torch.randn(3, 22),), spec)
    session = exported(given, tmp_path / "m.onnx", options=Options(operators))  # type: ignore[arg-type]
    for x, what in (
        (np.zeros((3, 21), np.float32), "Got invalid dimensions for input: input"),
        (np.zeros((3, 22, 1), np.float32), "Invalid rank for input: input"),
        (np.zeros((3, 22), np.float64), "Unexpected input data type"),
    ):
        with pytest.raises(Exception, match=what):
            session.run(None, {"input": x})
    with pytest.raises(ValueError, match=r"Required inputs \(\['input'\]\) are missing"):
        session.run(None, {})
    assert session.run(None, {"input": np.zeros((0, 22), np.float32)})[0].shape == (0, 5)
    for bad in (np.nan, np.inf):
        x = np.ones((2, 22), np.float32)
        x[0, 3] = bad
        y = session.run(None, {"input": x})[0]
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1]).all()


def embedding(spec: str, path: Path) -> onnxruntime.InferenceSession:
    rules = (LayerRule("*", parse_spec(spec), types=("embedding", "linear")),)
    return exported(compiled(Tokens(), (torch.randint(0, 31, (2, 7)),), rules=rules), path)


def test_token_ids_out_of_range_are_named(tmp_path: Path) -> None:
    session = embedding("e3m2/channel", tmp_path / "m.onnx")
    for token in (31, -32, 2**40):
        with pytest.raises(Exception, match=r"Embedding_e3m2_rows_of_indices.*out of data bounds, idx="):
            session.run(None, {"ids": np.array([[token]])})


def test_token_ids_out_of_range_are_zeros_where_the_runtime_gathers(tmp_path: Path) -> None:
    """GatherBlockQuantized reads nothing outside of its table, and raises nothing."""
    session = embedding("int4/group16", tmp_path / "m.onnx")
    for token in (31, -32, 2**40):
        assert not session.run(None, {"ids": np.array([[token]])})[0].any()


def test_a_truncated_initializer_is_refused(tmp_path: Path) -> None:
    export_onnx(program(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "up.weight_packed")
    tensor.raw_data = tensor.raw_data[:-1]
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(Exception, match=r"up\.weight_packed"):
        onnxruntime.InferenceSession(tmp_path / "bad.onnx")


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    export_onnx(program(), tmp_path / "m.onnx", external_data=True)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(Exception, match=r"m\.onnx\.data"):
        onnxruntime.InferenceSession(tmp_path / "m.onnx")


def test_columns_that_do_not_fit_in_the_file(tmp_path: Path) -> None:
    """A node whose attribute was changed by hand: onnxruntime's error names its operator and what it was doing."""
    export_onnx(program(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    node = next(n for n in model.graph.node if n.op_type == "Linear_e3m2")
    next(a for a in node.attribute if a.name == "cols").i = 16
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(Exception, match="_inlfunc_Linear_e3m2_decode"):
        onnxruntime.InferenceSession(tmp_path / "bad.onnx").run(None, {"x": np.zeros((1, 64), np.float32)})
