"""Tensors that are read when they are needed: of a file, or computed from such, and forgotten again.

A ``Lazy`` tensor has a shape, a dtype and a recipe. Operators that only look elsewhere or convert (views, casts,
copies, joins) give another Lazy; every other operator reads it first, so that whatever takes a tensor takes a Lazy.
Each reading computes anew: who needs the values several times calls ``real`` once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxquant.direct import Opened
from fxquant.errors import LoadError

aten: Any = torch.ops.aten


class Recipe(Protocol):
    """How the values come about. Recipes pickle, so that a task in another process can read what it is given."""

    def read(self) -> Tensor: ...


class Lazy(Tensor):
    """A tensor of ``recipe``'s values, on the CPU; ``like`` (on the meta device) has its shape, strides and dtype."""

    recipe: Recipe
    like: Tensor

    @staticmethod
    def __new__(cls, recipe: Recipe, like: Tensor) -> Lazy:
        made: Lazy = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.recipe, made.like = recipe, like
        return made

    def read(self) -> Tensor:
        """The values, as a tensor of memory or of a mapped file."""
        return self.recipe.read()

    @property
    def has_rows(self) -> bool:
        """Whether ``read_rows`` takes no more than the rows themselves: a part of a file, or a cast of one."""
        inner = _cast_of(self)
        return isinstance(self.recipe, FromFile) if inner is None else inner.has_rows

    def read_rows(self, start: int, stop: int) -> Tensor:
        """``read()[start:stop]``; where the values are a cast of others, only of these rows."""
        recipe = self.recipe
        if (inner := _cast_of(self)) is not None:
            return inner.read_rows(start, stop).to(self.dtype)
        return recipe.read_rows(start, stop) if isinstance(recipe, FromFile) else recipe.read()[start:stop]

    @property
    def source(self) -> object:
        """What the values are read from: equal for two tensors that see the same values, as views of them or not."""
        recipe = self.recipe
        if isinstance(recipe, Computed) and len(recipe.lazies) == 1:
            return recipe.lazies[0].source
        return recipe

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        if func in _SAME:
            return Lazy(args[0].recipe, args[0].like)
        if func in _LATER and kwargs.get("device") in (None, torch.device("cpu")):
            return _computed(func, tuple(args), kwargs)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a tensor that is read from a file; put another in its place")
        args, kwargs = tree_map(real, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Lazy({list(self.shape)}, {self.dtype}, {self.recipe})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Lazy, (self.recipe, self.like)

    def __deepcopy__(self, memo: Any) -> Lazy:
        return self


def real(value: Any) -> Any:
    """A Lazy tensor's values; anything else as it is."""
    return value.read() if isinstance(value, Lazy) else value


def as_stored(value: Lazy) -> Lazy:
    """The values before they are made float32, where they are float16 or bfloat16 until then: half the bytes, the same
    numbers."""
    inner = _cast_of(value)
    exact = inner is not None and value.dtype == torch.float32 and inner.dtype in (torch.float16, torch.bfloat16)
    return inner if inner is not None and exact else value


def _cast_of(value: Lazy) -> Lazy | None:
    """The tensor that ``value`` is a cast of, None where it is something else."""
    recipe = value.recipe
    inner = recipe.args[0] if isinstance(recipe, Computed) and recipe.operator == _CAST else None
    return inner if isinstance(inner, Lazy) else None


_CAST = "aten::_to_copy"
_SAME = {aten.detach.default, aten.alias.default}
_LATER = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default,
    aten.t.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten._to_copy.default, aten.clone.default, aten.cat.default, aten.stack.default, aten.expand.default,
}  # fmt: skip
"""Operators whose results are Lazy tensors again."""


@dataclass(frozen=True, eq=False)
class Computed:
    """The result of an operator, by its name and overload; ``item`` of several."""

    operator: str
    overload: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None

    @property
    def lazies(self) -> list[Lazy]:
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Lazy)]

    def read(self) -> Tensor:
        namespace, _, name = self.operator.partition("::")
        function = getattr(getattr(getattr(torch.ops, namespace), name), self.overload)
        args, kwargs = tree_map(real, (self.args, dict(self.kwargs)))
        found = function(*args, **kwargs)
        return found if self.item is None else found[self.item]  # type: ignore[no-any-return]


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def shape_of(value: Any) -> Any:
        return value.like if isinstance(value, Lazy) else value.to("meta") if isinstance(value, Tensor) else value

    meta_args, meta_kwargs = tree_map(shape_of, (args, {k: v for k, v in kwargs.items() if k != "device"}))
    like = func(*meta_args, **meta_kwargs)
    name, overload = func._schema.name, func._overloadname
    if isinstance(like, Tensor):
        return Lazy(Computed(name, overload, args, kwargs), like)
    return [Lazy(Computed(name, overload, args, kwargs, i), one) for i, one in enumerate(like)]


# --- files ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FromFile:
    """``shape`` values of ``dtype`` that lie in a file from byte ``begin`` on."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """A view of the mapped file. Raises LoadError where the file is shorter than it was."""
        try:
            raw = _mapped(self.path, self._version())
        except (OSError, RuntimeError) as error:
            raise self._gone(error) from error
        part = raw[self.begin : self.begin + self.nbytes]
        if part.numel() < self.nbytes:
            raise LoadError(f"{self.path} is shorter than it was when its header was read; fetch it again")
        if (part.data_ptr() % self.dtype.itemsize) or not self.nbytes:
            part = part.clone()
        return part.view(self.dtype).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """``read()[start:stop]`` in memory of its own: cheaper than to map what is read once, and the system need not
        keep it."""
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            raw = _opened(self.path, self._version()).read(self.begin + start * each, each * (stop - start))
        except OSError as error:
            raise self._gone(error) from error
        raw = raw if raw.data_ptr() % self.dtype.itemsize == 0 else raw.clone()
        return raw.view(self.dtype).view(stop - start, *self.shape[1:])

    def _version(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _gone(self, error: Exception) -> LoadError:
        return LoadError(f"{self.path} cannot be read any more: {error}; fetch it again")

    def lazy(self) -> Lazy:
        return Lazy(self, torch.empty(self.shape, dtype=self.dtype, device="meta"))


@lru_cache(maxsize=256)
def _opened(path: Path, version: tuple[int, int, int]) -> Opened:
    return Opened(path)


@lru_cache(maxsize=256)
def _mapped(path: Path, version: tuple[int, int, int]) -> Tensor:
    """The bytes of a file, mapped, as long as it is that ``version`` of it; writing to them does not reach it."""
    return torch.from_file(str(path), shared=False, size=version[1], dtype=torch.uint8)


# --- functions --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Called:
    """What a module's function returns for ``args``."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]

    def read(self) -> Tensor:
        return self.function(*tree_map(real, self.args))


def later(function: Callable[..., Tensor], *args: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``function(*args)``, a Lazy tensor of that shape and dtype where an argument is one."""
    if not any(isinstance(leaf, Lazy) for leaf in tree_leaves(args)):
        return function(*args)
    return Lazy(Called(function, args), torch.empty(tuple(shape), dtype=dtype, device="meta"))
