"""A program as one JSON document, with its tensors apart; every invariant of a loaded program is checked here.

    {"format": "fxquant", "version": 2, "fxquant": "0.1.0", "config": {...},
     "signature": {"inputs": [...], "output": ..., "fixed": {...}},
     "tensors": {"head.weight": {"dtype": "float32", "shape": [8, 4]}, "embed.weight": {"same_as": "head.weight"}},
     "nodes": [{"name": "linear", "op": "call_function", "target": "aten.linear.default", "args": [...], "info": ...}],
     "trace": {"lines": [...], "steps": [...]}, "observations": {"rows": 32, "inputs": "...", "layers": [...]}}

``decode`` raises MalformedError for whatever does not fit together. It builds the graph from tables of known operators
and compiles it, but runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant import files, ops, packing
from fxquant.encoding import (
    Json,
    MalformedError,
    decode_info,
    decode_signature,
    decode_spec,
    decode_tensor_type,
    decode_trace,
    decode_value,
    encode_info,
    encode_signature,
    encode_trace,
    encode_type,
    encode_value,
    fields,
    items,
    name,
    path,
    text,
)  # fmt: skip
from fxquant.errors import FormatError
from fxquant.graph import META, TensorType, info
from fxquant.lazy import Lazy
from fxquant.observed import decode_observations, encode_observations
from fxquant.program import Program
from fxquant.qtensor import QuantizedTensor, check_exponent_bias, check_scale
from fxquant.rewrite import attach, get_attrs, identity, tensors
from fxquant.targets import check_call, decode_target, encode_target

FORMAT, VERSION = "fxquant", 2  # 1 had the seconds of each pass in the trace
_KEYS = ("format", "version", "fxquant", "config", "signature", "tensors", "nodes", "trace")
_MAX_CONFIG_DEPTH = 32
MAX_NODES = 50_000  # a decoder layer has about 75


# --- writing ---------------------------------------------------------------------------------------------------------
def encode(program: Program, config: Mapping[str, Any]) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """The document, and the tensors that stand beside it by name, a tied one once."""
    table, stored = encode_tensors(kept_tensors(program.gm))
    document: dict[str, Json] = {
        "format": FORMAT,
        "version": VERSION,
        "fxquant": metadata.version("fxquant"),
        "config": plain(config, "the config"),
        "signature": encode_signature(program.signature),
        "tensors": table,
        "nodes": [encode_node(node) for node in program.gm.graph.nodes],
        "trace": encode_trace(program.trace),
    }
    if program.observations is not None:
        document["observations"] = encode_observations(program.observations)
    return document, stored


def kept_tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that nodes read, and the float weights that a graph in QDQ form still refines its codes from."""
    found = tensors(gm)
    wanted = dict.fromkeys(str(node.target) for node in get_attrs(gm.graph))
    wanted.update(dict.fromkeys(float_weights(gm.graph)))
    return {key: found[key] for key in wanted if key in found}


