"""Rotary position embeddings (RoFormer, section 3.2.2) as one operator of onnxruntime's.

    y = x cos + [-x2, x1] sin, x = [x1, x2]        Slice Slice Neg Concat Mul Mul Add -> com.microsoft RotaryEmbedding

A decoder turns queries and keys of every layer by it, which is a third of the nodes that it runs. The operator takes
half of cos and sin, whose two halves have to be the same value by construction, and the same positions in every batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from fxquant.codegen.onnx_builder import Builder, T, dims, rank
from fxquant.codegen.onnx_standard import MICROSOFT


def fused(b: Builder, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """``nodes`` with every such sum as one node, under its name; what only the sum read stays, for others to drop."""
    found: list[ir.Node] = []
    for node in nodes:
        b.nodes = found  # new nodes are wanted here
        if (parts := _parts(node)) is not None:
            node = _rotary(b, node, *parts)
        found.append(node)
    return found


def _rotary(b: Builder, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Node:
    out = node.outputs[0]
    inputs = [x, b.const([0]), _half(b, cos), _half(b, sin)]
    new = ir.node("RotaryEmbedding", inputs, {"interleaved": 0}, domain=MICROSOFT, name=node.name,
                  outputs=[ir.Value(name=out.name, type=out.type, shape=out.shape)])  # fmt: skip
    new.metadata_props.update(node.metadata_props)
    new.doc_string = node.doc_string
    ir.convenience.replace_all_uses_with(out, new.outputs[0])
    for i in range(len(node.inputs)):  # so that what only the sum read is not used any more
        node.replace_input_with(i, None)
    return new


def _half(b: Builder, value: ir.Value) -> ir.Value:
    """The first half of ``[1, s, d]`` as ``[s, d / 2]``, once for each value."""
    key = ("rotary", id(value))
    if key not in b.memo:
        _, s, d = dims(value)
        half = b.op("Slice", value, b.const([0]), b.const([int(d) // 2]), b.axes(2), dtype=value.dtype,
                    shape=[1, s, int(d) // 2])  # fmt: skip
        b.memo[key] = b.op("Squeeze", half, b.axes(0), dtype=value.dtype, shape=[s, int(d) // 2])
        b.memo["rotary of", id(value)] = value  # its id stays taken
    return b.memo[key]


def _parts(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin of a sum that is such an embedding; None of any other node."""
    if node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    plain, turned = (_of(v, "Mul") for v in node.inputs)
    if plain is None or turned is None:
        return None
    for first, second in ((plain, turned), (turned, plain)):
        x = first.inputs[0]
        cos, sin = _table(first.inputs[1]), _table(second.inputs[1])
        if x is not None and cos is not None and sin is not None and _fits(x, cos, sin) and _is_turned(second, x):
            return x, cos, sin
    return None


def _fits(x: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    width = dims(x)[-1] if rank(x) == 4 else None
    return isinstance(width, int) and width % 2 == 0 and x.dtype in (T.FLOAT, T.FLOAT16) and all(
        v.dtype == x.dtype and dims(v)[0] == 1 and dims(v)[1:] == (dims(x)[2], width) for v in (cos, sin)
    )  # fmt: skip


def _is_turned(node: ir.Node, x: ir.Value) -> bool:
    """Whether the first factor is ``[-x2, x1]``."""
    both, half = _of(node.inputs[0], "Concat"), int(dims(x)[-1]) // 2
    if both is None or len(both.inputs) != 2 or both.attributes.get_int("axis", 0) not in (-1, 3):
        return False
    minus = _of(both.inputs[0], "Neg")
    return minus is not None and _slice(minus.inputs[0], x) == (half, 2 * half) and _slice(
        both.inputs[1], x
    ) == (0, half)  # fmt: skip


def _slice(value: ir.Value | None, x: ir.Value) -> tuple[int, int] | None:
    """Begin and end of the part of the last dimension of x that ``value`` is."""
    node = _of(value, "Slice")
    if node is None or node.inputs[0] is not x:
        return None
    begin, end, axis, *step = (_number(v) for v in node.inputs[1:])
    if begin is None or end is None or axis not in (-1, 3) or step not in ([], [1]):
        return None
    return int(begin), min(int(end), int(dims(x)[-1]))


def _table(value: ir.Value | None) -> ir.Value | None:
    """``v [1, s, d]`` of ``Unsqueeze(v, 1)``, if its halves along d are the same value; else None."""
    node = _of(value, "Unsqueeze")
    if node is None or node.inputs[0] is None or _number(node.inputs[1]) != 1 or rank(node.inputs[0]) != 3:
        return None
    at: ir.Node | None = node.inputs[0].producer()
    while at is not None and at.op_type in ("Mul", "Cos", "Sin", "Cast"):
        if at.op_type == "Mul" and _number(at.inputs[1]) is None:
            return None
        at = None if at.inputs[0] is None else at.inputs[0].producer()
    same = at is not None and at.op_type == "Concat" and len(at.inputs) == 2 and at.inputs[0] is at.inputs[1]
    return node.inputs[0] if same and at is not None and at.attributes.get_int("axis", 0) in (-1, 2) else None


def _of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of that type that gives ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _number(value: ir.Value | None) -> int | float | None:
    """The one number of a Constant."""
    node = _of(value, "Constant")
    if node is None or "value" not in node.attributes:
        return None
    array = np.asarray(node.attributes["value"].as_tensor().numpy())
    return array.item() if array.size == 1 else None
