"""What an ONNX file claims, checked on its bytes before onnx or onnxruntime reads it.

A file is protobuf: fields of a number, a kind and a value, messages inside messages. Read here are those that make a
reader allocate, open another file, or never end: tensors whose sizes do not fit their values, weights in other files,
graphs inside graphs, functions that call each other. What the operators compute is onnxruntime's to check.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxquant import files
from fxquant.errors import ModelError

_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Bits of an element of each TensorProto.DataType but strings, which is 8."""
_STRING, _RAW, _EXTERNAL, _ELSEWHERE = 8, 9, 13, 1
_VALUES = {4: 32, 5: 8, 7: 8, 10: 64, 11: 8}
"""Fields of a tensor's values by type, and the fewest bits that an element takes there (packed varints: a byte)."""
_MAX_FIELDS, _MAX_DEPTH, _MAX_NODES, _MAX_SIZE, _MAX_DIMS = 1_000_000, 16, 1_000_000, 1 << 31, 64
Span = tuple[int, int]
Op = tuple[bytes, bytes, bytes]
"""Domain, name and overload of an operator."""


def check_onnx(path: str | Path, *, data: bool = True) -> None:
    """Raise ModelError unless the file is an ONNX model whose tensors have the values that their sizes say.

    Weights in another file must lie in the same folder, links followed; ``data`` False does not look whether that file
    is there and long enough. Refused are a million fields, 16 graphs inside each other, functions that call themselves,
    and those that call each other so often that a million nodes come of it.
    """
    path = Path(path)
    try:
        with files.regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if not 0 < size < _MAX_SIZE:
                raise ValueError(f"it has {size} bytes; expected 1 to {_MAX_SIZE}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                _Reader(mapped, path.parent if data else None).model()
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give a file that fxquant export wrote") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as an ONNX file: {str(error)[:300]}; give one that fxquant export "
                         f"wrote, or fetch it again") from None  # fmt: skip


def said(properties: Mapping[str, str], key: str, default: Any) -> Any:
    """The JSON that the file's property ``key`` holds: texts, in a list or a dict as ``default`` is, which is what a
    file without it says. ModelError for anything else."""
    if key not in properties:
        return default
    try:
        found = files.strict_json(properties[key].encode())
        texts = found.values() if isinstance(found, dict) else found
        if type(found) is not type(default) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"expected a {type(default).__name__} of texts")
    except ValueError as error:
        raise ModelError(f"the property {key!r} of the ONNX file cannot be read: {error}; give a file that fxquant "
                         f"export wrote") from None  # fmt: skip
    return found


