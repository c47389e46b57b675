"""An emulator of inline PTX: the assembly string that ships, run on numpy arrays.

``run(asm, constraints, inputs)`` takes the string and the constraints of ``tl.inline_asm_elementwise`` and an array for
every input register. It knows the instructions of ``NUMPY`` and is strict about the rest. An error: an unknown
instruction, a register that is not declared or read before it is written, an operand of the wrong size, a result that
is never written, and an input that is read after a result was written (unless that result is ``=&``: the compiler may
give both the same register).

What an instruction means is a row of a ``Domain``; ``ptx_proof`` has a second domain, of Boolean functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Word = NDArray[np.uint32]
U = np.uint32
SIZES = {"r": 32, "h": 16}
"""Letter of a constraint -> bits of the register."""


class PtxError(Exception):
    """Assembly that is wrong, or that the emulator does not know."""


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[tuple[str, ...] | str, ...]
    """Registers or numbers; a tuple where they stand in braces."""


@dataclass
class Register:
    """``value`` is None until it is written. ``kind`` is "in", "out" (written late), "early" or "local"."""

    bits: int
    kind: str
    value: Any = None


class Domain(NamedTuple):
    """What values are: the rows of instructions, and how a register is made of two halves and cut into them.

    A row takes the values of its sources, a number where the assembly has one, and returns that of its result.
    """

    rows: Mapping[str, Callable[..., Any]]
    constant: Callable[[int, int], Any]
    join: Callable[[Any, Any], Any]
    halves: Callable[[Any], tuple[Any, Any]]


# --- reading ---------------------------------------------------------------------------------------------------------
def parse(asm: str) -> tuple[dict[str, int], list[Instruction]]:
    """The declared registers with their bits, and the instructions."""
    text = re.sub(r"//.*|/\*.*?\*/", " ", asm)
    if text.count("{") != text.count("}"):
        raise PtxError("braces are not balanced")
    declared: dict[str, int] = {}
    found: list[Instruction] = []
    # no statement begins with a vector: braces there are those of a block
    for statement in (part.lstrip("{} \t\n") for part in text.split(";")):
        if not statement.strip():
            continue
        opcode, _, rest = statement.partition(" ")
        if opcode == ".reg":
            kind, _, names = rest.strip().partition(" ")
            declared |= dict.fromkeys(_names(names), int(re.sub(r"\D", "", kind)))
        else:
            found.append(Instruction(opcode, tuple(_operands(rest))))
    return declared, found


def _names(text: str) -> Iterator[str]:
    """``t0, t1`` or ``t<4>``."""
    for name in (part.strip() for part in text.split(",")):
        if match := re.fullmatch(r"(\w+)<(\d+)>", name):
            yield from (f"{match[1]}{i}" for i in range(int(match[2])))
        else:
            yield name


def _operands(text: str) -> Iterator[tuple[str, ...] | str]:
    for part in re.findall(r"\{[^}]*\}|[^,{\s][^,]*", text):
        yield tuple(name.strip() for name in part.strip("{}").split(",")) if part[0] == "{" else part.strip()


def registers(constraints: str, declared: Mapping[str, int]) -> dict[str, Register]:
    """``$0``, ``$1`` ... as ``constraints`` say, and what is declared."""
    made: dict[str, Register] = {}
    for i, text in enumerate(constraints.split(",")):
        letter = text.strip().lstrip("=&")
        if letter not in SIZES:
            raise PtxError(f"constraint {text!r}; known are {', '.join(SIZES)}, with = or =& for results")
        made[f"${i}"] = Register(SIZES[letter], "early" if "=&" in text else "out" if "=" in text else "in")
    return made | {name: Register(bits, "local") for name, bits in declared.items()}


# --- running ---------------------------------------------------------------------------------------------------------
def run(asm: str, constraints: str, inputs: Sequence[Any], domain: Domain | None = None) -> list[Any]:
    """The values of the results after ``asm``; ``inputs`` are the values of the other operands, in their order."""
    domain = domain or NUMPY
    declared, instructions = parse(asm)
    known = registers(constraints, declared)
    given = [register for register in known.values() if register.kind == "in"]
    for register, value in zip(given, inputs, strict=True):
        register.value = value
    machine = _Machine(known, domain)
    for instruction in instructions:
        machine.step(instruction)
    results = {name: register for name, register in known.items() if register.kind in ("out", "early")}
    for name, register in results.items():
        if register.value is None:
            raise PtxError(f"result {name} is never written")
    return [register.value for register in results.values()]


class _Machine:
    def __init__(self, known: dict[str, Register], domain: Domain) -> None:
        self.known, self.domain, self.finishing = known, domain, False

    def step(self, instruction: Instruction) -> None:
        opcode, (to, *sources) = instruction
        if opcode.startswith("mov."):
            self._move(int(opcode[5:]), to, *sources)
            return
        if opcode not in self.domain.rows:
            raise PtxError(f"unknown instruction {opcode}; known are mov, {', '.join(self.domain.rows)}")
        bits = 16 if opcode.endswith("16") else 32
        values = [self._read(source, bits) for source in sources]
        self._write(to, self.domain.rows[opcode](*values), bits)

    def _move(self, bits: int, to: Any, *sources: Any) -> None:
        (source,) = sources
        if isinstance(to, tuple):
            for name, value in zip(to, self.domain.halves(self._read(source, bits)), strict=True):
                self._write(name, value, bits // 2)
        elif isinstance(source, tuple):
            self._write(to, self.domain.join(*(self._read(name, bits // 2) for name in source)), bits)
        else:
            value = self._read(source, bits)
            self._write(to, self.domain.constant(value, bits) if isinstance(value, int) else value, bits)

    def _read(self, name: Any, bits: int) -> Any:
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", name):
            return int(name, 0)
        register = self._register(name, bits)
        if register.kind == "in" and self.finishing:
            raise PtxError(f"{name} is read after a result was written, which may be the same register")
        if register.value is None:
            raise PtxError(f"{name} is read before it is written")
        return register.value

    def _write(self, name: str, value: Any, bits: int) -> None:
        register = self._register(name, bits)
        if register.kind == "in":
            raise PtxError(f"{name} is an input and is written")
        self.finishing |= register.kind == "out"
        register.value = value

    def _register(self, name: str, bits: int) -> Register:
        if name not in self.known:
            raise PtxError(f"{name} is no number and no register that is declared")
        if self.known[name].bits != bits:
            raise PtxError(f"{name} has {self.known[name].bits} bits where {bits} are taken")
        return self.known[name]


# --- instructions on arrays ------------------------------------------------------------------------------------------
def _word(x: Any) -> Any:
    return U(x & 0xFFFFFFFF) if isinstance(x, int) else x


def _shl(x: Any, by: Any) -> Any:
    """A distance above 31 gives 0."""
    x, by = _word(x), _word(by)
    return np.where(by > 31, U(0), x << (by & U(31)))


def _shr(x: Any, by: Any) -> Any:
    x, by = _word(x), _word(by)
    return np.where(by > 31, U(0), x >> (by & U(31)))


def _funnel_left(low: Any, high: Any, by: int) -> Any:
    """The upper word of ``high:low << (by mod 32)``."""
    low, high, by = _word(low), _word(high), by & 31
    return high << U(by) | low >> U(32 - by) if by else high | U(0)


def _funnel_right(low: Any, high: Any, by: int) -> Any:
    """The lower word of ``high:low >> (by mod 32)``."""
    low, high, by = _word(low), _word(high), by & 31
    return low >> U(by) | high << U(32 - by) if by else low | U(0)


def _lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Bit ``4a + 2b + c`` of the table, for each bit of the words."""
    a, b, c = _word(a), _word(b), _word(c)
    result = a & U(0)
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _prmt(a: Any, b: Any, selector: int) -> Any:
    """Byte k is byte ``digit & 7`` of ``b:a``, or eight times its highest bit where the digit has bit 3."""
    sources = [_word(x) >> U(8 * k) & U(0xFF) for x in (a, b) for k in range(4)]
    result = _word(a) & U(0)
    for k in range(4):
        digit = selector >> 4 * k & 0xF
        byte = sources[digit & 7]
        result = result | (byte if digit < 8 else (byte >> U(7)) * U(0xFF)) << U(8 * k)
    return result


