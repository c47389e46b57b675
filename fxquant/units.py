"""Units: the tensors of a packed model that are made together, each read, rounded and packed some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxquant.deferred import Rounding, part_of, taken_from
from fxquant.lazy import Called, Computed, FromFile, Lazy
from fxquant.observe import Seen, sampled_rows, see
from fxquant.qtensor import error_squares, relative_error
from fxquant.scales import Scales

ELEMENTS = 1 << 22
"""Values of a weight that are in memory at a time."""
Put = Callable[[str, Tensor, int], None]
"""Takes the values of a tensor, by its name, from some row on."""


@dataclass(frozen=True)
class Unit:
    """Tensors of the new file that are made together: the parts of one rounded weight, which ``layer``
    is the first to read, or a tensor by itself."""

    name: str
    tensors: Mapping[str, Tensor]
    rounding: Rounding | None = None
    layer: str = ""


def sources_of(value: Any) -> Iterator[FromFile]:
    """The parts of files that a Lazy tensor is made of."""
    recipe = value.recipe if isinstance(value, Lazy) else None
    if isinstance(recipe, FromFile):
        yield recipe
    elif isinstance(recipe, (Computed, Called)):
        kwargs = dict(recipe.kwargs) if isinstance(recipe, Computed) else {}
        for leaf in tree_leaves((recipe.args, kwargs)):
            yield from sources_of(leaf)


def units_of(tensors: Mapping[str, Tensor], layers: Mapping[str, str]) -> list[Unit]:
    """The units of a packed graph's tensors, in the order in which the graph reads them. ``layers``: the first layer
    that reads each rounded weight."""
    groups: dict[object, dict[str, Tensor]] = {}
    roundings: dict[object, Rounding] = {}
    for name, value in tensors.items():
        part = part_of(value)
        key: object = name if part is None else part.of
        groups.setdefault(key, {})[name] = value
        if part is not None:
            roundings[key] = part.of
    units = []
    for key, group in groups.items():
        name = roundings[key].name if key in roundings else next(iter(group))
        units.append(Unit(name, group, roundings.get(key), layers.get(name, name)))
    return units


def pack_unit(unit: Unit, put: Put) -> tuple[float, Seen] | None:
    """``put`` the values of every tensor of ``unit``; a rounded weight's relative error, and what was seen of it."""
    if unit.rounding is None:
        for name, value in unit.tensors.items():
            _copy(name, value, put)
        return None
    return _round(unit, unit.rounding, put)


def _copy(name: str, value: Tensor, put: Put) -> None:
    rows = value.shape[0] if value.dim() else 1
    step = max(1, ELEMENTS * rows // max(value.numel(), 1))
    if not isinstance(value, Lazy):
        put(name, value, 0)
    elif value.has_rows and value.dim():
        for start in range(0, rows, step):
            put(name, value.read_rows(start, min(start + step, rows)), start)
    else:
        put(name, value.read(), 0)


def _round(unit: Unit, rounding: Rounding, put: Put) -> tuple[float, Seen]:
    at = dict.fromkeys(unit.tensors, 0)
    squares = list[Tensor]()
    sampled, scales = list[tuple[Tensor, Tensor]](), list[Scales]()
    rows, cols = 0, 0
    wanted = sampled_rows(*rounding.shape)
    for where, x, q in rounding.in_rows(ELEMENTS):
        q.check()
        for name, value in unit.tensors.items():
            assert isinstance(value, Lazy)
            part = taken_from(value, q)
            put(name, part, at[name])
            at[name] += len(part)
        squares.append(error_squares(x, q))
        some = wanted[(wanted >= where.start) & (wanted < where.stop)] - where.start
        if len(some):
            sampled.append((x[some].float(), q.rows(some).dequantize()))
        scales.append(q.scales)
        rows, cols = where.stop, x.shape[1]
    error = relative_error(torch.cat(squares))
    W, got = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    return error, see(unit.layer, W, got, _joined(scales), rounding.spec, (rows, cols))


def _joined(parts: Sequence[Scales]) -> Scales:
    """The scales of a whole matrix from those of its rows."""
    if len(parts) == 1:
        return parts[0]
    zero = [p.zero_point for p in parts if p.zero_point is not None]
    outer = [p.tensor_scale for p in parts if p.tensor_scale is not None]
    return Scales(
        torch.cat([p.scale for p in parts]), torch.cat(zero) if zero else None, torch.cat(outer) if outer else None
    )