def float_weights(graph: fx.Graph) -> set[str]:
    """Names of the float weights behind the ``dequantize`` nodes."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.fxquant.dequantize.default)
    return {weight.weight for node in nodes if (weight := info(node).weight) is not None}


def encode_tensors(found: Mapping[str, Tensor]) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """The table of tensors, and those to be stored: on the CPU, contiguous, none overlapping another.

    A tensor whose dimensions lie in another order in memory (transposed, channels last) is stored in that order, which
    the table says: it comes back with the same strides, so that every product of it is the same in every bit.
    """
    table: dict[str, Json] = {}
    stored: dict[str, Tensor] = {}
    first: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for key, value in found.items():
        if value.layout != torch.strided or value.is_meta or value.dtype == torch.complex128:
            raise MalformedError(
                f"tensor {key!r} is {value.dtype}, {value.layout}, on {value.device}: cannot be stored"
            )
        original = first.setdefault((*identity(value), value.numel() == 0 and key), key)
        if original != key:
            table[key] = {"same_as": original}
            continue
        table[key] = encode_type(TensorType(value.dtype, tuple(value.shape)))
        order = memory_order(value)
        if order != sorted(order):
            table[key]["order"] = order
        if isinstance(value, Lazy):
            stored[key] = value.permute(order) if order != sorted(order) else value
            continue
        dense = value.detach().resolve_conj().resolve_neg().cpu().permute(order).contiguous()
        shared = dense.untyped_storage().data_ptr() in storages
        stored[key] = dense.clone() if shared else dense
        storages.add(stored[key].untyped_storage().data_ptr())
    return table, stored


def memory_order(value: Tensor) -> list[int]:
    """The dimensions of a dense tensor by falling stride; as they are for one that is contiguous or has gaps."""
    plain_order, strides = list(range(value.dim())), value.stride()
    order = sorted(plain_order, key=lambda d: -strides[d])
    return order if not value.is_contiguous() and value.permute(order).is_contiguous() else plain_order


def encode_node(node: fx.Node) -> Json:
    """One node; MalformedError, naming it, for an operator or an argument that a saved graph cannot hold."""
    try:
        target = encode_target(node.target) if node.op == "call_function" else str(node.target)
        found = {
            "name": node.name, "op": node.op, "target": target,
            "args": [encode_value(a) for a in node.args],
            "kwargs": {k: encode_value(v) for k, v in node.kwargs.items()},
            "info": encode_info(info(node)),
        }  # fmt: skip
    except ValueError as error:
        raise MalformedError(f"node {node.name!r}: {error}") from None
    return {k: v for k, v in found.items() if v not in ([], {})}


def plain(value: Any, where: str, depth: int = 0) -> Json:
    """``value`` if JSON can hold it: dicts with text keys, lists, texts, numbers, None. Tuples become lists."""
    if depth > _MAX_CONFIG_DEPTH:
        raise MalformedError(f"{where} is nested deeper than {_MAX_CONFIG_DEPTH}")
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, where, depth + 1) for v in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise MalformedError(f"{where} holds {str(value)[:60]!r} of type {type(value).__name__}; expected plain data")


# --- reading ---------------------------------------------------------------------------------------------------------
def check_header(document: Json) -> dict[str, Json]:
    """The document's fields, if it is one of ours that this version reads."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MalformedError("this is not the graph of a saved fxquant model")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise MalformedError(f"the format version is {str(version)[:60]!r}; expected a number from 1 to {VERSION}")
    if version > VERSION:
        raise MalformedError(
            f"it has format version {version}, of fxquant {str(document.get('fxquant'))[:20]!r}; known is {VERSION}",
            "upgrade fxquant",
        )
    return fields(document, "the document", _KEYS, ["observations"])


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its type, and the order in which its dimensions lie in memory, outermost first."""

    type: TensorType
    order: tuple[int, ...]


def tensor_table(document: Mapping[str, Json]) -> dict[str, Stored | str]:
    """What each tensor is: a stored one, or the name of the one it is tied to."""
    found = document["tensors"]
    if not isinstance(found, dict):
        raise MalformedError("the table of tensors is not an object")
    if len(found) > 2 * MAX_NODES:
        raise MalformedError(f"the graph has {len(found)} tensors; at most {2 * MAX_NODES} are read")
    check_names(path(key, "a tensor") for key in found)
    table = {key: _entry(value, f"tensor {key!r}") for key, value in found.items()}
    for key, entry in table.items():
        if isinstance(entry, str) and not isinstance(table.get(entry), Stored):
            raise MalformedError(f"tensor {key!r} is tied to {entry[:100]!r}, which is not a stored tensor")
    return table


def _entry(value: Json, where: str) -> Stored | str:
    if isinstance(value, dict) and "same_as" in value:
        return text(fields(value, where, ["same_as"])["same_as"], where)
    found = fields(value, where, ["dtype", "shape"], ["order"])
    type_ = decode_tensor_type({"dtype": found["dtype"], "shape": found["shape"]}, where)
    dims = list(range(len(type_.shape)))
    order = items(found.get("order", dims), f"the order of {where}")
    if not all(type(d) is int for d in order) or sorted(order) != dims:
        raise MalformedError(f"the order of {where} is {str(order)[:60]}; expected the dimensions {dims} in some order")
    return Stored(type_, tuple(order))


def decode(document: Json, stored: Mapping[str, Tensor]) -> tuple[Program, dict[str, Any]]:
    """The program and the config. ``stored`` are the tensors beside the document, by name."""
    found = check_header(document)
    try:
        files.check_shown(found)
    except ValueError as error:
        raise MalformedError(str(error)) from None
    config = plain(found["config"], "the config")
    if not isinstance(config, dict):
        raise MalformedError("the config is not an object")
    constants = resolve(tensor_table(found), stored)
    graph = decode_graph(found["nodes"], constants)
    outputs = check_outputs(graph)
    signature = decode_signature(found["signature"], outputs)
    check_inputs(graph, [(i.name, i.type) for i in signature.inputs])
    check_used(graph, constants)
    for node in graph.nodes:
        if ops.is_op(node.target):
            check_weight(node, constants)
    trace = decode_trace(found["trace"], timed=found["version"] == 1)
    seen = decode_observations(found["observations"]) if "observations" in found else None
    return Program(module_of(graph, constants), signature, trace, seen), config


def resolve(table: Mapping[str, Stored | str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor by name, tied ones as the same tensor, each checked against the table."""
    own = {key: entry for key, entry in table.items() if isinstance(entry, Stored)}
    if missing := sorted(set(own) - set(stored)):
        raise MalformedError(f"tensor {missing[0]!r} is missing ({len(missing)} of {len(own)} are)")
    if extra := sorted(set(stored) - set(own)):
        raise MalformedError(f"tensor {extra[0][:100]!r} is there, but not in the graph ({len(extra)} in all)")
    found: dict[str, Tensor] = {}
    for key, entry in own.items():
        value = stored[key]
        want = TensorType(entry.type.dtype, tuple(entry.type.shape[d] for d in entry.order))
        if (got := TensorType(value.dtype, tuple(value.shape))) != want:
            raise MalformedError(f"tensor {key!r} is {got}; the graph says {want}")
        inverse = sorted(range(len(entry.order)), key=entry.order.__getitem__)
        found[key] = value if inverse == sorted(inverse) else value.permute(inverse)
    return {key: found[entry] if isinstance(entry, str) else found[key] for key, entry in table.items()}


