"""Rounding that is put off: the codes of a weight that is not read yet, made when they are written or asked for.

``quantize_later`` gives what ``quantize_tensor`` does, in Lazy tensors. Nothing is kept but the last weight that was
rounded, so a graph of them takes no memory however large its weights are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxquant.lazy import Called, Lazy, as_stored
from fxquant.qtensor import QuantizedTensor, check_kind, quantize_tensor, to_matrix
from fxquant.scheme import PerChannel, QuantSpec


@dataclass(frozen=True, eq=False)
class Rounding:
    """``quantize_tensor(weight, spec, channel_dims, name)``, of a weight that is read when its codes are needed."""

    weight: Lazy
    spec: QuantSpec
    channel_dims: int = 1
    name: str = "tensor"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix."""
        rows, cols = to_matrix(self.weight.like, self.spec, self.channel_dims).shape
        return rows, cols

    def quantized(self) -> QuantizedTensor:
        return _rounded(self)

    def in_rows(self, elements: int) -> Iterator[tuple[slice, Tensor, QuantizedTensor]]:
        """The float weight, as it is stored or wider, and what it is rounded to, rows ``[rows, cols]`` of about
        ``elements`` values at a time.

        Where a scale is of more than some rows, or rows cannot be read alone, it is the whole matrix at once.
        """
        rows, cols = self.shape
        step = self.spec.block(rows, cols)[0]
        alone = self.weight.has_rows and self.weight.dim() == 2 and self.channel_dims == 1
        along = isinstance(self.spec.granularity, PerChannel) and self.spec.granularity.axis
        if not alone or along or step >= rows or self.spec.kind.outer == "tensor":
            x = self.weight.read()
            q = quantize_tensor(x, self.spec, channel_dims=self.channel_dims, name=self.name)
            yield slice(0, rows), to_matrix(x, self.spec, self.channel_dims), q
            return
        step *= max(1, elements // (step * cols))
        exact = as_stored(self.weight)
        for start in range(0, rows, step):
            x = exact.read_rows(start, min(start + step, rows))
            yield slice(start, start + len(x)), x, quantize_tensor(x, self.spec, name=self.name)


@lru_cache(maxsize=1)
def _rounded(rounding: Rounding) -> QuantizedTensor:
    return quantize_tensor(
        rounding.weight.read(), rounding.spec, channel_dims=rounding.channel_dims, name=rounding.name
    )


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of what a weight is rounded to: ``codes``, ``scale``, ``zero_point`` or ``tensor_scale``."""

    of: Rounding
    name: str

    def read(self) -> Tensor:
        return self.taken(self.of.quantized())

    def taken(self, q: QuantizedTensor) -> Tensor:
        found = getattr(q, self.name)
        assert isinstance(found, Tensor)
        return found


def quantize_later(weight: Lazy, spec: QuantSpec, *, channel_dims: int = 1, name: str = "tensor") -> QuantizedTensor:
    """``quantize_tensor`` of a weight that is not read yet: codes and scales are Lazy, and made when they are read."""
    check_kind(weight, name)
    rounding = Rounding(weight, spec, channel_dims, name)
    rows, cols = to_matrix(weight.like, spec, channel_dims).shape
    outer, scales = spec.outer_shape(rows), spec.scale_shape(rows, cols)

    def part(part_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
        return Lazy(Part(rounding, part_name), torch.empty(shape, dtype=dtype, device="meta"))

    return QuantizedTensor(
        part("codes", (rows, cols), torch.uint8), part("scale", scales, spec.scale_dtype),
        part("zero_point", scales, torch.uint8) if spec.has_zero_point else None, spec, tuple(weight.shape),
        None if outer is None else part("tensor_scale", outer, torch.float32),
    )  # fmt: skip


def part_of(value: Tensor) -> Part | None:
    """The part of a rounded weight that a Lazy tensor is, or is made of."""
    recipe = value.recipe if isinstance(value, Lazy) else None
    if isinstance(recipe, Called) and isinstance(recipe.args[0], Lazy):
        return part_of(recipe.args[0])
    return recipe if isinstance(recipe, Part) else None


def taken_from(value: Lazy, q: QuantizedTensor) -> Tensor:
    """What ``value``, of which ``part_of`` says that it is made of a rounded weight, is for these rows ``q`` of it."""
    recipe = value.recipe
    if isinstance(recipe, Called):
        return recipe.function(taken_from(recipe.args[0], q), *recipe.args[1:])
    assert isinstance(recipe, Part)
    return recipe.taken(q)
