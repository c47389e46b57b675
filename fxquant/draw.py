"""Inputs that are made up: tokens and numbers drawn, seeded, for the sizes that a program allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.dims import evaluate
from fxquant.graph import TensorType, info
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.rewrite import aten
from fxquant.signature import Input

SIZES = ((2, 16), (1, 1), (3, 37), (1, 64), (4, 8), (2, 2), (8, 128))
"""Sizes that are tried for the first dynamic dimension and for the others; three that fit are given, or any one."""
_RUNS, _LONGEST = 3, 4096
Call = tuple[Sequence[Any], Mapping[str, Any]]


def made_up(program: Program, *, seed: int = 0) -> Iterator[Call]:
    """Up to three calls at different dynamic sizes that the signature allows."""
    signature = program.signature
    dims = [d for item in signature.inputs for d in item.type.shape if isinstance(d, str) and d.isidentifier()]
    names, placeholders = list(dict.fromkeys(dims)), program.gm.graph.find_nodes(op="placeholder")
    runs, seen = 0, set[tuple[int, ...]]()
    for pair in chain(SIZES, ((2, size) for size in range(1, _LONGEST) if not runs)):
        sizes = {name: pair[min(i, 1)] for i, name in enumerate(names)}
        if pair == (1, 1):  # the first call of a decoder: no past yet
            sizes |= {item.empty: 0 for item in signature.inputs if item.empty}
        if runs == _RUNS or tuple(sizes.values()) in seen or signature.broken(sizes) is not None:
            continue
        seen.add(tuple(sizes.values()))
        try:
            pairs = zip(signature.inputs, placeholders, strict=True)
            call = {item.name: _values(item, node, sizes, seed) for item, node in pairs}
            signature.bind((), call)
        except ValueError:  # a size that another one does not go with; InputError is one too
            continue
        runs += 1
        yield (), call


def _values(item: Input, node: fx.Node, sizes: Mapping[str, int], seed: int) -> Tensor:
    """Numbers for one input: token ids below the rows of the table that they are looked up in, masks of ones."""
    shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in item.type.shape]
    generator = torch.Generator().manual_seed(seed + sum(shape) + len(item.name))
    if item.type.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(item.type.dtype)
    if item.type.dtype == torch.bool or "mask" in item.name:
        return torch.ones(shape, dtype=item.type.dtype)
    if "position" in item.name and shape:
        return torch.arange(shape[-1], dtype=item.type.dtype).expand(shape).contiguous()
    return torch.randint(0, _rows(node) or 2, shape, generator=generator).to(item.type.dtype)


def _rows(node: fx.Node, depth: int = 6) -> int | None:
    """Rows of the table that ``node`` is an index into, through views and casts."""
    for user in node.users:
        table = {aten.embedding.default: 0, ops.embedding_wq.default: 1}.get(user.target)
        if table is not None and user.args[1 - table] is node:
            found = info(user.args[table]).type  # type: ignore[arg-type]
            if isinstance(found, TensorType) and isinstance(found.shape[0], int):
                return found.shape[0]
        if depth and user.args and user.args[0] is node and (rows := _rows(user, depth - 1)):
            return rows
    return None