def decode_graph(value: Json, constants: Mapping[str, Tensor]) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    rows = items(value, "the list of nodes")
    if len(rows) > MAX_NODES:
        raise MalformedError(f"the graph has {len(rows)} nodes; at most {MAX_NODES} are read")
    for i, row in enumerate(rows):
        row = fields(row, f"node {i}", ["name", "op", "target"], ["args", "kwargs", "info"])
        where = f"node {name(row['name'], f'node {i}')!r}"
        try:
            node = decode_node(graph, row, nodes, constants)
            node.meta[META] = decode_info(row.get("info", {}), where)
        except ValueError as error:
            raise MalformedError(str(error) if where in str(error) else f"{where}: {error}") from None
        if node.name != row["name"] or node.name in nodes:
            raise MalformedError(f"{where} has a name that is reserved or was used before")
        if (node.op == "output") != (i == len(rows) - 1):
            raise MalformedError(f"{where}: the output must be the last node, and only the last")
        nodes[node.name] = node
    if not nodes:
        raise MalformedError("the graph has no nodes")
    return graph


def decode_node(graph: fx.Graph, row: Json, nodes: Mapping[str, fx.Node], constants: Mapping[str, Tensor]) -> fx.Node:
    op, target = text(row["op"], "its op", 32), text(row["target"], "its target")
    args = tuple(decode_value(a, nodes) for a in items(row.get("args", []), "its list of arguments"))
    kwargs = row.get("kwargs", {})
    if not isinstance(kwargs, dict):
        raise MalformedError("its named arguments are not an object")
    kwargs = {key: decode_value(v, nodes) for key, v in kwargs.items()}
    if op == "call_function":
        function = decode_target(target)
        check_call(function, args, kwargs)
        return graph.create_node(op, function, args, kwargs, row["name"])
    if op not in ("placeholder", "get_attr", "output"):
        raise MalformedError(f"unknown op {op!r}; expected placeholder, get_attr, call_function or output")
    if kwargs or len(args) != (op == "output"):
        raise MalformedError(f"{op} has {len(args)} arguments and {len(kwargs)} by name")
    if op == "output" and (target != "output" or not isinstance(args[0], tuple)):
        raise MalformedError("the output is not a tuple of values")
    if op == "get_attr" and path(target, "it") not in constants:
        raise MalformedError(f"tensor {target!r} is not in the table of tensors")
    if op == "placeholder" and name(target, "its input") == "self":
        raise MalformedError(f"an input cannot be called {target!r}")
    return graph.create_node(op, target, args, {}, row["name"])


