"""lorc: what quantization took from the weights of linears, given back by two thin products beside each of them.

``y = linear(x, dequantize(w), b)`` -> ``add(y, linear(linear(x, dequantize(V)), dequantize(U)))``

The factors are weights in QDQ form themselves, ``[rank, in]`` and ``[out, rank]``, so they are packed, counted, saved
and exported like any other. All are inserted as zeros first and filled in as the walk over the data reaches their
layer: what later layers are given has the compensation of those before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import Statistics, Weights, error_change, shared_input, solvable_layers, walk
from fxquant.errors import CalibrationError
from fxquant.graph import NodeInfo, TensorType, WeightQuant, info, set_info, tensor_type
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import PARTS, float_weight, quant_of, quantized_matrix, quantized_of, replace_weight, task_name
from fxquant.qtensor import quantize_tensor, to_matrix
from fxquant.rewrite import Log, Rewrite, aten, attach, detach, fetch, free_name, get_attr, move_name, remove_unused
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.solvers.alternate import Alternation, Pair, alternated
from fxquant.solvers.damping import Inputs
from fxquant.solvers.gptq import Weight
from fxquant.solvers.lorc import Solution, solve_for
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "lorc"


@dataclass(frozen=True)
class _Branch:
    """The compensation of ``layer``: the dequantize nodes of its weight and of the factors, and what adds them."""

    layer: fx.Node
    weight: fx.Node
    U: fx.Node
    V: fx.Node
    add: fx.Node


def lorc(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rank``, ``factors`` (a spec), ``weighting``, ``rounds``, ``damp_percent``, ``sequential``,
    ``float_targets``, ``calibration`` (batches; unused without weighting, rounds and float targets), ``progress``,
    ``executor``. A task is a layer, with rounds all layers with the same input.
    """
    gm, log = program.gm, Log()
    rank, spec, rounds = settings["rank"], parse_spec(settings["factors"]), settings.get("rounds", 0)
    weight_of, takes = _layers(gm, rank, log)
    branches = {layer: _insert(gm, layer, weight_of[layer], rank, spec) for layer in takes}
    total = len(set(map(shared_input, weight_of)) if rounds else branches)
    queue = Queue(settings.get("executor", IN_PROCESS), settings.get("progress", quiet), RULE, total)
    run = _Run(gm, settings, spec, weight_of, branches, queue, log)
    usage = None
    if rounds:
        usage = _walk(gm, settings, list(weight_of), run.alternate)
    elif settings["weighting"] == "none" and not settings["float_targets"]:
        for layer in branches:
            run.compensate(layer, None)
    else:
        usage = _walk(gm, settings, list(branches), run.compensate)
    queue.finish()
    if usage is not None:
        log.rewrites.insert(0, usage)
    for branch in run.dropped:
        _remove(gm, branch)
    remove_unused(gm.graph)
    if run.short and len(run.short) == len(weight_of if rounds else branches):
        raise CalibrationError(
            f"too little calibration data for lorc with {'rounds' if rounds else 'weighting hessian'}: {run.short[0]}; "
            f"give more, or take {'rounds 0 and ' if rounds else ''}weighting act_rms or none"
        )
    return log


