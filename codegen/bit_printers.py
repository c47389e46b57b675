"""Bit expressions as source: Triton, PTX, C++ and ONNX, each a table with a row for every kind of operation.

All print the same list of steps, every operation once and after what it needs::

    Triton, C++    t3 = t2 & 0x90909090
    PTX            and.b32 t3, t2, 0x90909090;
    ONNX           BitwiseAnd(t2, 0x90909090) -> t3

PTX has one instruction for a mask and a merge, ``lop3``: ``a & m | b``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fxquant.bitops import Expr, nodes


class Step(NamedTuple):
    """``name = kind(args, by)`` on words of ``bits`` bits."""

    name: str
    kind: str
    args: tuple[str, ...]
    by: int
    bits: int


class Steps(NamedTuple):
    """The steps of some expressions, and the names of their values."""

    steps: list[Step]
    results: list[str]


def steps_of(outputs: Sequence[Expr], names: Mapping[str, str] | None = None) -> Steps:
    """Every operation of ``outputs`` once. ``names``: what words are called, by default as in the expression."""
    called: dict[Expr, str] = {}
    steps: list[Step] = []
    for node in nodes(*outputs):
        if node.kind == "word":
            called[node] = (names or {}).get(node.name, node.name)
            continue
        called[node] = f"t{len(steps)}"
        steps.append(Step(called[node], node.kind, tuple(called[arg] for arg in node.args), node.by, node.bits))
    return Steps(steps, [called[output] for output in outputs])


# --- Triton and C++: expressions -------------------------------------------------------------------------------------
def _moved_bytes(step: Step) -> list[tuple[int, int]]:
    """(shift to the left, mask of the result) that make a permutation; equal distances together."""
    masks: dict[int, int] = {}
    for k in range(step.bits // 8):
        if (digit := step.by >> 4 * k & 0xF) != 4:
            by = 8 * (k - digit)
            masks[by] = masks.get(by, 0) | 0xFF << 8 * k
    return list(masks.items())


def _permuted(step: Step, suffix: str) -> str:
    """A permutation as shifts and masks."""
    (x,) = step.args
    parts = []
    for by, mask in _moved_bytes(step):
        moved = f"({x} << {by})" if by > 0 else f"({x} >> {-by})" if by < 0 else x
        parts.append(f"({moved} & {mask:#x}{suffix})")
    return " | ".join(parts) or f"({x} & 0)"


_INFIX: dict[str, str] = {
    "or": "{0} | {1}",
    "and": "{0} & {by:#x}{u}",
    "shl": "{0} << {by}",
    "shr": "{0} >> {by}",
    "rotl": "({0} << {by}) | ({0} >> {back})",
}
"""Kinds of expression that Triton and C++ write alike; ``{u}`` is the suffix of an unsigned literal."""


def _infix(step: Step, suffix: str = "") -> str:
    if step.kind == "permute":
        return _permuted(step, suffix)
    return _INFIX[step.kind].format(*step.args, by=step.by, back=step.bits - step.by, u=suffix)


def triton(steps: Steps) -> list[str]:
    """Lines of a Triton function; words are tensors of uint32."""
    return [f"{step.name} = {_infix(step)}" for step in steps.steps]


def cpp(steps: Steps) -> list[str]:
    """Statements of C++ on unsigned words, of ``uint8_t``, ``uint16_t`` or ``uint32_t``."""
    return [f"const uint{s.bits}_t {s.name} = (uint{s.bits}_t)({_infix(s, 'u')});" for s in steps.steps]


# --- PTX -----------------------------------------------------------------------------------------------------------
_AND_OR = 0xEA
"""The table of lop3 for (a & b) | c."""

_PTX: dict[str, Callable[[Step], str]] = {
    "or": lambda s: f"or.b32 {s.name}, {s.args[0]}, {s.args[1]};",
    "and": lambda s: f"and.b32 {s.name}, {s.args[0]}, {s.by:#010x};",
    "shl": lambda s: f"shl.b32 {s.name}, {s.args[0]}, {s.by};",
    "shr": lambda s: f"shr.u32 {s.name}, {s.args[0]}, {s.by};",
    "rotl": lambda s: f"shf.l.wrap.b32 {s.name}, {s.args[0]}, {s.args[0]}, {s.by};",
    "permute": lambda s: f"prmt.b32 {s.name}, {s.args[0]}, 0, {s.by:#06x};",
}


def ptx(steps: Steps, *, halves: bool = False) -> str:
    """The body of an inline assembly of words of 32 bits.

    Operands are ``$0``, ``$1``, ... for the results, then for the words (name those so in ``steps_of``). ``halves``:
    each result is two operands of 16 bits, the low half first.
    """
    lines = [_PTX[step.kind](step) if isinstance(step, Step) else step for step in _fused(steps)]
    names = sorted({step.name for step in steps.steps}, key=lambda name: int(name[1:]))
    moves = (
        f"mov.b32 {{${2 * k}, ${2 * k + 1}}}, {name};" if halves else f"mov.b32 ${k}, {name};"
        for k, name in enumerate(steps.results)
    )
    declared = [f".reg .b32 {', '.join(names[at : at + 16])};" for at in range(0, len(names), 16)]
    return "\n".join(["{", *declared, *lines, *moves, "}"])


def _fused(steps: Steps) -> list[Step | str]:
    """Steps, where a mask whose only use is a merge has become one lop3 with it."""
    uses: dict[str, int] = {}
    for name in [arg for step in steps.steps for arg in step.args] + steps.results:
        uses[name] = uses.get(name, 0) + 1
    masks = {step.name: step for step in steps.steps if step.kind == "and" and uses.get(step.name) == 1}
    lines: list[Step | str] = []
    dropped: set[str] = set()
    for step in steps.steps:
        lines.append(step)
        if step.kind != "or":
            continue
        a, b = step.args
        if b in masks:  # the later of the two: what it masks is sure to be there
            a, b = b, a
        if a in masks:
            mask = masks[a]
            dropped.add(a)
            lines[-1] = f"lop3.b32 {step.name}, {mask.args[0]}, {mask.by:#010x}, {b}, {_AND_OR:#04x};"
    return [line for line in lines if isinstance(line, str) or line.name not in dropped]


# --- ONNX ----------------------------------------------------------------------------------------------------------
class OnnxNode(NamedTuple):
    """``outputs = op(inputs)``; an input that is an int is a constant of the word's type."""

    op: str
    inputs: tuple[str | int, ...]
    output: str
    direction: str = ""


