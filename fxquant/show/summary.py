"""summarize: what a program weighs before and after, layer by layer, and what each pass did.

    bytes_before = float bytes of the quantized weights + rest
    bytes_after  = packed codes, scales, zero points    + rest

``rest`` is every other tensor of the program, each memory counted once however many names it has. Both lowered programs
and those in QDQ form are summed by the size they pack to, so the figures do not move when a program is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

import fxquant.ops  # noqa: F401  (defines the operators)
from fxquant.graph import WeightQuant, info
from fxquant.layers import Layer, find_layers
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Program, Step, target_name
from fxquant.qdq import readers, rounding_spec
from fxquant.rewrite import get_attrs, identity, tensors
from fxquant.show import notebook
from fxquant.show.units import percent, plain, seconds, size, table

_LAYER_OPS: dict[Any, str] = {
    ops.linear_wq.default: "linear",
    ops.conv2d_wq.default: "conv",
    ops.embedding_wq.default: "embedding",
}
_DEQUANTIZE = (ops.dequantize.default, ops.dequantize_packed.default)
_STORED = ("codes", "packed", "scale", "zero_point", "tensor_scale", "exponent_bias", "index", "values")
_TYPES = {"linear": "linear", "embedding": "embedding", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv"}


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer: what its weight became, or in ``reason`` why it stayed in float (``spec`` None).

    ``bits`` are the bits of a stored code or float. ``bytes_after`` includes scales and zero points. ``error`` is
    ||W - W'|| / ||W||. ``tied_to`` names the layer that the same stored weight is counted under. ``activation`` is the
    spec that the layer's input is rounded to, None where it stays as it is. ``part_of`` names the weight whose
    compensation this is a factor of, which is no layer of the model's own.
    """

    name: str
    node: str
    type: str
    module: str
    weight: str
    shape: tuple[int, ...]
    bits: int
    bytes_before: int
    bytes_after: int
    spec: str | None = None
    method: str | None = None
    error: float | None = None
    reason: str | None = None
    tied_to: str | None = None
    source: str = ""
    activation: str | None = None
    part_of: str | None = None

    @property
    def format(self) -> str:
        """``e4m3/channel, inputs e4m3/token``; ``float`` for a weight in float."""
        return (self.spec or "float") + (f", inputs {self.activation}" if self.activation else "")


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One pass: ``label`` is its name, with #2, #3 where a name recurs; ``error`` as in ``program.Step``."""

    label: str
    name: str
    seconds: float | None
    rewrites: int
    declines: int
    nodes: int
    error: float | None
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeclineSummary:
    """A rule that did not fire, in which pass, on which layer, and why."""

    step: str
    rule: str
    node: str
    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Sizes in bytes of the whole model and of its quantized weights, its layers, declines and passes."""

    bytes_before: int
    bytes_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    weights: int
    layers: tuple[LayerSummary, ...]
    declines: tuple[DeclineSummary, ...]
    steps: tuple[StepSummary, ...]

    @property
    def bytes_per_weight(self) -> float | None:
        """Packed bytes, scales and compensation included, for each quantized weight; None where there is none."""
        return self.weight_bytes_after / self.weights if self.weights else None

    @property
    def quantized(self) -> tuple[LayerSummary, ...]:
        return tuple(layer for layer in self.layers if layer.spec is not None)

    @property
    def seconds(self) -> float | None:
        """What the passes took; None where that is not known of each."""
        known = [step.seconds for step in self.steps if step.seconds is not None]
        return sum(known) if len(known) == len(self.steps) else None

    @property
    def error(self) -> float | None:
        """The output error after the last pass that measured one."""
        return next((step.error for step in reversed(self.steps) if step.error is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that ``json.dumps`` takes; a figure that is not finite becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        extra = {"bytes_per_weight": self.bytes_per_weight, "seconds": self.seconds, "error": self.error}
        return found | dict(plain(extra))

    def __str__(self) -> str:
        return "\n".join(_render(self))

    def _repr_html_(self) -> str:
        """For notebooks: what ``str`` says, with tables."""
        totals = _totals_text(self)
        tables = [part for title, rows in _tables(self) for part in (notebook.lines(title), notebook.table(rows))]
        return notebook.page("fxquant compiled model", notebook.lines(*totals), *tables)


def summarize(program: Program) -> Summary:
    """The summary of ``program`` at any stage: captured, in QDQ form, lowered, or loaded from disk."""
    uses = list(weight_uses(program.gm))
    before, after = _totals(program.gm, uses)
    stored = {use.stored[0]: use for use in uses}
    return Summary(
        before,
        after,
        sum({use.quant.weight: use.quant.float_nbytes for use in uses}.values()),
        sum(use.quant.nbytes for use in stored.values()),
        sum(use.count for use in stored.values() if not use.quant.part_of),
        tuple(_layers(program, uses)),
        tuple(
            DeclineSummary(label, d.rule, d.node, d.layer, d.reason)
            for label, step in labelled(program.trace)
            for d in step.declines
        ),
        tuple(
            StepSummary(
                label, s.name, s.seconds, len(s.rewrites), len(s.declines), len(s.text.splitlines()), s.error,
                s.nbytes,
            )
            for label, s in labelled(program.trace)
        ),
    )  # fmt: skip


def model_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all tensors of a graph, quantized weights as they pack."""
    return _totals(gm, list(weight_uses(gm)))[1]


