"""Blocks of a captured graph: the repeated parts of a model, each with what it reads and what it hands on.

A block is named by a module path, ``model.layers.0``. Its nodes are those of that path and below, and whatever lies
between them: every path in the graph from one of them to another. So a block can be computed as a unit once its inputs
are there. Blocks that cannot be told apart, since each needs the other (a list that is gone through twice, one that
shares a module), are one.

Where no paths are given, they are found: a weight belongs to the outermost numbered list (``layers.0``, ``layers.1``,
...) of which two members hold the same quantized weights, more than one each. A weight outside such a list makes a
block of its own layer, and of what rounds the layer's input.
"""

from __future__ import annotations

import fnmatch
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import Batch, constants
from fxquant.graph import info
from fxquant.ops import ROUNDINGS
from fxquant.qdq import float_weight, quantized_weights
from fxquant.rewrite import fetch

AUTO = "auto"


@dataclass(frozen=True)
class Block:
    """``nodes`` in graph order, without tensors of the module; ``weights``: the dequantize nodes that they read.

    ``inputs`` are the values read from outside, ``outputs`` those that nodes outside read.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


def find_blocks(gm: fx.GraphModule, pattern: str = AUTO) -> list[Block]:
    """The blocks of ``gm``, in QDQ form, in the order they can be computed in.

    ``pattern`` is a glob over module paths (``*`` crosses dots; of a path and those below it the shortest match counts)
    or ``auto``; with a glob, weights that it does not match are in no block. ValueError where it matches nothing.
    """
    nodes = [n for n in gm.graph.nodes if n.op != "output"]
    constant = constants(gm.graph)
    paths = [info(user).path or info(w).path for w in quantized_weights(gm) for user in layers_on(w)]
    named = repeated(paths) if pattern == AUTO else _matching(paths, pattern)
    seeds: dict[str, set[fx.Node]] = {name: set() for name in named}
    for node in nodes:
        if node not in constant and (name := _owner(info(node).path, named)) is not None:
            seeds[name].add(node)
    if pattern == AUTO:
        taken = set[fx.Node]().union(*seeds.values())
        for user in (user for weight in quantized_weights(gm) for user in layers_on(weight)):
            if user not in taken:
                rounding = {n for n in user.all_input_nodes if n.target in ROUNDINGS} - taken
                seeds.setdefault(info(user).path or user.name, set()).update({user} | rounding)
    groups = [(name, _between(nodes, members)) for name, members in seeds.items() if members]
    while True:
        groups = _merged(nodes, groups)
        if not (stuck := _schedule(nodes, constant, [m for _, m in groups])[1]):
            break
        rest = [groups[i] for i in sorted(stuck)]
        groups = [g for i, g in enumerate(groups) if i not in stuck]
        groups.append((rest[0][0], _between(nodes, set().union(*(members for _, members in rest)))))
    found = [_block(name, members, nodes, constant) for name, members in groups]
    order = _schedule(nodes, constant, [set(b.nodes) for b in found])[0]
    return [found[i] for i in order if isinstance(i, int)]


def repeated(paths: Iterable[str]) -> list[str]:
    """Members of the numbered lists that hold ``paths``, by the rule of this module; paths outside one have none."""
    members: dict[str, dict[str, Counter[str]]] = {}  # list -> member -> weights below it
    for path in paths:
        for lead, member, rest in _numbered(path):
            members.setdefault(lead, {}).setdefault(member, Counter())[rest] += 1
    repeats = {lead for lead, held in members.items() if _alike(held.values())}
    outermost = (next((m for lead, m, _ in _numbered(path) if lead in repeats), None) for path in paths)
    return list(dict.fromkeys(member for member in outermost if member is not None))


def _numbered(path: str) -> list[tuple[str, str, str]]:
    """``a.0.b.1.c`` -> (a, a.0, b.1.c), (a.0.b, a.0.b.1, c): the lists a path is in, the outermost first."""
    parts = path.split(".")
    return [(".".join(parts[:i]), ".".join(parts[: i + 1]), ".".join(parts[i + 1 :]))
            for i, part in enumerate(parts) if part.isdecimal()]  # fmt: skip


def _alike(held: Iterable[Counter[str]]) -> bool:
    """Whether two members hold the same weights, and more than one."""
    count = Counter(frozenset(weights) for weights in held if len(weights) > 1)
    return any(n > 1 for n in count.values())


def _matching(paths: Sequence[str], pattern: str) -> list[str]:
    found = list(dict.fromkeys(name for path in paths if (name := _shortest(path, pattern)) is not None))
    if not found:
        shown = ", ".join((repeated(paths) or list(dict.fromkeys(paths)))[:6])
        raise ValueError(f"blocks {pattern!r} matches no module that holds a quantized weight; expected 'auto' or a "
                         f"glob over module paths such as {shown}")  # fmt: skip
    return found


def _shortest(path: str, pattern: str) -> str | None:
    parts = path.split(".")
    leads = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((lead for lead in leads if fnmatch.fnmatchcase(lead, pattern)), None)


def _owner(path: str, names: Collection[str]) -> str | None:
    parts = path.split(".")
    return next((lead for end in range(len(parts), 0, -1) if (lead := ".".join(parts[:end])) in names), None)


def layers_on(weight: fx.Node) -> list[fx.Node]:
    """The nodes that use a weight, or a view of it, as an operand."""
    found = []
    for user in weight.users:
        inner = [n for n in user.all_input_nodes if n is not weight and n.op != "get_attr"]
        found += [user] if inner else list(user.users)  # a view of the weight alone: whoever uses that
    return list(dict.fromkeys(found))


# --- from paths to nodes ----------------------------------------------------------------------------------------------
def _between(nodes: Sequence[fx.Node], members: set[fx.Node]) -> set[fx.Node]:
    """``members`` and every node that depends on one of them and that another depends on."""
    after, before = set(members), set(members)
    for node in nodes:
        if node not in after and any(n in after for n in node.all_input_nodes):
            after.add(node)
    for node in reversed(nodes):
        if node not in before and any(n in before for n in node.users):
            before.add(node)
    return after & before


def _merged(nodes: Sequence[fx.Node], groups: list[tuple[str, set[fx.Node]]]) -> list[tuple[str, set[fx.Node]]]:
    """Groups that have nodes in common made one, named after the first."""
    done: list[tuple[str, set[fx.Node]]] = []
    for name, members in groups:
        while hit := next((g for g in done if g[1] & members), None):
            done.remove(hit)
            name, members = hit[0], _between(nodes, hit[1] | members)
        done.append((name, members))
    return done


def _block(name: str, members: set[fx.Node], nodes: Sequence[fx.Node], constant: set[fx.Node]) -> Block:
    inside = [n for n in nodes if n in members and n not in constant]
    own = set(inside)
    read = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in own)
    fixed = _all_inputs([n for n in read if n in constant])
    return Block(
        name, tuple(inside), tuple(n for n in read if n not in constant),
        tuple(n for n in inside if any(user not in own for user in n.users)),
        tuple(n for n in nodes if n in fixed and info(n).weight is not None),
    )  # fmt: skip


def _all_inputs(start: Iterable[fx.Node]) -> set[fx.Node]:
    """``start`` and all that it depends on."""
    found, todo = set[fx.Node](), list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


# --- order ------------------------------------------------------------------------------------------------------------
def schedule(gm: fx.GraphModule, blocks: Sequence[Block]) -> list[Block | fx.Node]:
    """The blocks, and the single nodes that the last of them need, in an order in which they can be computed.

    Tensors of the module and weights are left out: they are read where they are used.
    """
    nodes = [n for n in gm.graph.nodes if n.op != "output"]
    needed = _all_inputs(n for block in blocks for n in (*block.nodes, *block.inputs))
    order, _ = _schedule([n for n in nodes if n in needed], constants(gm.graph), [set(b.nodes) for b in blocks])
    return [blocks[item] if isinstance(item, int) else item for item in order]


def _schedule(
    nodes: Sequence[fx.Node], constant: set[fx.Node], groups: Sequence[set[fx.Node]]
) -> tuple[list[fx.Node | int], set[int]]:
    """Nodes and numbers of groups in a topological order, the earliest first; and the groups that have none."""
    unit: dict[fx.Node, fx.Node | int] = {n: n for n in nodes if n not in constant}
    unit |= {n: i for i, group in enumerate(groups) for n in group if n not in constant}
    first: dict[fx.Node | int, int] = {}
    waits: dict[fx.Node | int, set[fx.Node | int]] = {}
    wanted: dict[fx.Node | int, list[fx.Node | int]] = {}
    for at, node in enumerate(nodes):
        if node not in unit:
            continue
        mine = unit[node]
        first.setdefault(mine, at)
        before = {unit[n] for n in node.all_input_nodes if n in unit} - {mine}
        waits.setdefault(mine, set()).update(before)
    for mine, before in waits.items():
        for other in before:
            wanted.setdefault(other, []).append(mine)
    ready = [(first[u], u) for u, before in waits.items() if not before]
    heapq.heapify(ready)
    order: list[fx.Node | int] = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for mine in wanted.get(done, ()):
            waits[mine].discard(done)
            if not waits[mine]:
                heapq.heappush(ready, (first[mine], mine))
    return order, {u for u in waits if isinstance(u, int)} - set(order)


# --- computing it -----------------------------------------------------------------------------------------------------
Constants = Mapping[fx.Node, Tensor]


@dataclass
class Values:
    """What is alive of a walk over all batches, ``values[node][batch]``, one unit of the schedule after the other.

    With ``as_float`` weights are the float ones and nothing rounds activations: the float model.
    """

    gm: fx.GraphModule
    batches: Sequence[Batch]
    as_float: bool
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constant = constants(self.gm.graph)

    def advance(self, unit: Block | fx.Node, rows: Iterable[Sequence[Any]], keep: set[fx.Node]) -> None:
        """Add the ``outputs`` of a unit, batch by batch; then only the values in ``keep`` are alive."""
        made, rows = (unit,) if isinstance(unit, fx.Node) else unit.outputs, list(rows)
        self.values.update({n: [row[i] for row in rows] for i, n in enumerate(made)})
        for node in [n for n in self.values if n not in keep]:
            del self.values[node]

    def outputs(self, unit: Block | fx.Node) -> Iterator[list[Any]]:
        """The unit's outputs, batch by batch."""
        if isinstance(unit, fx.Node) and unit.op == "placeholder":
            at = [n for n in self.gm.graph.nodes if n.op == "placeholder"].index(unit)
            yield from ([batch[at]] for batch in self.batches)
            return
        nodes, made = ((unit,), (unit,)) if isinstance(unit, fx.Node) else (unit.nodes, unit.outputs)
        fixed = evaluate(self.gm, self.fixed(nodes), as_float=self.as_float)
        for i in range(len(self.batches)):
            with torch.no_grad():
                yield compute(nodes, made, self.given(unit, i), fixed, as_float=self.as_float)

    def given(self, unit: Block | fx.Node, batch: int) -> dict[fx.Node, Any]:
        """The inputs of a unit in one batch."""
        inputs = unit.all_input_nodes if isinstance(unit, fx.Node) else unit.inputs
        return {n: self.values[n][batch] for n in inputs if n not in self.constant}

    def fixed(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The constants that ``nodes`` read."""
        return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n in self.constant))

    def nbytes(self) -> int:
        """Bytes of all values that are alive, storages counted once."""
        held = {}
        for value in (v for batch in self.values.values() for v in batch if isinstance(v, Tensor)):
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return sum(held.values())


def compute(
    nodes: Sequence[fx.Node], made: Sequence[fx.Node], given: Mapping[fx.Node, Any], fixed: Constants, *,
    as_float: bool = False,
) -> list[Any]:  # fmt: skip
    """The values of ``made`` among ``nodes``, which are computed in order, from their inputs and constants."""
    value = {**fixed, **given}
    last = {n: node for node in nodes for n in node.all_input_nodes}
    for node in nodes:
        if as_float and node.target in ROUNDINGS:
            value[node] = value[node.all_input_nodes[0]]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value.__getitem__)
            value[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for n in node.all_input_nodes:
            if last[n] is node and n not in made:
                value.pop(n, None)
    return [value[n] for n in made]


def evaluate(
    gm: fx.GraphModule, wanted: Iterable[fx.Node], given: Constants | None = None, *, as_float: bool = False
) -> dict[fx.Node, Tensor]:
    """Constants of the graph: tensors of the module, detached, and weights; those ``given`` are taken as they are."""
    known: dict[fx.Node, Tensor] = dict(given or {})

    def value(node: fx.Node) -> Tensor:
        if node not in known:
            if node.op == "get_attr":
                known[node] = fetch(gm, str(node.target)).detach()
            elif as_float and info(node).weight is not None:
                known[node] = float_weight(gm, node).detach()
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    return {node: value(node) for node in wanted}
