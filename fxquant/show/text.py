"""diff and explain: the trace of a program as text.

diff      what each pass changed in the graph, as unified diffs
explain   all that happened to one layer, in pass order, and what became of it
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

from fxquant.errors import ConfigError, near
from fxquant.graph import dtype_name
from fxquant.grids import FloatFormat, IntFormat
from fxquant.program import Program, Step
from fxquant.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, parse_spec
from fxquant.show.advice import advice
from fxquant.show.compare import Difference, compare
from fxquant.show.facts import comparison_facts, graph_facts, weight_facts
from fxquant.show.numerics import Comparison
from fxquant.show.summary import LayerSummary, labelled, ratio, summarize
from fxquant.show.units import percent, plural, seconds, size, table

CONTEXT = 1
"""Unchanged lines shown around a change."""


# --- diff ------------------------------------------------------------------------------------------------------------
def diff(program: Program, a: str | None = None, b: str | None = None) -> str:
    """Unified diffs of the graph's text: of every pass; of the pass ``a``; or from after ``a`` to after ``b``.

    Passes go by their labels in ``summarize(program).steps``: ``lower``, ``remove_dead#2`` for its second run. Raises
    ConfigError for an unknown one.
    """
    steps = labelled(program.trace)
    if b is not None:
        first, last = _find(steps, a) if a is not None else 0, _find(steps, b)
        found = compare(steps[first][1].text, steps[last][1].text)
        return "\n".join([f"# from {steps[first][0]} to {steps[last][0]}: {found.headline}", *_unified(found)])
    chosen = range(1, len(steps)) if a is None else [_find(steps, a)]
    return "\n\n".join(_step_diff(steps, i) for i in chosen)


def _step_diff(steps: list[tuple[str, Step]], i: int) -> str:
    label, step = steps[i]
    found = compare(steps[max(i - 1, 0)][1].text, step.text)
    return "\n".join([f"# {label}: {headline(step)}; {found.headline}", *_unified(found)])


def headline(step: Step) -> str:
    """``0.41 s, 210 rewrites, 2 declines, error 3.92 %``."""
    parts = [] if step.seconds is None else [seconds(step.seconds)]
    parts += [plural(len(step.rewrites), "rewrite"), plural(len(step.declines), "decline")]
    return ", ".join(parts + ([] if step.error is None else [f"error {percent(step.error)}"]))


def _unified(found: Difference) -> Iterator[str]:
    for kind, text in found.lines:
        yield f"@@ {plural(int(text), 'line')} @@" if kind == "@" else f"{kind}{text}"


def _find(steps: list[tuple[str, Step]], name: str) -> int:
    labels = [label for label, _ in steps]
    if name not in labels:
        raise ConfigError(f"no pass {name!r} in this program's trace{near(name, labels)}; it has {', '.join(labels)}")
    return labels.index(name)


# --- explain ---------------------------------------------------------------------------------------------------------
def explain(program: Program, layer: str, comparison: Comparison | None = None) -> str:
    """A layer's story: its format and how well it is used, its place in the graph, its error in ``comparison`` where
    there is one, and every rewrite and decline that touched it, in pass order, with what to do about a decline.

    ``layer`` is a layer's name, or a glob that lists several when it matches more than one. ConfigError names the
    nearest layers where nothing matches.
    """
    chosen = find(program, layer)
    if len({q.name for q in chosen}) > 1:
        return _listing(layer, chosen)
    stories = Stories(program)
    return "\n\n".join(stories.tell(q, _more_facts(program, q, comparison)) for q in chosen)


def _more_facts(program: Program, layer: LayerSummary, comparison: Comparison | None) -> list[tuple[str, str]]:
    compared = [] if comparison is None else comparison_facts(comparison, layer)
    return [*weight_facts(program, layer), *graph_facts(program, layer), *compared]


def find(program: Program, layer: str) -> list[LayerSummary]:
    """The layers of this name, or else those that match it as a glob; ConfigError where there is none."""
    layers = summarize(program).layers
    chosen = [q for q in layers if q.name == layer] or [q for q in layers if fnmatch.fnmatchcase(q.name, layer)]
    if not chosen:
        raise ConfigError(_unknown(layer, [q.name for q in layers]))
    return chosen


def _unknown(layer: str, names: list[str]) -> str:
    inside = [n for n in names if n.startswith(f"{layer}.")]
    if inside:
        held = plural(len(inside), "layer")
        return f"{layer!r} is not a layer but holds {held}; ask for '{layer}.*', or {inside[0]!r}"
    if not names:
        return f"no layer {layer!r}: this program has no layer with a weight matrix"
    close = near(layer, names) or f", such as {names[0]!r}"
    return f"no layer {layer!r} among the {len(names)} of this program{close}; a glob such as '*proj' lists several"


def _listing(glob: str, layers: list[LayerSummary]) -> str:
    rows = [("layer", "weight", "size", "error", "")]
    for q in layers:
        error = "" if q.error is None else percent(q.error)
        rows.append((q.name, q.format, size(q.bytes_after), error, q.reason or ""))
    return "\n".join([f"{plural(len(layers), 'layer')} match {glob!r}", *table(rows)])


class Stories:
    """The stories of a program's layers; the trace is read once, however many are told."""

    def __init__(self, program: Program) -> None:
        self.steps = labelled(program.trace)
        self.lines = [_index(step.text) for _, step in self.steps]
        self.events = [_events(step) for _, step in self.steps]

    def tell(self, layer: LayerSummary, more: Sequence[tuple[str, str]] = ()) -> str:
        """What ``explain`` says about one layer; ``more``: rows of facts besides those of the summary."""
        return "\n".join([*_facts(layer, more), "", *self._passes(layer)])

    def _passes(self, layer: LayerSummary) -> Iterator[str]:
        before: list[str] = []
        for i, (label, _) in enumerate(self.steps):
            after = self._lines_of(layer, i)
            events = [e for key in dict.fromkeys((layer.node, layer.name)) for e in self.events[i].get(key, ())]
            shown = [f"    {kind} {text}" for kind, text in compare(before, after, context=0).lines if kind != "@"]
            before = after
            if events or shown:
                yield f"  {label}"
                yield from (f"    {event}" for event in dict.fromkeys(events))
                yield from shown
            else:
                yield f"  {label}: nothing"

    def _lines_of(self, layer: LayerSummary, step: int) -> list[str]:
        """The lines of a step's graph that belong to the layer, in graph order."""
        index = self.lines[step]
        keys = (f"%{layer.node}", f"#{layer.name}", f"={layer.weight}")
        return [text for _, text in sorted({line for key in keys for line in index.get(key, ())})]