def labelled(trace: list[Step]) -> list[tuple[str, Step]]:
    """Steps with a label each: the pass's name, ``remove_dead#2`` for its second run."""
    seen: dict[str, int] = {}
    found = []
    for step in trace:
        seen[step.name] = seen.get(step.name, 0) + 1
        found.append((step.name if seen[step.name] == 1 else f"{step.name}#{seen[step.name]}", step))
    return found


# --- quantized weights in the graph ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Use:
    """A quantized weight and a layer that takes it. ``stored``: names of its codes, scale and zero point; ``node``: the
    operator that reads them."""

    layer: fx.Node
    node: fx.Node
    type: str
    quant: WeightQuant
    stored: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weight_uses(gm: fx.GraphModule) -> Iterator[Use]:
    for node in gm.graph.nodes:
        quant = info(node).weight
        if quant is None or (node.target not in _LAYER_OPS and node.target not in _DEQUANTIZE):
            continue
        named, stored = named_arguments(node), _stored(node)
        for user in node.users:
            if user.target is ops.with_outliers.default:
                stored += _stored(user)
        shape = tuple(int(n) for n in named["shape"])
        for layer in [node] if node.target in _LAYER_OPS else readers(node):
            yield Use(layer, node, _LAYER_OPS.get(layer.target) or _type_of(layer), quant, stored, shape)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _stored(node: fx.Node) -> tuple[str, ...]:
    """Names of the tensors that one of our operators reads, those behind quantized outliers included."""
    found: tuple[str, ...] = ()
    for part in (v for k, v in named_arguments(node).items() if k in _STORED and isinstance(v, fx.Node)):
        found += (str(part.target),) if part.op == "get_attr" else _stored(part)
    return found


def _type_of(node: fx.Node) -> str:
    return _TYPES.get(target_name(node.target).split(".")[1], "matmul")


def _totals(gm: fx.GraphModule, uses: list[Use]) -> tuple[int, int]:
    """Bytes of the whole model before and after: quantized weights as packed, a float weight only if still read."""
    present, stored = tensors(gm), {name for use in uses for name in use.stored}
    floats = {identity(present[u.quant.weight]) for u in uses if u.quant.weight in present}
    read = {identity(present[str(n.target)]) for n in get_attrs(gm.graph) if n.users}
    rest = {identity(value): value.nbytes for name, value in present.items() if name not in stored}
    before = sum({u.quant.weight: u.quant.float_nbytes for u in uses}.values())
    after = sum({u.stored[0]: u.quant.nbytes for u in uses}.values())
    before += sum(n for key, n in rest.items() if key not in floats)
    after += sum(n for key, n in rest.items() if key not in floats or key in read)
    return before, after


# --- layers ----------------------------------------------------------------------------------------------------------
def _layers(program: Program, uses: list[Use]) -> Iterator[LayerSummary]:
    """Quantized layers and those in float, in graph order."""
    found: dict[fx.Node, LayerSummary] = {}
    first: dict[str, str] = {}
    for use in uses:
        name = info(use.layer).path or use.quant.weight
        found[use.layer] = _quantized(use, name, first.get(use.stored[0]))
        first.setdefault(use.stored[0], name)
    reasons = {key: d.reason for step in program.trace for d in step.declines for key in (d.layer, d.node)}
    for layer in find_layers(program.gm):
        if layer.node not in found:
            key = str(identity(layer.weight)[:1])
            found[layer.node] = _in_float(layer, reasons, first.get(key))
            first.setdefault(key, layer.name)
    order = {node: i for i, node in enumerate(program.gm.graph.nodes)}
    return (found[node] for node in sorted(found, key=order.__getitem__))


