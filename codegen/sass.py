"""What a compiled kernel does, from its machine code: instructions a weight in the K loop, registers, spills, copies.

Nothing runs. SASS is taken apart by the disassembler that comes with triton, split into basic blocks, and the K loop is
the smallest natural loop that holds a tensor-core instruction. An instruction of a warp is 32 of threads, so

    a count per weight = instructions in the loop * 32 * warps of the CTA / weights the CTA reads a trip

and no kernel that is padded, repeats work in several warps, or moves weights through memory twice looks better for it.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant.codegen.aot import Compiled
from fxquant.codegen.variants import arch, occupancy
from fxquant.errors import KernelError

LOGIC = ("LOP3", "SHF", "PRMT", "SEL", "SGXT", "BMSK")
"""What decoding is made of. SEL, SGXT and BMSK are few; they are in so that nothing is hidden under another name."""
INTEGER = (*LOGIC, "IMAD", "IADD3", "IADD", "VIADD", "LEA", "MOV")
HALF = ("HMUL2", "HFMA2", "HADD2")
_MMA = re.compile(r"[A-Z]*MMA")  # HMMA, QMMA, OMMA, HGMMA, QGMMA, UTCHMMA, UTCQMMA, ...
_LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")
_WAITING = {"SYNCS", "BRA", "NANOSLEEP", "YIELD"}

_SECTION = re.compile(r"\s*\.section\s+(\.text\.\S+?),")
_LABEL = re.compile(r"^(\.L\w+):\s*$")
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_BARRIER = re.compile(r"^(B\d+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """``opcode`` as printed (``LDGSTS.E.BYPASS.128``), what it jumps to, and which of ``labels`` stand before it."""

    opcode: str
    operands: str = ""
    predicated: bool = False
    section: str = ""
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def moves(self) -> bool:
        """Whether it is the way ptxas loads a constant on the pipe of halves: ``HFMA2 R4, -RZ, RZ, 0, 1.7``."""
        return self.name == "HFMA2" and "-RZ, RZ" in self.operands

    @property
    def wide(self) -> bool:
        """Whether each thread moves 128 bits."""
        return ".128" in self.opcode

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of one kernel.

    ``spills`` are local loads and stores anywhere in it, ``stack`` bytes of local memory of a thread; ``shared`` bytes
    of a block. ``loop`` is False where no K loop was found that both reads and multiplies (a loop split between groups
    of warps): the counts then are of the whole kernel, and bound those of the loop. ``logic``, ``integer``, ``half``,
    ``i2f`` and ``issued`` are per weight, None for a kernel that reads no weights. ``copies`` are loads from global
    memory, ``copies128`` those of 128 bits a thread, ``tma`` bulk copies, ``sts`` stores to shared memory.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    blocks: int
    occupancy: float
    loop: bool
    instructions: int
    mma: str | None
    mmas: int
    copies: int
    copies128: int
    tma: int
    sts: int
    bars: int
    logic: float | None
    integer: float | None
    half: float | None
    i2f: float | None
    issued: float | None


def statistics(made: Compiled) -> Statistics:
    """Take a compiled kernel apart. Raises KernelError where the disassembler is missing or fails."""
    listing, usage = disassemble(made.cubin)
    return count(listing, usage, made)


def count(listing: str, usage: str, made: Compiled) -> Statistics:
    """``statistics`` of the text that ``nvdisasm -c`` and ``cuobjdump -res-usage`` print."""
    code = parse(listing)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not code or not found:
        raise KernelError(f"the disassembly of {made.variant.name} for sm_{made.arch} cannot be read; use triton 3.9")
    registers, stack = int(found[1]), int(found[2])
    inside = k_loop(code)
    body = [i for i in (code if inside is None else inside) if i.name != "NOP"]
    blocks, share = occupancy(arch(made.arch), registers=registers, shared=made.shared, warps=made.warps)
    mmas = [i.opcode for i in body if _MMA.fullmatch(i.name)]
    copies = [i for i in body if i.name in ("LDG", "LDGSTS")]

    def per_weight(names: Sequence[str]) -> float | None:
        return _number(body, names) * 32 * made.warps / made.variant.weights if made.variant.weights else None

    return Statistics(
        registers=registers, spills=_number(code, ("LDL", "STL")), stack=stack, shared=made.shared,
        blocks=blocks, occupancy=share, loop=inside is not None, instructions=len(body),
        mma=max(set(mmas), key=mmas.count).split(".")[0] if mmas else None, mmas=len(mmas),
        copies=len(copies), copies128=sum(i.wide for i in copies), tma=_number(body, ("UTMALDG", "UBLKCP")),
        sts=_number(body, ("STS", "STSM")), bars=_number(body, ("BAR",)),
        logic=per_weight(LOGIC), integer=per_weight(INTEGER), half=per_weight(HALF),
        i2f=per_weight(("I2F", "I2FP", "I2HP")), issued=per_weight(()),
    )  # fmt: skip


def _number(code: Iterable[Instruction], names: Sequence[str]) -> int:
    """How many of the instructions have one of the names; all of them for no names."""
    return sum(not names or (i.name in names and not i.moves) for i in code)


# --- text -------------------------------------------------------------------------------------------------------------
def disassemble(cubin: bytes) -> tuple[str, str]:
    """What ``nvdisasm -c`` and ``cuobjdump -res-usage`` print of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _run("nvdisasm", "-c", str(path)), _run("cuobjdump", "-res-usage", str(path))


