"""A program as JSON and back: values, node types, signature and trace. Nothing that is read is ever executed.

    None, bool, int, str, finite float      as they are
    list                                    [...]
    tuple                                   {"tuple": [...]}
    node                                    {"node": "linear_1"}       one that comes earlier in the graph
    inf, -inf, nan                          {"float": "inf"}
    dtype, device, layout, memory_format    {"dtype": "float32"}
    slice, complex                          {"slice": [start, stop, step]}, {"complex": [real, imaginary]}

Every ``decode_*`` function checks what it reads and raises MalformedError for anything else.
"""

from __future__ import annotations

import keyword
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxquant import dims
from fxquant.errors import FormatError
from fxquant.graph import NodeInfo, ScalarType, TensorType, ValueType, WeightQuant, dtype_name
from fxquant.program import Step
from fxquant.rewrite import Declined, Rewrite
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.signature import Input, Signature

Json = Any
"""What json.loads returns: None, bool, int, float, str, list or dict."""


class MalformedError(ValueError):
    """What is wrong with a document, or with a program to be written as one; save and load make it their own error.

    ``hint`` is what to do when it was a file that is wrong.
    """

    def __init__(self, what: str, hint: str = "the saved model is damaged or was changed: save it again") -> None:
        super().__init__(what)
        self.hint = hint


_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_LAYOUTS = {"strided": torch.strided}
_MEMORY = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_DEVICE = re.compile(r"(?:cpu|cuda|mps|xpu|meta)(?::[0-9]{1,2})?")
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
MAX_DEPTH, MAX_TEXT, MAX_TRACE = 16, 4096, 1 << 28
MAX_SPEC = 8192  # lut(...) of 256 values


# --- checks of single fields -----------------------------------------------------------------------------------------
def fields(value: Json, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Json]:
    """``value`` if it is an object with these keys and no others."""
    if not isinstance(value, dict):
        raise MalformedError(f"{where} is {_kind(value)}; expected an object with {', '.join(required)}")
    if missing := [k for k in required if k not in value]:
        raise MalformedError(f"{where} has no {missing[0]!r}")
    if unknown := [k for k in value if k not in required and k not in optional]:
        raise MalformedError(
            f"{where} has an unknown key {unknown[0][:60]!r}; known are {', '.join((*required, *optional))}"
        )
    return value


def items(value: Json, where: str) -> list[Json]:
    if not isinstance(value, list):
        raise MalformedError(f"{where} is {_kind(value)}; expected a list")
    return value


def text(value: Json, where: str, limit: int = MAX_TEXT) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise MalformedError(f"{where} is {_kind(value)}; expected a text of at most {limit} characters")
    return value


