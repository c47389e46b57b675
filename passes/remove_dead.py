"""remove_dead: drop nodes nobody uses and tensors no node reads.

The float weight of a layer in QDQ form is kept: later passes refine its codes. Once the layer is lowered, it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program
from fxquant.rewrite import Log, Rewrite, detach, get_attrs, remove_unused, tensors


def remove_dead(program: Program, settings: Mapping[str, Any]) -> Log:
    gm = program.gm
    names = remove_unused(gm.graph)
    used = {str(node.target) for node in get_attrs(gm.graph)}
    for node in gm.graph.nodes:
        if node.target is ops.dequantize.default and (weight := info(node).weight):
            used.add(weight.weight)
    dead = [name for name in tensors(gm) if name not in used]
    for name in dead:
        detach(gm, name)
    rewrites = [Rewrite("remove_node", name, "") for name in names]
    rewrites += [Rewrite("remove_tensor", name, name.rpartition(".")[0]) for name in dead]
    return Log(rewrites)


REMOVE_DEAD = Pass("remove_dead", "drop unused nodes and tensors", remove_dead)