def _two_halves(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation`` in float64, rounded once, on both float16 of a word."""

    def row(*words: Any) -> Any:
        low, high = zip(*(halves(_word(x)) for x in words), strict=True)
        with np.errstate(over="ignore", invalid="ignore"):
            return join(*(_rounded(operation(*map(_float, part))) for part in (low, high)))

    return row


def _float(half: Any) -> Any:
    return half.astype(np.uint16).view(np.float16).astype(np.float64)


def _rounded(value: Any) -> Any:
    return value.astype(np.float16).view(np.uint16).astype(U)


def halves(x: Any) -> tuple[Any, Any]:
    return x & U(0xFFFF), x >> U(16)


def join(low: Any, high: Any) -> Any:
    return _word(low) | _word(high) << U(16)


NUMPY = Domain(
    rows={
        "and.b32": lambda a, b: _word(a) & _word(b),
        "or.b32": lambda a, b: _word(a) | _word(b),
        "xor.b32": lambda a, b: _word(a) ^ _word(b),
        "not.b32": lambda a: ~_word(a),
        "shl.b32": _shl,
        "shr.u32": _shr,
        "shr.b32": _shr,
        "shf.l.wrap.b32": _funnel_left,
        "shf.r.wrap.b32": _funnel_right,
        "lop3.b32": _lop3,
        "prmt.b32": _prmt,
        "add.f16x2": _two_halves(lambda a, b: a + b),
        "sub.f16x2": _two_halves(lambda a, b: a - b),
        "mul.f16x2": _two_halves(lambda a, b: a * b),
    },
    constant=lambda value, bits: U(value),
    join=join,
    halves=halves,
)


# --- elements --------------------------------------------------------------------------------------------------------
def elementwise(
    asm: str, constraints: str, arrays: Sequence[NDArray[Any]], results: Sequence[np.dtype[Any]], pack: int,
    order: NDArray[np.int64] | None = None,
) -> list[NDArray[Any]]:  # fmt: skip
    """``tl.inline_asm_elementwise``: arrays of one shape to an array of it for each dtype of ``results``.

    ``pack`` elements go through the assembly at a time, those of less than 32 bits side by side in registers. Which
    elements meet is up to the compiler: ``order`` permutes them (and back), and must not change what comes out.
    """
    shape = arrays[0].shape
    order = np.arange(arrays[0].size) if order is None else order
    if len(order) % pack:
        raise PtxError(f"{len(order)} elements are not a multiple of pack, {pack}")
    inputs = [register for a in arrays for register in _to_registers(a.reshape(-1)[order], pack)]
    counts = [_registers_of(dtype, pack) for dtype in results]
    given = sum(text.strip().startswith("=") for text in constraints.split(","))
    if given != sum(counts) or len(constraints.split(",")) - given != len(inputs):
        raise PtxError(f"constraints {constraints} are not {sum(counts)} results and {len(inputs)} inputs")
    out = iter(run(asm, constraints, inputs))
    back = np.argsort(order)
    made = []
    for dtype, count in zip(results, counts, strict=True):
        columns = [np.broadcast_to(next(out), len(order) // pack) for _ in range(count)]
        made.append(_from_registers(columns, dtype, pack)[back].reshape(shape))
    return made


def _registers_of(dtype: np.dtype[Any], pack: int) -> int:
    if pack > 1 and pack * dtype.itemsize % 4:
        raise PtxError(f"{pack} elements of {dtype} do not fill registers")
    return pack if dtype.itemsize == 4 else max(1, pack * dtype.itemsize // 4)


def _to_registers(flat: NDArray[Any], pack: int) -> list[Word]:
    count = _registers_of(flat.dtype, pack)
    raw = np.ascontiguousarray(flat)
    if pack == 1:
        return [raw.view(f"u{raw.dtype.itemsize}").astype(U)]
    return list(raw.view(U).reshape(-1, count).T.copy())


def _from_registers(columns: Sequence[Word], dtype: np.dtype[Any], pack: int) -> NDArray[Any]:
    if pack == 1:
        return columns[0].astype(f"u{dtype.itemsize}").view(dtype)
    return np.ascontiguousarray(np.stack(columns, -1)).reshape(-1).view(dtype)
