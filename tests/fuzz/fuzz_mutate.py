"""Mutations of files, from a seeded generator: bytes, text, JSON trees, safetensors, protobuf.

A case is what a loader is given: file names and their content. ``mutated`` changes a few things in one of its files,
by a mutator that knows the file's structure, or by bytes. Parts of other cases are spliced in.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

Case = dict[str, bytes]

MAX_FILE = 1 << 22
"""Files do not grow beyond this many bytes."""

NUMBERS = (
    0, 1, 2, 3, 7, 8, 9, 16, 32, 63, 64, 127, 128, 255, 256, 1023, 2**15, 2**16, 2**24, 10**6, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, 10**30,
)  # fmt: skip
WORDS = (
    "", " ", "x", "*", "..", "../../x", "/etc/passwd", "a/b", "\x00", "\n", "\r\n", "é", "ﬁ", "\u202e", "😀", "None",
    "self", "__class__", "__import__('os')", "import os", '"', "'", "\\", '");x("', "<script>alert(1)</script>",
    "{{7*7}}", "${x}", "%s%n", "${jndi:x}", "a" * 300, "a" * 5000, ".", "a..b", "weight", "nan", "inf", "-0", "1e999",
    "0x10", "1_0", "٣", "true", "null", "[]", "{}", "batch", "batch*batch", "2**63", "1//0", "float32", "bfloat16",
    "complex128", "cuda", "cpu:99", "e3m2/channel", "e2m1/group32:e8m0", "int4/group0", "uint8/block1x0",
    "lut(1,1)", "lut(nan,1)", "higgs8", "e8m0", "aten.linear.default", "aten.add.Tensor", "operator.getitem",
    "fxquant.dequantize", "output", "get_attr", "call_function", "placeholder",
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 5e-324, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))


def mutated(rng: random.Random, case: Case, pool: Sequence[Case], chosen: Sequence[str] = ()) -> Case:
    """The case with one to six changes, most of them in files of ``chosen`` (by default any)."""
    found = dict(case)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6))):
        names = [name for name in found if not chosen or name in chosen] or list(found)
        if not names:
            break
        name = rng.choice(names)
        if rng.random() < 0.01 and len(found) > 1:
            del found[name]
            continue
        if rng.random() < 0.02:
            other = rng.choice(pool)
            found[name] = other.get(name) or rng.choice(list(other.values()) or [b""])
            continue
        others = [c[name] for c in pool if name in c]
        found[name] = _file(rng, name, found[name], others)[:MAX_FILE]
    return found


def _file(rng: random.Random, name: str, content: bytes, others: Sequence[bytes]) -> bytes:
    suffix = name.rpartition(".")[2]
    mutator = KINDS.get(suffix, any_bytes)
    if mutator is not any_bytes and rng.random() < 0.25:
        mutator = any_bytes
    try:
        return mutator(rng, content, others)
    except Exception:  # it is not what its name says any more
        return any_bytes(rng, content, others)


# --- bytes -----------------------------------------------------------------------------------------------------------
def any_bytes(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Flips, cuts, insertions of numbers and words, repeats, splices."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        at = min(at, rng.randrange(257))  # headers are at the beginning
    match rng.randrange(9):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + rng.randrange(1, 65)]
        case 4:
            data[at : at + (8 if rng.random() < 0.5 else 0)] = _number(rng)
        case 5:
            data[at:at] = rng.choice(WORDS).encode()
        case 6:
            data[at:at] = data[at : at + rng.randrange(1, 257)] * rng.choice((1, 2, 50))
        case 7 if others:
            other = rng.choice(others)
            cut = rng.randrange(len(other) + 1)
            data[at:] = other[cut:]
        case _:
            data[at : at + 4] = _number(rng)[:4]
    return bytes(data)


def _number(rng: random.Random) -> bytes:
    return (
        struct.pack("<Q", rng.choice(NUMBERS) % 2**64) if rng.random() < 0.8 else struct.pack("<d", rng.choice(FLOATS))
    )


# --- text ------------------------------------------------------------------------------------------------------------
_TOKENS = re.compile(r"\d+|\w+|\s+|.", re.DOTALL)


def text(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Tokens that are dropped, repeated, swapped, replaced; deep nesting; parts of other texts."""
    parts = _TOKENS.findall(content.decode())
    at = rng.randrange(len(parts) + 1)
    last = min(at, max(len(parts) - 1, 0))
    match rng.randrange(9):
        case 0:
            del parts[at : at + rng.randrange(1, 8)]
        case 1:
            parts[at:at] = parts[at : at + rng.randrange(1, 30)] * rng.choice((1, 1, 3, 100))
        case 2 if parts:
            other = rng.randrange(len(parts))
            parts[last], parts[other] = parts[other], parts[last]
        case 3:
            parts[at : at + 1] = [rng.choice(WORDS)]
        case 4:
            parts[at : at + 1] = [str(rng.choice(NUMBERS) * rng.choice((1, 1, -1)))]
        case 5:
            deep = rng.choice(("[", "(", "{", "-", "**", "a: ", "- ", "&a [*a,*a]", "<<: *a", "!!python/x "))
            parts.insert(at, deep * rng.choice((1, 3, 40, 2000)))
        case 6 if others:
            more = _TOKENS.findall(rng.choice(others).decode())
            cut = rng.randrange(len(more) + 1)
            parts[at:at] = more[cut : cut + rng.randrange(1, 40)]
        case 7:
            parts[at:at] = [rng.choice(parts or [""])]
        case _:
            del parts[at:]
    return "".join(parts).encode("utf-8", "surrogatepass")


