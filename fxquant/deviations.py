"""Deviations: running sums for the distance of two tensors, and counts of values against a format's grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxquant.counterparts import Pair
from fxquant.layers import Layer
from fxquant.observations import Histogram
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.qdq import rounding_spec
from fxquant.qtensor import load_scale, to_matrix
from fxquant.rewrite import fetch
from fxquant.scales import Scales, choose, power_of_two, spread
from fxquant.scheme import QuantSpec
from fxquant.show.numerics import Errors
from fxquant.show.stored import stored_weight
from fxquant.show.summary import Use

BINS = 64
_CHUNK = 1 << 20
_EDGE = 2.0**-16
"""How far above the largest value of a grid, relative to it, a quotient may be and not count as saturated."""
_SAME = 1e-2
"""How far the error of a weight may be from the recorded one, relative to it, before it counts as another weight."""


@dataclass
class Deviation:
    """||y||^2, ||y'||^2, ||y - y'||^2 and y y' over all that was added, but for entries that are not finite in one.

    ``rows``, ``same``: rows of logits, and those with the same largest entry.
    """

    want: float = 0.0
    got: float = 0.0
    off: float = 0.0
    dot: float = 0.0
    count: int = 0
    bad: int = 0
    rows: int = 0
    same: int = 0

    def add(self, want: Tensor, got: Tensor, *, logits: bool = False) -> None:
        self.look(got)
        if logits and want.numel():
            self.rows += want.shape[:-1].numel()
            self.same += int((want.argmax(-1) == got.argmax(-1)).sum())
        pairs = zip(want.reshape(-1).split(_CHUNK), got.reshape(-1).split(_CHUNK), strict=True)
        for a, b in pairs:
            x, y = a.double(), b.double()
            if not bool((x.isfinite() & y.isfinite()).all()):
                keep = x.isfinite() & y.isfinite()
                x, y = x[keep], y[keep]
            self.want += float(x.square().sum())
            self.got += float(y.square().sum())
            self.dot += float(x @ y)
            self.off += float((x - y).square_().sum())

    def look(self, got: Tensor) -> None:
        """Count what is not finite, and nothing else."""
        self.count += got.numel()
        self.bad += got.numel() - int(got.isfinite().sum())

    @property
    def nonfinite(self) -> float:
        return self.bad / self.count if self.count else 0.0

    @property
    def top1(self) -> float | None:
        return self.same / self.rows if self.rows else None

    @property
    def errors(self) -> Errors:
        """Zeros that stay zeros are exact; what is not zero where zeros should be is infinitely far off."""
        if self.off == 0:
            return Errors(math.inf, 1.0, 0.0)
        if self.want == 0:
            return Errors(-math.inf, 0.0, math.inf)
        cosine = self.dot / math.sqrt(self.want * self.got) if self.got else 0.0
        return Errors(10 * math.log10(self.want / self.off), min(cosine, 1.0), math.sqrt(self.off / self.want))


# --- histograms -------------------------------------------------------------------------------------------------------
@dataclass
class _Counts:
    lo: float
    hi: float
    unit: Literal["scale", "value"]
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    below: int = 0
    above: int = 0

    def add(self, x: Tensor) -> None:
        """Count values; NaN belongs to no bin. The division by a scale may end a little above what it stands for."""
        flat = x.float().reshape(-1)
        if self.unit == "scale":
            edge = _EDGE * max(-self.lo, self.hi)
            near = (flat >= self.lo - edge) & (flat <= self.hi + edge)
            flat = torch.where(near, flat.clamp(self.lo, self.hi), flat)
        inside = torch.histc(flat, BINS, self.lo, self.hi).to(torch.int64).cpu()
        self.bins += inside
        self.below += int((flat < self.lo).sum())
        self.above += int((flat > self.hi).sum())

    @property
    def histogram(self) -> Histogram:
        return Histogram(self.lo, self.hi, tuple(self.bins.tolist()), self.below, self.above, self.unit)


@dataclass(frozen=True)
class WeightCounts:
    """``as_compiled``: whether the float weight has the error that was recorded when it was quantized."""

    histogram: Histogram
    as_compiled: bool


def weight_counts(gm: fx.GraphModule, pair: Pair, use: Use | None, *, changed: bool) -> WeightCounts | None:
    """The float weight of a layer divided by its scales; None for a layer in float, which has no ``use``.

    A weight that was ``changed`` before it was quantized is no longer there: its codes are counted instead.
    """
    if use is None or pair.layer is None:
        return None
    stored = stored_weight(gm, use)
    counts = _Counts(*stored.spec.format.limits, "scale")
    if changed:
        counts.add(stored.values)
        return WeightCounts(counts.histogram, True)
    scales, zeros = stored.spread_scales
    weight = _matrix(pair.layer, stored.spec).float()
    counts.add(weight / scales + zeros)
    patched = any(user.target is ops.with_outliers.default for user in use.node.users)
    restored = (stored.values - zeros) * scales
    return WeightCounts(counts.histogram, patched or _as_recorded(use.quant.error, weight, restored))


def _matrix(layer: Layer, spec: QuantSpec) -> Tensor:
    value = layer.weight.detach()
    return to_matrix(value.transpose(-1, -2) if layer.transposed else value, spec, layer.channel_dims)


def _as_recorded(error: float, weight: Tensor, restored: Tensor) -> bool:
    norm = float(weight.norm())
    return not norm or abs(float((restored - weight).norm()) / norm - error) <= _SAME * error + 1e-4


@dataclass
class InputCounts:
    """Counts of what a layer is given: divided by their scales where ``rounding`` rounds them, else as they are."""

    gm: fx.GraphModule
    node: fx.Node
    rounding: fx.Node | None
    counts: _Counts | None = None

    @staticmethod
    def of(gm: fx.GraphModule, pair: Pair) -> InputCounts | None:
        """None for a layer whose input is no activation, such as an embedding."""
        if pair.layer is None or pair.type == "embedding":
            return None
        at = 1 - pair.layer.position if pair.layer.type == "matmul" else 0
        x = pair.node.args[at]
        if not isinstance(x, fx.Node):
            return None
        if x.target in ROUNDINGS:
            return InputCounts(gm, x.args[0], x)  # type: ignore[arg-type]
        return InputCounts(gm, x, None)

    @property
    def histogram(self) -> Histogram | None:
        return None if self.counts is None else self.counts.histogram

    def add(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return
        if self.rounding is not None:
            x = self._over_scale(x)
        if self.counts is None:
            self.counts = self._range(x)
        if self.counts is not None:
            self.counts.add(x)

    def _range(self, x: Tensor) -> _Counts | None:
        """The grid's for rounded values; that of the first batch for others, whose later ones may lie outside."""
        if self.rounding is not None:
            return _Counts(*rounding_spec(self.rounding).format.limits, "scale")
        finite = x[x.isfinite()]
        if not finite.numel():
            return None
        lo, hi = float(finite.min()), float(finite.max())
        return _Counts(lo, hi if hi > lo else lo + 1.0, "value")

    def _over_scale(self, x: Tensor) -> Tensor:
        node = self.rounding
        assert node is not None
        spec, matrix = rounding_spec(node), x.reshape(-1, x.shape[-1]).float()
        if isinstance(bias := node.kwargs.get("exponent_bias"), fx.Node):
            matrix = matrix * power_of_two(fetch(self.gm, str(bias.target)))
        if node.target is ops.fake_quantize.default:
            given, zero = (n if n is None else fetch(self.gm, str(n.target)) for n in node.args[1:3])  # type: ignore[union-attr]
            assert given is not None
            scales = Scales(load_scale(given, spec), zero)
        else:
            scales = choose(matrix, spec, name="activation")
        block = spec.block(*matrix.shape)
        ratio = matrix / spread(scales.effective.float(), block, matrix.shape)
        return ratio if scales.zero_point is None else ratio + spread(scales.zero_point.float(), block, matrix.shape)
