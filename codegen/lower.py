"""lower: layers in QDQ form to operators on packed codes.

A row of ``LOWERING`` matches a layer on a dequantized weight and puts the packed operator in its place. What no row
matches keeps its float operator and reads its weight through ``dequantize_packed``: it still runs on packed bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import packing
from fxquant.graph import info, update_info
from fxquant.lazy import later
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program
from fxquant.qtensor import store_scale
from fxquant.rewrite import (
    Call,
    Decline,
    Log,
    Match,
    Rule,
    Var,
    apply_rules,
    aten,
    attach,
    detach,
    fetch,
    free_name,
    get_attr,
)  # fmt: skip
from fxquant.scheme import parse_spec


def lower(program: Program, settings: Mapping[str, Any]) -> Log:
    gm = program.gm
    for node in gm.graph.find_nodes(op="call_function", target=ops.dequantize.default):
        pack_weight(gm, node)
    log = apply_rules(gm, LOWERING)
    apply_rules(gm, REMAINDER, log=log)
    return log


def pack_weight(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replace the codes and scales that a ``dequantize`` node reads by their stored form; a rule then lowers it."""
    codes_node, spec = node.args[0], parse_spec(str(node.args[3]))
    assert isinstance(codes_node, fx.Node)
    name = str(codes_node.target).removesuffix("_codes") + "_packed"
    codes, layout = fetch(gm, str(codes_node.target)), packing.planar(spec.format.bits)
    shape = packing.packed_shape((codes.shape[0], codes.shape[1]), layout)
    packed = later(packing.pack, codes, layout, shape=shape, dtype=torch.uint8)
    _exchange(gm, codes_node, name, packed)
    scale_node = node.args[1]
    assert isinstance(scale_node, fx.Node)
    scale = fetch(gm, str(scale_node.target))
    if spec.kind.format is not None and scale.dtype != torch.uint8:
        stored = later(store_scale, scale, spec, shape=scale.shape, dtype=torch.uint8)
        _exchange(gm, scale_node, f"{scale_node.target}_codes", stored)


def _exchange(gm: fx.GraphModule, old: fx.Node, name: str, value: Tensor) -> None:
    """Put the constant ``value`` in the place of the constant that ``old`` reads."""
    name = free_name(gm, name)
    attach(gm, name, value)
    detach(gm, str(old.target))
    with gm.graph.inserting_before(old):
        new = get_attr(gm.graph, name, value)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def _weight(match: Match) -> tuple[Any, ...]:
    return match["packed"], match["scale"], match["zp"]


def lower_linear(match: Match) -> fx.Node | Decline:
    return _lowered(
        match, ops.linear_wq.default, match["x"], *_weight(match), match["bias"], match["spec"], match["shape"]
    )


def lower_conv2d(match: Match) -> fx.Node | Decline:
    window = [_pair(match[k]) for k in ("stride", "padding", "dilation")]
    return _lowered(
        match, ops.conv2d_wq.default, match["x"], *_weight(match), match["bias"], match["spec"], match["shape"],
        *window, match["groups"],
    )  # fmt: skip


def lower_embedding(match: Match) -> fx.Node | Decline:
    return _lowered(
        match, ops.embedding_wq.default, match["indices"], *_weight(match), match["spec"], match["shape"],
        **_options(match, "dtype"),
    )  # fmt: skip


def _pair(value: Any) -> list[int]:
    return list(value) * 2 if len(value) == 1 else list(value)


def _dequantize(match: Match) -> fx.Node:
    """The dequantize node that the packed operator absorbs."""
    return next(a for a in match.node.args if isinstance(a, fx.Node) and a.target is ops.dequantize.default)


def _options(match: Match, *names: str) -> dict[str, Any]:
    """Those keyword arguments of the dequantize node."""
    return {k: v for k, v in _dequantize(match).kwargs.items() if k in names}


def _lowered(match: Match, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """The packed operator, carrying the WeightQuant of the weight it absorbs."""
    new = match.call(target, *args, **kwargs, **_options(match, "tensor_scale", "exponent_bias"))
    update_info(new, weight=info(_dequantize(match)).weight)
    return new


def read_packed(match: Match) -> fx.Node | Decline:
    """A consumer without a packed operator of its own: it reads the weight decoded."""
    return match.call(
        ops.dequantize_packed.default, *_weight(match), match["spec"], match["shape"], **match.node.kwargs
    )


_DQ = Call(ops.dequantize.default, Var("packed"), Var("scale"), Var("zp"), Var("spec"), Var("shape"))
LOWERING = (
    Rule(Call(aten.linear.default, Var("x"), _DQ, Var("bias")),
         lower_linear),  # linear(x, dq(w), b) -> linear_wq(x, w, b)
    Rule(Call(aten.conv2d.default, Var("x"), _DQ, Var("bias"), *map(Var, ("stride", "padding", "dilation", "groups"))),
         lower_conv2d),  # conv2d(x, dq(w), b, ...) -> conv2d_wq(x, w, b, ...)
    Rule(Call(aten.embedding.default, _DQ, Var("indices")),
         lower_embedding),  # embedding(dq(w), i) -> embedding_wq(i, w)
)  # fmt: skip
REMAINDER = (Rule(_DQ, read_packed),)  # op(dq(w)) -> op(dequantize_packed(w))

LOWER = Pass("lower", "layers in QDQ form to operators on packed codes", lower)
