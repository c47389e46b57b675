"""normalize: one spelling for each thing, so that every later pattern matches once.

Arguments become positional with defaults filled in, operators without effect disappear, products with a constant
matrix become ``linear``. No value changes in any bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxquant.graph import NodeInfo, TensorType, info, set_info
from fxquant.program import Pass, Program
from fxquant.rewrite import Call, Decline, Log, Match, Rule, Var, apply_rules, aten, fetch, get_attrs

_END = 2**63 - 1


def normalize(program: Program, settings: Mapping[str, Any]) -> Log:
    for node in program.gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            fill_arguments(node)
    log = apply_rules(program.gm, RULES)
    settle_constants(program.gm.graph)
    return log


def settle_constants(graph: fx.Graph) -> None:
    """Move every get_attr node right in front of its first user, so that the program reads top to bottom."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(get_attrs(graph)):
        if node.users:
            min(node.users, key=order.__getitem__).prepend(node)


def fill_arguments(node: fx.Node) -> None:
    """Every positional argument of the schema in its place, defaults included; keyword-only ones stay by name."""
    positional, given = [], dict(node.kwargs)
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    for i, argument in enumerate(a for a in arguments if not a.kwarg_only):
        if i < len(node.args):
            positional.append(node.args[i])
        elif argument.name in given:
            positional.append(given.pop(argument.name))
        else:
            positional.append(argument.default_value)
    node.args, node.kwargs = tuple(positional), given


def drop_noop(match: Match) -> fx.Node | Decline:
    return match["x"]  # type: ignore[no-any-return]


def _same_type(match: Match) -> bool:
    x = match["x"]
    return isinstance(x, fx.Node) and info(x).type is not None and info(x).type == info(match.node).type


def _is_eval(match: Match) -> bool:
    return match.node.args[2] is False or bool(match.node.args[1] == 0.0)


def _is_whole(match: Match) -> bool:
    return isinstance(match["x"], fx.Node)


def linear_from_product(match: Match) -> fx.Node | Decline:
    return match.call(aten.linear.default, match["x"], _transposed(match, match["w"]), match.captured.get("b"))


def _transposed(match: Match, weight: fx.Node) -> fx.Node:
    """``weight^T`` as a view: F.linear transposes it back, so the same matrix product runs."""
    new = match.call(aten.permute.default, weight, [1, 0])
    value = fetch(match.gm, str(weight.target))
    set_info(new, NodeInfo(TensorType(value.dtype, (value.shape[1], value.shape[0])), info(match.node).path))
    return new


def _constant_matrix(match: Match) -> bool:
    w = match["w"]
    if not (isinstance(w, fx.Node) and w.op == "get_attr" and fetch(match.gm, str(w.target)).dim() == 2):
        return False
    b = match.captured.get("b")
    return b is None or (isinstance(b, fx.Node) and b.op == "get_attr" and fetch(match.gm, str(b.target)).dim() == 1)


_x, _w, _b = Var("x"), Var("w"), Var("b")
RULES = (
    Rule(Call((aten.alias.default, aten.detach.default, aten.lift_fresh.default), _x), drop_noop),  # alias(x) -> x
    Rule(Call((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default), _x),
         drop_noop, where=_same_type),  # to(x: float32, float32) -> x
    Rule(Call((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), _x),
         drop_noop, where=_is_eval),  # dropout(x, p, train=False) -> x
    Rule(Call(aten.slice.Tensor, _x, Var("dim"), 0, _END, 1), drop_noop, where=_is_whole),  # x[:] -> x
    Rule(Call(aten.addmm.default, _b, _x, _w),
         linear_from_product, where=_constant_matrix),  # b + x W -> linear(x, W^T, b)
    Rule(Call((aten.mm.default, aten.matmul.default), _x, _w),
         linear_from_product, where=_constant_matrix),  # x W -> linear(x, W^T)
)  # fmt: skip

NORMALIZE = Pass(
    "normalize", "one spelling: positional arguments, no operators without effect, products as linear", normalize
)
