"""Rewriting fx graphs by tables of rules. Knows fx, nothing of quantization.

A rule is a row ``Rule(pattern, handler)``; a handler builds the replacement, or says why not::

    LOWER = (
        Rule(Call(aten.linear.default, x, Call(ops.dequantize.default, ...), bias), fuse_linear),  # linear(x, dq(w))
    )
    def fuse_linear(match: Match) -> fx.Node | Decline: ...

Both outcomes are recorded, so that "why was my layer not rewritten?" has an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant import spool
from fxquant.graph import NodeInfo, info, set_info
from fxquant.lazy import Lazy


@dataclass(frozen=True, slots=True)
class Var:
    """Matches any argument and captures it under ``name``; the same name twice must be the same argument."""

    name: str


class Call:
    """Matches a call of ``target`` (one function or several) whose first arguments match ``args``."""

    def __init__(self, target: Any, *args: Any) -> None:
        self.targets = target if isinstance(target, tuple) else (target,)
        self.args = args

    def __repr__(self) -> str:
        return f"{self.targets[0]}({', '.join(map(repr, self.args))})"


@dataclass(frozen=True, slots=True)
class Decline:
    """A rule that matched but must not fire, and why."""

    reason: str


@dataclass(frozen=True)
class Match:
    """Where a rule matched: the node, its graph module and the captured arguments (``match["x"]``)."""

    gm: fx.GraphModule
    node: fx.Node
    captured: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.captured[name]

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call in front of the matched node, with the provenance of that node."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        set_info(new, info(self.node))
        return new

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """Attach ``value`` to the module as ``name`` and insert the node that reads it."""
        attach(self.gm, name, value)
        with self.graph.inserting_before(self.node):
            return get_attr(self.graph, name, value)


Handler = Callable[[Match], "fx.Node | Decline"]


@dataclass(frozen=True)
class Rule:
    """``pattern`` -> what ``handler`` returns. ``where`` narrows the pattern; what it rejects is not a decline."""

    pattern: Call
    handler: Handler
    where: Callable[[Match], bool] | None = None

    @property
    def name(self) -> str:
        return self.handler.__name__


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One rule that fired: on which node, of which layer."""

    rule: str
    node: str
    layer: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Declined:
    """One rule that matched and did not fire, and why."""

    rule: str
    node: str
    layer: str
    reason: str


@dataclass
class Log:
    """What a pass did and what it left alone."""

    rewrites: list[Rewrite] = field(default_factory=list)
    declines: list[Declined] = field(default_factory=list)

    def rewrote(self, rule: str, node: fx.Node, detail: str = "") -> None:
        self.rewrites.append(Rewrite(rule, node.name, info(node).path, detail))

    def declined(self, rule: str, node: fx.Node, reason: str) -> None:
        self.declines.append(Declined(rule, node.name, info(node).path, reason))


def match_node(gm: fx.GraphModule, pattern: Call, node: fx.Node) -> Match | None:
    """The match of ``pattern`` rooted at ``node``, or None."""
    captured: dict[str, Any] = {}
    return Match(gm, node, captured) if _matches(pattern, node, captured) else None


def _matches(pattern: Any, value: Any, captured: dict[str, Any]) -> bool:
    if isinstance(pattern, Var):
        return captured.setdefault(pattern.name, value) is value
    if isinstance(pattern, Call):
        return (
            isinstance(value, fx.Node)
            and value.op == "call_function"
            and value.target in pattern.targets
            and len(value.args) >= len(pattern.args)
            and all(_matches(p, a, captured) for p, a in zip(pattern.args, value.args, strict=False))
        )
    return bool(pattern == value)


