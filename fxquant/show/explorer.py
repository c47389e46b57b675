"""Model Explorer: a program as the JSON that Google's Model Explorer opens, and figures to lay over its nodes.

One graph collection: the graph as it is, and after each pass. Namespaces are module paths; constants are attributes of
what reads them, not nodes. An overlay is a file of node data: a figure for each layer, coloured from green to red.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from fxquant.errors import SaveError
from fxquant.graph import TensorType, info, type_text
from fxquant.program import Program, line, target_name
from fxquant.show.html import write_page
from fxquant.show.numerics import Comparison
from fxquant.show.summary import LayerSummary, Summary, labelled, named_arguments, ratio, summarize
from fxquant.show.units import percent, size

FINAL = "final"
"""The id of the graph as it is."""
MOST_NODES = 20_000
"""Nodes in the graphs of passes; those that would exceed it are left out."""
_SHOWN = 400
"""Characters of an attribute."""
_GRADIENT = (("#1f7a4d", 0.0), ("#f2c94c", 0.5), ("#b3261e", 1.0))
_LINE = re.compile(r"%(?P<node>\S+) (?:: (?P<type>.*?) )?= (?P<value>.*?)(?:  # (?P<path>\S+))?")


def write(program: Program, path: str | Path, comparison: Comparison | None = None) -> list[Path]:
    """Write the graphs to ``path`` and each overlay beside it (``model.error.json``); returns the files, the graphs'
    first. Raises SaveError for a name that does not end in .json, which Model Explorer would not open."""
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise SaveError(f"{path} does not end in .json, by which Model Explorer knows graphs; name it {path.stem}.json")
    found = [path]
    write_page(path, json.dumps(collection(program, path.stem), allow_nan=False))
    for name, data in overlays(program, comparison).items():
        found.append(path.with_suffix(f".{name}.json"))
        write_page(found[-1], json.dumps(data, allow_nan=False))
    return found


def collection(program: Program, label: str) -> dict[str, Any]:
    """A GraphCollection: the graph as it is, then those after each pass, the last first."""
    summary = summarize(program)
    layers = {q.node: q for q in summary.layers}
    final = {
        "id": FINAL,
        "nodes": list(_nodes(program, layers)),
        "groupNodeAttributes": {"": _totals(summary)},
    }
    graphs, left = [final], MOST_NODES
    for i, (name, step) in reversed(list(enumerate(labelled(program.trace)))):
        lines = step.text.splitlines()
        if (left := left - len(lines)) < 0:
            break
        graphs.append({"id": f"after {i:02} {name}", "nodes": list(_nodes_of_text(lines))})
    return {"label": label, "graphs": graphs, "graphSorting": "name_desc"}


def overlays(program: Program, comparison: Comparison | None = None) -> dict[str, dict[str, Any]]:
    """Node data by name: the weight's ``error`` in per cent, ``bits``, ``bytes``; and what a comparison found:
    ``local`` and ``accumulated`` (relative errors in per cent) and ``sqnr`` (local, in dB)."""
    layers = summarize(program).layers
    figures: dict[str, dict[str, float]] = {
        "error": {q.node: 100 * q.error for q in layers if q.error is not None},
        "bits": {q.node: q.bits for q in layers},
        "bytes": {q.node: q.bytes_after for q in layers},
    }
    rows = () if comparison is None else comparison.layers
    if rows:
        figures["local"] = {r.node: 100 * r.local.relative for r in rows if r.local is not None}
        figures["accumulated"] = {r.node: 100 * r.accumulated.relative for r in rows if r.accumulated is not None}
        figures["sqnr"] = {r.node: r.local.sqnr for r in rows if r.local is not None and abs(r.local.sqnr) < 1e6}
    units = {"error": "weight error, %", "bits": "bits a weight", "bytes": "bytes", "local": "local error, %",
             "accumulated": "accumulated error, %", "sqnr": "local SQNR, dB"}  # fmt: skip
    return {
        name: {FINAL: _node_data(units[name], values, worst_high=name != "sqnr")} for name, values in figures.items()
    }


def _node_data(name: str, values: Mapping[str, float], *, worst_high: bool) -> dict[str, Any]:
    """GraphNodeData: green where the figure is good."""
    stops = [{"stop": at, "bgColor": colour} for colour, at in _GRADIENT]
    if not worst_high:
        stops = [{"stop": 1 - at, "bgColor": colour} for colour, at in reversed(_GRADIENT)]
    finite = {node: value for node, value in values.items() if abs(value) < float("inf")}
    return {"name": name, "results": {node: {"value": value} for node, value in finite.items()}, "gradient": stops}


# --- the graph as it is -----------------------------------------------------------------------------------------------
def _nodes(program: Program, layers: Mapping[str, LayerSummary]) -> Iterator[dict[str, Any]]:
    for node in program.gm.graph.nodes:
        if node.op == "get_attr":
            continue
        named = _arguments(node)
        read = [(i, n) for i, n in enumerate(node.all_input_nodes) if n.op != "get_attr"]
        about, kind = info(node), info(node).type
        attrs = [("operator", _label(node, full=True))] if node.op == "call_function" else []
        attrs += [(key, text) for key, text in named.items() if not text.startswith("%")]
        attrs += _facts(layers[node.name]) if node.name in layers else []
        attrs += [("module", about.module), ("source", about.source), ("text", line(node))]
        made = {
            "id": node.name, "label": _label(node), "namespace": about.path.replace(".", "/"),
            "attrs": [{"key": k, "value": v[:_SHOWN]} for k, v in attrs if v],
            "incomingEdges": [_edge(n.name, i) for i, n in read],
            "inputsMetadata": [_metadata(i, _name_of(n, named)) for i, n in read],
        }  # fmt: skip
        if node.op != "output":
            made["outputsMetadata"] = [_metadata(0, node.name, type_text(kind) if kind is not None else "")]
        yield made


def _label(node: fx.Node, *, full: bool = False) -> str:
    if node.op == "call_function":
        text = target_name(node.target)
        return text if full else text.partition(".")[2] or text
    return node.name if node.op == "placeholder" else "output"


def _arguments(node: fx.Node) -> dict[str, str]:
    """Arguments by name as text; tensors of the module by their names and types."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return {}
    return {name: _shown(value) for name, value in named_arguments(node).items() if value is not None}


