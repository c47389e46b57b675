"""How a captured program is called: named tensor inputs, fixed values, and the structure of its output.

Inside, a graph takes a flat list of tensors and returns a flat tuple. ``Signature`` is what stands between that and the
model's own call: it binds positional and keyword arguments to inputs, checks them, and puts the outputs back together.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.dims import condition_names, evaluate, holds
from fxquant.errors import InputError
from fxquant.graph import TensorType, dtype_name

Structure = dict[str, Any] | int | None
"""A leaf is the index of a flat output; ``{"kind": "dict" | "list" | "tuple", "keys": [...], "items": [...]}``."""


@dataclass(frozen=True)
class Input:
    """A tensor input: its name and its type, symbolic where a size may vary.

    ``empty`` names the dimension that is 0 where the input is left out; inputs without one must be given.
    """

    name: str
    type: TensorType
    empty: str = ""


@dataclass(frozen=True)
class Signature:
    """Names and types of the inputs, values that were fixed at capture, and the output's structure.

    ``out_spec`` is the pytree spec that rebuilds the model's own output type; a loaded program has none and returns
    dicts, lists and tuples. ``parameters`` are the names that positional arguments bind to, in order; a last
    ``*args`` takes the rest. ``limits`` are the conditions on dimension names under which the program holds
    (``batch <= 3``, ``batch % 2 != 0``).
    """

    inputs: tuple[Input, ...]
    output: Structure
    fixed: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    parameters: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors of a call, in graph order; InputError names what is missing, unknown or of a wrong type.

        A tensor inside a container is found by its path (``x_key``, ``xs_0``), not by its position.
        """
        names = [i.name for i in self.inputs]
        call = self._by_parameter(args, names)
        given: dict[str, Any] = {}
        if twice := next((k for k in kwargs if k in call), None):
            raise InputError(f"input {twice!r} was given twice, by position and by name")
        for outer, tree in {**call, **kwargs}.items():
            for name, value in ({outer: tree} if outer in names else named_leaves({outer: tree})).items():
                if name in given:
                    raise InputError(f"input {name!r} was given twice")
                if name in names:
                    given[name] = value
                elif name in self.fixed or value is None:
                    self._check_fixed(name, value)
                else:
                    raise InputError(f"unknown input {name!r}; the model was captured with {names}")
        given |= left_out(self.inputs, given)
        if missing := [n for n in names if n not in given]:
            raise InputError(f"missing input{'s' if len(missing) > 1 else ''} {missing}; the model takes {names}")
        self._check_types(given)
        return [given[n] for n in names]

    def _by_parameter(self, args: Sequence[Any], names: list[str]) -> dict[str, Any]:
        """Positional arguments by the parameter that each binds to."""
        parameters = self.parameters or tuple(names)
        rest = parameters[-1][1:] if parameters and parameters[-1].startswith("*") else ""
        plain = parameters[:-1] if rest else parameters
        if len(args) > len(plain) and not rest:
            raise InputError(f"{len(args)} positional inputs given; the model takes {len(plain)}: {list(plain)}")
        call = dict(zip(plain, args, strict=False))
        return {**call, rest: tuple(args[len(plain) :])} if len(args) > len(plain) else call

    def _check_fixed(self, name: str, value: Any) -> None:
        want = self.fixed.get(name)
        if isinstance(value, Tensor) or value != want:
            raise InputError(
                f"input {name!r} was fixed to {want!r} when the model was captured; recompile to change it"
            )

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The size of every named dimension, from the flat tensors of a call."""
        pairs = zip(self.inputs, tensors, strict=True)
        dims = [pair for item, value in pairs for pair in zip(item.type.shape, value.shape, strict=True)]
        return {dim: size for dim, size in dims if isinstance(dim, str) and dim.isidentifier()}

    def _check_types(self, given: Mapping[str, Any]) -> None:
        sizes: dict[str, int] = {}
        derived: list[tuple[Input, Tensor, int, str]] = []  # sizes such as 2*batch, checked once all names are known
        for item in self.inputs:
            value = given[item.name]
            if not isinstance(value, Tensor):
                raise InputError(f"input {item.name!r} is a {type(value).__name__}; expected a tensor {item.type}")
            if value.dtype != item.type.dtype or value.dim() != len(item.type.shape):
                raise InputError(f"input {item.name!r} is {describe(value)}; expected {item.type}")
            for size, dim in zip(value.shape, item.type.shape, strict=True):
                if isinstance(dim, str) and not dim.isidentifier():
                    derived.append((item, value, size, dim))
                elif size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                    known = f" with {dim} = {sizes[dim]}" if isinstance(dim, str) else ""
                    raise InputError(f"input {item.name!r} is {describe(value)}; expected {item.type}{known}")
        for item, value, size, dim in derived:
            _check_derived(item, value, size, dim, sizes)
        self._check_limits(sizes)

    def _check_limits(self, sizes: Mapping[str, int]) -> None:
        if (broken := self.broken(sizes)) is None:
            return
        used = condition_names(broken)
        at = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in used)
        raise InputError(
            f"the inputs have {at}; the program holds for {broken}{self._nearest(sizes, used)}, since the model takes "
            f"another path at other sizes, or has no more positions; compile with example_inputs of the size you need"
        )

    def broken(self, sizes: Mapping[str, int]) -> str | None:
        """The first limit that does not hold; one that cannot be computed (a division by zero) does not."""
        for limit in self.limits:
            try:
                if holds(limit, sizes):
                    continue
            except ValueError:
                pass
            return limit
        return None

    def _nearest(self, sizes: Mapping[str, int], used: set[str]) -> str:
        """`` (such as batch = 4 or 6)``: the closest sizes that are allowed, where one dimension decides."""
        if len(used) != 1:
            return ""
        (name,) = used
        around = [range(sizes[name], max(sizes[name] - 4096, -1), -1), range(sizes[name], sizes[name] + 4096)]
        found = [next((n for n in side if self.broken({**sizes, name: n}) is None), None) for side in around]
        known = [str(n) for n in found if n is not None]
        return f" (such as {name} = {' or '.join(known)})" if known else ""

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's output from the graph's flat outputs: its own type, or plain containers for a loaded program."""
        if self.out_spec is not None:
            return pytree.tree_unflatten(list(outputs), self.out_spec)
        return _build(self.output, outputs)


