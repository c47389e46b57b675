"""What an exported file says of itself to people who open it in a viewer: names and doc strings.

Nodes are called by their module's path and the name of the graph's node, ``model.layers.0.mlp.up_proj/linear_5``; what
one operator of the graph becomes shares both, ``.../silu.1`` before ``.../silu``. Values keep the short names.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from torch import fx

from fxquant.graph import info
from fxquant.ops import ROUNDINGS
from fxquant.program import target_name
from fxquant.qdq import rounding_spec

FUNCTIONS = {
    "Linear": "x @ W^T. W = value of each code * scale; packed holds the codes as planar bytes, cols of them a row, "
    "group_size of them a scale.",
    "LinearBias": "x @ W^T + bias. W = value of each code * scale; packed holds the codes as planar bytes, cols of "
    "them a row, group_size of them a scale.",
    "Conv2d": "The convolution of x with W of shape weight_shape. W = value of each code * scale; packed holds the "
    "codes as planar bytes.",
    "Embedding": "Rows of W, decoded only where they are asked for. W = value of each code * scale; packed holds the "
    "codes as planar bytes.",
    "Dequantize": "W of shape weight_shape: value of each code * scale; packed holds the codes as planar bytes.",
    "DequantizeCodes": "W of shape weight_shape: value of each code * scale, the codes one a byte.",
    "FakeQuantizeDynamic": "x rounded to the format, with a scale found for each row: largest magnitude / largest "
    "value of the format.",
    "FakeQuantize": "x rounded to the format under one scale.",
    "FakeQuantizeEach": "x rounded to the format under scales that broadcast over it.",
}
"""What each kind of operator of our own domain computes."""


def function_doc(kind: str, format: str) -> str:
    """The doc string of an operator's function."""
    return f"fxquant, format {format}: {FUNCTIONS[kind]}"


def name_nodes(node: fx.Node, made: Iterable[ir.Node]) -> None:
    """Names, layer and doc string for the ONNX nodes that a node of the graph became, constants aside."""
    about, told = info(node), node_doc(node)
    for item in made:
        if item.op_type == "Constant":
            continue
        if about.path:
            item.name = f"{about.path}/{item.name}"
            item.metadata_props["layer"] = about.path
        item.doc_string = told


def node_doc(node: fx.Node) -> str:
    """``aten.linear, Linear at model.py:12, weight e3m2/channel (rtn, error 3.92%, 1,327,104 bytes)``."""
    about, parts = info(node), [target_name(node.target)]
    if about.module or about.source:
        parts.append(" at ".join(filter(None, (about.module, about.source))))
    if (quant := about.weight) is not None:
        parts.append(f"weight {quant.spec} ({quant.method}, error {quant.error:.2%}, {quant.nbytes:,} bytes)")
    if node.target in ROUNDINGS:
        parts.append(f"rounded to {rounding_spec(node)}")
    return ", ".join(parts)
