"""Calibration: what the layers of a graph are given, collected in one walk over the data.

The graph is walked node by node, each node for all batches before the next one. So when a layer is reached, its inputs
of every batch are there: the statistics are complete, its weight may be replaced, and what follows sees the new one.
Inputs from the quantized prefix cost one pass over the data this way, not one a layer. What is kept is the values that
a later layer needs, of all batches; weights are decoded when they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant import spool
from fxquant.errors import CalibrationError, InputError
from fxquant.graph import info, tensor_type
from fxquant.lazy import real
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Progress, quiet
from fxquant.qdq import float_weight, quant_of, quantized_weights
from fxquant.rewrite import Rewrite, aten, fetch
from fxquant.signature import Signature, as_call

Weights = Literal["quantized", "float"]
Batch = list[Tensor]
"""The inputs of one call of a graph, in its order."""
Calibration = Iterable[Any]
"""Batches (tuples or dicts of inputs, or the one tensor input), or token windows ``[n, length]``, each a batch."""


@dataclass(frozen=True)
class Statistics:
    """What a layer was given, in all batches; each figure is computed when it is first asked for.

    ``inputs``: the layer's input, batch by batch; ``float_inputs``: what the float model's layer is given, where asked
    for. ``cols`` are the columns of the layer's weight as a matrix, ``rows`` how many rows of them there are in all.
    ``train`` and ``held_out`` are the batches to solve on and to judge on: every eighth batch is held out, none where
    there are fewer than eight.
    """

    node: fx.Node
    inputs: Sequence[Tensor]
    float_inputs: Sequence[Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the figures that were asked for."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor))

    @property
    def train(self) -> list[int]:
        return [i for i in range(len(self.inputs)) if i not in set(self.held_out)]

    @property
    def held_out(self) -> list[int]:
        return list(range(len(self.inputs)))[7::8]

    def columns(self, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        """float32 ``[rows, cols]`` of each of ``batches``, by default of all."""
        for i in range(len(self.inputs)) if batches is None else batches:
            yield columns(self.node, self.inputs[i]).float()

    @cached_property
    def rows(self) -> int:
        return sum(len(x) for x in self.columns())

    @cached_property
    def hessian(self) -> Tensor:
        """2/n sum of x x^T over the batches of ``train``, float32 ``[cols, cols]``."""
        return self.moment(self.train)

    @cached_property
    def held_out_hessian(self) -> Tensor | None:
        """The same over the batches of ``held_out``; None where there are none."""
        return self.moment(self.held_out) if self.held_out else None

    def moment(self, batches: Sequence[int]) -> Tensor:
        """2/n sum of x x^T over ``batches``. CalibrationError where it overflows float32."""
        total, rows = None, 0
        for x in self.columns(batches):
            rows += len(x)
            total = x.t() @ x if total is None else total.addmm_(x.t(), x)
        assert total is not None
        if not bool(total.isfinite().all()):
            path = info(self.node).path
            raise CalibrationError(f"layer {path!r}: its inputs are too large, their squares overflow float32")
        return total.mul_(2 / max(rows, 1))

    @cached_property
    def drift(self) -> Tensor | None:
        """2/n sum of (x_float - x) x^T over ``train``: how far x is from what the float model's layer is given."""
        return self._drift(self.train)

    @cached_property
    def held_out_drift(self) -> Tensor | None:
        """The same over the batches of ``held_out``; None where there are none."""
        return self._drift(self.held_out) if self.held_out else None

    def _drift(self, batches: Sequence[int]) -> Tensor | None:
        if self.float_inputs is None:
            return None
        total, rows = torch.zeros(()), 0
        for i, x in zip(batches, self.columns(batches), strict=True):
            total = total + (columns(self.node, self.float_inputs[i]).float() - x).t() @ x
            rows += len(x)
        return total * (2 / max(rows, 1))

    @property
    def share(self) -> float:
        """The part of all rows that is held out."""
        return sum(len(x) for x in self.columns(self.held_out)) / max(self.rows, 1)

    @property
    def figures(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
        """``hessian`` and ``drift``, the same of what is held out, and ``share``: what solvers know of the inputs."""
        return self.hessian, self.drift, self.held_out_hessian, self.held_out_drift, self.share

    @cached_property
    def largest(self) -> Tensor:
        """The largest magnitude of all, float32 ``[]``."""
        return torch.stack([x.abs().amax().float() for x in self.inputs]).amax()

    @cached_property
    def absmax(self) -> Tensor:
        """The largest magnitude of every column, float32 ``[cols]``."""
        return torch.stack([x.abs().amax(0) for x in self.columns()]).amax(0)

    @cached_property
    def absmean(self) -> Tensor:
        """The mean magnitude of every column, float32 ``[cols]``."""
        return torch.stack([x.abs().sum(0) for x in self.columns()]).sum(0) / max(self.rows, 1)


def error_change(before: float, after: float, held_before: float, held_after: float) -> str:
    """``20.00% -> 10.00% (21.00% -> 11.00% held out)`` from parts of the squared output, on what was solved on and on
    what was held out; the same where nothing was."""
    a, b, c, d = (math.sqrt(max(part, 0.0)) for part in (before, after, held_before, held_after))
    return f"{a:.2%} -> {b:.2%}" + ("" if (a, b) == (c, d) else f" ({c:.2%} -> {d:.2%} held out)")


@dataclass
class Usage:
    """``rows`` of the first layer's input, and the most bytes of activations and statistics alive at a time."""

    rows: int = 0
    peak_bytes: int = 0

    def rewrite(self, batches: int) -> Rewrite:
        """The line of a pass's log that says how much data there was and what it took."""
        detail = f"{self.rows} rows in {batches} batches, {self.peak_bytes / 2**20:.1f} MiB at most"
        return Rewrite("calibrate", "", "", detail)


# --- data -------------------------------------------------------------------------------------------------------------
def batches_of(data: Calibration, signature: Signature) -> list[Batch]:
    """The inputs of every batch as the graph takes them.

    A tensor of integers ``[n, length]`` is n batches of one window each, for the model's first input. CalibrationError
    where there is none or where one does not fit the model, naming it.
    """
    if isinstance(data, Tensor):
        data = _windows(data, signature)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration is a {type(data).__name__}; expected an iterable of batches (dicts or tuples of tensors), or "
            f"a tensor of token windows [n, length] as fxquant.evaluate.calibration_windows makes it"
        )
    batches = []
    for i, item in enumerate(data):
        try:
            args, kwargs = as_call(item)
            batches.append(signature.bind(args, kwargs))
        except InputError as error:
            raise CalibrationError(f"calibration batch {i}: {error}") from error
    if not batches:
        raise CalibrationError("calibration holds no batches; a few thousand tokens or some hundred images are usual")
    return batches


