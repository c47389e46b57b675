"""search_formats: LLM-FP4's joint search of formats and clipping, layer by layer, on the float model's activations.

The activation ``fake_quantize(x, scale)`` and the weights ``dequantize(codes, scale)`` of the linears that read it are
searched in turn, in rounds: each time the one is looked for that keeps the layers' outputs best under the other. A
pre-shifted activation gets its shifts anew for every candidate. Operands of attention's products are searched one by
one, for the least error of their own. With the loss "fisher" errors of outputs cost what their gradients say, from one
backward pass over the data. LLM-FP4 (2310.16836), sections 3.2 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from fxquant.calibrate import Statistics, walk, why_not
from fxquant.gradients import Importance, output_importance
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import (
    float_weight,
    put,
    quant_of,
    quantized_matrix,
    quantized_weights,
    requantize,
    rounding_spec,
    task_name,
)
from fxquant.qtensor import to_matrix
from fxquant.rewrite import Log, aten, fetch
from fxquant.solvers.joint import SAMPLE, Found, Options, search_operand, search_together
from fxquant.solvers.search import Activation, Fisher
from fxquant.tasks import IN_PROCESS, Queue, Task

RULE = "search_formats"
OPERANDS = 1 << 15
"""Elements that a candidate for an operand of attention is tried on."""


@dataclass(frozen=True)
class Group:
    """An activation that is rounded (or None) and the linears that read it, with the weights they multiply by."""

    rounding: fx.Node | None
    layers: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


def search_formats(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration``, ``progress``, ``executor``, ``rounds``, ``steps``, ``octaves``, ``formats`` ("all"
    of the same bits, or "same"), ``max_shift``, ``float_targets``, ``loss`` ("mse" or "fisher").

    Each group, and each operand of attention, is a task. The walk does not wait for them.
    """
    gm, log = program.gm, Log()
    groups = {group.rounding or group.layers[0]: group for group in _groups(gm, log)}
    progress = settings.get("progress", quiet)
    options = Options(**{f.name: settings[f.name] for f in fields(Options) if f.name in settings})
    costs: dict[fx.Node, Importance] = {}
    if settings.get("loss", "mse") == "fisher":
        layers = [layer for group in groups.values() for layer in group.layers]
        costs = output_importance(gm, layers, settings["calibration"], progress=progress, what=RULE)
    operands = {n for n in gm.graph.nodes if n.target in ROUNDINGS and n not in groups and not _reads_weights(n)}
    queue = Queue(settings.get("executor", IN_PROCESS), progress, RULE, len(groups) + len(operands))

    def reached(node: fx.Node, seen: Statistics) -> None:
        if node in operands:
            _submit_operand(gm, node, seen, options, queue, log)
        else:
            own = groups[node]
            known = [costs[layer] for layer in own.layers if layer in costs]
            queue.submit(_task(gm, own, seen, known, options), lambda found: _write(gm, own, found, log))

    walk(gm, settings["calibration"], [*groups, *operands], reached, weights="float")
    queue.finish()
    return log


def _groups(gm: fx.GraphModule, log: Log) -> list[Group]:
    """What is searched together; weights whose layers cannot be are declined."""
    of: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for weight in quantized_weights(gm):
        (layer, *others), spec = weight.users, quant_of(weight).spec
        reason = why_not(layer) if not others else "its weight is shared by layers with inputs of their own"
        if reason is None and layer.target is not aten.linear.default:
            reason = "only linears are searched"
        if reason is None and (spec.kind.format is not None or spec.has_zero_point or spec.block(2, 2)[0] > 1):
            reason = f"scales of {spec} follow a rule of their own; searched are fp32, fp16 and bf16, a row or a group"
        if reason is not None:
            log.declined(RULE, layer, f"{reason}; it stays as it was")
            continue
        x = layer.args[0]
        assert isinstance(x, fx.Node)
        of.setdefault(x if x.target in ROUNDINGS else layer, []).append((layer, weight))
    return [
        Group(key if key.target in ROUNDINGS else None, tuple(y for y, _ in pairs), tuple(w for _, w in pairs))
        for key, pairs in of.items()
    ]


