"""compare: a compiled model and its float original run side by side, and how far each layer's output is off.

The float model is captured anew and brought to the same spelling, and the nodes of both graphs are matched
(``counterparts``). Both are walked node by node, one batch at a time. Where the compiled graph reaches a layer,

    accumulated   compares its value with the float model's
    local         computes the layer once more, from the float model's values: back to the nearest nodes that have a
                  counterpart, so rounded inputs, compensations and norms whose weights were scaled are part of it

A value is kept as long as something is still to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxquant.capture import capture
from fxquant.codegen import cpu
from fxquant.compiled import CompiledModel
from fxquant.counterparts import Counterparts, Pair, counterparts, is_float, rounds
from fxquant.deviations import Deviation, InputCounts, weight_counts
from fxquant.draw import made_up
from fxquant.errors import CaptureError, InputError
from fxquant.examples import default_inputs
from fxquant.graph import tensor_type
from fxquant.ops import operators as ops
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Program, Progress, Stage, quiet, run
from fxquant.rewrite import fetch
from fxquant.show.numerics import Comparison, LayerError, OutputError
from fxquant.show.summary import weight_uses
from fxquant.signature import Signature, as_call, output_names
from fxquant.verify import verify

Call = tuple[Sequence[Any], Mapping[str, Any]]


def compare(
    compiled: CompiledModel, model: nn.Module | ExportedProgram, inputs: Any = None, *, seed: int = 0,
    progress: Progress = quiet,
) -> Comparison:  # fmt: skip
    """Rank the layers of ``compiled`` by their error against ``model``, the float model that it was compiled from.

    ``inputs``: token windows ``[n, length]`` (integers, each a batch), an iterable of batches (dicts or tuples of
    inputs), or one batch as a dict; by default tokens and numbers are drawn with ``seed``. A model with a KV cache is
    compared at its first step, the past empty; give ``fxquant.hf.with_cache(model)`` as ``model``.

    Raises InputError for inputs that do not fit, and for a ``model`` whose layers or shapes are not those of
    ``compiled``; CaptureError where it cannot be captured.
    """
    drawn = inputs is None
    calls = _drawn(compiled.program, seed) if drawn else _calls(inputs, compiled.program.signature)
    mine = [_bound(compiled.program.signature, call, i) for i, call in enumerate(calls)]
    progress("capture the float model", 0, 0)
    reference = _reference(model, compiled.program, calls)
    matched = counterparts(compiled.program, reference)
    batches = list(zip(mine, (_bound(reference.signature, call, i) for i, call in enumerate(calls)), strict=True))
    side = _SideBySide(compiled.program, reference, matched)
    with torch.no_grad(), cpu.activation_bits(compiled.activation_bits):
        for i, pair in enumerate(batches):
            side.run(*pair, i, len(batches), progress)
        layers, notes = side.layers(progress)
    progress("compare", 1, 1)
    first = [theirs[0] for _, theirs in batches]
    tokens = sum(x.numel() for x in first) if not first[0].is_floating_point() and first[0].dim() > 1 else None
    samples = sum(x.shape[0] if x.dim() else 1 for x in first)
    return Comparison(tuple(layers), side.outputs(), samples, tokens, seed if drawn else None, tuple(notes))


# --- the float model and the data -------------------------------------------------------------------------------------
def _reference(model: nn.Module | ExportedProgram, program: Program, calls: Sequence[Call]) -> Program:
    """The float model as the passes found it: captured and normalized."""
    args, kwargs = calls[0]
    if isinstance(model, ExportedProgram):
        example = None
    elif callable(own := getattr(model, "example_inputs", None)):
        example = own()
    else:
        try:
            example = default_inputs(model)  # small ones: what is captured is run several times
        except CaptureError:
            example = dict(kwargs) if kwargs else tuple(args)
    wants_past = any(item.empty for item in program.signature.inputs)
    if wants_past and isinstance(model, nn.Module) and not getattr(model, "declared_inputs", ()):
        raise InputError(
            "the compiled model has a KV cache and the float model has none; give fxquant.hf.with_cache(model)"
        )
    try:
        captured = capture(model, example)
    except (InputError, CaptureError) as error:
        raise type(error)(f"the float model cannot be captured; is it the one that was compiled? {error}") from error
    return run(captured, [Stage(NORMALIZE)], check=verify)


def _drawn(program: Program, seed: int) -> list[Call]:
    """One call with drawn inputs, what may be left out (a KV cache) left out."""
    found = next(made_up(program, seed=seed), None)
    if found is None:
        raise InputError("no inputs could be made up that the model takes; give inputs=[batch, ...]")
    optional = {item.name for item in program.signature.inputs if item.empty}
    return [((), {name: value for name, value in found[1].items() if name not in optional})]


def _calls(inputs: Any, signature: Signature) -> list[Call]:
    first = signature.inputs[0].name
    if isinstance(inputs, Tensor) and inputs.dim() == 2 and not inputs.is_floating_point():
        found: list[Call] = [((), {first: window.unsqueeze(0)}) for window in inputs]
    elif isinstance(inputs, (Tensor, Mapping)):
        found = [as_call(inputs)]
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes)):
        found = [as_call(batch) for batch in inputs]
    else:
        raise InputError(
            f"inputs is a {type(inputs).__name__}; expected an iterable of batches (dicts or tuples of tensors), one "
            f"batch as a dict, or token windows [n, length]"
        )
    if not found:
        raise InputError("inputs holds no batches; one window of some hundred tokens or a few images are enough")
    return found


def _bound(signature: Signature, call: Call, batch: int) -> list[Tensor]:
    try:
        return signature.bind(*call)
    except InputError as error:
        raise InputError(f"batch {batch}: {error}") from error


# --- both graphs ------------------------------------------------------------------------------------------------------
@dataclass
class _Side:
    """The values of one graph that are still to be read, and how often each is."""

    program: Program
    extra: Mapping[fx.Node, int]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    left: dict[fx.Node, int] = field(default_factory=dict)
    at: int = 0

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.program.gm.graph.nodes if n.op != "output"]
        self.order = {node: i for i, node in enumerate(self.nodes)}
        flat: Sequence[Any] = self.program.gm.graph.output_node().args[0]  # type: ignore[assignment]
        names = output_names(self.program.signature.output)
        self.outputs = {name: n for name, n in zip(names, flat, strict=False) if isinstance(n, fx.Node)}

    def start(self, batch: Sequence[Tensor]) -> None:
        self.values, self.at = {}, 0
        inputs = (n for n in self.nodes if n.op == "placeholder")
        self.given = dict(zip(inputs, batch, strict=True))
        users = {n: sum(u.op != "output" for u in n.users) for n in self.nodes}
        outputs = set(self.outputs.values())
        self.left = {n: users[n] + self.extra.get(n, 0) + (n in outputs) for n in self.nodes}

    def advance(self, upto: fx.Node) -> None:
        """Compute all nodes up to this one."""
        while self.at <= self.order[upto]:
            node = self.nodes[self.at]
            self.at += 1
            if self.left[node]:
                self.values[node] = self.compute(node, self.values)
            for read in node.all_input_nodes:
                self.read(read)

    def compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self.given[node]
        if node.op == "get_attr":
            return fetch(self.program.gm, str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def read(self, node: fx.Node) -> None:
        """Note that a value was read, and drop it after the last time."""
        self.left[node] -= 1
        if self.left[node] == 0:
            self.values.pop(node, None)


@dataclass
class _Row:
    """What is known of a layer so far. ``inside``: the nodes that its local value is computed with, in order; ``cuts``:
    those that are taken from the float model."""

    pair: Pair
    inside: list[fx.Node]
    cuts: list[fx.Node]
    local: Deviation = field(default_factory=Deviation)
    accumulated: Deviation = field(default_factory=Deviation)
    inputs: InputCounts | None = None


class _SideBySide:
    def __init__(self, program: Program, reference: Program, matched: Counterparts) -> None:
        self.matched = matched
        order = {node: i for i, node in enumerate(program.gm.graph.nodes)}
        self.rows = {p.out: _Row(p, *self._inside(p, order)) for p in matched.pairs if is_float(p.want)}
        mine, theirs = dict[fx.Node, int](), dict[fx.Node, int]()
        for row in self.rows.values():
            for node in _kept(row.pair):
                mine[node] = mine.get(node, 0) + 1
            for node in (row.pair.want, *(matched.same[c] for c in row.cuts)):
                theirs[node] = theirs.get(node, 0) + 1
        self.mine, self.theirs = _Side(program, mine), _Side(reference, theirs)
        self.whole: dict[str, tuple[Deviation, str]] = {}

    def _inside(self, pair: Pair, order: Mapping[fx.Node, int]) -> tuple[list[fx.Node], list[fx.Node]]:
        inside, cuts, todo = {pair.out}, set[fx.Node](), list(pair.out.all_input_nodes)
        while todo:
            node = todo.pop()
            if node in self.matched.same and not rounds(node):
                cuts.add(node)
            elif node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
        return sorted(inside, key=order.__getitem__), list(cuts)

    def run(
        self, mine: Sequence[Tensor], theirs: Sequence[Tensor], batch: int, batches: int, progress: Progress
    ) -> None:
        """Batch number ``batch`` of so many through both graphs."""
        total = len(self.mine.nodes)
        self.mine.start(mine)
        self.theirs.start(theirs)
        for i, node in enumerate(self.mine.nodes):
            progress("compare", batch * total + i, batches * total)
            self.mine.advance(node)
            if node in self.rows:
                self._measure(self.rows[node])
        self.theirs.advance(self.theirs.nodes[-1])
        self._outputs()

    def _measure(self, row: _Row) -> None:
        pair, same = row.pair, self.matched.same
        for node in (pair.want, *(same[c] for c in row.cuts)):
            self.theirs.advance(node)
        values: dict[fx.Node, Any] = {c: self.theirs.values[same[c]] for c in row.cuts}
        got = self.mine.values[pair.out]
        for node in row.inside:
            values[node] = self.mine.compute(node, values)
        want, local = self.theirs.values[pair.want], values[pair.out]
        if pair.type == "kv cache":
            got, local = (_restored(pair.node, side) for side in (self.mine.values, values))
        if pair.reason:
            row.accumulated.look(got)
        else:
            row.accumulated.add(want, got)
            row.local.add(want, local)
        row.inputs = row.inputs or InputCounts.of(self.mine.program.gm, pair)
        if row.inputs is not None:
            row.inputs.add(values[row.inputs.node])
        for node in _kept(pair):
            self.mine.read(node)
        for node in (pair.want, *(same[c] for c in row.cuts)):
            self.theirs.read(node)

    def _outputs(self) -> None:
        for name, node in self.theirs.outputs.items():
            other = self.mine.outputs.get(name)
            deviation, reason = self.whole.setdefault(name, (Deviation(), ""))
            want = self.theirs.values[node]
            got = None if other is None else self.mine.values[other]
            if not isinstance(want, Tensor) or not want.is_floating_point():
                reason = "no tensor of floating point"
            elif not isinstance(got, Tensor):
                reason = "the compiled model does not have it"
            elif not got.is_floating_point():
                reason = "stored as codes; see the layers of type kv cache"
            else:
                deviation.add(want, got, logits="logits" in name and want.dim() > 1)
            self.whole[name] = deviation, reason

    def outputs(self) -> tuple[OutputError, ...]:
        return tuple(
            OutputError(name, None if reason else d.errors, d.nonfinite, d.top1, reason)
            for name, (d, reason) in self.whole.items()
        )

    def layers(self, progress: Progress) -> tuple[list[LayerError], list[str]]:
        """All rows, each with the histogram of its weight; and what is to be said of them."""
        found, other, gm = list[LayerError](), list[str](), self.mine.program.gm
        uses = {use.layer: use for use in weight_uses(gm)}
        for i, row in enumerate(self.rows.values()):
            progress("weights", i, len(self.rows))
            pair = row.pair
            counts = weight_counts(gm, pair, uses.get(pair.node), changed=pair.name in self.matched.changed)
            if counts is not None and not counts.as_compiled:
                other.append(pair.name)
            given = None if row.inputs is None else row.inputs.histogram
            local, accumulated = (None if pair.reason else d.errors for d in (row.local, row.accumulated))
            found.append(
                LayerError(
                    pair.name, pair.node.name, pair.type, _spec(pair), _activation(row), local,
                    accumulated, row.accumulated.nonfinite, pair.reason, self._includes(row),
                    None if counts is None else counts.histogram, given,
                )
            )  # fmt: skip
        return found, _notes(other)

    def _includes(self, row: _Row) -> tuple[str, ...]:
        """Other layers whose rounding is part of the row's local value."""
        own = {row.pair.node, row.pair.out}
        names = {r.pair.node: r.pair.name for r in self.rows.values()}
        return tuple(dict.fromkeys(names[n] for n in row.inside if n in names and n not in own))