def _windows(data: Tensor, signature: Signature) -> list[dict[str, Tensor]]:
    if data.dim() != 2 or data.is_floating_point():
        raise CalibrationError(
            f"calibration is a tensor {data.dtype} {list(data.shape)}; expected token windows, integers [n, length], "
            f"or an iterable of batches: give [x] where x is one batch"
        )
    return [{signature.inputs[0].name: window.unsqueeze(0)} for window in data]


# --- the walk ---------------------------------------------------------------------------------------------------------
Reached = Callable[[fx.Node, Statistics], None]


def walk(
    gm: fx.GraphModule, batches: Sequence[Batch], layers: Sequence[fx.Node], reached: Reached, *,
    weights: Weights = "quantized", drift: bool = False, progress: Progress = quiet, what: str = "calibrate",
) -> Usage:  # fmt: skip
    """Call ``reached(layer, statistics)`` for every layer, in graph order, each just before it is computed.

    ``layers`` are nodes that ``why_not`` has nothing against. ``reached`` may write new codes for the layer's weight.
    With ``weights="float"`` every layer is computed with its float weight and activations are not rounded, so that
    inputs are those of the float model.
    ``drift`` walks both models side by side, for ``Statistics.drift``.
    CalibrationError where a layer's input holds NaN or Inf, naming the layer and the batch.
    """
    run = _Walk(gm, batches, weights)
    beside = _Walk(gm, batches, "float") if drift else None
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    left = sorted(layers, key=order.__getitem__)
    needed, last_use = _needed(left, order)
    total, kept = len(left), dict[Any, Statistics]()
    for node in [n for n in gm.graph.nodes if n in needed]:
        if left and node is left[0]:
            progress(what, total - len(left), total)
            key = shared_input(node)
            if key not in kept:
                kept[key] = run.statistics(node, beside)
            left = left[1:]
            reached(node, kept[key])
            run.account(sum(s.nbytes for s in kept.values()))
            kept = {k: s for k, s in kept.items() if any(shared_input(n) == k for n in left)}
        if not left:
            break
        dead = [n for n in node.all_input_nodes if last_use.get(n) is node]
        for each in (run, beside) if beside is not None else (run,):
            each.step(node, dead)
    progress(what, total, total)
    if beside is not None:
        run.usage.peak_bytes += beside.usage.peak_bytes
    return run.usage