# --- JSON ------------------------------------------------------------------------------------------------------------
def json_text(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return json.dumps(tree(rng, json.loads(content), others), separators=(",", ":")).encode()


def tree(rng: random.Random, root: Any, others: Sequence[bytes] = ()) -> Any:
    """A JSON value with one change somewhere: a value replaced, moved, dropped, doubled, or a little off."""
    path = _path(rng, root)
    if not path:
        return _value(rng, root)
    holder = root
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    match rng.randrange(10):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case 1:
            holder[_word(rng)] = holder[key]
        case 2 | 3:
            holder[key] = _somewhere(rng, root)
        case 4 if others:
            holder[key] = _somewhere(rng, json.loads(rng.choice(others)))
        case 5 if isinstance(holder, list):
            other = rng.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
        case 5:
            holder[_word(rng)] = holder.pop(key)
        case 6 | 7:
            holder[key] = _near(rng, holder[key])
        case _:
            holder[key] = _value(rng, holder[key])
    return root


def _path(rng: random.Random, root: Any) -> list[Any]:
    """The way to some value: down at random, ending at each level with one chance in six."""
    path: list[Any] = []
    while isinstance(root, (dict, list)) and root and not (path and rng.random() < 1 / 6):
        key: Any = rng.choice(list(root)) if isinstance(root, dict) else rng.randrange(len(root))
        path.append(key)
        root = root[key]
    return path


def _somewhere(rng: random.Random, root: Any) -> Any:
    for key in _path(rng, root):
        root = root[key]
    return json.loads(json.dumps(root))  # a copy


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, str(value), float(value), [value]))
    if isinstance(value, str):
        return text(rng, value.encode("utf-8", "surrogatepass"), ()).decode("utf-8", "surrogatepass")
    if isinstance(value, list) and value:
        return rng.choice((value[::-1], value[:-1], value * 2, value[0], value[1:]))
    return _value(rng, value)


def _value(rng: random.Random, value: Any) -> Any:
    nested: Any = value
    for _ in range(rng.choice((1, 5, 40, 300))):
        nested = [nested] if rng.random() < 0.5 else {"tuple": [nested]}
    return rng.choice((
        None, True, False, rng.choice(NUMBERS), -rng.choice(NUMBERS), rng.choice(FLOATS), _word(rng), [], {},
        [rng.choice(NUMBERS)] * rng.choice((1, 2, 8, 70)), nested, {"node": _word(rng)}, {"float": "nan"},
    ))  # fmt: skip


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


# --- safetensors -----------------------------------------------------------------------------------------------------
def safetensors(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """The header as JSON, its length kept right; or the tensors' bytes, with NaN, Inf and large codes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if rng.random() < 0.5:
        if data:
            at = rng.randrange(len(data)) & ~3
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", bytes(4),
                                            rng.randbytes(4)))  # fmt: skip
        if rng.random() < 0.2:
            del data[rng.randrange(len(data) + 1) :]
    else:
        header = tree(rng, header, [c[8 : 8 + int.from_bytes(c[:8], "little")] for c in others[:20]])
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + bytes(data)


# --- ONNX ------------------------------------------------------------------------------------------------------------
def protobuf(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """An ONNX model with one field of one message changed, dropped or doubled."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(content)
    message: Any = model
    while True:
        fields = [(f, v) for f, v in message.ListFields()]
        if not fields:
            break
        field, value = rng.choice(fields)
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        if field.type == field.TYPE_MESSAGE and rng.random() < 0.85:
            message = rng.choice(list(value)) if repeated else value
            continue
        if repeated:
            _repeated(rng, field, value)
        elif rng.random() < 0.2:
            message.ClearField(field.name)
        elif field.type != field.TYPE_MESSAGE:
            setattr(message, field.name, _plain(rng, value))
        break
    return model.SerializeToString()


def _repeated(rng: random.Random, field: Any, value: Any) -> None:
    at = rng.randrange(len(value))
    if rng.random() < 0.3:
        del value[at]
    elif field.type == field.TYPE_MESSAGE:
        value.add().CopyFrom(value[at])
    elif rng.random() < 0.3:
        value.append(value[at])
    else:
        value[at] = _plain(rng, value[at])


def _plain(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bytes):
        return any_bytes(rng, value, ())
    if isinstance(value, str):
        return rng.choice((_word(rng), value + "x", value[:-1])).encode("utf-8", "replace").decode()
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return rng.choice(FLOATS)
    found = rng.choice((value + 1, value - 1, -value, rng.choice(NUMBERS), -rng.choice(NUMBERS)))
    return found if -(2**31) <= found < 2**31 or abs(value) >= 2**31 else rng.randrange(64)


KINDS: dict[str, Callable[[random.Random, bytes, Sequence[bytes]], bytes]] = {
    "json": json_text, "jsonl": text, "yaml": text, "yml": text, "toml": text, "txt": text,
    "safetensors": safetensors, "onnx": protobuf,
}  # fmt: skip
"""By the ending of a file's name; others are mutated as bytes."""
