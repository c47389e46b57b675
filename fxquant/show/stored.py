"""A quantized weight as it is stored: codes and scales, in QDQ form or packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from fxquant import packing
from fxquant.ops import operators as ops
from fxquant.qtensor import load_scale
from fxquant.rewrite import fetch
from fxquant.scales import Scales, spread
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.show.summary import Use, named_arguments


@dataclass(frozen=True)
class StoredWeight:
    """``codes``: uint8 ``[rows, cols]``, the matrix view; ``exponent_bias``: int8 ``[cols]`` or None."""

    codes: Tensor
    scales: Scales
    spec: QuantSpec
    exponent_bias: Tensor | None

    @property
    def values(self) -> Tensor:
        """What the codes stand for before they are multiplied with scales, float32: points of the format's grid."""
        return self.spec.format.decode(self.codes)

    @property
    def spread_scales(self) -> tuple[Tensor, Tensor | float]:
        """Scales and zero points (0 where there are none) that broadcast over the matrix."""
        block, zero = self.spec.block(*self.codes.shape), self.scales.zero_point
        zeros = 0.0 if zero is None else spread(zero.float(), block, self.codes.shape)
        return spread(self.scales.effective.float(), block, self.codes.shape), zeros


def stored_weight(gm: fx.GraphModule, use: Use) -> StoredWeight:
    """The weight that ``use`` reads."""
    named = named_arguments(use.node)

    def part(name: str) -> Tensor | None:
        node = named.get(name)
        return fetch(gm, str(node.target)) if isinstance(node, fx.Node) else None

    spec, codes, scale = parse_spec(str(named["spec"])), part("codes"), part("scale")
    assert scale is not None
    if use.node.target is not ops.dequantize.default:
        packed = part("packed")
        assert packed is not None
        codes = packing.unpack(packed, packing.planar(spec.format.bits), math.prod(use.shape) // packed.shape[0])
    assert codes is not None
    scales = Scales(load_scale(scale, spec), part("zero_point"), part("tensor_scale"))
    return StoredWeight(codes, scales, spec, part("exponent_bias"))
