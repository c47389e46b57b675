"""Program: the one object that goes from stage to stage, with the trace of what every pass did to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph import info, type_text
from fxquant.observations import Observations
from fxquant.rewrite import Declined, Log, Rewrite, attach, fetch, get_attrs, identity
from fxquant.signature import Signature


@dataclass(frozen=True)
class Step:
    """One pass that ran: what it rewrote, what it declined, the graph after it, its time in seconds (None: not known).

    ``error`` is ||y - y_float|| / ||y_float|| of the first output on the example inputs, ``nbytes`` what the model's
    tensors take, codes packed; None where not measured.
    """

    name: str
    rewrites: tuple[Rewrite, ...]
    declines: tuple[Declined, ...]
    text: str
    seconds: float | None
    error: float | None = None
    nbytes: int | None = None


@dataclass
class Program:
    """A graph of tensor operators, how to call it, its history, and what was seen of its numbers on the way.

    ``gm`` takes the signature's inputs in order and returns a tuple of flat outputs; weights are get_attr nodes.
    """

    gm: fx.GraphModule
    signature: Signature
    trace: list[Step] = field(default_factory=list)
    observations: Observations | None = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the program as the model it was captured from."""
        outputs = self.gm(*self.signature.bind(args, kwargs))
        return self.signature.unflatten(outputs)


def copied(program: Program, device: torch.device | None = None) -> Program:
    """The program with a graph of its own. Its tensors are shared, or copies on ``device`` where that is given; then
    tensors that the graph makes are made there too."""
    graph, root = fx.Graph(), nn.Module()
    placed: dict[tuple[object, ...], Tensor] = {}
    nodes: dict[fx.Node, fx.Node] = {}
    for node in program.gm.graph.nodes:
        new = nodes[node] = graph.node_copy(node, nodes.__getitem__)
        new.meta = dict(node.meta)
        if device is not None:
            new.args, new.kwargs = fx.node.map_aggregate(
                (new.args, new.kwargs), lambda a: device if isinstance(a, torch.device) else a
            )
    for name in dict.fromkeys(str(node.target) for node in get_attrs(program.gm.graph)):
        value = fetch(program.gm, name)
        if device is not None:  # ties stay ties
            value = placed.setdefault(identity(value), value.detach().to(device))
        attach(root, name, value)
    return Program(fx.GraphModule(root, graph), program.signature, list(program.trace), program.observations)


@dataclass(frozen=True)
class Pass:
    """A graph pass: ``apply(program, settings)`` edits ``program.gm`` in place and returns what it did.

    ``summary`` is one line for people. ``settings`` holds the scheme's rules and this pass's own options.
    """

    name: str
    summary: str
    apply: Callable[[Program, Mapping[str, Any]], Log]


@dataclass(frozen=True)
class Stage:
    """A pass with the settings it runs under."""

    pass_: Pass
    settings: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[fx.GraphModule], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """A Step's ``error`` and ``nbytes``."""

    error: float | None = None
    nbytes: int | None = None


Measure = Callable[[Program], Measured]
Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``; ``total`` 0 means unknown."""


def quiet(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def run(
    program: Program,
    stages: Iterable[Stage],
    *,
    check: Check,
    measure: Measure | None = None,
    progress: Progress = quiet,
) -> Program:
    """Run passes in order; after each one the graph is linted, checked, optionally measured, and recorded."""
    stages = list(stages)
    for i, stage in enumerate(stages):
        progress(stage.pass_.name, i, len(stages))
        begin = time.perf_counter()
        log = stage.pass_.apply(program, stage.settings)
        program.gm.graph.lint()
        program.gm.recompile()
        seconds = time.perf_counter() - begin
        check(program.gm)
        record(program, stage.pass_.name, log, seconds, measure)
    progress("done", len(stages), len(stages))
    return program


def record(program: Program, name: str, log: Log, seconds: float, measure: Measure | None = None) -> None:
    """Append a Step for what has just been done to ``program``."""
    found = measure(program) if measure is not None else Measured()
    rewrites, declines = tuple(log.rewrites), tuple(log.declines)
    step = Step(name, rewrites, declines, text(program.gm), seconds, found.error, found.nbytes)
    program.trace.append(step)


def text(gm: fx.GraphModule) -> str:
    """The graph as a readable program, a line a node: ``%name : type = target(arguments)  # layer``."""
    return "\n".join(line(node) for node in gm.graph.nodes)


def line(node: fx.Node) -> str:
    """One node as a line of text."""
    found = info(node)
    left = f"%{node.name} : {type_text(found.type)}" if found.type is not None else f"%{node.name}"
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "get_attr":
        return f"{left} = {node.target}"
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    shown = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
    return f"{left} = {target_name(node.target)}({', '.join(shown)})" + (f"  # {found.path}" if found.path else "")


def target_name(target: Any) -> str:
    """``aten.linear``, ``aten.add.Scalar``, ``fxquant.linear_wq``, ``operator.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.__name__.removesuffix('.default')}"
    return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', target)}"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value) if isinstance(value, str) else str(value)


def relative_error(got: Sequence[Any], want: Sequence[Any]) -> float | None:
    """||got - want|| / ||want|| of the first floating point output, in float64."""
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            norm = float(b.double().norm())
            return float((a.double() - b.double()).norm()) / norm if norm else float((a.double()).norm())
    return None