def apply_rules(gm: fx.GraphModule, rules: Iterable[Rule], *, log: Log | None = None) -> Log:
    """Apply the first rule that fires to every node, in graph order, once; unused nodes are removed at the end.

    A replacement takes the old node's name (text diffs stay small) and its type and module path.
    """
    log, rules = log or Log(), tuple(rules)
    for node in list(gm.graph.nodes):
        for rule in rules:
            match = match_node(gm, rule.pattern, node)
            if match is None or (rule.where is not None and not rule.where(match)):
                continue
            new = rule.handler(match)
            if isinstance(new, Decline):
                log.declined(rule.name, node, new.reason)
                continue
            log.rewrote(rule.name, node)
            replace(gm.graph, node, new)
            break
    remove_unused(gm.graph)
    return log


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Make every user of ``old`` use ``new`` and erase ``old``; a freshly made ``new`` takes over its name."""
    fresh = new.op == "call_function" and not new.users
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    name = old.name
    graph.erase_node(old)
    if fresh:
        _give_name(new, name)


def move_name(old: fx.Node, new: fx.Node, other: str) -> None:
    """Give the name of ``old`` to ``new``, and ``old`` the name ``other``, numbered if it is taken."""
    name = old.name
    old._rename(other)
    _give_name(new, name)


def _give_name(node: fx.Node, name: str) -> None:
    """Not by Node._rename, which would number the name since it was in use once."""
    node.graph._graph_namespace._rename_object(node, name)
    node.name = name


def remove_unused(graph: fx.Graph) -> list[str]:
    """Erase nodes without users, save inputs and the output; returns their names."""
    gone = []
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gone.append(node.name)
            graph.erase_node(node)
    return gone


# --- tensors on the module ------------------------------------------------------------------------------------------
def fetch(gm: nn.Module, name: str) -> Tensor:
    """The tensor that a get_attr node of target ``name`` reads."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor), f"{name} is not a tensor"
    return value


def unwritable(model: nn.Module) -> str | None:
    """The name of a module or tensor that generated code may not hold, None where there is none.

    torch.fx writes a name that is no identifier between double quotes as it is: one with a quote would end the text,
    and what follows would run. Some models take names from their config.
    """
    modules = model.named_modules(remove_duplicate=False)
    tensors_ = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return next((name for name, _ in chain(modules, *tensors_) if not _is_writable(name)), None)


def _is_writable(name: str) -> bool:
    return name.isprintable() and set(name).isdisjoint("\"'\\")


def attach(gm: nn.Module, name: str, value: Tensor) -> None:
    """Register ``value`` as the buffer ``name``, making the modules on its path.

    ValueError if the name is taken, or one that generated code may not hold.
    """
    if not _is_writable(name):
        raise ValueError(f"the name {name[:100]!r} holds quotes, backslashes or what cannot be printed; rename it")
    *path, leaf = name.split(".")
    owner: nn.Module = gm
    for part in path:
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if hasattr(owner, leaf):
        raise ValueError(f"{name} exists already; take a free_name or detach it first")
    owner.register_buffer(leaf, spool.keep(value))


def write(gm: nn.Module, name: str, value: Tensor) -> None:
    """Give the tensor ``name`` of the module other values of the same type, in place where it is in memory."""
    held = fetch(gm, name)
    if isinstance(held, Lazy) or spool.is_open():  # what is written to a mapped file would be in memory from then on
        detach(gm, name)
        attach(gm, name, value)
    else:
        held.copy_(value)


def free_name(gm: nn.Module, name: str) -> str:
    """``name``, or the first of ``name_1``, ``name_2``, ... that the module does not have: a model may have any."""
    taken, free, count = tensors(gm), name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def detach(gm: nn.Module, name: str) -> None:
    """Remove the tensor ``name`` from the module, if it is there."""
    *path, leaf = name.split(".")
    owner = gm.get_submodule(".".join(path)) if path else gm
    if hasattr(owner, leaf):
        delattr(owner, leaf)


def get_attr(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """A get_attr node for the tensor ``name``, typed. Its name is the path with dots as underscores."""
    node = graph.create_node("get_attr", name)
    set_info(node, NodeInfo.of_tensor(value, path=name.rpartition(".")[0]))
    return node


def get_attrs(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "get_attr")


def tensors(gm: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    found: dict[str, Tensor] = dict(gm.named_parameters(remove_duplicate=False))
    found.update(gm.named_buffers(remove_duplicate=False))
    return found


def identity(value: Tensor) -> tuple[object, ...]:
    """A key that two tensors share exactly when they are the same memory seen the same way (a tie)."""
    memory: object = value.source if isinstance(value, Lazy) else value.untyped_storage().data_ptr()
    return (memory, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype, value.device)


aten: Any = torch.ops.aten
"""The operators graphs are made of; typed Any since they are resolved at run time."""
