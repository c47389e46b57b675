"""ggml: packed weights as the blocks of a GGUF file, where a block type holds them exactly.

A block is 32 weights of a row. Its bytes, with q[i] the stored code of weight i::

    Q8_0    d float16 | q[0..31] int8                                        value = d q
    Q5_0    d float16 | bit 4 of q, 4 bytes | bits 0-3 of q[i] and q[i+16]   value = d (q - 16)
    Q4_0    d float16 | bits 0-3 of q[i] and q[i+16], 16 bytes               value = d (q - 8)
    Q4_1    d, m float16 | the same                                          value = d q + m
    MXFP4   e E8M0 | the same, q as E2M1                                     value = 2^(e-127) q
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.codegen.checkpoint import Weight
from fxquant.errors import ExportError
from fxquant.qtensor import QuantizedTensor
from fxquant.scales import spread

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A row: weights of ``format`` become blocks of the type ``name``, whose ``head`` comes before ``body``."""

    name: str
    format: str
    head: Callable[[QuantizedTensor], Tensor | None]
    body: Callable[[Tensor], Tensor]


# --- heads: [rows, blocks, bytes], None where a scale is not exact ----------------------------------------------------
def _by_block(scale: Tensor, q: QuantizedTensor) -> Tensor:
    """Scales (or zero points) of 32 columns each, ``[rows, cols / 32]``."""
    rows, cols = q.codes.shape
    wide = spread(scale, q.spec.block(rows, cols), (rows, cols))
    return wide.expand(rows, cols)[:, ::BLOCK]


def _float16(value: Tensor) -> Tensor | None:
    """Bytes of ``value`` in float16; None where that is not exact."""
    half = value.to(torch.float16)
    return half.unsqueeze(-1).contiguous().view(torch.uint8) if torch.equal(half.float(), value) else None


def _scale(q: QuantizedTensor) -> Tensor | None:
    return _float16(_by_block(q.scales.effective.float(), q))


def _scale_and_lowest(q: QuantizedTensor) -> Tensor | None:
    assert q.zero_point is not None
    scale = _by_block(q.scales.effective.float(), q)
    d, m = _float16(scale), _float16(-_by_block(q.zero_point.float(), q) * scale)
    return None if d is None or m is None else torch.cat([d, m], -1)


def _exponent(q: QuantizedTensor) -> Tensor | None:
    return _by_block(q.stored_scale, q).unsqueeze(-1) if q.spec.scale == "e8m0" else None


# --- bodies: uint8 codes [rows, blocks, 32] -> bytes [rows, blocks, bytes] --------------------------------------------
def _whole(codes: Tensor) -> Tensor:
    return codes


def _halves(codes: Tensor) -> Tensor:
    return codes[..., :16] & 0xF | (codes[..., 16:] & 0xF) << 4  # q[i+16] | q[i]


def _around_8(codes: Tensor) -> Tensor:
    return _halves(codes ^ 8)  # -8 .. 7 -> 0 .. 15, on two's complement


def _around_16(codes: Tensor) -> Tensor:
    codes = codes ^ 16
    fifth = ((codes >> 4).reshape(*codes.shape[:-1], 4, 8) << torch.arange(8)).sum(-1)  # q7 q6 ... q0
    return torch.cat([fifth.to(torch.uint8), _halves(codes)], -1)


TYPES = (
    BlockType("Q8_0", "int8", _scale, _whole),
    BlockType("Q5_0", "int5", _scale, _around_16),
    BlockType("Q4_0", "int4", _scale, _around_8),
    BlockType("Q4_1", "uint4", _scale_and_lowest, _halves),
    BlockType("MXFP4", "e2m1", _exponent, _halves),
)
WHAT_FITS = (
    "What fits: int8, int5 and int4 in groups of a multiple of 32, per channel or per tensor, with fp16 scales "
    "(Q8_0, Q5_0, Q4_0), and mxfp4 (MXFP4); for instance -c config.yaml with the rule "
    "{match: '*', weight: int4/group32:fp16}, or the recipe MXFP4"
)


def blocks(weight: Weight) -> tuple[str, Tensor]:
    """The block type of a weight and its bytes, uint8 ``[rows, bytes a row]``.

    ExportError, naming the layer, for a format, groups or scales that no type holds, and for layers that round inputs.
    """
    q = weight.tensor
    rows, cols = q.codes.shape
    said = f"{weight.layer} is {q.spec}"
    if weight.rounding is not None:
        raise ExportError(f"{said} with inputs {weight.rounding.spec}; a GGUF file does not say that inputs are "
                          f"rounded\nWhat to do: compile without activation, or export to ONNX")  # fmt: skip
    kind = next((t for t in TYPES if t.format == str(q.spec.format)), None)
    if kind is None:
        raise ExportError(f"{said}, and no block type of GGUF holds {q.spec.format}\n{WHAT_FITS}")
    wide = q.spec.block(rows, cols)[1]
    if cols % BLOCK or (wide % BLOCK and wide != cols):
        raise ExportError(f"{said} with {cols} columns in groups of {wide}; blocks of GGUF have {BLOCK} columns\n"
                          f"{WHAT_FITS}")  # fmt: skip
    if (head := kind.head(q)) is None:
        raise ExportError(f"{said}, and {kind.name} cannot hold its scales exactly{_why(kind)}\n{WHAT_FITS}")
    body = kind.body(q.codes.reshape(rows, -1, BLOCK))
    return kind.name, torch.cat([head, body], -1).flatten(1)


def _why(kind: BlockType) -> str:
    if kind.name == "Q4_1":
        return (
            ": it stores the scale and the lowest value of a block in float16, and lowest = -zero_point * scale has "
            "more digits than that"
        )
    return ": it stores E8M0" if kind.name == "MXFP4" else ": it stores float16"