def check_outputs(graph: fx.Graph) -> int:
    """How many flat outputs there are; MalformedError where one is neither one value of a node nor a plain one."""
    outputs: Any = graph.output_node().args[0]
    for i, item in enumerate(outputs):
        several = isinstance(item, fx.Node) and isinstance(info(item).type, tuple)
        if several or not (item is None or isinstance(item, (fx.Node, bool, int, float, str))):
            raise MalformedError(f"output {i} is {str(item)[:60]!r}; expected one value")
    return len(outputs)


def check_inputs(graph: fx.Graph, inputs: list[tuple[str, TensorType]]) -> None:
    """Raise MalformedError unless the placeholders are the signature's inputs, in order."""
    found = [(str(node.target), info(node).type) for node in graph.find_nodes(op="placeholder")]
    names = [n for n, _ in found]
    if names != [n for n, _ in inputs] or len(set(names)) != len(names):
        raise MalformedError(f"the graph's inputs are {names}; the signature says {[n for n, _ in inputs]}")
    for (key, got), (_, want) in zip(found, inputs, strict=True):
        if got is not None and got != want:
            raise MalformedError(f"input {key!r} is {got} in the graph and {want} in the signature")


def check_used(graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
    """Raise MalformedError unless every tensor has a reader, and the type that its readers carry."""
    for node in get_attrs(graph):
        value, got = constants[str(node.target)], info(node).type
        want = TensorType(value.dtype, tuple(value.shape))
        if got is not None and got != want:
            raise MalformedError(f"node {node.name!r} says that tensor {node.target!r} is {got}; it is {want}")
    read = {str(node.target) for node in get_attrs(graph)} | float_weights(graph)
    if unread := sorted(set(constants) - read):
        raise MalformedError(f"tensor {unread[0]!r} is in the table of tensors, but no node reads it")


def module_of(graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph with its tensors as buffers of a fresh module."""
    root = nn.Module()
    for key, value in constants.items():
        attach(root, key, value)
    gm = fx.GraphModule(root, graph)
    for key in set(constants) - {str(node.target) for node in get_attrs(graph)}:
        attach(gm, key, constants[key])
    return gm


_RESERVED = frozenset(dir(nn.Module()))
_RESERVED_FIRST = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def check_names(names: Iterable[str]) -> None:
    """Raise MalformedError where a tensor's name would shadow a part of a module, or lies inside another tensor."""
    paths = [key.split(".") for key in names]
    owners = {".".join(parts[:end]) for parts in paths for end in range(1, len(parts))}
    for parts in paths:
        if parts[0] in _RESERVED_FIRST or not _RESERVED.isdisjoint(parts):
            raise MalformedError(f"tensor {'.'.join(parts)!r} has a name that is reserved")
        if ".".join(parts) in owners:
            raise MalformedError(f"tensor {'.'.join(parts)!r} has the name of a module")


# --- quantized weights -----------------------------------------------------------------------------------------------
_ROWS_FIRST = {"linear_wq": 2, "conv2d_wq": 4, "embedding_wq": 2}
"""Operators whose weight has this many dimensions, its first one being the rows."""


def check_weight(node: fx.Node, constants: Mapping[str, Tensor]) -> None:
    """Raise MalformedError unless the weight of one of our operators fits its spec and its shape."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = {**dict(zip([a.name for a in schema.arguments], node.args, strict=False)), **node.kwargs}
    if "index" in given:
        _check_outliers(node, constants)
        return
    spec, where = decode_spec(given["spec"], f"node {node.name!r}"), f"node {node.name!r}"
    if "shape" not in given:
        return
    key = "codes" if "codes" in given else "packed"
    codes, scale, zero_point, outer, bias = (
        _constant(given.get(k), k, where, constants)
        for k in (key, "scale", "zero_point", "tensor_scale", "exponent_bias")
    )
    shape = _weight_shape(given["shape"], where)
    if "stride" in given:
        _check_window(given, where)
    if codes is None or scale is None or codes.dim() != 2 or codes.dtype != torch.uint8:
        raise MalformedError(f"{where}: its {key} or its scale is missing, or {key} is not a uint8 matrix")
    rows = int(codes.shape[0])
    if not _fits(rows, shape, _ROWS_FIRST.get(schema.name.partition("::")[2])):
        raise MalformedError(f"{where}: {key} of {rows} rows do not make a weight of shape {list(shape)}")
    try:
        _check_codes(QuantizedTensor(codes, scale, zero_point, spec, shape, outer, bias), packed=key == "packed")
    except FormatError as error:
        raise MalformedError(f"{where}, weight {given[key].target!r}: {error}") from None


def _check_outliers(node: fx.Node, constants: Mapping[str, Tensor]) -> None:
    where = f"node {node.name!r}"
    index, sizes = _constant(node.args[1], "index", where, constants), []
    for operand in (node.args[0], node.args[2]):
        kind = info(operand).type if isinstance(operand, fx.Node) else None
        if not isinstance(kind, TensorType) or not all(isinstance(d, int) for d in kind.shape):
            raise MalformedError(f"{where}: its weight or its values have no fixed shape")
        sizes.append(math.prod(d for d in kind.shape if isinstance(d, int)))
    assert index is not None
    if problem := ops.outliers_problem(index, *sizes):
        raise MalformedError(f"{where}: {problem}")


def _fits(rows: int, shape: tuple[int, ...], rank: int | None) -> bool:
    """Whether ``rows`` is the first size where ``rank`` is given, else a product of leading sizes."""
    if rank is not None:
        return len(shape) == rank and rows == shape[0]
    return rows in [math.prod(shape[:k]) for k in range(len(shape) + 1)]


def _check_codes(q: QuantizedTensor, *, packed: bool) -> None:
    """Raise a FormatError unless codes, or packed bytes in their place, and scales are what the spec wants."""
    if not packed:
        q.check()
        return
    rows = int(q.codes.shape[0])
    cols = math.prod(q.shape) // rows
    want = packing.packed_shape((rows, cols), packing.planar(q.spec.format.bits))
    if tuple(q.codes.shape) != want:
        raise FormatError(
            f"packed codes have shape {list(q.codes.shape)}; {q.spec} of {rows}x{cols} codes wants {list(want)}"
        )
    check_scale(q.scale, q.zero_point, q.spec, rows=rows, cols=cols, tensor_scale=q.tensor_scale)
    check_exponent_bias(q.exponent_bias, cols)


def _check_window(given: Mapping[str, Any], where: str) -> None:
    for key, low in (("stride", 1), ("padding", 0), ("dilation", 1)):
        sizes = given[key]
        if len(sizes) != 2 or not all(isinstance(n, int) and low <= n < 2**31 for n in sizes):
            raise MalformedError(f"{where}: its {key} is {str(sizes)[:60]}; expected two sizes of at least {low}")
    if not isinstance(given["groups"], int) or given["groups"] < 1:
        raise MalformedError(f"{where}: its groups are {str(given['groups'])[:60]}; expected at least 1")


def _constant(value: Any, key: str, where: str, constants: Mapping[str, Tensor]) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        raise MalformedError(f"{where}: its {key} is not a tensor of the model")
    return constants[str(value.target)]


def _weight_shape(value: Any, where: str) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else ()
    good = all(isinstance(d, int) and not isinstance(d, bool) and 1 <= d < 2**40 for d in sizes)
    if not sizes or len(sizes) > 8 or not good or math.prod(sizes) >= 2**48:
        raise MalformedError(
            f"{where}: weight shape {str(value)[:100]} is not one to eight positive sizes below 2^48 in all"
        )
    return sizes
