"""quantize_attention: both operands of attention's products rounded, queries times keys and probabilities times values.

::

    scaled_dot_product_attention(q, k, v, mask)
 -> p = softmax(round(q) @ round(k)^T * scale + mask);  round(p) @ round(v)

and likewise ``matmul`` and ``bmm`` of two activations. Scales are one a tensor, from calibration data, or one a row,
found when the model runs (``token``; a row of v is a key's value). LLM-FP4 (2310.16836), section 5.1: BERT and ViT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxquant.calibrate import Statistics, walk
from fxquant.graph import NodeInfo, TensorType, info, set_info, tensor_type
from fxquant.layers import find_layers
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import insert_rounding
from fxquant.rewrite import Decline, Log, aten, replace
from fxquant.scheme import parse_spec

RULE = "quantize_attention"
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def quantize_attention(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``spec``, ``progress``, and ``calibration`` where the spec is static."""
    gm, log, spec = program.gm, Log(), parse_spec(settings.get("spec", "e4m3/tensor"))
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        if isinstance(done := spell_out(gm.graph, node), Decline):
            log.declined(RULE, node, f"{done.reason}; it stays in float")
    weights = {layer.node for layer in find_layers(gm)}
    products = [n for n in gm.graph.nodes if n.target in _PRODUCTS and n not in weights and _of_activations(n)]
    operands = [(n, at) for n in products for at in (0, 1)]
    absmax = _ranges(gm, operands, settings) if spec.static else {}
    for node, at in operands:
        x = node.args[at]
        assert isinstance(x, fx.Node)
        node.update_arg(at, insert_rounding(gm, node, x, spec, absmax.get((node, at)), info(node).path))
    for node in products:
        log.rewrote(RULE, node, f"both operands rounded to {spec}")
    return log


def _of_activations(node: fx.Node) -> bool:
    return all(isinstance(a, fx.Node) and a.op == "call_function" for a in node.args[:2])


def _ranges(
    gm: fx.GraphModule, operands: list[tuple[fx.Node, int]], settings: Mapping[str, Any]
) -> dict[tuple[fx.Node, int], Tensor]:
    """The largest magnitude of every operand, in all batches."""
    found, probes = dict[tuple[fx.Node, int], Tensor](), dict[fx.Node, tuple[fx.Node, int]]()
    for node, at in operands:  # the walk looks at first arguments of nodes: a view in front of each operand is one
        with gm.graph.inserting_before(node):
            probe = gm.graph.call_function(aten.alias.default, (node.args[at],))
        set_info(probe, info(node.args[at]))  # type: ignore[arg-type]
        probes[probe] = (node, at)

    def reached(probe: fx.Node, seen: Statistics) -> None:
        found[probes[probe]] = seen.largest

    walk(gm, settings["calibration"], list(probes), reached, progress=settings.get("progress", quiet), what=RULE)
    for probe in probes:
        gm.graph.erase_node(probe)
    return found


# --- attention as products --------------------------------------------------------------------------------------------
def spell_out(graph: fx.Graph, node: fx.Node) -> fx.Node | Decline:
    """Put ``softmax(q k^T * scale + mask) v`` in the place of ``scaled_dot_product_attention``."""
    q, k, v, mask, dropout, causal = (*node.args, None, 0.0, False)[:6] if len(node.args) < 6 else node.args[:6]
    if dropout:
        return Decline("it drops probabilities at random")
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    head, types = tensor_type(q).shape[-1], [tensor_type(n) for n in (q, k, v)]
    scale = node.kwargs.get("scale")
    if scale is None and not isinstance(head, int):
        return Decline("its head size is not fixed")
    factor = 1 / math.sqrt(head) if scale is None else float(scale)  # type: ignore[arg-type]
    build = _Builder(graph, node)
    if node.kwargs.get("enable_gqa"):
        want, have = types[0].shape[-3], types[1].shape[-3]
        if not isinstance(want, int) or not isinstance(have, int):
            return Decline("its number of heads is not fixed")
        k, v = (build.repeat(n, want // have, want) for n in (k, v))
    rank, keys = len(types[1].shape), tensor_type(k).shape[-2]
    swapped = TensorType(types[1].dtype, (*tensor_type(k).shape[:-2], types[1].shape[-1], keys))
    shape = TensorType(types[0].dtype, (*types[0].shape[:-1], keys))
    scores = build(aten.matmul.default, shape, q, build(aten.transpose.int, swapped, k, rank - 2, rank - 1))
    scores = build(aten.mul.Scalar, shape, scores, factor)
    if causal:
        lowest = build(aten.full_like.default, shape, scores, -math.inf)
        scores = build(aten.add.Tensor, shape, scores, build(aten.triu.default, shape, lowest, 1))
    if isinstance(mask, fx.Node):
        kind = tensor_type(mask)
        if str(kind.dtype) == "torch.bool":
            hidden = build(aten.logical_not.default, kind, mask)
            scores = build(aten.masked_fill.Scalar, shape, scores, hidden, -math.inf)
        else:
            scores = build(aten.add.Tensor, shape, scores, mask)
    p = build(aten._safe_softmax.default, shape, scores, -1)  # a query that sees no key gives 0, as before
    done = build(aten.matmul.default, tensor_type(node), p, v)
    replace(graph, node, done)
    return done


class _Builder:
    """New nodes in the place of one, with its module and source."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def __call__(self, target: Any, type: TensorType, *args: Any) -> fx.Node:
        about = info(self.node)
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args)
        set_info(made, NodeInfo(type, about.path, about.module, about.source))
        return made

    def repeat(self, x: fx.Node, times: int, heads: int) -> fx.Node:
        """Every head of ``[..., heads, n, d]`` repeated for the queries of its group."""
        kind = tensor_type(x)
        shape = TensorType(kind.dtype, (*kind.shape[:-3], heads, *kind.shape[-2:]))
        return x if times == 1 else self(aten.repeat_interleave.self_int, shape, x, times, len(kind.shape) - 3)


QUANTIZE_ATTENTION = Pass("quantize_attention", "round both operands of attention's products", quantize_attention)