def left_out(inputs: Sequence[Input], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """An empty tensor for each input that may be left out and was, if nothing else of its dimension was given.

    Its other sizes are those of the inputs that are there; what cannot be known stays missing.
    """
    tensors = {i: value for i in inputs if isinstance(value := given.get(i.name), Tensor)}
    sizes = {dim: n for i, value in tensors.items() for dim, n in zip(i.type.shape, value.shape, strict=False)}
    found = {}
    for item in inputs:
        if not item.empty or item.name in given or item.empty in sizes:
            continue
        shape = [0 if dim == item.empty else dim if isinstance(dim, int) else sizes.get(dim) for dim in item.type.shape]
        if None not in shape:
            device = next(iter(tensors.values())).device if tensors else None
            found[item.name] = torch.empty(shape, dtype=item.type.dtype, device=device)  # type: ignore[arg-type]
    return found


def _check_derived(item: Input, value: Tensor, size: int, dim: str, sizes: Mapping[str, int]) -> None:
    """Raise an InputError unless ``size`` is the value of the expression ``dim``, if its names are known."""
    try:
        want = evaluate(dim, sizes)
    except ValueError:  # a name that no input has as a plain size: nothing to compare with
        return
    if size != want:
        raise InputError(f"input {item.name!r} is {describe(value)}; expected {item.type} with {dim} = {want}")


def describe(value: Tensor) -> str:
    return f"{dtype_name(value.dtype)}{list(value.shape)}"


def structure_of(spec: pytree.TreeSpec) -> Structure:
    """The structure of a pytree spec: mappings (also model outputs) become dicts, sequences lists or tuples."""
    counter = iter(range(spec.num_leaves))

    def walk(node: pytree.TreeSpec) -> Structure:
        if node.is_leaf():
            return next(counter)
        keys = node.context
        if (
            isinstance(keys, (list, tuple))
            and len(keys) == node.num_children
            and all(type(k) in (str, int) for k in keys)
        ):
            return {"kind": "dict", "keys": list(keys), "items": [walk(c) for c in node.children()]}
        kind = "list" if node.type is list else "tuple"
        return {"kind": kind, "items": [walk(c) for c in node.children()]}

    return walk(spec)


def output_names(structure: Structure) -> list[str]:
    """A name for every flat output: its key where it has one, else ``output``, ``output_1``, ..."""
    names: list[str] = []

    def walk(node: Structure, name: str) -> None:
        if not isinstance(node, dict):
            if isinstance(node, int):
                names.append(name)
            return
        keys = list(map(str, node.get("keys", ()))) or [f"{name}_{i}" if i else name for i in range(len(node["items"]))]
        for key, item in zip(keys, node["items"], strict=True):
            walk(item, key if name == "output" else f"{name}_{key}" if node.get("keys") else key)

    walk(structure, "output")
    return names


def _build(node: Structure, outputs: Sequence[Any]) -> Any:
    if not isinstance(node, dict):
        return None if node is None else outputs[node]
    items = [_build(item, outputs) for item in node["items"]]
    if node["kind"] == "dict":
        return dict(zip(node["keys"], items, strict=True))
    return items if node["kind"] == "list" else tuple(items)


def named_leaves(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs by flat name: a list or dict of tensors under ``x`` becomes ``x_0``, ``x_1`` or ``x_key``."""
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            found[re.sub(r"\W", "_", "_".join([name, *(_key(p) for p in path)]))] = leaf
    return found


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """The names that positional arguments of ``model.forward`` bind to; ``*args`` for those that take the rest."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (*named, *(f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL))


def by_parameter(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by parameter name, what went to ``**kwargs`` by its own."""
    found: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if call.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as (args, kwargs): a tuple or list is positional, a mapping by keyword, a tensor one input."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        if not all(isinstance(k, str) for k in example):
            raise InputError("example_inputs as a dict maps input names to tensors; a key is not a string")
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise InputError(
        f"example_inputs is a {type(example).__name__}; expected a tuple of positional inputs or a dict of keyword "
        f"inputs"
    )
