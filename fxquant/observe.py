"""observe: look at a program in QDQ form, where float weights and codes are both there, and say what was seen.

The graph is run once on the example inputs, node by node, and of every weight some rows are kept, evenly spaced. Rows
of all weights with equally many columns are rounded to each candidate together: a row has scales of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import columns, constants, why_not
from fxquant.graph import info
from fxquant.observations import Candidate, Histogram, LayerObservation, Observations, histogram
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.qdq import float_weight, quant_of, quantized_of, quantized_weights, readers, rounding_spec
from fxquant.qtensor import QuantizedTensor, packed_nbytes, quantize_tensor, to_matrix
from fxquant.scales import Scales, power_of_two, spread
from fxquant.scheme import PerChannel, QuantSpec, parse_spec

ROWS = 32
"""Rows of a weight that are looked at, fewer where they are so long that they hold more than LOOKED values."""
LOOKED = 1 << 16
VALUES = 1 << 16
"""Values of an input that its histogram is made of."""
CANDIDATES = (
    "int3/group64", "int4/channel", "int4/group64", "int8/channel", "nf4/group64", "e2m1/channel", "e2m1/group64",
    "e2m1/group32:e8m0", "e2m2/channel", "e2m2/group64", "e2m3/channel", "e3m2/channel", "e3m2/group64", "e4m3/channel",
)  # fmt: skip
"""Specs that every weight is rounded to, to compare: scales of rows and groups only."""


def observe(program: Program, inputs: Sequence[Any] | None, *, described: str = "the example inputs") -> Observations:
    """Histograms, errors and candidates of every quantized layer of ``program``, which is in QDQ form.

    ``inputs``: what the graph takes, in its order; None looks at weights only. The program is not changed.
    """
    watch = _Watch(program.gm, inputs is not None)
    with torch.no_grad():
        watch.run(*(inputs if inputs is not None else [None] * len(program.signature.inputs)))
        layers = told(list(watch.seen.values()))
    return Observations(layers, ROWS, described if inputs is not None else "")


def told(found: Sequence[Seen]) -> tuple[LayerObservation, ...]:
    """The observations of weights, each with what every candidate would lose."""
    return tuple(seen.told(candidates) for seen, candidates in zip(found, _candidates(found), strict=True))


def sampled_rows(rows: int, cols: int) -> Tensor:
    """Which of the rows of a weight are looked at, int64."""
    return torch.linspace(0, rows - 1, min(rows, ROWS, max(LOOKED // max(cols, 1), 4))).long()


@dataclass
class Seen:
    """Rows ``sampled`` of the ``rows`` of a weight, float (W) and as they became (got), and what its layer is given.

    ``moments`` are the mean squares of the input's columns, ``exponents`` the shifts that were folded into the weight.
    """

    name: str
    spec: QuantSpec
    W: Tensor
    got: Tensor
    weight: Histogram
    scale: Histogram
    rows: int
    sampled: Tensor
    exponents: Tensor | None = None
    input: Histogram | None = None
    moments: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """m_j: of ones where no input is known."""
        return self.moments if self.moments is not None else torch.ones(self.W.shape[1])

    def told(self, candidates: tuple[Candidate, ...]) -> LayerObservation:
        error = relative(self.W, self.got, self.importance)
        return LayerObservation(self.name, self.weight, self.scale, self.input, error, candidates)


def relative(W: Tensor, got: Tensor, importance: Tensor) -> float:
    """The error of ``LayerObservation``."""
    rows = ((x.square() * importance).sum(1) for x in (got - W, W))  # a row is added up by one thread
    lost, whole = (math.fsum(row.tolist()) for row in rows)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


class _Watch(fx.Interpreter):
    """Runs a graph, and looks at its weights and at what their layers are given. ``runs``: there are inputs."""

    def __init__(self, gm: fx.GraphModule, runs: bool) -> None:
        super().__init__(gm)
        self.gm, self.runs = gm, runs
        self.constants = constants(gm.graph)
        self.seen: dict[str, Seen] = {}
        self.readers: dict[fx.Node, str] = {}
        self.weights: dict[fx.Node, tuple[fx.Node, QuantizedTensor]] = {}
        self.factors: dict[fx.Node, str] = {}
        self.first: dict[str, Tensor] = {}
        for node in quantized_weights(gm):
            outer = next((u for u in node.users if u.target is ops.with_outliers.default), node)
            if quant_of(node).part_of:
                self.factors[outer] = quant_of(node).part_of
                continue
            self.weights[outer] = node, quantized_of(gm, node)
            for reader in readers(node):
                self.readers.setdefault(reader, quant_of(node).weight)

    def run_node(self, n: fx.Node) -> Any:
        if not self.runs and n not in self.constants:
            return None
        if n in self.readers and self.runs:
            self._see_input(n, self.readers[n])
        value = super().run_node(n)
        if n in self.weights:
            self._see_weight(*self.weights[n], value)
        elif n in self.factors:
            self._see_factor(self.factors[n], value)
        return value

    def _see_weight(self, node: fx.Node, q: QuantizedTensor, value: Tensor) -> None:
        quant = quant_of(node)
        if quant.weight in self.seen:
            return
        some = sampled_rows(*q.codes.shape)
        W, got = (_matrix(x, q)[some.to(value.device)].float().cpu() for x in (float_weight(self.gm, node), value))
        shape = (q.codes.shape[0], q.codes.shape[1])
        self.seen[quant.weight] = see(layer_name(node), W, got, q.scales, q.spec, shape, q.exponent_bias)

    def _see_factor(self, weight: str, value: Tensor) -> None:
        """V ``[rank, in]`` comes before U ``[out, rank]``; W' is what the codes say and U V."""
        V = self.first.pop(weight, None)
        if V is None:
            self.first[weight] = value
        elif (seen := self.seen.get(weight)) is not None:
            seen.got = seen.got + (value[seen.sampled.to(value.device)].float() @ V.float()).cpu()

    def _see_input(self, layer: fx.Node, weight: str) -> None:
        seen, source = self.seen.get(weight), layer.args[0]
        if seen is None or seen.input is not None or why_not(layer) is not None or not isinstance(source, fx.Node):
            return
        x = self.env[source]
        square = columns(layer, x).float().square().mean(dim=0).cpu()
        if square.shape[0] == seen.W.shape[1] and bool(square.isfinite().all()):
            bias = seen.exponents
            seen.moments = square if bias is None else square * power_of_two(-2 * bias.int().cpu())
        seen.input = _of_input(source, x)