def _needed(layers: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """The nodes that the layers depend on, themselves included, and for each the last of them that reads it."""
    found: set[fx.Node] = set()
    todo = list(layers)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    last: dict[fx.Node, fx.Node] = {}
    for node in sorted(found, key=order.__getitem__):
        last.update(dict.fromkeys(node.all_input_nodes, node))
    return found, last


@dataclass
class _Walk:
    """The values of all batches that are alive: ``values[node][batch]``."""

    gm: fx.GraphModule
    batches: Sequence[Batch]
    weights: str
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    constants: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constants = constants(self.gm.graph)

    def step(self, node: fx.Node, dead: Sequence[fx.Node]) -> None:
        """Compute ``node`` for every batch and drop what is read for the last time."""
        if node.op == "placeholder":
            at = [n for n in self.gm.graph.nodes if n.op == "placeholder"].index(node)
            self.values[node] = [batch[at] for batch in self.batches]
        elif node not in self.constants:
            fixed = {n: self.constant(n) for n in node.all_input_nodes if n in self.constants}
            self.values[node] = [spool.keep(self.compute(node, i, fixed)) for i in range(len(self.batches))]
            if not node.users:
                del self.values[node]
        for n in dead:
            self.values.pop(n, None)
        self.account()

    def compute(self, node: fx.Node, batch: int, fixed: Mapping[fx.Node, Tensor]) -> Any:
        def value(n: fx.Node) -> Any:
            return fixed[n] if n in fixed else self.values[n][batch]

        if self.weights == "float" and node.target in ROUNDINGS:
            return value(_input(node))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def constant(self, node: fx.Node) -> Tensor:
        """A tensor of the module, or a weight decoded from its codes."""
        if node.op == "get_attr":
            return real(fetch(self.gm, str(node.target)))  # type: ignore[no-any-return]
        if self.weights == "float" and (quant := info(node).weight) is not None:
            value = float_weight(self.gm, node)
            return torch.zeros_like(value) if quant.part_of else value  # the float model has no compensation
        fixed = {n: self.constant(n) for n in node.all_input_nodes}
        return self.compute(node, 0, fixed)  # type: ignore[no-any-return]

    def statistics(self, node: fx.Node, other: _Walk | None) -> Statistics:
        """What ``node`` is given, and what it is given in the walk ``other``. CalibrationError for NaN and Inf."""
        inputs = list(self.values[_input(node)])
        for i, x in enumerate(inputs):
            if bad := int((~x.isfinite()).sum()):
                raise CalibrationError(
                    f"layer {info(node).path!r}: its input holds {bad} NaN or Inf among {x.numel()} values in "
                    f"calibration batch {i} of {len(inputs)}; the model or its data are broken before this layer"
                )
        found = Statistics(node, inputs, None if other is None else list(other.values[_input(node)]))
        self.usage.rows = self.usage.rows or found.rows
        return found

    def account(self, extra: int = 0) -> None:
        """Note how much is alive: storages counted once, weights not counted."""
        held = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for batch in self.values.values()
            for value in batch
            if isinstance(value, Tensor)
        }
        self.usage.peak_bytes = max(self.usage.peak_bytes, sum(held.values()) + extra)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Tensors of the module, and weights: what is computed from dequantized constants alone."""
    tensors, weights = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        inputs = set(node.all_input_nodes)
        if node.op == "get_attr":
            tensors.add(node)
        elif (
            node.op == "call_function"
            and inputs <= tensors | weights
            and (node.target is ops.dequantize.default or inputs & weights)
        ):
            weights.add(node)
    return tensors | weights


# --- what a layer sums over -------------------------------------------------------------------------------------------
_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2}
_PROBES = (aten.alias.default,)
"""Like ``ROUNDINGS``, nodes that ``walk`` takes as layers too, for the statistics of what they are given."""


def solvable_layers(gm: fx.GraphModule) -> tuple[dict[fx.Node, fx.Node], list[tuple[fx.Node, str]]]:
    """The layers whose codes a method may choose anew, each with the dequantize node of its weight, and why not others.

    Left out are layers that have no one Hessian, weights that several layers share, weights with exponent biases, and
    factors of a compensation.
    """
    found, declined = dict[fx.Node, fx.Node](), list[tuple[fx.Node, str]]()
    for node in quantized_weights(gm):
        users = list(node.users)
        names = ", ".join(info(user).path or user.name for user in users)
        for user in users:
            reason = why_not(user)
            if quant_of(node).part_of:
                reason = f"it is a factor of the compensation of {quant_of(node).part_of}"
            elif node.kwargs.get("exponent_bias") is not None:
                reason = "its weight has the shifts of its inputs folded in already"
            elif len(users) > 1:
                reason = f"its weight is shared by {names}, which have inputs of their own"
            if reason is None:
                found[user] = node
            else:
                declined.append((user, reason))
    return found, declined


def why_not(node: fx.Node) -> str | None:
    """Why the inputs of a layer give no one Hessian for its weight; None where they do."""
    if node.target is aten.linear.default:
        return None
    if node.target in _CONVOLUTIONS:
        groups = node.args[6] if len(node.args) > 6 else 1
        return None if groups == 1 else f"its {groups} groups of channels have inputs of their own"
    if node.target is aten.embedding.default:
        return "an embedding looks rows up and sums over nothing"
    return f"no rule says what {getattr(node.target, '__name__', node.target)} sums over"


def columns(node: fx.Node, x: Tensor) -> Tensor:
    """The layer's input as ``[rows, cols]``, cols as in the matrix view of its weight: a convolution's are unfolded."""
    if node.target is aten.linear.default or node.target in (*ROUNDINGS, *_PROBES):
        return x.reshape(-1, x.shape[-1])
    dims = _CONVOLUTIONS[node.target]
    kernel, stride, padding, dilation = _window(node, dims)
    x = x.reshape(-1, *x.shape[-dims - 1 :])
    image = x.unsqueeze(2) if dims == 1 else x
    patches = F.unfold(image, kernel, dilation=dilation, padding=padding, stride=stride)  # [batch, cols, places]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _window(node: fx.Node, dims: int) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation in two dimensions; a 1-D convolution is one on images of height 1."""
    kernel = tensor_type(node.args[1]).shape[2:]  # type: ignore[arg-type]
    found = []
    for value, still in zip((kernel, *node.args[3:6]), (1, 1, 0, 1), strict=True):
        sizes = [int(v) for v in value]  # type: ignore[union-attr, arg-type]
        sizes = sizes * dims if len(sizes) == 1 else sizes
        found.append((still, sizes[0]) if dims == 1 else (sizes[0], sizes[1]))
    return found


def _input(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def shared_input(node: fx.Node) -> Any:
    """A key of what a layer is given: layers with the same key see the same columns."""
    if node.target not in _CONVOLUTIONS:
        return _input(node), None
    return _input(node), str(_window(node, _CONVOLUTIONS[node.target]))
