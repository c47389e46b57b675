"""The catalogue: which kernels there are for a format, and in which tiles and for which architectures each is compiled.

Families are modules of kernels (``triton_source``): ``weight_only_<format>`` for activations of 16 bits,
``fp8_<format>_e4m3`` for activations of FP8, ``mx_...`` and ``nv_...`` where both sides have scales of blocks. Tiles
are those that a launch takes (``tiles``), so what is compiled and counted here is what runs. ``rows`` makes activations
ready for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxquant.codegen import triton_source
from fxquant.codegen.rounding import BYTE_DOTS
from fxquant.codegen.tiles import Steps, tiles
from fxquant.codegen.variants import ARCHS, Constant, Variant
from fxquant.decodings import KERNEL_FORMATS, decodes, decoding
from fxquant.formats import Format, IntFormat, parse_format
from fxquant.grids import FloatFormat

E4M3 = FloatFormat(4, 3, 7, "fn")
"""The FP8 of activations."""
WITH_FP8 = tuple(number for number in ARCHS if number >= BYTE_DOTS)
NEEDS_FP8 = "FP8 tensor cores came with sm_89; sm_80 and sm_86 multiply in float16, by weight_only"

SIGNATURE: dict[str, str] = {
    "x": "*fp16", "w": "*i32", "scale": "*fp32", "zero": "*fp16", "row_scale": "*fp32", "bias": "*fp16",
    "residual": "*fp16", "thin": "*fp16", "wide": "*fp16", "out": "*fp16", "M": "i32", "N": "i32", "K": "i32",
    "blocks": "i32", "x_stride": "i32", "residual_stride": "i32", "out_stride": "i32",
}  # fmt: skip
"""Run-time arguments of ``gemm`` in every family."""
_UNALIGNED = {"M", "blocks"}
_PLAIN: dict[str, Constant] = {"BIAS": False, "ACTIVATION": "none", "RESIDUAL": False, "RANK": 0}
"""Constants of a ``gemm`` with nothing after the product."""

formats: tuple[str, ...] = tuple(str(format) for format in KERNEL_FORMATS)
"""Formats that have kernels."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a ``gemm`` is compiled for: so many rows of x, and a scale for ``group`` columns (0: for a row)."""

    kind: str
    M: int
    group: int = 0


HALF_USES = (Use("decode", 16), Use("decode-group", 16, 64), Use("prefill", 128))
"""Activations of 16 bits."""
BYTE_USES = (Use("decode-fp8", 16), Use("decode-fp8-group", 16, 256), Use("prefill-fp8", 128))
"""Activations of FP8."""
SIZE, SMS = 4096, 132
"""Rows and columns of the weights that tiles are asked for, and multiprocessors of the GPU."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile of an MX or NVFP4 kernel, and the architectures that run it so."""

    kind: str
    BM: int
    BN: int
    warps: int
    stages: int
    archs: tuple[int, ...]
    swap: bool = False


SCALED_TILES = (
    Tile("decode-mx", 16, 128, warps=4, stages=3, archs=(100, 103), swap=True),
    Tile("decode-mx", 16, 64, warps=4, stages=3, archs=(120, 121)),
)
"""MX and NVFP4 on both sides. sm_120 has no instruction for E4M3 times E2M1."""
SCALED_BLOCK = 256
NEEDS_SCALED = "tensor cores that take scales came with sm_100; others decode the weights, by weight_only"


ROWS = (
    Variant(
        "rows_to_half", "rows", "rows", "to_half",
        {"x": "*bf16", "out": "*fp16", "row_scale": "*fp32", "K": "i32", "x_stride": "i32"}, {"BK": 1024},
        aligned=frozenset(("x", "out", "row_scale", "K", "x_stride")), stages=1,
    ),
    Variant(
        "rows_to_e4m3", "rows", "rows", "round_rows",
        {"x": "*fp16", "given": "*fp32", "before": "*i32", "after": "*i32", "out": "*u8", "row_scale": "*fp32",
         "K": "i32", "x_stride": "i32", "up": "fp32", "down": "fp32"},
        {"MBITS": 3, "BIAS": 7, "MAX": 448.0, "INTEGER": False, "STATIC": False, "BEFORE": False, "AFTER": False,
         "TO_MBITS": 3, "TO_BIAS": 7, "BK": 1024},
        aligned=frozenset(("x", "given", "before", "after", "out", "row_scale", "K", "x_stride")), stages=1,
    ),
)  # fmt: skip
"""What makes rows of activations ready: bfloat16 as float16 and a power of two, and E4M3 with a scale a token."""


def variants(names: Sequence[str]) -> list[Variant]:
    """Every kernel of the formats, as it is compiled. Raises FormatError for a format without one."""
    found: list[Variant] = []
    for name in names:
        format = parse_format(name)
        zero = isinstance(format, IntFormat) and not format.signed
        found += [_gemm(format, None, use, arch, zero=zero) for use in HALF_USES for arch in ARCHS]
        if not zero and decodes(format, E4M3) is None:
            found += [_gemm(format, E4M3, use, arch) for use in BYTE_USES for arch in WITH_FP8]
        found += [
            _scaled(operands, tile)
            for operands in triton_source.SCALED
            if operands.w == str(format)
            for tile in SCALED_TILES
            if operands.x == operands.w or tile.archs != (120, 121)
        ]
    return [*found, *ROWS] if found else found


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
        triton_source.rows(),
    ]


def _gemm(format: Format, target: FloatFormat | None, use: Use, arch: int, *, zero: bool = False) -> Variant:
    """A use on an architecture, in the tiles that a launch takes there."""
    of = decoding(format, target, group=use.group, cols=SIZE)
    steps = Steps(-(-SIZE // of.block), of.block, format.bits, 2 if target is None else 1)
    tile = tiles(use.M, SIZE, steps, sms=SMS, arch=arch)
    signature = dict(SIGNATURE)
    if target is not None:
        signature |= {"x": "*fp8e4nv", "w": "*u8"}
    if tile.splits > 1:
        signature["out"] = "*fp32"
    constants: dict[str, Constant] = {
        "BM": tile.BM, "BN": tile.BN, "RUN": of.run, "EVERY": of.every(use.group), "GROUP": use.group,
        "PADDED": use.group, "EVEN": True, "SPLITS": tile.splits, "SWAP": tile.swap, "ZERO": zero,
        "ROW_SCALE": target is not None, **_PLAIN, "USE_ASM": True,
    }  # fmt: skip
    kind = f"fp{format.bits}_{format}" if isinstance(format, FloatFormat) else str(format)
    return Variant(
        name=f"{kind}_{use.kind.replace('-', '_')}",
        kind=use.kind,
        family=triton_source.gemm(of).name,
        function="gemm",
        signature=signature,
        constants=constants,
        aligned=frozenset(signature) - _UNALIGNED,
        warps=tile.warps,
        stages=tile.stages,
        weights=tile.BN * of.block,
        bits=format.bits + (32 / use.group if use.group else 0),
        archs=(arch,),
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
    constants: dict[str, Constant] = {
        "BM": tile.BM, "BN": tile.BN, "BK": SCALED_BLOCK, "EVEN": True, "SPLITS": 1, "SWAP": tile.swap,
        "ROW_SCALE": False, **_PLAIN,
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