def see(
    name: str, W: Tensor, got: Tensor, scales: Scales, spec: QuantSpec, shape: tuple[int, int],
    exponents: Tensor | None = None,
) -> Seen:  # fmt: skip
    """A weight ``[rows, cols]`` of that ``shape``: its ``sampled_rows`` W and got, and all its scales."""
    some = sampled_rows(*shape)
    if exponents is not None:  # folded: the weight is that of an input 2^bias times as large
        got = got * power_of_two(exponents.int().cpu())
    logs = histogram(scales.effective.log2(), unit="log2")
    return Seen(name, spec, W, got, _in_units(W, scales, spec, shape, some), logs, shape[0], some, exponents)


def layer_name(node: fx.Node) -> str:
    """The path of the first layer that reads a dequantized weight."""
    return next((info(reader).path for reader in readers(node)), "") or quant_of(node).weight


def _matrix(x: Tensor, q: QuantizedTensor) -> Tensor:
    """A weight as the rows and columns of its codes."""
    along = isinstance(q.spec.granularity, PerChannel) and q.spec.granularity.axis
    return to_matrix(x, q.spec) if along else x.reshape(q.codes.shape)


def _in_units(W: Tensor, scales: Scales, spec: QuantSpec, shape: tuple[int, int], some: Tensor) -> Histogram:
    """Float weights divided by their scales, between the ends of the grid."""

    def of_rows(values: Tensor) -> Tensor:
        wide = spread(values, spec.block(*shape), shape).cpu()
        return (wide[some] if wide.shape[0] > 1 else wide).float()

    units = W / of_rows(scales.effective)
    if scales.zero_point is not None:
        units = units + of_rows(scales.zero_point)
    return histogram(units, *spec.format.limits, unit="scale")


def _of_input(source: fx.Node, x: Tensor) -> Histogram:
    """The input before it is rounded; in units of each token's scale where it is rounded a token."""
    flat = x.reshape(-1, x.shape[-1] if x.dim() else 1).float()
    keep = max(1, VALUES // flat.shape[-1])
    flat = flat[:: max(1, flat.shape[0] // keep)]
    if source.target in ROUNDINGS and (spec := rounding_spec(source)).dynamic:
        low, high = spec.format.limits
        return histogram(flat / (flat.abs().amax(dim=1, keepdim=True) / high).clamp_min(1e-30), low, high, unit="scale")
    return histogram(flat)


# --- candidates -------------------------------------------------------------------------------------------------------
def _candidates(found: Sequence[Seen]) -> list[tuple[Candidate, ...]]:
    """For each weight what every candidate would lose and take, in the order of ``CANDIDATES``."""
    result: list[list[Candidate]] = [[] for _ in found]
    for cols in dict.fromkeys(seen.W.shape[1] for seen in found):
        members = [i for i, seen in enumerate(found) if seen.W.shape[1] == cols]
        stacked = torch.cat([found[i].W for i in members])
        for text in CANDIDATES:
            spec = parse_spec(text)
            rounded = quantize_tensor(stacked, spec).dequantize()
            at = 0
            for i in members:
                W, some = found[i].W, slice(at, at + len(found[i].W))
                at += len(W)
                error = relative(W, rounded[some], found[i].importance)
                result[i].append(Candidate(text, error, packed_nbytes(spec, found[i].rows, cols)))
    return [tuple(candidates) for candidates in result]