@dataclass
class _Run:
    """What is done when the walk reaches a layer. ``dropped``: branches to remove; ``short``: layers without data."""

    gm: fx.GraphModule
    settings: Mapping[str, Any]
    spec: QuantSpec
    weight_of: Mapping[fx.Node, fx.Node]
    branches: Mapping[fx.Node, _Branch]
    queue: Queue
    log: Log
    dropped: list[_Branch] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    done: set[fx.Node] = field(default_factory=set)

    def compensate(self, layer: fx.Node, seen: Statistics | None) -> None:
        """Factors for the codes that the layer has."""
        branch, settings = self.branches[layer], self.settings
        if seen is not None and settings["weighting"] == "hessian" and self._too_little(layer, seen):
            self.queue.skip()
            return
        value, codes = float_weight(self.gm, branch.weight), quantized_of(self.gm, branch.weight)
        inputs = None if seen is None else Inputs(*seen.figures)
        args = value, codes, self.spec, settings["rank"], settings["weighting"], settings["damp_percent"], inputs
        task = Task(task_name(RULE, branch.weight), solve_for, args)
        self._submit(task, lambda found: self._fill(layer, found, seen is not None), alone=seen is None)

    def _fill(self, layer: fx.Node, found: Solution, on_outputs: bool) -> None:
        branch, change = self.branches[layer], _change(found, on_outputs)
        if found.useless:
            self._drop(layer, f"factors would not bring it closer: {change}")
            return
        _fill(self.gm, branch, found)
        self.log.rewrote(RULE, branch.add, f"rank {self.settings['rank']}, {self.spec}, {change}")

    def alternate(self, layer: fx.Node, seen: Statistics) -> None:
        """Codes and factors of the layer and of those after it that have the same input."""
        if layer in self.done:
            return
        same = [other for other in self.weight_of if shared_input(other) == shared_input(layer)]
        self.done.update(same)
        short = [self._too_little(each, seen) for each in same]
        if any(short):
            self.queue.skip()
            return
        gm, nodes, settings = self.gm, [self.weight_of[each] for each in same], self.settings
        problem = Alternation(
            [_weight(gm, node) for node in nodes],
            [quantized_matrix(gm, node) for node in nodes],
            [settings["rank"] if each in self.branches else 0 for each in same],
            self.spec,
            settings["rounds"],
            settings["weighting"],
            settings["damp_percent"],
        )
        task = Task(task_name(RULE, nodes[0]), alternated, (problem, Inputs(*seen.figures)))

        def write(found: list[Pair]) -> None:
            for each, pair in zip(same, found, strict=True):
                self._accept(each, pair)

        self._submit(task, write)

    def _submit(self, task: Task, write: Callable[[Any], None], *, alone: bool = False) -> None:
        """``alone``: no later layer is given what is found for this one."""
        self.queue.submit(task, write)
        if self.settings["sequential"] and not alone:
            self.queue.finish()

    def _accept(self, layer: fx.Node, pair: Pair) -> None:
        node = self.weight_of[layer]
        (a, b), (c, d), (e, f) = pair.before, pair.alone, pair.after
        change = f"output error {error_change(a, e, b, f)}; GPTQ alone {error_change(a, c, b, d)}"
        if pair.quantized is not None:
            replace_weight(self.gm, node, replace(pair.quantized, shape=tuple(float_weight(self.gm, node).shape)), RULE)
        if pair.factors is not None:
            _fill(self.gm, self.branches[layer], pair.factors)
            detail = f"round {pair.round}, rank {self.settings['rank']}, {self.spec}, {change}"
            self.log.rewrote(RULE, self.branches[layer].add, detail)
            return
        if layer in self.branches:
            self._drop(layer, f"factors would not bring it closer: {change}")
        if pair.quantized is not None:
            self.log.rewrote(RULE, layer, f"codes alone, {change}")

    def _too_little(self, layer: fx.Node, seen: Statistics) -> bool:
        cols = quantized_matrix(self.gm, self.weight_of[layer]).shape[1]
        if seen.rows >= cols:
            return False
        self.short.append(f"{seen.rows} rows of input for a weight of {cols} columns")
        reason = f"too little data: {self.short[-1]}"
        if layer in self.branches:
            self._drop(layer, reason)
        else:
            self.log.declined(RULE, layer, reason)
        return True

    def _drop(self, layer: fx.Node, reason: str) -> None:
        branch = self.branches[layer]
        self.log.declined(RULE, branch.add, reason)
        self.dropped.append(branch)


def _walk(gm: fx.GraphModule, settings: Mapping[str, Any], layers: list[fx.Node], reached: Any) -> Rewrite:
    weights: Weights = "quantized" if settings["sequential"] else "float"
    drift = weights == "quantized" and settings["float_targets"]
    batches = settings["calibration"]
    return walk(gm, batches, layers, reached, weights=weights, drift=drift).rewrite(len(batches))


def _layers(gm: fx.GraphModule, rank: int, log: Log) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
    """The layers with weights of their own, each with the node that dequantizes its weight, and which take factors.

    Layers that do not are declined.
    """
    found, declined = solvable_layers(gm)
    for layer, reason in declined:
        log.declined(RULE, layer, f"{reason}; the factors are for linears of their own")
    takes = []
    for layer, weight in found.items():
        rows, cols = to_matrix(float_weight(gm, weight), quant_of(weight).spec).shape
        if layer.target is not aten.linear.default:
            log.declined(RULE, layer, "it is a convolution; the factors are for linears of their own")
        elif rank > min(rows, cols):
            most = min(rows, cols)
            log.declined(RULE, layer, f"rank {rank} is more than its {rows}x{cols} weight has; give at most {most}")
        else:
            takes.append(layer)
    return found, takes