_LINE = re.compile(r"%(?P<node>\S+) (?:: .*?)?= (?P<value>.*?)(?:  # (?P<path>\S+))?")
_STORED = re.compile(r"(_t)?_(codes|packed|scale(_codes)?|zero_point|tensor_scale|exponent_bias)(_\d+)?$")


def _index(text: str) -> dict[str, list[tuple[int, str]]]:
    """Lines of a graph by ``%node``, ``#module path`` and ``=tensor`` (a weight's codes and scales included)."""
    found: dict[str, list[tuple[int, str]]] = {}
    for item in enumerate(text.splitlines()):
        match = _LINE.fullmatch(item[1])
        if match is None:
            continue
        keys = [f"%{match['node']}", f"#{match['path']}", f"={_STORED.sub('', match['value'])}", f"={match['value']}"]
        for key in dict.fromkeys(keys):
            found.setdefault(key, []).append(item)
    return found


def _events(step: Step) -> dict[str, list[str]]:
    """Rewrites and declines of a step as text, by node and by layer."""
    found: dict[str, list[str]] = {}
    told = [(r.node, r.layer, f"rewrote: {r.rule} {r.detail or r.node}") for r in step.rewrites]
    told += [(d.node, d.layer, f"declined: {d.rule}, since {d.reason}") for d in step.declines]
    for node, layer, text in told:
        for key in {node, layer}:
            found.setdefault(key, []).append(text)
    for d in step.declines:
        if (what := advice(d.reason)) is not None:
            for key in {d.node, d.layer}:
                found[key].append(f"  to do: {what}")
    return found


def _facts(layer: LayerSummary, more: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    rows = [("layer", f"{layer.type}{f' ({layer.module})' if layer.module else ''}, node %{layer.node}")]
    rows.append(("weight", f"{layer.weight} [{', '.join(map(str, layer.shape))}]"))
    if layer.spec is None:
        rows += [("format", f"float, {layer.bits} bits"), ("size", size(layer.bytes_after))]
        rows.append(("why", layer.reason or ""))
        if (what := advice(layer.reason or "")) is not None:
            rows.append(("to do", what))
    else:
        rows += [("format", f"{layer.spec}: {describe_spec(layer.spec)}"), ("method", layer.method or "")]
        change = f"{size(layer.bytes_before)} -> {size(layer.bytes_after)}"
        rows.append(("size", f"{change} ({ratio(layer.bytes_before, layer.bytes_after)}), scales included"))
    if layer.activation is not None:
        rows.append(("inputs", f"rounded to {layer.activation}: {describe_spec(layer.activation)}"))
    if layer.error is not None:
        rows.append(("error", f"{percent(layer.error)} of the weight's norm"))
    if layer.tied_to:
        rows.append(("tied", f"shares its weight with {layer.tied_to}, which it is counted under"))
    if layer.source:
        rows.append(("source", layer.source))
    yield layer.name
    yield from (f"  {line}" for line in table([("", ""), *rows, *more])[1:])


def describe_spec(text: str) -> str:
    """A spec in words: ``6-bit float, values up to 28, one float32 scale per output channel``."""
    spec = parse_spec(text)
    kind = {FloatFormat: "float", IntFormat: "integer"}.get(type(spec.format), "codebook")
    name = str(spec.kind.format) if spec.kind.format is not None else dtype_name(spec.scale_dtype)
    zero = " and zero point" if spec.has_zero_point else ""
    above = f", under one float32 scale a {spec.kind.outer}" if spec.kind.outer else ""
    return (
        f"{spec.format.bits}-bit {kind}, values up to {spec.format.max:g}, one {name} scale{zero} "
        f"{_where(spec.granularity)}{above}"
    )


def _where(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "for the whole weight"
        case PerChannel(axis):
            return f"per index of dimension {axis}" if axis else "per output channel"
        case PerGroup(size):
            return f"for every {size} weights of a row"
        case PerBlock(rows, cols):
            return f"for every block of {rows}x{cols} weights"
    return "per token"