def onnx(steps: Steps) -> list[OnnxNode]:
    """Nodes of ONNX (opset 18 and up) on tensors of uint8, uint16 or uint32."""
    made: list[OnnxNode] = []
    for step in steps.steps:
        made += _ONNX[step.kind](step)
    return made


def _onnx_shift(step: Step) -> list[OnnxNode]:
    return [OnnxNode("BitShift", (step.args[0], step.by), step.name, "LEFT" if step.kind == "shl" else "RIGHT")]


def _onnx_rotl(step: Step) -> list[OnnxNode]:
    up, down = f"{step.name}_up", f"{step.name}_down"
    return [
        OnnxNode("BitShift", (step.args[0], step.by), up, "LEFT"),
        OnnxNode("BitShift", (step.args[0], step.bits - step.by), down, "RIGHT"),
        OnnxNode("BitwiseOr", (up, down), step.name),
    ]


def _onnx_permute(step: Step) -> list[OnnxNode]:
    made: list[OnnxNode] = []
    parts = []
    for k, (by, mask) in enumerate(_moved_bytes(step)):
        moved: str = step.args[0]
        if by:
            moved = f"{step.name}_moved{k}"
            made.append(OnnxNode("BitShift", (step.args[0], abs(by)), moved, "LEFT" if by > 0 else "RIGHT"))
        parts.append(f"{step.name}_part{k}")
        made.append(OnnxNode("BitwiseAnd", (moved, mask), parts[-1]))
    if not parts:
        return [OnnxNode("BitwiseAnd", (step.args[0], 0), step.name)]
    whole = parts[0]
    for k, part in enumerate(parts[1:]):
        merged = f"{step.name}_merged{k}"
        made.append(OnnxNode("BitwiseOr", (whole, part), merged))
        whole = merged
    made[-1] = made[-1]._replace(output=step.name)
    return made


_ONNX: dict[str, Callable[[Step], list[OnnxNode]]] = {
    "or": lambda s: [OnnxNode("BitwiseOr", s.args, s.name)],
    "and": lambda s: [OnnxNode("BitwiseAnd", (s.args[0], s.by), s.name)],
    "shl": _onnx_shift,
    "shr": _onnx_shift,
    "rotl": _onnx_rotl,
    "permute": _onnx_permute,
}