class _Reader:
    """The messages of a mapped file. ``folder`` holds files of weights, None where they are not looked for."""

    def __init__(self, data: mmap.mmap, folder: Path | None) -> None:
        self.data, self.folder, self.fields, self.sizes = data, folder, 0, dict[str, int]()

    def model(self) -> None:
        functions: dict[Op, Counter[Op]] = {}
        calls = Counter[Op]()
        graphs = 0
        for field, _, span in self.messages((0, len(self.data))):
            if field == 7:
                graphs += 1
                self.graph(span, 0, calls)
            elif field == 25:
                name, body = self.function(span)
                functions[name] = body
        if graphs != 1:
            raise ValueError(f"it holds {graphs} graphs; expected one")
        _check_calls(functions, calls)

    def messages(self, span: Span) -> Iterator[tuple[int, int, Span]]:
        """The fields of a message: number, value of a varint, and where the bytes of what has a length lie."""
        at, end = span
        while at < end:
            self.fields += 1
            if self.fields > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            key, at = self.varint(at, end)
            kind, value, inner = key & 7, 0, (0, 0)
            if kind == 0:
                value, at = self.varint(at, end)
            elif kind == 2:
                length, at = self.varint(at, end)
                inner = (at, at + length)
                at += length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise ValueError(f"at byte {at} is no protobuf")
            if at > end or key >> 3 == 0:
                raise ValueError(f"a field at byte {at} goes beyond its message: it is truncated, or no protobuf")
            yield key >> 3, value, inner

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        raise ValueError(f"at byte {at} is no protobuf: it is truncated, or of another kind")

    def content(self, span: Span) -> bytes:
        return self.data[span[0] : min(span[1], span[0] + 4096)]

    # --- graphs
    def graph(self, span: Span, depth: int, calls: Counter[Op]) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it has more than {_MAX_DEPTH} graphs inside each other")
        for field, _, inner in self.messages(span):
            if field == 1:
                self.node(inner, depth, calls)
            elif field == 5:
                self.tensor(inner)
            elif field == 15:
                self.sparse(inner)

    def node(self, span: Span, depth: int, calls: Counter[Op]) -> None:
        parts = {4: b"", 7: b"", 8: b""}
        for field, _, inner in self.messages(span):
            if field == 5:
                self.attribute(inner, depth, calls)
            elif field in parts:
                parts[field] = self.content(inner)
        calls[(parts[7], parts[4], parts[8])] += 1

    def attribute(self, span: Span, depth: int, calls: Counter[Op]) -> None:
        for field, _, inner in self.messages(span):
            if field in (5, 10):
                self.tensor(inner)
            elif field in (6, 11):
                self.graph(inner, depth + 1, calls)
            elif field in (22, 23):
                self.sparse(inner)

    def function(self, span: Span) -> tuple[Op, Counter[Op]]:
        parts, calls = {1: b"", 10: b"", 13: b""}, Counter[Op]()
        for field, _, inner in self.messages(span):
            if field == 7:
                self.node(inner, 0, calls)
            elif field == 11:
                self.attribute(inner, 0, calls)
            elif field in parts:
                parts[field] = self.content(inner)
        return (parts[10], parts[1], parts[13]), calls

    # --- tensors
    def sparse(self, span: Span) -> None:
        for field, _, inner in self.messages(span):
            if field in (1, 2):
                self.tensor(inner)

    def tensor(self, span: Span) -> None:
        """Raise ValueError unless there are as many values as the sizes say."""
        dims, kind, there, place, elsewhere = list[int](), 0, -1, dict[str, str](), False
        texts, packed = 0, 0
        name = ""
        for field, value, inner in self.messages(span):
            length = inner[1] - inner[0]
            if field == 1:
                dims += [value] if inner == (0, 0) else self.packed(inner)
            elif field == 2:
                kind = value
            elif field == 8:
                name = self.content(inner).decode("utf-8", "replace")[:60]
            elif field == _RAW:
                there = length
            elif field == _EXTERNAL:
                place |= [self.entry(inner)]
            elif field == 14:
                elsewhere = value == _ELSEWHERE
            elif field == 6:
                texts += 1
            elif field in _VALUES:
                packed += 8 * length if inner != (0, 0) else 64  # a value for itself is counted among the fields
        if len(dims) > _MAX_DIMS or not all(0 <= n < 2**40 for n in dims):
            raise ValueError(f"tensor {name!r} has sizes {str(dims)[:60]}; expected at most {_MAX_DIMS} below 2^40")
        count = math.prod(dims)
        if kind == _STRING:
            if texts != count:
                raise ValueError(f"tensor {name!r} has sizes {dims} and {texts} texts")
            return
        if kind not in _BITS:
            raise ValueError(f"tensor {name!r} has element type {kind}, which is not known")
        nbytes = -(-count * _BITS[kind] // 8)
        if elsewhere or place:
            self.check_place(name, place, nbytes)
        elif there >= 0 and there != nbytes:
            raise ValueError(f"tensor {name!r} of sizes {str(dims)[:60]} takes {nbytes} bytes and has {there}")
        elif there < 0 and packed < min(_BITS[kind], 8) * count:
            raise ValueError(f"tensor {name!r} of sizes {str(dims)[:60]} takes {nbytes} bytes and has no such values")

    def packed(self, span: Span) -> list[int]:
        found, at = list[int](), span[0]
        while at < span[1] and len(found) <= _MAX_DIMS:
            value, at = self.varint(at, span[1])
            found.append(value)
        return found

    def entry(self, span: Span) -> tuple[str, str]:
        found = {field: self.content(inner).decode("utf-8") for field, _, inner in self.messages(span)}
        return found.get(1, ""), found.get(2, "")

    def check_place(self, name: str, place: dict[str, str], nbytes: int) -> None:
        """Raise ValueError unless the values lie in a file beside this one, inside its bounds."""
        location = place.get("location", "")
        parts = Path(location).parts
        if not parts or os.path.isabs(location) or ".." in parts or not location.isprintable():
            raise ValueError(f"tensor {name!r} lies in the file {location[:100]!r}; expected one in the folder of this "
                             f"file itself")  # fmt: skip
        numbers = [place.get("offset", "0"), place.get("length", str(nbytes))]
        if not all(n.isascii() and n.isdigit() and len(n) < 16 for n in numbers) or int(numbers[1]) != nbytes:
            raise ValueError(f"tensor {name!r} takes {nbytes} bytes; its place in {location[:60]!r} is {numbers}")
        if self.folder is None:
            return
        if location not in self.sizes:
            files.check_inside(self.folder, self.folder / location)
            self.sizes[location] = (self.folder / location).stat().st_size
        if int(numbers[0]) + nbytes > self.sizes[location]:
            raise ValueError(f"tensor {name!r} ends beyond {location[:60]!r} of {self.sizes[location]} bytes")


def _check_calls(functions: dict[Op, Counter[Op]], calls: Counter[Op]) -> None:
    """Raise ValueError for functions that call themselves, or expand to more than a million nodes."""
    expanded: dict[Op, int] = {}
    for name in functions:
        stack = [(name, iter(functions[name]))]
        inside = {name}
        while stack:
            current, rest = stack[-1]
            inner = next((op for op in rest if op in functions and op not in expanded), None)
            if inner in inside:
                raise ValueError(f"function {current[1].decode('utf-8', 'replace')[:60]!r} calls itself")
            if inner is not None:
                stack.append((inner, iter(functions[inner])))
                inside.add(inner)
                continue
            expanded[current] = sum(n * (1 + expanded.get(op, 0)) for op, n in functions[current].items())
            inside.discard(current)
            stack.pop()
    if (total := sum(n * (1 + expanded.get(op, 0)) for op, n in calls.items())) > _MAX_NODES:
        raise ValueError(f"its functions call each other so often that {total} nodes come of it; at most {_MAX_NODES}")