def whole(value: Json, where: str, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MalformedError(f"{where} is {_kind(value)}; expected a whole number from {low} to {high}")
    return value


def name(value: Json, where: str) -> str:
    """A node's name: a plain identifier, since it becomes a variable of the generated code."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or _reserved(value):
        raise MalformedError(
            f"{where} has the name {_kind(value)}; expected a plain identifier of at most 256 characters"
        )
    return value


def path(value: Json, where: str) -> str:
    """A tensor's name: parts with dots between them, each an attribute that generated code can name.

    A part is an identifier in the form Python reads it in (NFKC), which becomes ``x.part``, or any other printable text
    without quotes and backslashes, which becomes ``getattr(x, "part")``.
    """
    parts = value.split(".") if isinstance(value, str) and len(value) <= MAX_TEXT else []
    if not parts or not all(map(_attribute, parts)):
        raise MalformedError(
            f"{where} has the tensor name {_kind(value)}; expected dotted parts of 1 to 256 printable characters each, "
            f"without quotes, backslashes and Python's own words"
        )
    return str(value)


def _attribute(part: str) -> bool:
    plain = part.isprintable() and not set(part) & set("\"'\\/")
    return plain and 1 <= len(part) <= 256 and unicodedata.normalize("NFKC", part) == part and not _reserved(part)


def _reserved(part: str) -> bool:
    """Words of Python, and names such as ``__class__``."""
    return keyword.iskeyword(part) or (part.startswith("__") and part.endswith("__"))


def _kind(value: Json) -> str:
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:100]


# --- values ----------------------------------------------------------------------------------------------------------
def encode_value(value: Any, depth: int = 0) -> Json:
    """An argument of a node as JSON; MalformedError for a type that has no spelling here."""
    if depth > MAX_DEPTH:
        raise MalformedError(f"an argument is nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        inner = [encode_value(v, depth + 1) for v in value]
        return inner if isinstance(value, list) else {"tuple": inner}
    if isinstance(value, slice):
        return {"slice": [encode_value(v, depth + 1) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [encode_value(value.real), encode_value(value.imag)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    for type_, key in _PLAIN_TYPES.items():
        if isinstance(value, type_):
            return {key: str(value).removeprefix("torch.")}
    raise MalformedError(f"an argument is a {type(value).__name__}, which a saved graph cannot hold")


_PLAIN_TYPES = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def decode_value(value: Json, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The inverse of ``encode_value``; ``nodes`` are the nodes that may be named."""
    if depth > MAX_DEPTH:
        raise MalformedError(f"an argument is nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return decode_number(value, "an argument")
    if isinstance(value, str):
        return text(value, "an argument")
    if isinstance(value, int):
        return whole(value, "an argument")
    if isinstance(value, list):
        return [decode_value(v, nodes, depth + 1) for v in value]
    if len(value) != 1:
        raise MalformedError(f"an argument is {_kind(value)}; expected one key")
    ((key, inner),) = value.items()
    if key == "node":
        if not isinstance(inner, str) or inner not in nodes:
            raise MalformedError(f"an argument is the node {_kind(inner)}, which does not come earlier in the graph")
        return nodes[inner]
    if key in _PARTS:
        parts = [decode_value(v, nodes, depth + 1) for v in items(inner, f"an argument of kind {key!r}")]
        return _of_parts(key, parts)
    return decode_plain(key, inner)


_PARTS: dict[str, Callable[..., Any]] = {"tuple": lambda *v: v, "slice": slice, "complex": complex}


def _of_parts(key: str, parts: list[Any]) -> Any:
    if key == "slice" and len(parts) != 3:
        raise MalformedError(f"a slice has {len(parts)} parts; expected 3")
    if key == "complex" and (len(parts) != 2 or not all(isinstance(p, float) and math.isfinite(p) for p in parts)):
        raise MalformedError("a complex number is not two finite floats")
    return _PARTS[key](*parts)


def decode_plain(key: str, value: Json) -> Any:
    """A dtype, device, layout, memory format or non-finite float."""
    tables: dict[str, Mapping[str, Any]] = {
        "dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _MEMORY, "float": _SPECIAL,
    }  # fmt: skip
    if key == "device" and isinstance(value, str) and _DEVICE.fullmatch(value):
        return torch.device(value)
    if isinstance(value, str) and value in tables.get(key, {}):
        return tables[key][value]
    if key in tables:
        raise MalformedError(f"unknown {key} {_kind(value)}; expected one of {', '.join(tables[key])}")
    raise MalformedError(f"an argument is of unknown kind {key[:60]!r} with value {_kind(value)}")


def decode_number(value: Json, where: str) -> float:
    """A float, written as JSON writes it where it is finite."""
    if isinstance(value, dict):
        return float(decode_plain("float", fields(value, where, ["float"])["float"]))
    if not isinstance(value, float) or not math.isfinite(value):
        raise MalformedError(f"{where} is {_kind(value)}; expected a number")
    return value


def _positive(value: Json, where: str) -> float:
    """A finite float that is not below 0."""
    if not 0 <= (found := decode_number(value, where)) < math.inf:
        raise MalformedError(f"{where} is {found}; expected a finite number, at least 0")
    return found


# --- types and quantization of nodes ---------------------------------------------------------------------------------
def encode_type(value: ValueType | None) -> Json:
    """``{"dtype", "shape"}`` for a tensor, ``{"kind", "value"}`` for a number, a list for several values."""
    if isinstance(value, TensorType):
        return {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    if isinstance(value, ScalarType):
        return {"kind": value.kind, "value": value.value}
    return value if value is None else [encode_type(v) for v in value]


def decode_type(value: Json, where: str, depth: int = 0) -> ValueType | None:
    if depth > MAX_DEPTH:
        raise MalformedError(f"the type of {where} is nested deeper than {MAX_DEPTH}")
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(decode_type(v, where, depth + 1) for v in value)
    if isinstance(value, dict) and "kind" in value:
        value = fields(value, f"the type of {where}", ["kind", "value"])
        if value["kind"] not in ("int", "float", "bool"):
            raise MalformedError(f"the type of {where} is {_kind(value['kind'])}; expected int, float or bool")
        size = value["value"]
        return ScalarType(value["kind"], None if size is None else decode_dim(size, where, low=-(2**63)))
    return decode_tensor_type(value, where)


def decode_tensor_type(value: Json, where: str) -> TensorType:
    found = fields(value, f"the type of {where}", ["dtype", "shape"])
    shape = items(found["shape"], f"the shape of {where}")
    if len(shape) > 64:
        raise MalformedError(f"{where} has {len(shape)} dimensions; at most 64 are allowed")
    return TensorType(decode_plain("dtype", found["dtype"]), tuple(decode_dim(d, where) for d in shape))


def decode_dim(value: Json, where: str, low: int = 0) -> dims.Dim:
    """A size, or an expression over dimension names, of which only the syntax is checked."""
    if not isinstance(value, str):
        return whole(value, f"a size of {where}", low)
    try:
        dims.names(value)
    except ValueError as error:
        raise MalformedError(f"a size of {where} is {_kind(value)}: {str(error)[:200]}") from None
    return value


def encode_info(value: NodeInfo) -> Json:
    """The fields of a NodeInfo that are not empty."""
    weight = value.weight
    found = {
        "type": encode_type(value.type), "path": value.path, "module": value.module, "source": value.source,
        "weight": None if weight is None else {
            "weight": weight.weight, "spec": str(weight.spec), "method": weight.method,
            "error": encode_value(float(weight.error)), "nbytes": weight.nbytes, "float_nbytes": weight.float_nbytes,
            **({"transposed": True} if weight.transposed else {}),
            **({"part_of": weight.part_of} if weight.part_of else {}),
        },
    }  # fmt: skip
    return {k: v for k, v in found.items() if v not in (None, "")}


def decode_info(value: Json, where: str) -> NodeInfo:
    found = fields(value, f"the info of {where}", [], ["type", "path", "module", "source", "weight"])
    weight = found.get("weight")
    return NodeInfo(
        type=decode_type(found.get("type"), where),
        path=text(found.get("path", ""), f"the path of {where}"),
        module=text(found.get("module", ""), f"the module of {where}"),
        source=text(found.get("source", ""), f"the source of {where}"),
        weight=None if weight is None else _decode_weight(weight, f"the weight of {where}"),
    )


def _decode_weight(value: Json, where: str) -> WeightQuant:
    names = ["weight", "spec", "method", "error", "nbytes", "float_nbytes"]
    found = fields(value, where, names, ["transposed", "part_of"])
    added = "part_of" in found
    return WeightQuant(
        weight=path(found["weight"], where),
        spec=decode_spec(found["spec"], where),
        method=text(found["method"], f"the method of {where}"),
        error=_positive(found["error"], f"the error of {where}"),
        nbytes=whole(found["nbytes"], f"the size of {where}", 0),
        float_nbytes=whole(found["float_nbytes"], f"the size of {where}", 0 if added else 1),
        transposed=found.get("transposed") is True,
        part_of=path(found["part_of"], where) if added else "",
    )


def decode_spec(value: Json, where: str) -> QuantSpec:
    try:
        return parse_spec(text(value, f"the spec of {where}", MAX_SPEC))
    except FormatError as error:
        raise MalformedError(f"{where}: {error}") from None


# --- signature and trace ---------------------------------------------------------------------------------------------
def encode_signature(signature: Signature) -> Json:
    return {
        "inputs": [
            {"name": i.name, "type": encode_type(i.type)} | ({"empty": i.empty} if i.empty else {})
            for i in signature.inputs
        ],
        "output": signature.output,
        "fixed": {k: encode_value(v) for k, v in signature.fixed.items()},
        "parameters": list(signature.parameters),
        "limits": list(signature.limits),
    }


def decode_signature(value: Json, outputs: int) -> Signature:
    """``outputs``: how many flat outputs the graph has, for the indices in the output's structure."""
    found = fields(value, "the signature", ["inputs", "output", "fixed", "parameters", "limits"])
    inputs = []
    for item in items(found["inputs"], "the list of inputs"):
        item = fields(item, "an input", ["name", "type"], ["empty"])
        where = name(item["name"], "an input")
        inputs.append(decode_input(where, decode_tensor_type(item["type"], f"input {where!r}"), item.get("empty", "")))
    check_structure(found["output"], outputs)
    fixed = {}
    for key, item in found["fixed"].items() if isinstance(found["fixed"], dict) else [("", [])]:
        fixed[text(key, "the name of a fixed input")] = plain = decode_value(item, {})
        if not (plain is None or isinstance(plain, (bool, int, float, str))):
            raise MalformedError("the fixed inputs of the signature are not names of plain values")
    parameters = tuple(text(p, "a parameter's name", 256) for p in items(found["parameters"], "the parameters"))
    limits = tuple(decode_limit(limit, inputs) for limit in items(found["limits"], "the limits of sizes"))
    return Signature(tuple(inputs), found["output"], fixed, None, parameters, limits)


def decode_input(where: str, type_: TensorType, empty: Json) -> Input:
    """An input; MalformedError unless the dimension that is 0 where it is left out is one of its own."""
    if empty != "" and text(empty, f"the empty dimension of input {where!r}", 256) not in type_.shape:
        raise MalformedError(f"input {where!r} is {type_}, which has no dimension {empty!r}")
    return Input(where, type_, empty)


def decode_limit(value: Json, inputs: Sequence[Input]) -> str:
    """A condition over dimension names of the inputs, such as ``batch <= 3``."""
    limit = text(value, "a limit of sizes", 1024)
    known = {dim for item in inputs for dim in item.type.shape if isinstance(dim, str)}
    try:
        unknown = dims.condition_names(limit) - known
    except ValueError as error:
        raise MalformedError(f"a limit of sizes: {error}") from None
    if unknown:
        raise MalformedError(f"limit {limit[:60]!r} names {sorted(unknown)[0]!r}, which is no size of an input")
    return limit


def check_structure(value: Json, outputs: int) -> None:
    """Raise MalformedError unless ``value`` is an output's structure that holds each of ``outputs`` once, in order."""
    found = list(_indices(value, outputs))
    if found != list(range(outputs)):
        raise MalformedError(f"the structure of the output holds the outputs {found[:20]}; the graph gives {outputs}")


def _indices(value: Json, outputs: int, depth: int = 0) -> Iterator[int]:
    where = "the structure of the output"
    if depth > MAX_DEPTH:
        raise MalformedError(f"{where} is nested deeper than {MAX_DEPTH}")
    if value is None:
        return
    if not isinstance(value, dict):
        yield whole(value, f"an index in {where}", 0, outputs - 1)
        return
    found = fields(value, where, ["kind", "items"], ["keys"])
    if found["kind"] not in ("dict", "list", "tuple") or (found["kind"] == "dict") != ("keys" in found):
        raise MalformedError(f"{where} has kind {_kind(found['kind'])}; expected dict with keys, list or tuple")
    inner = items(found["items"], where)
    keys = [_output_key(k) for k in items(found.get("keys", []), "the keys of the output")]
    if "keys" in found and (len(keys) != len(inner) or len(set(keys)) != len(keys)):
        raise MalformedError(f"a dict of the output has {len(keys)} keys for {len(inner)} values, or a key twice")
    for item in inner:
        yield from _indices(item, outputs, depth + 1)


def _output_key(value: Json) -> str | int:
    where = "a key of the output"
    return whole(value, where) if isinstance(value, int) else text(value, where)


def encode_trace(trace: Sequence[Step]) -> Json:
    """The steps; their texts as indices into ``lines``, where a line that many steps share stands once.

    What they took is apart (``encode_timings``): everything here is the same whenever a job is run.
    """
    lines: dict[str, int] = {}
    steps = [
        {
            "name": step.name,
            "error": None if step.error is None else encode_value(float(step.error)),
            "nbytes": step.nbytes,
            "rewrites": [[r.rule, r.node, r.layer, r.detail] for r in step.rewrites],
            "declines": [[d.rule, d.node, d.layer, d.reason] for d in step.declines],
            "text": [lines.setdefault(line, len(lines)) for line in step.text.split("\n")],
        }
        for step in trace
    ]  # fmt: skip
    return {"lines": list(lines), "steps": steps}


def decode_trace(value: Json, *, timed: bool = False) -> list[Step]:
    """``timed``: each step holds its seconds, as in version 1 of the format."""
    names = ["name", "error", "rewrites", "declines", "text"] + ["seconds"] * timed
    found = fields(value, "the trace", ["lines", "steps"])
    lines = [text(line, "a line of the trace", 1 << 20) for line in items(found["lines"], "the lines of the trace")]
    steps, total = [], 0
    for item in items(found["steps"], "the steps of the trace"):
        item = fields(item, "a step", names, ["nbytes"])
        where = f"step {text(item['name'], 'the name of a step', 256)!r}"
        numbers = items(item["text"], f"the text of {where}")
        shown = [lines[whole(i, f"a line of {where}", 0, len(lines) - 1)] for i in numbers]
        total += sum(map(len, shown)) + len(shown)
        if total > MAX_TRACE:
            raise MalformedError(f"the trace has more than {MAX_TRACE} characters")
        steps.append(Step(
            name=item["name"],
            rewrites=tuple(Rewrite(*row) for row in _rows(item["rewrites"], where)),
            declines=tuple(Declined(*row) for row in _rows(item["declines"], where)),
            text="\n".join(shown),
            seconds=_positive(item["seconds"], f"the time of {where}") if timed else None,
            error=None if item["error"] is None else decode_number(item["error"], f"the error of {where}"),
            nbytes=None if item.get("nbytes") is None else whole(item["nbytes"], f"the bytes of {where}", 0),
        ))  # fmt: skip
    return steps


def encode_timings(trace: Sequence[Step]) -> Json:
    """The seconds of every step, null where they are not known."""
    return {"seconds": [[step.name, None if step.seconds is None else float(step.seconds)] for step in trace]}


def decode_timings(value: Json, trace: Sequence[Step]) -> list[Step]:
    """``trace`` with the seconds that ``encode_timings`` wrote."""
    rows = items(fields(value, "the document", ["seconds"])["seconds"], "the list of seconds")
    good = all(isinstance(row, list) and len(row) == 2 for row in rows)
    if not good or [row[0] for row in rows] != [step.name for step in trace]:
        raise MalformedError("its seconds are not those of the passes in the graph's trace")
    taken = [None if row[1] is None else _positive(row[1], f"the time of step {row[0]!r}") for row in rows]
    return [replace(step, seconds=seconds) for step, seconds in zip(trace, taken, strict=True)]


def _rows(value: Json, where: str) -> list[list[str]]:
    rows = items(value, f"the log of {where}")
    if not all(isinstance(row, list) and len(row) == 4 and all(isinstance(t, str) for t in row) for row in rows):
        raise MalformedError(f"a row of the log of {where} is not four texts")
    return rows
