"""lorc: what quantization took from the weights of linears, given back by two thin products beside each of them.

``y = linear(x, dequantize(w), b)`` -> ``add(y, linear(linear(x, dequantize(V)), dequantize(U)))``

The factors are weights in QDQ form themselves, ``[rank, in]`` and ``[out, rank]``, so they are packed, counted, saved
and exported like any other. All are inserted as zeros first and filled in as the walk over the data reaches their
layer: what later layers are given has the compensation of those before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import Statistics, Weights, error_change, solvable_layers, walk
from fxquant.errors import CalibrationError
from fxquant.graph import NodeInfo, TensorType, WeightQuant, info, set_info, tensor_type
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import PARTS, float_weight, quant_of, replace_weight
from fxquant.qtensor import quantize_tensor, to_matrix
from fxquant.rewrite import Log, Rewrite, aten, attach, detach, fetch, free_name, get_attr, move_name, remove_unused
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.solvers.lorc import Solution, solve

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
    """``settings``: ``rank``, ``factors`` (a spec), ``weighting``, ``damp_percent``, ``sequential``, ``float_targets``,
    ``calibration`` (batches; unused without weighting and float targets), ``progress``.
    """
    gm, log = program.gm, Log()
    rank, spec = settings["rank"], parse_spec(settings["factors"])
    branches = {layer: _insert(gm, layer, weight, rank, spec) for layer, weight in _layers(gm, rank, log).items()}
    dropped: list[_Branch] = []
    short: list[str] = []

    def reached(layer: fx.Node, seen: Statistics | None) -> None:
        branch = branches[layer]
        value = float_weight(gm, branch.weight)
        given = (
            {} if seen is None else {"moments": seen.hessian, "drift": seen.drift, "held_out": seen.held_out_hessian}
        )
        if seen is not None and settings["weighting"] == "hessian" and seen.rows < value.shape[1]:
            short.append(f"{seen.rows} rows of input for a weight of {value.shape[1]} columns")
            log.declined(RULE, branch.add, f"too little data: {short[-1]}")
            dropped.append(branch)
            return
        found = solve(
            value, _restored(gm, branch.weight), spec, rank=rank, weighting=settings["weighting"],
            damp_percent=settings["damp_percent"], **given,
        )  # fmt: skip
        if found.useless:
            log.declined(RULE, branch.add, f"factors would not bring it closer: {_change(found, seen is not None)}")
            dropped.append(branch)
            return
        _fill(gm, branch, found)
        log.rewrote(RULE, branch.add, f"rank {rank}, {spec}, {_change(found, seen is not None)}")

    if settings["weighting"] == "none" and not settings["float_targets"]:
        for layer in branches:
            reached(layer, None)
    else:
        log.rewrites.insert(0, _walk(gm, settings, list(branches), reached))
    for branch in dropped:
        _remove(gm, branch)
    remove_unused(gm.graph)
    if short and len(short) == len(branches):
        raise CalibrationError(
            f"too little calibration data for lorc with weighting hessian: {short[0]}; give more, or take weighting "
            f"act_rms or none"
        )
    return log


def _walk(gm: fx.GraphModule, settings: Mapping[str, Any], layers: list[fx.Node], reached: Any) -> Rewrite:
    weights: Weights = "quantized" if settings["sequential"] else "float"
    drift = weights == "quantized" and settings["float_targets"]
    progress, batches = settings.get("progress", quiet), settings["calibration"]
    usage = walk(gm, batches, layers, reached, weights=weights, drift=drift, progress=progress, what=RULE)
    return usage.rewrite(len(batches))


def _layers(gm: fx.GraphModule, rank: int, log: Log) -> dict[fx.Node, fx.Node]:
    """The linears to compensate, each with the dequantize node of its weight; other layers are declined."""
    found, declined = solvable_layers(gm)
    for layer, reason in declined:
        log.declined(RULE, layer, f"{reason}; the factors are for linears of their own")
    for layer, weight in list(found.items()):
        rows, cols = to_matrix(float_weight(gm, weight), quant_of(weight).spec).shape
        if layer.target is not aten.linear.default:
            log.declined(RULE, layer, "it is a convolution; the factors are for linears of their own")
            del found[layer]
        elif rank > min(rows, cols):
            most = min(rows, cols)
            log.declined(RULE, layer, f"rank {rank} is more than its {rows}x{cols} weight has; give at most {most}")
            del found[layer]
    return found


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


def _restored(gm: fx.GraphModule, weight: fx.Node) -> Tensor:
    """The weight as its codes have it."""
    args, kwargs = fx.node.map_arg((weight.args, weight.kwargs), lambda n: fetch(gm, str(n.target)))
    return weight.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def _change(found: Solution, on_outputs: bool) -> str:
    """The errors ||(W - W') X|| / ||W X|| (or ||W - W'|| / ||W||) without and with the factors."""
    errors = error_change(found.before, found.after, found.held_out_before, found.held_out)
    return f"{'output' if on_outputs else 'weight'} error {errors}"


LORC = Pass("lorc", "give back what quantization took, by two thin products beside each linear (LoRC)", lorc)