def tool(name: str) -> Path:
    """A program of the CUDA toolkit: triton's own, or one on the path."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if own.is_file():
        return own
    if found := shutil.which(name):
        return Path(found)
    raise KernelError(
        f"{name} is not in {own.parent} nor on the path; install triton from PyPI, which brings it, or the CUDA toolkit"
    )


def _run(name: str, *args: str) -> str:
    path = tool(name)
    try:
        done = subprocess.run([path, *args], capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError(f"cannot run {path}: {error}; install triton from PyPI again") from error
    if done.returncode:
        raise KernelError(f"{path} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing, in order."""
    found: list[Instruction] = []
    section = ""
    labels: list[str] = []
    for line in listing.splitlines():
        if match := _SECTION.match(line):
            section, labels = match[1], []
        elif match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _LINE.match(line):
            found.append(Instruction(match[2], match[3].strip(), match[1] is not None, section, tuple(labels)))
            labels = []
    return found


# --- loops ------------------------------------------------------------------------------------------------------------
def k_loop(code: Sequence[Instruction]) -> list[Instruction] | None:
    """The instructions of the K loop, without loops inside it that only wait; None where there is none to be found.

    It is the natural loop with the fewest instructions that has a tensor-core instruction. One that loads nothing from
    global memory is part of a loop that the compiler split between groups of warps, and is not taken.
    """
    starts = _starts(code)
    after = _successors(code, starts)
    parts = [code[a:b] for a, b in itertools.pairwise(starts)]
    loops = _natural_loops(after)
    multiply = {b for b, part in enumerate(parts) if any(_MMA.fullmatch(i.name) for i in part)}
    waits = [body for _, body in loops if all(i.name in _WAITING for b in body for i in parts[b])]
    candidates = []
    for header, body in loops:
        if body & multiply:
            spinning = set().union(*(w for w in waits if w < body))
            taken = _reached(header, body - spinning, after)
            if not (taken & multiply) or not any(header in after[b] for b in taken):
                taken = body  # it waits on its only way round
            candidates.append([i for b in sorted(taken) for i in parts[b]])
    smallest = min(candidates, key=len, default=None)
    if smallest is None or not any(i.name in _LOADS for i in smallest):
        return None
    return smallest


def _reached(start: int, within: set[int], after: Sequence[set[int]]) -> set[int]:
    """The blocks of ``within`` that ``start`` leads to without leaving them."""
    found, pending = set(), [start]
    while pending:
        if (block := pending.pop()) in within and block not in found:
            found.add(block)
            pending.extend(after[block])
    return found


def _starts(code: Sequence[Instruction]) -> list[int]:
    """Where basic blocks begin, and the end of the code."""
    first = {0, len(code)}
    for at, i in enumerate(code):
        if i.labels or (at and code[at - 1].section != i.section):
            first.add(at)
        if i.name in ("BRA", "EXIT", "BSYNC", "BRX", "BRXU", "RET"):
            first.add(at + 1)
    return sorted(first)


def _successors(code: Sequence[Instruction], starts: Sequence[int]) -> list[set[int]]:
    """For each block those that may run next. Calls return; what an indirect jump reaches is not known."""
    block_at = {label: b for b, at in enumerate(starts[:-1]) for label in code[at].labels}
    resumes: dict[str, set[int]] = {}  # where threads go on that wait at a convergence barrier
    for i in code:
        if i.name == "BSSY" and i.target in block_at and (match := _BARRIER.match(i.operands)):
            resumes.setdefault(match[1], set()).add(block_at[i.target])
    after: list[set[int]] = []
    for b, end in enumerate(starts[1:]):
        last = code[end - 1]
        found: set[int] = set()
        always = last.name in ("EXIT", "RET", "BRX", "BRXU") and not last.predicated
        if last.name == "BRA":
            if last.target in block_at:
                found.add(block_at[last.target])
            # BRA.U UP0, `(.L_x_1) depends on UP0 without being predicated
            always = not last.predicated and last.operands.startswith("`")
        elif last.name == "BSYNC" and (match := _BARRIER.match(last.operands)):
            found |= resumes.get(match[1], set())
        if not always and end < len(code) and code[end].section == last.section:
            found.add(b + 1)
        after.append(found)
    return after


def _natural_loops(after: Sequence[set[int]]) -> list[tuple[int, set[int]]]:
    """Each block that dominates one which jumps to it, the header, and the blocks of its loop."""
    before: list[set[int]] = [set() for _ in after]
    for b, targets in enumerate(after):
        for t in targets:
            before[t].add(b)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for b, targets in enumerate(after):
        for header in targets & dominators[b]:
            body = loops.setdefault(header, {header})
            pending = [b]
            while pending:
                if (block := pending.pop()) not in body:
                    body.add(block)
                    pending.extend(before[block])
    return list(loops.items())


def _dominators(before: Sequence[set[int]]) -> list[set[int]]:
    """For each block those on every way to it from an entry: a block that nothing jumps to."""
    everything = set(range(len(before)))
    found = [everything if sources else {b} for b, sources in enumerate(before)]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for b, sources in enumerate(before):
            if b and sources and (new := set.intersection(*(found[s] for s in sources)) | {b}) != found[b]:
                found[b], changed = new, True
    return found
