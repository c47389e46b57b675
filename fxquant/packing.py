"""Packing: how n-bit codes lie in bytes.

The ``planar`` layout, used on disk and in ONNX, splits an n-bit code into planes of 8, 4, 2 or 1 bits, low bits first::

    bits  planes         6-bit code (FP6 E3M2)                     ZeroQuant(4+2), section "4+2 bit split"
    8     8              s e2 | e1 e0 m1 m0
    7     4 + 2 + 1      \\_2_/  \\____4____/
    6     4 + 2
    5     4 + 1          plane 4: e1 e0 m1 m0, two codes a byte, the even column in the low nibble
    4     4              plane 2: s e2, four codes a byte, the first column in the lowest bits
    3     2 + 1
    2     2
    1     1

A row of ``cols`` codes takes ``ceil(cols * 4 / 8) + ceil(cols * 2 / 8) + ...`` bytes: its planes one after the other.
With ``cols`` a multiple of 8 that is exactly ``bits / 8`` bytes a code; otherwise each plane's last byte is filled
with zero bits. Kernel layouts are made from this one when a model is loaded.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fxquant.errors import FormatError


@cache
def planes(bits: int) -> tuple[int, ...]:
    """The widths of the planes of an n-bit code, low bits first: 6 -> (4, 2)."""
    if not 1 <= bits <= 8:
        raise FormatError(f"cannot pack codes of {bits} bits; expected 1 to 8")
    return tuple(width for width in (4, 2, 1, 8) if bits & width)


def plane_bytes(cols: int, bits: int) -> tuple[int, ...]:
    """How many bytes of a packed row each plane takes."""
    return tuple(-(-cols * width // 8) for width in planes(bits))


def packed_shape(shape: tuple[int, int], bits: int) -> tuple[int, int]:
    """The shape of ``pack(codes, bits)`` for codes of ``shape`` [rows, cols]."""
    rows, cols = shape
    return rows, sum(plane_bytes(cols, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[rows, cols]``, each below ``2**bits``, to planar bytes uint8 ``[rows, packed]``."""
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"pack takes a uint8 matrix of codes, got {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FormatError(f"code {int(codes.max())} does not fit in {bits} bits")
    out, low = [], 0
    for width in planes(bits):
        out.append(_pack_plane(codes >> low if low else codes, width))
        low += width
    return torch.cat(out, dim=1)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of ``pack``: planar bytes ``[rows, packed]`` to codes ``[rows, cols]``."""
    widths, sizes = planes(bits), plane_bytes(cols, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != sum(sizes):
        raise FormatError(
            f"unpack of {cols} {bits}-bit codes takes uint8 [rows, {sum(sizes)}], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    codes: Tensor | None = None
    low = 0
    for width, plane in zip(widths, packed.split(sizes, dim=1), strict=True):
        part = _unpack_plane(plane, width, cols)
        codes = part if codes is None else codes | (part << low)
        low += width
    assert codes is not None
    return codes


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """The low ``width`` bits of each code, ``8 / width`` codes a byte, the first in the lowest bits."""
    rows, cols = codes.shape
    per_byte = 8 // width
    low = codes & (2**width - 1)
    if pad := -cols % per_byte:
        low = torch.nn.functional.pad(low, (0, pad))
    parts = low.reshape(rows, (cols + pad) // per_byte, per_byte).unbind(dim=2)
    byte: Tensor = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        byte = byte | (part << (i * width))
    return byte


def _unpack_plane(plane: Tensor, width: int, cols: int) -> Tensor:
    if width == 8:
        return plane
    mask = 2**width - 1
    parts = [(plane >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(parts, dim=2).reshape(plane.shape[0], -1)[:, :cols]
