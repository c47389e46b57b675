"""normalize: one spelling for each thing, so that every later pattern matches once.

Arguments become positional with defaults filled in, operators without effect disappear, products with a constant
matrix become ``linear``, and a weight that is normed anew at every call is computed once. No value changes in any bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxquant.graph import NodeInfo, TensorType, info, set_info
from fxquant.layers import find_layers, other_uses, swaps_matrix
from fxquant.program import Pass, Program
from fxquant.rewrite import Call, Decline, Log, Match, Rule, Var, apply_rules, aten, fetch, free_name, get_attrs

_END = 2**63 - 1


def normalize(program: Program, settings: Mapping[str, Any]) -> Log:
    for node in program.gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            fill_arguments(node)
    log = apply_rules(program.gm, RULES)
    settle_constants(program.gm.graph)
    for node, layer in other_uses(find_layers(program.gm)):
        log.declined(
            "find_layers", node, f"it uses {layer.target} of layer {layer.name!r} and is no layer: a float copy stays"
        )
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


def drop_copy(match: Match) -> fx.Node | Decline:
    """What ``into[:, 1:] = x`` leaves of itself in functional form: x in the dtype and the size of ``into``."""
    into, x = match["into"], match["x"]
    mine, wanted = info(x).type, info(match.node).type
    if not isinstance(mine, TensorType) or not isinstance(wanted, TensorType):
        return Decline("the types of a copy are not known")
    if mine.dtype != wanted.dtype:
        x = match.call(aten.to.dtype, x, wanted.dtype, False, False, None)
        set_info(x, replace(info(match.node), type=TensorType(wanted.dtype, mine.shape)))
    return x if mine.shape == wanted.shape else match.call(aten.expand_as.default, x, into)


def _same_type(match: Match) -> bool:
    x = match["x"]
    return isinstance(x, fx.Node) and info(x).type is not None and info(x).type == info(match.node).type


def _is_eval(match: Match) -> bool:
    return match.node.args[2] is False or bool(match.node.args[1] == 0.0)


def _is_whole(match: Match) -> bool:
    return isinstance(match["x"], fx.Node)


def linear_from_product(match: Match) -> fx.Node | Decline:
    return match.call(aten.linear.default, match["x"], _transposed(match, match["w"]), match.captured.get("b"))


def linear_from_swapped_product(match: Match) -> fx.Node | Decline:
    return match.call(aten.linear.default, match["x"], match["w"].args[0], match.captured.get("b"))


def product_from_einsum(match: Match) -> fx.Node | Decline:
    """``einsum('bi,oi->bo', x, w)`` as linear, ``einsum('ebi,eio->ebo', x, w)`` as bmm, with the weight either way.

    einsum runs a bmm, whose kernel for fewer than 400 products rounds in another order than linear's.
    """
    terms, _, out = match["equation"].replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    x, w = match["operands"]
    size, experts = _value(match, w).numel(), right[:-2]
    known = out == left[:-1] + out[-1:] and out[-1:] not in left and left.startswith(experts) and len(left) > 1
    swapped = right == experts + out[-1:] + left[-1:]
    if not known or not (swapped or right == experts + left[-1:] + out[-1:]) or (experts and len(left) != 3):
        return Decline(f"einsum {match['equation']!r} is neither 'bi,oi->bo' nor 'ebi,eio->ebo'; write it as a linear")
    if experts:
        return match.call(aten.bmm.default, x, _transposed(match, w) if swapped else w)
    if size < 400:
        return Decline(f"a weight of {size} values is rounded in another order by einsum than by linear")
    return match.call(aten.linear.default, x, w if swapped else _transposed(match, w), None)


def fold_weight_norm(match: Match) -> fx.Node | Decline:
    """The weight ``g v / ||v||`` of a module under ``weight_norm`` as a constant of its own, which makes it a layer."""
    v, g = match["v"], match["g"]
    name = free_name(match.gm, f"{_owner(str(v.target))}weight")
    value = aten._weight_norm(_value(match, v), _value(match, g), *match.node.args[2:])
    return match.constant(name, value)


def _owner(name: str) -> str:
    """Where the parts of a weight come from: ``conv.`` for ``conv.parametrizations.weight.original0``."""
    owner = name.partition("parametrizations.")[0] if "parametrizations." in name else name.rpartition(".")[0]
    return owner + "." if owner and not owner.endswith(".") else owner


def _transposed(match: Match, weight: fx.Node) -> fx.Node:
    """``weight`` with its last two dimensions swapped, as a view: F.linear swaps them back; the same product runs."""
    value = _value(match, weight)
    swap = (aten.permute.default, [1, 0]) if value.dim() == 2 else (aten.transpose.int, 1, 2)
    new = match.call(swap[0], weight, *swap[1:])
    set_info(new, NodeInfo(TensorType(value.dtype, tuple(value.transpose(-1, -2).shape)), info(match.node).path))
    return new


def _value(match: Match, constant: fx.Node) -> torch.Tensor:
    return fetch(match.gm, str(constant.target))


def _constant_matrix(match: Match) -> bool:
    return _is_constant(match, match["w"], 2) and _has_bias(match)


def _swapped_matrix(match: Match) -> bool:
    w = match["w"]
    swap = isinstance(w, fx.Node) and w.op == "call_function" and swaps_matrix(w)
    return swap and _is_constant(match, w.args[0], 2) and _has_bias(match)


def _constant_operand(match: Match) -> bool:
    operands = match["operands"]
    return len(operands) == 2 and any(_is_constant(match, operands[1], rank) for rank in (2, 3))


def _constant_parts(match: Match) -> bool:
    return all(isinstance(part, fx.Node) and part.op == "get_attr" for part in (match["v"], match["g"]))


def _has_bias(match: Match) -> bool:
    return "b" not in match.captured or _is_constant(match, match["b"], 1)


def _is_constant(match: Match, value: Any, rank: int) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and _value(match, value).dim() == rank


_x, _w, _b = Var("x"), Var("w"), Var("b")
RULES = (
    Rule(Call((aten.alias.default, aten.detach.default, aten.lift_fresh.default), _x), drop_noop),  # alias(x) -> x
    Rule(Call((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default), _x),
         drop_noop, where=_same_type),  # to(x: float32, float32) -> x
    Rule(Call((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), _x),
         drop_noop, where=_is_eval),  # dropout(x, p, train=False) -> x
    Rule(Call(aten.copy.default, Var("into"), _x), drop_copy),  # copy(into, x) -> x as large as into
    Rule(Call(aten.slice.Tensor, _x, Var("dim"), 0, _END, 1), drop_noop, where=_is_whole),  # x[:] -> x
    Rule(Call(aten.addmm.default, _b, _x, _w),
         linear_from_product, where=_constant_matrix),  # b + x W -> linear(x, W^T, b)
    Rule(Call((aten.mm.default, aten.matmul.default), _x, _w),
         linear_from_product, where=_constant_matrix),  # x W -> linear(x, W^T)
    Rule(Call(aten.addmm.default, _b, _x, _w),
         linear_from_swapped_product, where=_swapped_matrix),  # b + x W^T -> linear(x, W, b)
    Rule(Call((aten.mm.default, aten.matmul.default), _x, _w),
         linear_from_swapped_product, where=_swapped_matrix),  # x W^T -> linear(x, W)
    Rule(Call(aten.einsum.default, Var("equation"), Var("operands")),
         product_from_einsum, where=_constant_operand),  # einsum("bi,oi->bo", x, W) -> linear(x, W)
    Rule(Call(aten._weight_norm.default, Var("v"), Var("g")),
         fold_weight_norm, where=_constant_parts),  # _weight_norm(v, g) -> its value
)  # fmt: skip

NORMALIZE = Pass(
    "normalize", "one spelling: positional arguments, no operators without effect, products as linear", normalize
)
