"""The catalogue: which kernels there are for a format, and in which tiles and for which architectures each is compiled.

Families are modules of kernels (``triton_source``): ``weight_only_<format>`` for activations of 16 bits, and
``fp8_<format>_e4m3`` for activations of FP8. A row of ``_TILES`` is one use of a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxquant.codegen import triton_source
from fxquant.codegen.variants import Variant
from fxquant.decodings import BLOCK, KERNEL_FORMATS, Decoding, decodes, decoding
from fxquant.formats import Format, IntFormat, parse_format
from fxquant.grids import FloatFormat

E4M3 = FloatFormat(4, 3, 7, "fn")
"""The FP8 of activations."""
BIG = (80, 90, 100, 103)
"""Architectures with more than 160 KB of shared memory on an SM."""
SMALL = (86, 89, 120, 121)
"""Architectures with 100 KB."""
WITH_FP8 = (89, 90, 100, 103, 120, 121)
NEEDS_FP8 = "FP8 tensor cores came with sm_89; sm_80 and sm_86 multiply in float16, by weight_only"

SIGNATURE: dict[str, str] = {
    "x": "*fp16", "w": "*i32", "scale": "*fp32", "zero": "*fp16", "row_scale": "*fp32", "bias": "*fp16",
    "residual": "*fp16", "thin": "*fp16", "wide": "*fp16", "out": "*fp16", "M": "i32", "N": "i32", "K": "i32",
    "blocks": "i32", "x_stride": "i32", "residual_stride": "i32", "out_stride": "i32",
}  # fmt: skip
"""Run-time arguments of ``gemm`` in every family."""
_UNALIGNED = {"M", "blocks"}

formats: tuple[str, ...] = tuple(str(format) for format in KERNEL_FORMATS)
"""Formats that have kernels."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One use of a ``gemm``: its kind, tile and options, and the architectures that run it so."""

    kind: str
    BM: int
    BN: int
    warps: int
    stages: int
    archs: tuple[int, ...]
    group: int = 0
    splits: int = 1
    swap: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_DECODE = Tile("decode", 16, 64, warps=2, stages=4, archs=BIG, splits=4)
_PREFILL = Tile("prefill", 64, 128, warps=4, stages=3, archs=(80, 90), swap=True)
HALF_TILES = (
    _DECODE,
    replace(_DECODE, stages=3, archs=SMALL),
    replace(_DECODE, kind="decode-group", group=64),
    replace(_DECODE, kind="decode-group", group=64, stages=3, archs=SMALL),
    _PREFILL,  # on Hopper wgmma: W is the operand of 64 rows and more, from registers
    replace(_PREFILL, stages=2, BM=32, swap=False, archs=SMALL),
    replace(_PREFILL, stages=2, swap=False, archs=(100, 103)),
)
"""Activations of 16 bits."""
_DECODE8 = Tile("decode-fp8", 16, 64, warps=4, stages=4, archs=(90,), splits=4, swap=True)
BYTE_TILES = (
    _DECODE8,
    replace(_DECODE8, BN=128, archs=(100, 103)),  # the tensor cores of Blackwell's data centre take 128 rows
    replace(_DECODE8, swap=False, stages=3, archs=(89, 120, 121)),
    replace(_DECODE8, kind="decode-fp8-group", group=256),
    replace(_DECODE8, kind="prefill-fp8", BM=64, BN=128, stages=3, splits=1),
)
"""Activations of FP8."""


SCALED_TILES = (
    Tile("decode-mx", 16, 128, warps=4, stages=3, archs=(100, 103), swap=True),
    Tile("decode-mx", 16, 64, warps=4, stages=3, archs=(120, 121)),
)
"""MX and NVFP4 on both sides. sm_120 has no instruction for E4M3 times E2M1."""
SCALED_BLOCK = 256
NEEDS_SCALED = "tensor cores that take scales came with sm_100; others decode the weights, by weight_only"


def variants(names: Sequence[str]) -> list[Variant]:
    """Every kernel of the formats, as it is compiled. Raises FormatError for a format without one."""
    found: list[Variant] = []
    for name in names:
        format = parse_format(name)
        zero = isinstance(format, IntFormat) and not format.signed
        found += [_gemm(format, None, tile, zero=zero) for tile in HALF_TILES]
        if not zero and decodes(format, E4M3) is None:
            found += [_gemm(format, E4M3, tile) for tile in BYTE_TILES]
        found += [
            _scaled(operands, tile)
            for operands in triton_source.SCALED
            if operands.w == str(format)
            for tile in SCALED_TILES
            if operands.x == operands.w or tile.archs != (120, 121)
        ]
    return found


