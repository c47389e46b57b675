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
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant.calibrate import Statistics, walk, why_not
from fxquant.formats import Format
from fxquant.gradients import Importance, output_importance
from fxquant.grids import FloatFormat
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, put, quant_of, quantized_matrix, quantized_weights, requantize, rounding_spec
from fxquant.qtensor import QuantizedTensor, fake_quantize, to_matrix
from fxquant.rewrite import Log, aten, fetch
from fxquant.scales import Scales
from fxquant.scheme import QuantSpec
from fxquant.solvers.gptq import targets
from fxquant.solvers.search import (
    Activation,
    Fisher,
    channel_bias,
    formats_of,
    output_error,
    search_activation,
    search_weight,
    shift_limit,
    weighted,
)

RULE = "search_formats"
SAMPLE = 256
"""Rows that a candidate for an activation is tried on."""
OPERANDS = 1 << 15
"""Elements that a candidate for an operand of attention is tried on."""


@dataclass(frozen=True)
class Group:
    """An activation that is rounded (or None) and the linears that read it, with the weights they multiply by."""

    rounding: fx.Node | None
    layers: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


def search_formats(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration``, ``progress``, ``rounds``, ``steps``, ``octaves``, ``formats`` ("all" of the same
    bits, or "same"), ``max_shift``, ``float_targets``, ``loss`` ("mse" or "fisher")."""
    gm, log = program.gm, Log()
    groups = {group.rounding or group.layers[0]: group for group in _groups(gm, log)}
    progress = settings.get("progress", quiet)
    costs: dict[fx.Node, Importance] = {}
    if settings.get("loss", "mse") == "fisher":
        layers = [layer for group in groups.values() for layer in group.layers]
        costs = output_importance(gm, layers, settings["calibration"], progress=progress, what=RULE)
    operands = {n for n in gm.graph.nodes if n.target in ROUNDINGS and n not in groups and not _reads_weights(n)}

    def reached(node: fx.Node, seen: Statistics) -> None:
        if node in operands:
            _search_operand(gm, node, seen, settings, log)
        else:
            own = groups[node]
            _search(gm, own, seen, [costs[layer] for layer in own.layers if layer in costs], settings, log)

    walk(gm, settings["calibration"], [*groups, *operands], reached, weights="float",
         progress=progress, what=RULE)  # fmt: skip
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


def _search(
    gm: fx.GraphModule, group: Group, seen: Statistics, costs: Sequence[Importance], settings: Mapping[str, Any],
    log: Log,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    W = [to_matrix(float_weight(gm, w), quant_of(w).spec).float() for w in group.weights]
    found = [quantized_matrix(gm, w) for w in group.weights]
    cols = W[0].shape[1]
    every = max(seen.rows // max(4 * SAMPLE, 2 * cols), 1)
    rows = torch.cat([x[::every] for x in seen.columns()])
    again = max(len(rows) // SAMPLE, 1)
    few, fisher = rows[::again], _fisher(costs, every)
    less = None if fisher is None else fisher.sample(again)
    rounding = _Rounding(gm, group.rounding, seen.absmax, settings)
    before = [_error(rounding(few), q, few, w, less, at) for q, w, at in zip(found, W, _places(W), strict=True)]
    start = rounding.state
    for round_ in range(settings.get("rounds", 3)):
        rounding.search(few, torch.cat([q.dequantize() for q in found]), generator, less, again=round_ > 0)
        given = rounding(rows)
        costly = given if fisher is None else given * fisher.tokens[:, None]
        H = 2 / len(rows) * costly.t() @ given
        aims = _targets(W, rows, given, costly, H) if settings.get("float_targets", False) else W
        for i, (target, node, at) in enumerate(zip(aims, group.weights, _places(W), strict=True)):
            spec = quant_of(node).spec
            found[i], _ = search_weight(
                target, H, spec, _candidates(spec, settings), steps=settings.get("steps", 100),
                octaves=settings.get("octaves", 2.0), generator=generator,
                row_weight=None if fisher is None else fisher.channels[at],
            )  # fmt: skip
    after = [_error(rounding(few), q, few, w, less, at) for q, w, at in zip(found, W, _places(W), strict=True)]
    if not sum(after) < sum(before):
        rounding.state = start
        for layer in group.layers:
            log.declined(RULE, layer, "the search found nothing better on its sample; it stays as it was")
        return
    rounding.write(log)
    for layer, node, q, a, b in zip(group.layers, group.weights, found, before, after, strict=True):
        requantize(gm, node, replace(q, shape=tuple(float_weight(gm, node).shape)), RULE)
        log.rewrote(RULE, layer, f"{q.spec}, output error {math.sqrt(a):.2%} -> {math.sqrt(b):.2%}")


def _reads_weights(node: fx.Node) -> bool:
    return any(user.target is aten.linear.default for user in node.users)


def _search_operand(gm: fx.GraphModule, node: fx.Node, seen: Statistics, settings: Mapping[str, Any], log: Log) -> None:
    """The format and clip with the least squared error of an operand of attention, which is multiplied by no weight."""
    rounding = _Rounding(gm, node, seen.largest.reshape(1), settings)
    if not rounding_spec(node).static:
        log.declined(RULE, node, "an operand of attention whose scales are found when it runs; its format stays")
        return
    per = max(OPERANDS // len(seen.inputs), 1)
    x = torch.cat([x.flatten()[:: max(x.numel() // per, 1)].float() for x in seen.inputs])
    rounding.search(x.unsqueeze(1), torch.ones(1, 1), torch.Generator().manual_seed(0), again=False)
    rounding.write(log)


class _Rounding:
    """How an activation is rounded: read from its node, searched, written back. Without a node nothing is rounded."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node | None, absmax: Tensor, settings: Mapping[str, Any]) -> None:
        self.gm, self.node, self.absmax, self.settings = gm, node, absmax, settings
        self.state: Activation | None = None
        if node is None:
            return
        bias = node.kwargs.get("exponent_bias")
        held = fetch(gm, str(bias.target)) if isinstance(bias, fx.Node) else None
        scale = node.args[1] if node.target is ops.fake_quantize.default else None
        given = fetch(gm, str(scale.target)) if isinstance(scale, fx.Node) else torch.empty(0)
        self.state = Activation(rounding_spec(node), given, held, math.inf, 0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.state is None:
            return x
        given = Scales(self.state.scale) if self.state.spec.static else None
        return fake_quantize(x, self.state.spec, given, self.state.exponent_bias)

    def search(
        self, x: Tensor, W: Tensor, generator: torch.Generator, fisher: Fisher | None = None, *, again: bool
    ) -> None:
        if self.state is None:
            return
        spec, shift = self.state.spec, self.state.exponent_bias is not None
        formats = _candidates(spec, self.settings)
        if spec.static:
            self.state = search_activation(
                x, W, self.absmax, spec, formats, shift=shift, limit=self.settings.get("max_shift"),
                steps=self.settings.get("steps", 100), octaves=self.settings.get("octaves", 2.0),
                near=self.state.step if again else None, fisher=fisher, generator=generator,
            )  # fmt: skip
            return
        trials = [self._dynamic(replace(spec, format=format), shift) for format in formats]
        view = weighted(W, fisher).t()
        whole = output_error(x, view, fisher) or 1.0
        for trial in trials:
            rounded = fake_quantize(x, trial.spec, None, trial.exponent_bias)
            loss = output_error(rounded - x, view, fisher) / whole
            if trial is trials[0] or loss < self.state.loss:
                self.state = replace(trial, loss=loss)

    def _dynamic(self, spec: QuantSpec, shift: bool) -> Activation:
        most = self.settings.get("max_shift")
        limit = shift_limit(spec.format) if most is None else most
        bias = channel_bias(self.absmax, self.absmax.amax(), limit) if shift else None
        return Activation(spec, torch.empty(0), bias, math.inf, 0)

    def write(self, log: Log) -> None:
        """Give the node what was found."""
        if self.state is None or self.node is None:
            return
        before, spec = rounding_spec(self.node), self.state.spec
        if spec.static:
            read = self.node.args[1]
            assert isinstance(read, fx.Node)
            put(self.gm, read, self.state.scale)
        if self.state.exponent_bias is not None:
            read = self.node.kwargs["exponent_bias"]
            assert isinstance(read, fx.Node)
            put(self.gm, read, self.state.exponent_bias)
        at = 3 if self.node.target is ops.fake_quantize.default else 1
        self.node.update_arg(at, str(spec))
        log.rewrote(RULE, self.node, f"{before} -> {spec}, error of the products {math.sqrt(self.state.loss):.2%}")


def _candidates(spec: QuantSpec, settings: Mapping[str, Any]) -> Sequence[Format]:
    """The formats that may take the place of the spec's own, that one first."""
    own = spec.format
    if settings.get("formats", "all") == "same" or not isinstance(own, FloatFormat):
        return [own]
    return [own, *(format for format in formats_of(own.bits) if format != own)]


def _fisher(costs: Sequence[Importance], every: int) -> Fisher | None:
    """What errors of the outputs of all layers of a group cost, of every ``every``-th row of each batch."""
    if not costs:
        return None
    tokens = [sum(parts[1:], parts[0])[::every] for parts in zip(*(c.tokens for c in costs), strict=True)]
    return Fisher.of(torch.cat(tokens), torch.cat([c.channels for c in costs]))


def _places(W: Sequence[Tensor]) -> list[slice]:
    """Where the rows of each weight are among those of all."""
    ends = list(accumulate(len(w) for w in W))
    return [slice(end - len(w), end) for end, w in zip(ends, W, strict=True)]


def _targets(W: list[Tensor], x: Tensor, given: Tensor, costly: Tensor, H: Tensor) -> list[Tensor]:
    """Weights whose outputs on the rounded inputs come nearest to W's on the float ones."""
    drift = 2 / len(x) * (x - given).t() @ costly
    return targets(W, H, drift, 0.01)


def _error(given: Tensor, q: QuantizedTensor, x: Tensor, W: Tensor, fisher: Fisher | None, at: slice) -> float:
    """||X' W'^T - X W^T||^2 / ||X W^T||^2; with ``fisher`` of what errors cost, ``at`` its channels."""
    want = F.linear(x, W)
    squares = torch.stack([(F.linear(given, q.dequantize()) - want).square(), want.square()])
    if fisher is not None:
        squares = squares * fisher.tokens[:, None] * fisher.channels[at]
    error, whole = squares.sum((1, 2)).tolist()
    return float(error / (whole or 1.0))


SEARCH_FORMATS = Pass(
    "search_formats", "search formats and clipping of activations and weights together (LLM-FP4)", search_formats
)