def _shown(value: Any) -> str:
    if isinstance(value, fx.Node):
        kind = info(value).type
        if value.op == "get_attr":
            return f"{value.target}: {kind}" if isinstance(kind, TensorType) else str(value.target)
        return f"%{value.name}"
    return str(value)


def _name_of(read: fx.Node, named: Mapping[str, str]) -> str:
    """The argument that a value is given for; its own name where it is inside a list."""
    return next((name for name, text in named.items() if text == f"%{read.name}"), read.name)


def _facts(layer: LayerSummary) -> list[tuple[str, str]]:
    facts = [("weight", f"{layer.weight} {list(layer.shape)}"), ("format", layer.format)]
    change = f"{size(layer.bytes_before)} -> {size(layer.bytes_after)} ({ratio(layer.bytes_before, layer.bytes_after)})"
    facts += [("method", layer.method or ""), ("size", change)]
    facts += [] if layer.error is None else [("weight error", percent(layer.error))]
    return [*facts, ("stays in float", layer.reason or ""), ("tied to", layer.tied_to or "")]


def _totals(s: Summary) -> dict[str, str]:
    found = {"size": f"{size(s.bytes_before)} -> {size(s.bytes_after)}", "quantized layers": str(len(s.quantized)),
             "formats": ", ".join(dict.fromkeys(q.format for q in s.quantized))}  # fmt: skip
    return found | ({} if s.error is None else {"output error": percent(s.error)})


def _edge(source: str, at: int) -> dict[str, str]:
    return {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(at)}


def _metadata(at: int, name: str, kind: str = "") -> dict[str, Any]:
    attrs = [{"key": "__tensor_tag", "value": name}]
    return {"id": str(at), "attrs": attrs + ([{"key": "tensor_shape", "value": kind}] if kind else [])}


# --- the graph after a pass, of which its text is kept ----------------------------------------------------------------
def _nodes_of_text(lines: list[str]) -> Iterator[dict[str, Any]]:
    constants, calls = dict[str, str](), list[re.Match[str]]()
    for text in lines:
        match = _LINE.fullmatch(text)
        if match is None:
            continue
        if "(" not in match["value"] and match["value"] != "input":
            constants[match["node"]] = match["value"]
        else:
            calls.append(match)
    for match in calls:
        label, _, rest = match["value"].partition("(")
        read = [n for n in dict.fromkeys(re.findall(r"%(\w+)", rest)) if n not in constants]
        held = [constants[n] for n in dict.fromkeys(re.findall(r"%(\w+)", rest)) if n in constants]
        attrs = [("operator", label), ("tensors", ", ".join(held)), ("text", match[0])]
        yield {
            "id": match["node"], "label": label.partition(".")[2] or match["node"],
            "namespace": (match["path"] or "").replace(".", "/"),
            "attrs": [{"key": k, "value": v[:_SHOWN]} for k, v in attrs if v],
            "incomingEdges": [_edge(name, i) for i, name in enumerate(read)],
            "outputsMetadata": [_metadata(0, match["node"], match["type"] or "")],
        }  # fmt: skip
    if lines and lines[-1].startswith("return"):
        read = [n for n in dict.fromkeys(re.findall(r"%(\w+)", lines[-1])) if n not in constants]
        edges = [_edge(n, i) for i, n in enumerate(read)]
        yield {"id": "output", "label": "output", "namespace": "", "incomingEdges": edges}