def emit(family: str) -> str:
    """The source of a family's file. Raises KeyError for a name that is no family."""
    return {source.name: source.text for source in sources(formats)}[family]


def sources(names: Sequence[str]) -> list[triton_source.Source]:
    """The modules of the formats."""
    parsed = [parse_format(name) for name in names]
    pairs = [(format, target) for format in parsed for target in (None, E4M3) if decodes(format, target) is None]
    return [
        *(triton_source.gemm(decoding(format, target)) for format, target in pairs),
        *(triton_source.scaled(operands) for operands in triton_source.SCALED if operands.w in names),
    ]


def every(decoding: Decoding, group: int) -> int:
    """Slices after which a kernel scales its sum: as many as divide a block and lie in one group.

    ``group`` is the columns that a group takes when packed, 0 for a scale a row. For FP8 no more than 128 columns
    either way: Hopper's tensor cores add up with fewer bits than float32 has.
    """
    most = decoding.slices
    limit = group or (128 if decoding.target is not None else 0)
    while limit and limit % (most * decoding.width):
        most //= 2
    return max(most, 1)


def _gemm(format: Format, target: FloatFormat | None, tile: Tile, *, zero: bool = False) -> Variant:
    of = decoding(format, target, group=tile.group)
    tile = _fitted(tile, of)
    signature = dict(SIGNATURE)
    if target is not None:
        signature |= {"x": "*fp8e4nv", "w": "*u8"}
    if tile.splits > 1:
        signature["out"] = "*fp32"
    constants: dict[str, bool | int | float | str | None] = {
        "BM": tile.BM, "BN": tile.BN, "RUN": of.run, "EVERY": every(of, tile.group), "GROUP": tile.group,
        "PADDED": tile.group, "EVEN": True, "SPLITS": tile.splits, "SWAP": tile.swap, "ZERO": zero,
        "ROW_SCALE": target is not None, "BIAS": False, "ACTIVATION": "none", "RESIDUAL": False, "RANK": 0,
        "USE_ASM": True,
    }  # fmt: skip
    kind = f"fp{format.bits}_{format}" if isinstance(format, FloatFormat) else str(format)
    return Variant(
        name=f"{kind}_{tile.kind.replace('-', '_')}",
        kind=tile.kind,
        family=triton_source.gemm(of).name,
        function="gemm",
        signature=signature,
        constants=constants,
        aligned=frozenset(signature) - _UNALIGNED,
        warps=tile.warps,
        stages=tile.stages,
        weights=tile.BN * of.block,
        bits=format.bits + (32 / tile.group if tile.group else 0),
        archs=tile.archs,
        needs="" if target is None else NEEDS_FP8,
    )


def _scaled(operands: triton_source.Scaled, tile: Tile) -> Variant:
    byte = {"e2m1": "*u8", "e4m3": "*fp8e4nv"}
    exponent = "*u8" if operands.size == 32 else "*fp8e4nv"
    rest = {k: v for k, v in SIGNATURE.items() if k not in ("x", "w", "zero", "blocks")}
    signature = {
        "x": byte[operands.x], "x_exponent": exponent, "w": byte[operands.w], "w_exponent": exponent, **rest,
        "w_stride": "i32",
    }  # fmt: skip
    constants: dict[str, bool | int | float | str | None] = {
        "BM": tile.BM, "BN": tile.BN, "BK": SCALED_BLOCK, "EVEN": True, "SPLITS": tile.splits, "SWAP": tile.swap,
        "ROW_SCALE": False, "BIAS": False, "ACTIVATION": "none", "RESIDUAL": False, "RANK": 0,
    }  # fmt: skip
    return Variant(
        name=f"{operands.name}_decode",
        kind=tile.kind,
        family=operands.name,
        function="gemm",
        signature=signature,
        constants=constants,
        aligned=frozenset(signature) - _UNALIGNED,
        warps=tile.warps,
        stages=tile.stages,
        weights=tile.BN * SCALED_BLOCK,
        bits=operands.bits,
        archs=tile.archs,
        needs=NEEDS_SCALED,
    )


def _fitted(tile: Tile, of: Decoding) -> Tile:
    """A tile for blocks that may be longer than ``BLOCK``, and so take more shared memory."""
    if of.block <= BLOCK:
        return tile
    if tile.kind == "prefill" and not tile.swap:
        return replace(tile, BM=tile.BM // 2, BN=64)
    return replace(tile, stages=max(tile.stages - 1, 2))
