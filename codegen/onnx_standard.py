"""Layers on packed weights as operators that onnxruntime has: MatMulNBits, GatherBlockQuantized, DequantizeLinear.

Codes are those of the packed weight, rearranged at export; signed integers become unsigned around a zero point of half
their range, which is what both operators of com.microsoft take where none is given::

    INT4 code c (two's complement)     c ^ 8 = value + 8

MatMulNBits   block: 16 to 256, a power of two   B uint8 [N, blocks, block * bits / 8], scales [N, blocks],
              zero points [N, ceil(blocks * bits / 8)], packed as the codes are; K is filled up to whole blocks

Groups that are multiples of a block have their scale repeated, as has one scale a row. What is exact and fast on
onnxruntime's CPU was measured (docs/onnx.md): 4 bits with float32 activations (level 1; 2 and 8 bits there decode all
of W at every call), every width with activations rounded to int8 (level 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant.codegen.onnx_builder import Builder, T, dims, rank
from fxquant.formats import IntFormat
from fxquant.scheme import QuantSpec

MICROSOFT = "com.microsoft"
BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)
ONE_BLOCK = 128
"""The block of weights with one scale a row: larger ones round activations coarser at level 4."""
EXACT, ROUNDED = 1, 4
"""accuracy_level of MatMulNBits: activations in float32, or rounded to int8 in every block of a row."""
FAST = {EXACT: (4,), ROUNDED: (2, 4, 8)}
"""Widths that onnxruntime multiplies without decoding the whole weight at every call, by accuracy_level."""
LINEAR_TYPES = {
    "e4m3": T.FLOAT8E4M3FN, "e5m2": T.FLOAT8E5M2, "e4m3fnuz": T.FLOAT8E4M3FNUZ, "e5m2fnuz": T.FLOAT8E5M2FNUZ,
    "int8": T.INT8, "uint8": T.UINT8,
}  # fmt: skip
"""Formats of whole bytes that DequantizeLinear decodes as the reference does."""

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weight:
    """A packed weight of the graph: its initializers, scales already plain floats, and its matrix view."""

    packed: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    spec: QuantSpec
    rows: int
    cols: int

    @property
    def inputs(self) -> list[ir.Value]:
        return [self.packed, self.scale] if self.zero_point is None else [self.packed, self.scale, self.zero_point]


# --- which one ------------------------------------------------------------------------------------------------------
def takes_matmul(b: Builder, x: ir.Value, weight: Weight) -> bool:
    """Whether a linear becomes MatMulNBits."""
    spec, options = weight.spec, b.options
    if options.operators == "fxquant" or x.dtype != T.FLOAT or rank(x) < 2 or not _is_blocked(weight):
        return False
    if options.operators == "standard":
        return True
    block = _block(spec, weight.cols)
    slow = spec.format.bits == 2 and block in (16, 256)  # level 4 has no kernel for these
    return spec.format.bits in FAST[_level(b)] and not slow


def takes_gather(b: Builder, weight: Weight) -> bool:
    """Whether an embedding becomes GatherBlockQuantized: exact for every width, rows of whole bytes only."""
    whole = weight.cols % max(8 // weight.spec.format.bits, 1) == 0
    return b.options.operators != "fxquant" and whole and _is_blocked(weight)


def takes_dequantize(b: Builder, weight: Weight) -> bool:
    """Whether a weight becomes DequantizeLinear, where MatMulNBits and GatherBlockQuantized are not."""
    constant = all(v.const_value is not None for v in weight.inputs)
    return b.options.operators == "standard" and constant and str(weight.spec.format) in LINEAR_TYPES


def _is_blocked(weight: Weight) -> bool:
    format = weight.spec.format
    fits = isinstance(format, IntFormat) and format.bits in BITS and _block(weight.spec, weight.cols) is not None
    return fits and all(v.const_value is not None for v in weight.inputs)


def _block(spec: QuantSpec, cols: int) -> int | None:
    """The block in which a row of ``cols`` columns is stored, None where its groups are no whole blocks."""
    size = spec.group_size(cols)
    if size >= cols:
        return max(BLOCKS[-1], min(ONE_BLOCK, 1 << (cols - 1).bit_length()))
    return next((block for block in BLOCKS if size % block == 0), None)


def _level(b: Builder) -> int:
    return ROUNDED if b.options.activation_bits == 8 else EXACT


# --- operators ------------------------------------------------------------------------------------------------------
def matmul(b: Builder, x: ir.Value, weight: Weight, bias: ir.Value | None) -> ir.Value:
    """x W^T + bias as MatMulNBits."""
    block = _block(weight.spec, weight.cols)
    assert block is not None
    inputs = [_codes(b, weight, block), _scales(b, weight, block), _zero_points(b, weight, block), None, bias]
    return b.op(
        "MatMulNBits", x, *inputs, domain=MICROSOFT, dtype=T.FLOAT, K=weight.cols, N=weight.rows,
        bits=weight.spec.format.bits, block_size=block, accuracy_level=_level(b),
    )  # fmt: skip


def gather(b: Builder, indices: ir.Value, weight: Weight) -> ir.Value:
    """Rows of W as GatherBlockQuantized, from the very bytes that a MatMulNBits of the same weight reads."""
    block, bits, cols = _block(weight.spec, weight.cols), weight.spec.format.bits, weight.cols
    assert block is not None
    settings = {"gather_axis": 0, "block_size": block, "bits": bits, "domain": MICROSOFT, "dtype": T.FLOAT}
    lead = list(dims(indices))
    if cols % block == 0 and weight.zero_point is None:
        scales = _scales(b, weight, block, tall=True)
        shape = [*lead, cols // block, block]
        rows = b.op("GatherBlockQuantized", _codes(b, weight, block), indices, scales, quantize_axis=2, shape=shape,
                    **settings)  # fmt: skip
        return b.op("Reshape", rows, b.const([*[0] * len(lead), cols]), dtype=T.FLOAT, shape=[*lead, cols])
    inputs = [_plain_codes(b, weight), indices, _scales(b, weight, block), _zero_points(b, weight, block)]
    return b.op("GatherBlockQuantized", *inputs, quantize_axis=1, shape=[*lead, cols], **settings)


def dequantize(b: Builder, weight: Weight) -> ir.Value:
    """W as a matrix FLOAT ``[rows, cols]`` by DequantizeLinear."""
    spec, scale = weight.spec, dims(weight.scale)
    kind = LINEAR_TYPES[str(spec.format)]
    axis, block = (1, spec.group_size(weight.cols)) if scale[1] != 1 else (0, None)
    inputs = [_typed(b, weight, kind)]
    for value in weight.inputs[1:]:
        assert value.const_value is not None
        array = value.const_value.numpy()
        array = array.astype(np.uint8 if array.dtype == np.uint8 else np.float32)
        if scale[1] != 1:
            array = np.broadcast_to(array, (weight.rows, array.shape[1]))
        else:
            array = array.reshape(()) if scale[0] == 1 else array.reshape(-1)
        inputs.append(_made(b, weight, f"{value.name}_linear", array))
    if scale == (1, 1):
        axis = None  # type: ignore[assignment]
    return b.op("DequantizeLinear", *inputs, axis=axis, block_size=block, dtype=T.FLOAT,
                shape=[weight.rows, weight.cols])  # fmt: skip


# --- initializers, each made once for every weight ------------------------------------------------------------------
def _codes(b: Builder, weight: Weight, block: int) -> ir.Value:
    """uint8 ``[rows, blocks, block * bits / 8]``: rows filled up to whole blocks."""
    name = f"{weight.packed.name}_blocks{block}"
    if ("initializer", name) in b.memo:
        return b.memo["initializer", name]
    plain, per = _unsigned(weight), block * weight.spec.format.bits // 8
    blocks = -(-weight.cols // block)
    whole = np.zeros((weight.rows, blocks * per), dtype=np.uint8)
    whole[:, : plain.shape[1]] = plain
    return _made(b, weight, name, whole.reshape(weight.rows, blocks, per))


def _plain_codes(b: Builder, weight: Weight) -> ir.Value:
    """uint8 ``[rows, cols * bits / 8]``."""
    return _made(b, weight, f"{weight.packed.name}_unsigned", _unsigned(weight))


def _unsigned(weight: Weight) -> Bytes:
    """Planar bytes of INT codes as those of unsigned codes: the top bit of each turned over."""
    assert weight.packed.const_value is not None
    planar: Bytes = weight.packed.const_value.numpy()
    if weight.zero_point is not None:
        return planar
    flip = {2: 0b10101010, 4: 0b10001000, 8: 0b10000000}[weight.spec.format.bits]
    return planar ^ np.uint8(flip)


def _scales(b: Builder, weight: Weight, block: int, *, tall: bool = False) -> ir.Value:
    """FLOAT ``[rows, blocks]``, or ``[rows, blocks, 1]``."""
    array = _each_block(weight, weight.scale, block).astype(np.float32)
    name = f"{weight.scale.name}_blocks{block}"
    return _made(b, weight, f"{name}_tall", array[..., None]) if tall else _made(b, weight, name, array)


def _zero_points(b: Builder, weight: Weight, block: int) -> ir.Value | None:
    """uint8 ``[rows, ceil(blocks * bits / 8)]``, packed as codes are; None for half of the range."""
    if weight.zero_point is None:
        return None
    bits = weight.spec.format.bits
    points, per = _each_block(weight, weight.zero_point, block), 8 // bits
    whole = np.zeros((weight.rows, -(-points.shape[1] // per) * per), dtype=np.uint8)
    whole[:, : points.shape[1]] = points
    packed = np.zeros((weight.rows, whole.shape[1] // per), dtype=np.uint8)
    for i in range(per):
        packed |= whole[:, i::per] << np.uint8(i * bits)
    return _made(b, weight, f"{weight.zero_point.name}_blocks{block}", packed)


def _each_block(weight: Weight, value: ir.Value, block: int) -> Array:
    """One value for every block of every row, from one a tensor, a row or a group."""
    assert value.const_value is not None
    array, blocks = value.const_value.numpy(), -(-weight.cols // block)
    size = weight.spec.group_size(weight.cols)
    groups = np.minimum(np.arange(blocks) * block // max(size, 1), array.shape[1] - 1)
    return np.ascontiguousarray(np.broadcast_to(array, (weight.rows, array.shape[1]))[:, groups])


def _typed(b: Builder, weight: Weight, kind: ir.DataType) -> ir.Value:
    """The bytes of 8-bit codes as a tensor of the type that they are codes of."""
    name = f"{weight.packed.name}_typed"
    if ("initializer", name) in b.memo:
        return b.memo["initializer", name]
    assert weight.packed.const_value is not None
    array = weight.packed.const_value.numpy().view(kind.numpy())
    return _made(b, weight, name, array)


def _made(b: Builder, weight: Weight, name: str, array: Array) -> ir.Value:
    key = ("initializer", name)
    if key not in b.memo:
        b.memo[key] = b.initializer(name, ir.tensor(np.ascontiguousarray(array)))
    return b.memo[key]