def _quantized(use: Use, name: str, tied_to: str | None) -> LayerSummary:
    quant, about = use.quant, info(use.layer)
    return LayerSummary(
        name, use.layer.name, use.type, about.module, quant.weight, use.shape, quant.spec.format.bits,
        quant.float_nbytes, quant.nbytes, str(quant.spec), quant.method, quant.error, None, tied_to, about.source,
        _activation(use.layer), quant.part_of or None,
    )  # fmt: skip


def _in_float(layer: Layer, reasons: dict[str, str], tied_to: str | None) -> LayerSummary:
    about, weight = info(layer.node), layer.weight
    reason = reasons.get(layer.node.name) or reasons.get(layer.name) or "no pass has looked at this layer"
    return LayerSummary(
        layer.name, layer.node.name, layer.type, about.module, layer.target, tuple(weight.shape), weight.itemsize * 8,
        weight.nbytes, weight.nbytes, reason=reason, tied_to=tied_to, source=about.source,
        activation=_activation(layer.node),
    )  # fmt: skip


def _activation(layer: fx.Node) -> str | None:
    """The spec that the layer's input is rounded to."""
    first = layer.args[0] if layer.args else None
    return str(rounding_spec(first)) if isinstance(first, fx.Node) and first.target in ROUNDINGS else None


# --- text ------------------------------------------------------------------------------------------------------------
def _render(s: Summary) -> Iterator[str]:
    yield from _totals_text(s)
    for title, rows in _tables(s):
        yield ""
        yield title
        yield from (f"  {row}" for row in table(rows))


def _tables(s: Summary) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows, those without a row besides the head left out."""
    for title, rows in (("formats", _formats(s)), ("in float", _float_rows(s)), ("passes", _step_rows(s))):
        if len(rows) > 1:
            yield title, rows


def _totals_text(s: Summary) -> Iterator[str]:
    quantized = s.quantized
    yield f"model    {size(s.bytes_before)} -> {size(s.bytes_after)} ({ratio(s.bytes_before, s.bytes_after)})"
    if s.bytes_per_weight is not None:
        change = ratio(s.weight_bytes_before, s.weight_bytes_after)
        yield (
            f"weights  {size(s.weight_bytes_before)} -> {size(s.weight_bytes_after)} "
            f"({change}, {s.bytes_per_weight:.4f} bytes a weight with scales)"
        )
    factors = sum(q.part_of is not None for q in quantized)
    added = f", {factors} factors of compensation added" if factors else ""
    yield f"layers   {len(quantized) - factors} of {len(s.layers) - factors} quantized{added}"
    if s.error is not None:
        yield f"error    {percent(s.error)} of the first output, on the example inputs"


def ratio(before: int, after: int) -> str:
    """``5.3x smaller``; ``same size`` within half a percent; ``added`` for what was not there before."""
    if after and not before:
        return "added"
    if not after or abs(before / after - 1) < 0.005:
        return "same size"
    return f"{before / after:.2f}x smaller" if before > after else f"{after / before:.2f}x larger"


def _formats(s: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("spec", "method", "layers", "size", "error mean", "error max")]
    for key in dict.fromkeys((q.format, q.method) for q in s.quantized):
        members = [q for q in s.quantized if (q.format, q.method) == key]
        errors = [q.error for q in members if q.error is not None and math.isfinite(q.error)] or [0.0]
        stored = sum(q.bytes_after for q in members if not q.tied_to)
        mean = percent(sum(errors) / len(errors))
        rows.append((str(key[0]), str(key[1]), str(len(members)), size(stored), mean, percent(max(errors))))
    return rows


def _float_rows(s: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layers", "size", "such as", "why")]
    floats = [q for q in s.layers if q.spec is None]
    for reason in dict.fromkeys(q.reason for q in floats):
        members = [q for q in floats if q.reason == reason]
        stored = sum(q.bytes_after for q in members if not q.tied_to)
        rows.append((str(len(members)), size(stored), members[0].name, str(reason)))
    return rows


def _step_rows(s: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("pass", "time", "rewrites", "declines", "nodes", "error")]
    for step in s.steps:
        error = "" if step.error is None else percent(step.error)
        figures = (str(step.rewrites), str(step.declines), str(step.nodes), error)
        rows.append((step.label, seconds(step.seconds), *figures))
    return rows