def _weight(gm: fx.GraphModule, node: fx.Node) -> Weight:
    """The layer's weight; where its clipping was searched for, with the scales that were found."""
    quant = quant_of(node)
    scales = quantized_of(gm, node).scales if quant.method == "search_formats" else None
    return Weight(to_matrix(float_weight(gm, node), quant.spec), quant.spec, quant.weight, scales)


# --- the graph --------------------------------------------------------------------------------------------------------
def _insert(gm: fx.GraphModule, layer: fx.Node, weight: fx.Node, rank: int, spec: QuantSpec) -> _Branch:
    """Put ``add(layer, linear(linear(x, dq(V)), dq(U)))`` behind the layer, with factors of zeros."""
    out, about = tensor_type(layer), info(layer)
    value, x = float_weight(gm, weight), layer.args[0]
    rows, cols = value.shape
    graph, users = gm.graph, list(layer.users)
    with graph.inserting_before(layer.next):
        V = _factor(gm, weight, about, "lorc_V", value.new_zeros(rank, cols), spec)
        thin = graph.create_node("call_function", aten.linear.default, (x, V, None), name=f"{layer.name}_lorc_v")
        U = _factor(gm, weight, about, "lorc_U", value.new_zeros(rows, rank), spec)
        wide = graph.create_node("call_function", aten.linear.default, (thin, U, None), name=f"{layer.name}_lorc_u")
        add = graph.call_function(aten.add.Tensor, (layer, wide))
    set_info(thin, NodeInfo(TensorType(out.dtype, (*out.shape[:-1], rank)), info(V).path, about.module, about.source))
    set_info(wide, NodeInfo(out, info(U).path, about.module, about.source))
    set_info(add, NodeInfo(out, about.path, about.module, about.source))
    for user in users:
        user.replace_input_with(layer, add)
    move_name(layer, add, f"{layer.name}_base")
    return _Branch(layer, weight, U, V, add)


def _factor(
    gm: fx.GraphModule, weight: fx.Node, layer: NodeInfo, suffix: str, value: Tensor, spec: QuantSpec
) -> fx.Node:
    """Attach ``value`` and its codes to the module and insert the node that dequantizes them."""
    owner, q = quant_of(weight).weight, quantize_tensor(value, spec)
    name = free_name(gm, f"{owner}_{suffix}")
    attach(gm, name, value)
    parts: list[fx.Node | None] = []
    for part in PARTS:
        if (tensor := getattr(q, part)) is not None:
            attach(gm, f"{name}_{part}", tensor)
        parts.append(None if tensor is None else get_attr(gm.graph, f"{name}_{part}", tensor))
    options: dict[str, Any] = {} if value.dtype == torch.float32 else {"dtype": value.dtype}
    node = gm.graph.call_function(ops.dequantize.default, (*parts[:3], str(spec), list(value.shape)), options)
    path = f"{layer.path}.{suffix}" if layer.path else suffix
    quant = WeightQuant(name, spec, RULE, 0.0, q.nbytes, 0, part_of=owner)
    set_info(node, NodeInfo(TensorType(value.dtype, tuple(value.shape)), path, weight=quant))
    return node


def _fill(gm: fx.GraphModule, branch: _Branch, found: Solution) -> None:
    for node, value, q in ((branch.U, found.factors.U, found.U), (branch.V, found.factors.V, found.V)):
        fetch(gm, quant_of(node).weight).copy_(value)
        replace_weight(gm, node, q, RULE)


def _remove(gm: fx.GraphModule, branch: _Branch) -> None:
    """Take the branch out again; the layer gets its name back."""
    branch.add.replace_all_uses_with(branch.layer)
    move_name(branch.add, branch.layer, f"{branch.add.name}_dropped")
    for factor in (branch.U, branch.V):
        for part in factor.all_input_nodes:
            detach(gm, str(part.target))
        detach(gm, quant_of(factor).weight)


def _change(found: Solution, on_outputs: bool) -> str:
    """The errors ||(W - W') X|| / ||W X|| (or ||W - W'|| / ||W||) without and with the factors."""
    errors = error_change(found.before, found.after, found.held_out_before, found.held_out)
    return f"{'output' if on_outputs else 'weight'} error {errors}"


LORC = Pass("lorc", "give back what quantization took, by two thin products beside each linear (LoRC)", lorc)