def _task(
    gm: fx.GraphModule, group: Group, seen: Statistics, costs: Sequence[Importance], options: Options
) -> Task:  # fmt: skip
    """The search of a group on evenly spaced rows of its input."""
    W = [to_matrix(float_weight(gm, w), quant_of(w).spec) for w in group.weights]
    every = max(seen.rows // max(4 * SAMPLE, 2 * W[0].shape[1]), 1)
    rows = torch.cat([x[::every] for x in seen.columns()])
    start = [quantized_matrix(gm, w) for w in group.weights]
    args = rows, W, start, _activation(gm, group.rounding), seen.absmax, _fisher(costs, every), options
    return Task(task_name(RULE, group.weights[0]), search_together, args)


def _write(gm: fx.GraphModule, group: Group, found: Found | None, log: Log) -> None:
    if found is None:
        for layer in group.layers:
            log.declined(RULE, layer, "the search found nothing better on its sample; it stays as it was")
        return
    if group.rounding is not None and found.activation is not None:
        _write_rounding(gm, group.rounding, found.activation, log)
    for layer, node, q, a, b in zip(group.layers, group.weights, found.weights, found.before, found.after, strict=True):
        requantize(gm, node, replace(q, shape=tuple(float_weight(gm, node).shape)), RULE)
        log.rewrote(RULE, layer, f"{q.spec}, output error {math.sqrt(a):.2%} -> {math.sqrt(b):.2%}")


def _reads_weights(node: fx.Node) -> bool:
    return any(user.target is aten.linear.default for user in node.users)


def _submit_operand(
    gm: fx.GraphModule, node: fx.Node, seen: Statistics, options: Options, queue: Queue, log: Log
) -> None:  # fmt: skip
    """The format and clip with the least squared error of an operand of attention, which is multiplied by no weight."""
    if not rounding_spec(node).static:
        log.declined(RULE, node, "an operand of attention whose scales are found when it runs; its format stays")
        queue.skip()
        return
    per = max(OPERANDS // len(seen.inputs), 1)
    x = torch.cat([x.flatten()[:: max(x.numel() // per, 1)].float() for x in seen.inputs])
    args = x.unsqueeze(1), seen.largest.reshape(1), _activation(gm, node), options
    task = Task(f"{RULE}/{node.name}", search_operand, args)
    queue.submit(task, lambda found: _write_rounding(gm, node, found, log))


def _activation(gm: fx.GraphModule, node: fx.Node | None) -> Activation | None:
    """How an activation is rounded; None where it is not."""
    if node is None:
        return None
    bias = node.kwargs.get("exponent_bias")
    held = fetch(gm, str(bias.target)) if isinstance(bias, fx.Node) else None
    scale = node.args[1] if node.target is ops.fake_quantize.default else None
    given = fetch(gm, str(scale.target)) if isinstance(scale, fx.Node) else torch.empty(0)
    return Activation(rounding_spec(node), given, held, math.inf, 0)


def _write_rounding(gm: fx.GraphModule, node: fx.Node, found: Activation, log: Log) -> None:
    """Give the node what was found."""
    before, spec = rounding_spec(node), found.spec
    if spec.static:
        read = node.args[1]
        assert isinstance(read, fx.Node)
        put(gm, read, found.scale)
    if found.exponent_bias is not None:
        read = node.kwargs["exponent_bias"]
        assert isinstance(read, fx.Node)
        put(gm, read, found.exponent_bias)
    node.update_arg(3 if node.target is ops.fake_quantize.default else 1, str(spec))
    log.rewrote(RULE, node, f"{before} -> {spec}, error of the products {math.sqrt(found.loss):.2%}")


def _fisher(costs: Sequence[Importance], every: int) -> Fisher | None:
    """What errors of the outputs of all layers of a group cost, of every ``every``-th row of each batch."""
    if not costs:
        return None
    tokens = [sum(parts[1:], parts[0])[::every] for parts in zip(*(c.tokens for c in costs), strict=True)]
    return Fisher.of(torch.cat(tokens), torch.cat([c.channels for c in costs]))


SEARCH_FORMATS = Pass(
    "search_formats", "search formats and clipping of activations and weights together (LLM-FP4)", search_formats
)
