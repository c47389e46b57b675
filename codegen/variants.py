"""A kernel as it is compiled: which function of which emitted file, for which arguments, tile and architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fxquant.errors import ArchError

Constant = bool | int | float | str | None

FP_FUSION = True
"""Whether a multiplication and an addition may become one FMA. Stated at every compile and launch: triton's default
is on up to 3.9 and off from 3.10."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel.

    ``function`` is the name of the ``@triton.jit`` function in the emitted file ``<family>.py``. ``signature`` gives
    the triton type of every run-time argument (``*fp16``, ``*i32``, ``i32``) and ``constants`` the values of the
    others, in any order. ``aligned`` names run-time arguments that are multiples of 16: pointers in bytes, integers
    as such. Without it there are no 128-bit copies.

    One CTA of ``warps`` warps reads ``weights`` weights a trip of its K loop (BN * KB; 0: it reads none) of ``bits``
    bits each in memory, scales included where they are read with them. ``archs`` are the architectures it is meant for,
    ``needs`` says why not the others.
    """

    name: str
    kind: str
    family: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    warps: int = 4
    stages: int = 3
    weights: int = 0
    bits: float = 0.0
    archs: tuple[int, ...] = (80, 86, 89, 90, 100, 103, 120, 121)
    needs: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", MappingProxyType(dict(self.signature)))
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))
        object.__setattr__(self, "aligned", frozenset(self.aligned))

    @property
    def decodes(self) -> bool:
        """Whether it serves few rows of x, so that reading the weights is all the time there is to fill."""
        return self.kind.startswith("decode")


@dataclass(frozen=True, slots=True)
class Arch:
    """What one SM has: ``shared`` bytes for its blocks and 1 KB of it taken by each, warps, blocks, registers.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    number: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65536

    @property
    def block_shared(self) -> int:
        """The most shared memory one block can have."""
        return self.shared - 1024


_KB = 1024
ARCHS = {
    row.number: row
    for row in (
        Arch(80, 164 * _KB, 64, 32),
        Arch(86, 100 * _KB, 48, 16),
        Arch(89, 100 * _KB, 48, 24),
        Arch(90, 228 * _KB, 64, 32),
        Arch(100, 228 * _KB, 64, 32),
        Arch(103, 228 * _KB, 64, 32),
        Arch(120, 100 * _KB, 48, 24),
        Arch(121, 100 * _KB, 48, 24),
    )
}


def arch(number: int) -> Arch:
    """The architecture sm_<number>. Raises ArchError for one that kernels are not made for."""
    if found := ARCHS.get(number):
        return found
    why = "has no 16-bit tensor core that these kernels use" if number < 80 else "is not known"
    raise ArchError(f"sm_{number} {why}; expected one of {', '.join(f'sm_{n}' for n in ARCHS)}")


def parse_arch(text: str) -> int:
    """80 from ``sm_80``, ``80`` or ``8.0``, and so on. Raises ArchError."""
    digits = text.strip().lower().removeprefix("sm_").removesuffix("a").replace(".", "")
    if not (digits.isascii() and digits.isdecimal()):
        raise ArchError(f"unknown architecture {text!r}; expected one of {', '.join(f'sm_{n}' for n in ARCHS)}")
    return arch(int(digits)).number


def occupancy(on: Arch, *, registers: int, shared: int, warps: int) -> tuple[int, float]:
    """Blocks of a kernel that one SM holds, and the share of its warps that they are; (0, 0.0) where none fits.

    blocks = min(warp slots of the register file / warps, shared / (block's + 1 KB), SM's warps / warps, SM's blocks);
    a warp's registers are given out 256 at a time, ``registers`` and ``shared`` are a thread's and a block's.
    """
    if shared > on.block_shared:
        return 0, 0.0
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(on.registers // warp_registers // warps, on.shared // (shared + 1024), on.warps // warps, on.blocks)
    return blocks, blocks * warps / on.warps