def _kept(pair: Pair) -> list[fx.Node]:
    """Nodes of the compiled graph whose values are looked at: the output, and the scales of what is stored as codes."""
    scale = pair.node.args[1] if pair.type == "kv cache" else None
    return [pair.out, *([scale] if isinstance(scale, fx.Node) else [])]


def _spec(pair: Pair) -> str | None:
    if pair.type == "kv cache":
        return str(pair.node.args[2])
    return None if pair.summary is None else pair.summary.spec


def _activation(row: _Row) -> str | None:
    if row.pair.summary is not None:
        return row.pair.summary.activation
    if row.pair.type == "kv cache":
        return None
    specs = [str(n.args[3 if n.target is ops.fake_quantize.default else 1]) for n in row.inside if rounds(n)]
    return specs[0] if specs else None


def _restored(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """The values that codes of a KV cache stand for, in the dtype that they had."""
    x, scale, spec = node.args
    kind = tensor_type(x)  # type: ignore[arg-type]
    found: Tensor = ops.dequantize_kv(values[node], values[scale], str(spec), kind.shape[-1], dtype=kind.dtype)  # type: ignore[index]
    return found


def _notes(other: Sequence[str]) -> list[str]:
    if not other:
        return []
    which = f"1 layer, {other[0]}" if len(other) == 1 else f"{len(other)} layers, such as {other[0]}"
    return [f"the weights of {which}, are not those that were compiled; is it the right checkpoint?"]
