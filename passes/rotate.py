"""rotate: inputs and weights of linears turned by blocks of a Hadamard matrix, so that outliers spread out.

``linear(x, W)`` -> ``linear(x R, W R)``, block by block of ``size`` channels. W R is computed here. x R is folded into
the linear that produces x where there is one (v -> o through attention), else the graph computes it, once for all
readers of x: ``flatten(matmul(unflatten(x, [K / size, size]), R))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.choice import taken_linears
from fxquant.graph import NodeInfo, TensorType, info, set_info, tensor_type
from fxquant.layers import Layer
from fxquant.producers import Fold, columns_of, mix_constant, plan_fold
from fxquant.program import Pass, Program
from fxquant.rewrite import Log, aten, attach, free_name, get_attr
from fxquant.solvers.rotate import block_size, hadamard

RULE = "rotate"
LARGEST = 128
"""The largest block where no size is given."""


def rotate(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``rules``, ``size`` (a power of two, or None), ``seed``."""
    gm, log = program.gm, Log()
    names: dict[tuple[int, torch.dtype], str] = {}
    for x, readers in taken_linears(gm, settings["rules"]).items():
        channels = readers[0].weight.shape[0 if readers[0].transposed else 1]
        size = settings.get("size") or block_size(channels, limit=LARGEST)
        if size < 2 or channels % size:
            for layer in readers:
                log.declined(RULE, layer.node, _no_blocks(channels, settings.get("size")))
            continue
        rotation = hadamard(size, seed=settings.get("seed", 0))
        fold = plan_fold(gm, x, readers={layer.node for layer in readers})
        if folded := isinstance(fold, Fold) and fold.can_mix(size):
            assert isinstance(fold, Fold)
            fold.mix(rotation)
        else:
            _rotate_online(gm, x, readers, rotation, names)
        for layer in readers:
            mix_constant(gm, columns_of(layer), rotation, torch.arange(channels).reshape(-1, size))
            where = "in the weight that produces it" if folded else "when the model runs"
            log.rewrote(RULE, layer.node, f"blocks of {size}, its input {where}")
    return log


def _no_blocks(channels: int, size: int | None) -> str:
    if size is None:
        return f"its input has {channels} channels, which no power of two above 1 divides"
    return f"its input has {channels} channels, no multiple of {size}; choose a smaller size, or leave it out"


def _rotate_online(
    gm: fx.GraphModule, x: fx.Node, readers: list[Layer], rotation: Tensor, names: dict[tuple[int, torch.dtype], str]
) -> None:
    """Give ``readers`` the rotated x. Rotations of one size and dtype are one constant."""
    graph, (kind, size) = gm.graph, (tensor_type(x), len(rotation))
    value = rotation.to(kind.dtype)
    key = size, kind.dtype
    if key not in names:
        names[key] = free_name(gm, f"rotation_{size}")
        attach(gm, names[key], value)
    channels = kind.shape[-1]
    assert isinstance(channels, int)
    blocks = TensorType(kind.dtype, (*kind.shape[:-1], channels // size, size))
    with graph.inserting_before(readers[0].node):
        matrix = get_attr(graph, names[key], value)
        split = graph.call_function(aten.unflatten.int, (x, -1, [channels // size, size]))
        turned = graph.call_function(aten.matmul.default, (split, matrix))
        whole = graph.call_function(aten.flatten.using_ints, (turned, -2, -1))
    for node, made in ((split, blocks), (turned, blocks), (whole, kind)):
        set_info(node, NodeInfo(made, info(readers[0].node).path))
    for layer in readers:
        layer.node.args = (whole, *layer.node.args[1:])


ROTATE = Pass("rotate", "turn inputs and weights by blocks of a Hadamard matrix", rotate)
