"""Results of tasks as JSON and tensors, and back: no pickle, and a type is made only if it is in the caller's table.

    None, bool, int, str, finite float      as they are
    inf, -inf, nan                          {"float": "inf"}
    list, tuple, dict                       [...], {"tuple": [...]}, {"dict": [[key, value], ...]}
    tensor                                  {"tensor": 3}             the fourth tensor of the file
    dtype, QuantSpec, number format         {"dtype": "float32"}, {"spec": "e3m2/channel"}, {"format": "e3m2"}
    frozen dataclass of the table           {"value": ["solvers.gptq.Solution", {field: value, ...}]}

A value that was decoded equals the encoded one, and its tensors lie in memory as new ones do (contiguous, aligned):
what is computed from them does not depend on whether they were kept.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from fxquant.encoding import MAX_DEPTH, Json, MalformedError, decode_number, decode_plain, decode_spec, fields, items
from fxquant.errors import FxquantError
from fxquant.formats import parse_format
from fxquant.graph import dtype_name
from fxquant.grids import CodebookFormat, FloatFormat, IntFormat
from fxquant.qtensor import QuantizedTensor
from fxquant.scales import Scales
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.tasks import ALIGNMENT

Types = dict[str, type]
_FORMATS = (FloatFormat, IntFormat, CodebookFormat)


def table(*rows: type) -> Types:
    """Frozen dataclasses by the names that they have in a file, the table of ``encode`` and ``decode``."""
    return {f"{row.__module__.removeprefix('fxquant.')}.{row.__qualname__}": row for row in rows}


CORE = table(QuantizedTensor, Scales)


def encode(value: Any, types: Types) -> tuple[Json, list[Tensor]]:
    """``value`` as JSON and the tensors that it names. Raises MalformedError for a type that has no spelling."""
    names, tensors = {row: name for name, row in types.items()}, list[Tensor]()

    def inner(value: Any, depth: int) -> Json:
        if depth > MAX_DEPTH:
            raise MalformedError(f"a result is nested deeper than {MAX_DEPTH}")
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, Tensor):
            found = plain(value)
            tensors.append(found.clone() if found.data_ptr() in {t.data_ptr() for t in tensors} else found)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, (list, tuple)):
            parts = [inner(v, depth + 1) for v in value]
            return parts if isinstance(value, list) else {"tuple": parts}
        if isinstance(value, dict):
            return {"dict": [[inner(k, depth + 1), inner(v, depth + 1)] for k, v in value.items()]}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, QuantSpec):
            return {"spec": _named(value, parse_spec)}
        if isinstance(value, _FORMATS):
            return {"format": _named(value, parse_format)}
        if (name := names.get(type(value))) is not None:
            held = {f.name: inner(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
            return {"value": [name, held]}
        raise MalformedError(f"a result is a {type(value).__qualname__}, which no file of a job can hold")

    return inner(value, 0), tensors


def _named(value: Any, parse: Callable[[str], Any]) -> str:
    """The text of a spec or format; MalformedError where it does not say all, as for a table of one's own."""
    try:
        same = parse(str(value)) == value
    except FxquantError:
        same = False
    if not same:
        raise MalformedError(f"{value} has no name that says all of it")
    return str(value)


def plain(value: Tensor) -> Tensor:
    """The tensor on the CPU, without gradient, in memory as a new one lies there; itself where it does."""
    value = value.detach().cpu()
    new = torch.empty(value.shape, dtype=value.dtype, device="meta")
    own = value.untyped_storage().nbytes() == value.nbytes and not value.data_ptr() % ALIGNMENT
    if own and value.stride() == new.stride():
        return value
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def decode(value: Json, tensors: Sequence[Tensor], types: Types) -> Any:
    """The inverse of ``encode``: each of ``tensors`` is named once, in order. Raises MalformedError for all else."""
    left = iter(range(len(tensors)))

    def inner(value: Json, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise MalformedError(f"a result is nested deeper than {MAX_DEPTH}")
        if value is None or isinstance(value, (bool, str, int)):
            return value
        if isinstance(value, float):
            return decode_number(value, "a result")
        if isinstance(value, list):
            return [inner(v, depth + 1) for v in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise MalformedError("a part of a result is not an object with one key")
        ((key, part),) = value.items()
        if key == "tensor":
            if type(part) is not int or part != next(left, None):
                raise MalformedError(f"a result names tensor {str(part)[:20]}, which is not the next one")
            return tensors[part]
        if key == "tuple":
            return tuple(inner(v, depth + 1) for v in items(part, "a tuple"))
        if key == "dict":
            return dict(_pair(pair, lambda v: inner(v, depth + 1)) for pair in items(part, "a dict"))
        if key == "spec":
            return decode_spec(part, "a result")
        if key == "format":
            return _format(part)
        if key == "value":
            name, parts = _two(part)
            return _made(types, name, parts, lambda v: inner(v, depth + 1))
        if key in ("float", "dtype"):
            return decode_plain(key, part)
        raise MalformedError(f"a part of a result is of unknown kind {key[:60]!r}")

    found = inner(value, 0)
    if next(left, None) is not None:
        raise MalformedError("a file holds tensors that its result does not name")
    return found


def _two(value: Json) -> tuple[Json, Json]:
    if not isinstance(value, list) or len(value) != 2:
        raise MalformedError("a part of a result is not a list of two")
    return value[0], value[1]


def _pair(value: Json, inner: Callable[[Json], Any]) -> tuple[Any, Any]:
    key, found = map(inner, _two(value))
    if not isinstance(key, (str, int, float, bool, tuple)) and key is not None:
        raise MalformedError("a key of a dict is not a plain value")
    try:
        hash(key)
    except TypeError:
        raise MalformedError("a key of a dict is not a plain value") from None
    return key, found


def _format(value: Json) -> Any:
    try:
        return parse_format(value if isinstance(value, str) and len(value) <= 64 else "")
    except FxquantError as error:
        raise MalformedError(str(error)) from None


# --- dataclasses ------------------------------------------------------------------------------------------------------
def _made(types: Types, name: Json, parts: Json, inner: Callable[[Json], Any]) -> Any:
    """A dataclass of the table, its fields of the types that it declares, and checked where it has a ``check``."""
    row = types.get(name) if isinstance(name, str) else None
    if row is None:
        raise MalformedError(f"a result is a {str(name)[:60]!r}; known are {', '.join(types)}")
    hints = declared(row)
    found = {key: inner(v) for key, v in fields(parts, f"a {name}", list(hints)).items()}
    for key, hint in hints.items():
        if not fits(found[key], hint):
            raise MalformedError(f"{key} of a {name} is a {type(found[key]).__name__}; expected {hint}")
    try:
        made = row(**found)
        if isinstance(made, QuantizedTensor):
            made.check()
    except Exception as error:  # a file made to break it gets the same answer as any other
        raise MalformedError(f"a {name} is not valid: {str(error)[:300]}") from None
    return made


@cache
def declared(row: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = typing.get_type_hints(row)
    return {field.name: hints[field.name] for field in dataclasses.fields(row)}


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``: a class, a union, Literal, tuple, list, Sequence, dict or Mapping."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return isinstance(value, tuple) and all(fits(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)[: 1 if origin is list else 2]) and all(fits(v, args[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint or type(None))
