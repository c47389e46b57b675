"""Model Explorer: what is written loads into its own classes, loses nothing there, and names the graph's nodes."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tied
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.errors import SaveError
from fxquant.show import explorer

RULES = {"rules": [{"match": "up", "keep": True}, {"match": "*", "weight": "e3m2/channel", "activation": "e4m3/token"}]}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture(scope="module")
def compiled(model: torch.nn.Module) -> fxquant.CompiledModel:
    return fxquant.compile(model, {"tokens": torch.randint(0, 50, (2, 5))}, RULES)


def build(kind: Any, value: Any) -> Any:
    """``value`` as an instance of Model Explorer's class ``kind``; TypeError for keys it does not have."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{k: build(hints[k], v) for k, v in value.items()})  # type: ignore[operator]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [build(inner[0], v) for v in value]
    if origin is dict:
        return {k: build(inner[1], v) for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        plain = next((t for t in inner if isinstance(t, type) and isinstance(value, t)), None)
        return value if plain is not None else build(next(t for t in inner if t is not type(None)), value)
    if origin is typing.Literal:
        assert value in inner
        return value
    assert isinstance(value, kind), (kind, value)
    return value


def filled(made: Any, given: Any) -> Any:
    """``made`` without the defaults that ``given`` does not name."""
    if isinstance(given, dict):
        return {k: filled(made[k], v) for k, v in given.items()}
    return [filled(a, b) for a, b in zip(made, given, strict=True)] if isinstance(given, list) else made


def test_graphs_load_into_its_classes(compiled: fxquant.CompiledModel) -> None:
    builder = pytest.importorskip("model_explorer.graph_builder")
    written = explorer.collection(compiled.program, "tied")
    loaded = build(builder.GraphCollection, written)
    assert filled(dataclasses.asdict(loaded), written) == written
    assert [g.id for g in loaded.graphs][:2] == ["final", "after 06 remove_dead#2"]
    assert sorted((g.id for g in loaded.graphs), reverse=True) == [g.id for g in loaded.graphs]  # as they are listed
    assert loaded.graphs[-1].id == "after 00 capture"


def test_every_edge_leads_to_a_node(compiled: fxquant.CompiledModel) -> None:
    for graph in explorer.collection(compiled.program, "tied")["graphs"]:
        nodes = {node["id"] for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        assert {"tokens", "output", "linear", "embedding"} <= nodes
        for node in graph["nodes"]:
            assert {"id", "label", "namespace", "incomingEdges"} <= set(node)  # the viewer takes none of them as given
            assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= nodes


def test_the_last_pass_has_the_nodes_of_the_graph(compiled: fxquant.CompiledModel) -> None:
    final, last = explorer.collection(compiled.program, "tied")["graphs"][:2]
    for a, b in zip(final["nodes"], last["nodes"], strict=True):
        assert (a["id"], a["namespace"]) == (b["id"], b["namespace"])
        assert {e["sourceNodeId"] for e in a["incomingEdges"]} == {e["sourceNodeId"] for e in b["incomingEdges"]}


def test_nodes_say_what_they_are(compiled: fxquant.CompiledModel) -> None:
    nodes = {n["id"]: n for n in explorer.collection(compiled.program, "tied")["graphs"][0]["nodes"]}
    down = nodes["linear_1"]
    assert (down["label"], down["namespace"]) == ("linear_wq", "down")
    attrs = {item["key"]: item["value"] for item in down["attrs"]}
    assert attrs["format"] == "e3m2/channel, inputs e4m3/token"
    assert attrs["packed"] == "down.weight_packed: uint8[24, 30]"
    assert attrs["operator"] == "fxquant.linear_wq"
    assert down["outputsMetadata"][0]["attrs"][1] == {"key": "tensor_shape", "value": "float32[batch, sequence, 24]"}
    assert down["inputsMetadata"][0]["attrs"][0]["value"] == "x"
    up = {item["key"]: item["value"] for item in nodes["linear"]["attrs"]}
    assert up["stays in float"] == "rule 'up' keeps it in float"


def test_overlays_load_into_its_classes(compiled: fxquant.CompiledModel, model: torch.nn.Module) -> None:
    builder = pytest.importorskip("model_explorer.node_data_builder")
    found = explorer.overlays(compiled.program, compiled.compare(model))
    assert set(found) == {"error", "bits", "bytes", "local", "accumulated", "sqnr"}
    nodes = {n["id"] for n in explorer.collection(compiled.program, "tied")["graphs"][0]["nodes"]}
    for data in found.values():
        loaded = builder.ModelNodeData({k: build(builder.GraphNodeData, v) for k, v in data.items()})
        assert filled(json.loads(loaded.to_json_string()), data) == data
        assert set(data["final"]["results"]) <= nodes
        assert [stop["stop"] for stop in data["final"]["gradient"]] == [0.0, 0.5, 1.0]
    row = next(q for q in compiled.summary().layers if q.name == "down")
    assert row.error is not None
    assert found["error"]["final"]["results"][row.node]["value"] == 100 * row.error


def test_large_traces_are_cut(compiled: fxquant.CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "MOST_NODES", 60)
    assert len(explorer.collection(compiled.program, "tied")["graphs"]) < 1 + len(compiled.program.trace)


def test_command_writes_graphs_and_overlays(compiled: fxquant.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "out")
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--model-explorer", str(tmp_path / "tied.json")])
    assert run.exit_code == 0, run.output
    assert "model-explorer" in run.stderr
    names = {p.name for p in tmp_path.glob("*.json")}
    assert names == {"tied.json", "tied.error.json", "tied.bits.json", "tied.bytes.json"}
    assert json.loads((tmp_path / "tied.json").read_text())["label"] == "tied"
    with pytest.raises(SaveError, match=r"name it tied\.json"):
        compiled.model_explorer(tmp_path / "tied.graph")
