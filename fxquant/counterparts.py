"""Counterparts: which node of a compiled graph computes, in exact arithmetic, what which node of the float graph does.

Passes keep the names of what they replace, and leave most of the graph as it is. So a node has a counterpart if

    it is an input, or a constant of the same bits,
    it is a layer: the layer of that name, unless its output channels were scaled or mixed for a layer behind it,
    it applies the same operator to arguments that have counterparts,
    it has the name and the type of a float node and depends on no changed constant,
    it rounds something that has one.

What has none is what a method scaled or rotated, and the inside of what took the place of one operator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxquant.errors import InputError
from fxquant.graph import TensorType, info, type_text
from fxquant.layers import Layer, find_layers
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.producers import Fold, plan_fold
from fxquant.program import Program, Step
from fxquant.rewrite import aten, fetch, identity
from fxquant.show.summary import LayerSummary, summarize
from fxquant.signature import output_names

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_SHIFTED = re.compile(r"shifted by (\S+), whose constants carry it")


@dataclass(frozen=True)
class Pair:
    """A layer, an attention product or a store of a KV cache in both graphs.

    ``node`` is the operator in the compiled graph, ``out`` the node that has the whole output (behind a compensation),
    ``want`` the one of the float graph. ``reason``: why the outputs are not to be compared, empty where they are.
    ``summary`` and ``layer`` are those of a layer with a weight.
    """

    name: str
    type: str
    node: fx.Node
    out: fx.Node
    want: fx.Node
    reason: str = ""
    summary: LayerSummary | None = None
    layer: Layer | None = None


@dataclass(frozen=True)
class Counterparts:
    """``same[node of the compiled graph]`` is the node of the float graph; ``pairs`` in the order of the former.

    ``changed``: names of layers whose float weight was scaled or rotated before it was quantized.
    """

    same: Mapping[fx.Node, fx.Node]
    pairs: tuple[Pair, ...]
    changed: frozenset[str]


def rounds(node: fx.Node) -> bool:
    """Whether the node rounds its input, or restores what was rounded."""
    return node.target in (*ROUNDINGS, ops.quantize_kv.default, ops.dequantize_kv.default)


def counterparts(program: Program, reference: Program) -> Counterparts:
    """The counterparts of ``program``'s nodes in ``reference``, the captured and normalized float model.

    InputError, naming a layer, where the models are not the same.
    """
    return _Matching(program, reference).run()


@dataclass
class _Matching:
    program: Program
    reference: Program
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    clean: set[fx.Node] = field(default_factory=set)
    """Nodes that depend on no constant that was changed, or whose layer makes up for it."""
    weights: set[fx.Node] = field(default_factory=set)
    """Decoded weights, and what is made of them before a layer takes them: the layer's rounding."""

    def __post_init__(self) -> None:
        gm = self.reference.gm
        self.float_nodes = {n.name: n for n in gm.graph.nodes}
        self.values: dict[Any, fx.Node] = {}
        self.canonical: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            key = _key(node, self.canonical)
            self.canonical[node] = node if key is None else self.values.setdefault(key, node)
        self.nodes = {n.name: n for n in self.program.gm.graph.nodes}

    def run(self) -> Counterparts:
        layers = find_layers(self.reference.gm)
        scaled, changed = _scaled(self.program.trace, self.reference, layers)
        pairs = [*self._layer_pairs(layers, scaled)]
        outs = {pair.out: pair for pair in pairs}
        inputs = self._inputs()
        taken = set(outs) | {pair.node for pair in pairs}
        for node in self.program.gm.graph.nodes:
            if node.target is ops.dequantize_packed.default or (
                node not in taken and any(n in self.weights for n in node.all_input_nodes)
            ):
                self.weights.add(node)
                continue
            found = self._find(node, outs, inputs)
            if found is not None:
                self.same[node] = self.canonical.get(found, found)
            if found is not None or node in self.by_input or (node not in outs and self._is_clean(node)):
                self.clean.add(node)
        pairs += [*self._products(taken), *self._stores()]
        order = {node: i for i, node in enumerate(self.program.gm.graph.nodes)}
        return Counterparts(self.same, tuple(sorted(pairs, key=lambda p: order[p.out])), frozenset(changed))

    def _inputs(self) -> dict[fx.Node, fx.Node]:
        """Inputs of the same name and type."""
        sides = []
        for program in (self.program, self.reference):
            nodes = program.gm.graph.find_nodes(op="placeholder")
            sides.append({i.name: (n, i.type.dtype) for i, n in zip(program.signature.inputs, nodes, strict=True)})
        mine, theirs = sides
        self.by_input = {n: theirs[name][0] for name, (n, _) in mine.items() if name in theirs}
        return {n: theirs[name][0] for name, (n, kind) in mine.items() if name in theirs and theirs[name][1] == kind}

    def _find(self, node: fx.Node, outs: Mapping[fx.Node, Pair], inputs: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        if node.op == "placeholder":
            return inputs.get(node)
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            return None
        if node in outs:
            return None if outs[node].reason else outs[node].want
        if rounds(node):
            return self._rounded(node)
        key = _key(node, self.same)
        found = None if key is None else self.values.get(key)
        return found or self._of_same_name(node)

    def _constant(self, node: fx.Node) -> fx.Node | None:
        other = self.values.get(("get_attr", str(node.target)))
        if other is None:
            return None
        a, b = fetch(self.program.gm, str(node.target)), fetch(self.reference.gm, str(other.target))
        alike = a.shape == b.shape and a.dtype == b.dtype
        return other if alike and (identity(a) == identity(b) or torch.equal(a, b.to(a.device))) else None

    def _rounded(self, node: fx.Node) -> fx.Node | None:
        """What a rounded value is the rounded form of."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if node.kwargs.get("shifted"):
            return None
        if node.target is ops.dequantize_kv.default and x.op == "placeholder":
            return self.by_input.get(x)
        return self.same.get(x)

    def _of_same_name(self, node: fx.Node) -> fx.Node | None:
        other = self.float_nodes.get(node.name)
        if other is None or not self._is_clean(node):
            return None
        alike = type_text(info(node).type) == type_text(info(other).type) and info(node).path == info(other).path
        return other if alike else None

    def _is_clean(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.kwargs.get("shifted"):
            return False
        if info(node).weight is not None:  # a layer undoes what its input went through
            return True
        inputs = [node.args[0]] if rounds(node) else node.all_input_nodes
        return all(n in self.clean or n in self.weights for n in inputs)

    # --- pairs --------------------------------------------------------------------------------------------------------
    def _layer_pairs(self, layers: Sequence[Layer], scaled: Mapping[fx.Node, str]) -> Iterator[Pair]:
        mine = [q for q in summarize(self.program).layers if not q.part_of]
        theirs: dict[str, list[Layer]] = {}
        for layer in layers:
            theirs.setdefault(layer.name, []).append(layer)
        _check_names(mine, layers)
        for q in mine:
            own = theirs[q.name]
            layer = own.pop(0) if len(own) > 1 else own[0]
            _check_shape(q, layer)
            node = self.nodes[q.node]
            yield Pair(q.name, q.type, node, self._out(node, layer.node), layer.node, scaled.get(layer.node, ""), q,
                       layer)  # fmt: skip

    def _out(self, node: fx.Node, want: fx.Node) -> fx.Node:
        """The node that took the layer's name, and adds its compensation; or the layer itself."""
        other = self.nodes.get(want.name)
        return other if other is not None and other is not node and other in node.users else node

    def _products(self, layers: set[fx.Node]) -> Iterator[Pair]:
        """Attention, and products of two activations of which one is rounded."""
        taken: dict[str, int] = {}
        for node in self.program.gm.graph.nodes:
            rounded = any(isinstance(a, fx.Node) and a.target in ROUNDINGS for a in node.args[:2])
            if node in layers or not (node.target is _ATTENTION or (node.target in _PRODUCTS and rounded)):
                continue
            if node not in self.same:
                continue  # a product inside of what was one operator
            whole = self.same[node].target is _ATTENTION
            name = ".".join(filter(None, (info(node).path, "attention" if whole else "product")))
            taken[name] = taken.get(name, 0) + 1
            unique = name if taken[name] == 1 else f"{name}_{taken[name]}"
            yield Pair(unique, "attention", node, node, self.same[node])

    def _stores(self) -> Iterator[Pair]:
        """What a KV cache stores: codes of the keys and values of this call's tokens, by the output they go to."""
        flat: Sequence[Any] = self.program.gm.graph.output_node().args[0]  # type: ignore[assignment]
        names = dict(zip(flat, output_names(self.program.signature.output), strict=False))
        for node in self.program.gm.graph.find_nodes(op="call_function", target=ops.quantize_kv.default):
            x = node.args[0]
            if isinstance(x, fx.Node) and x in self.same:
                name = next((names[user] for user in node.users if user in names), node.name)
                yield Pair(name, "kv cache", node, node, self.same[x])


def _key(node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> Any:
    """What a node computes, as a key over the values that it reads; None where one of those is not known."""
    if node.op == "get_attr":
        return "get_attr", str(node.target)
    if node.op != "call_function" or any(n not in known for n in node.all_input_nodes):
        return None
    return node.target, _frozen(node.args, known), _frozen(node.kwargs, known)


def _frozen(value: Any, known: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, known) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v, known)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", *(_frozen(v, known) for v in (value.start, value.stop, value.step))
    return (type(value).__name__, str(value)) if isinstance(value, torch.device) else (type(value).__name__, value)


# --- what methods scaled ----------------------------------------------------------------------------------------------
def _scaled(trace: Sequence[Step], reference: Program, layers: Sequence[Layer]) -> tuple[dict[fx.Node, str], set[str]]:
    """Float layers whose output channels a method changed, with why; and the names of all whose weights it changed."""
    by_node = {layer.node.name: layer for layer in layers}
    by_name = {layer.name: layer for layer in layers}
    found, changed = dict[fx.Node, str](), set[str]()

    def producer(node: fx.Node, rule: str) -> None:
        if node.name in by_node:
            found[node] = (
                f"{rule} scaled or mixed its output channels, which the layer behind it undoes; its rounding is part "
                f"of that layer's local error"
            )
            changed.add(by_node[node.name].name)

    for step in trace:
        readers: dict[fx.Node, list[Layer]] = {}
        for r in step.rewrites:
            layer = by_node.get(r.node) or by_name.get(r.layer)
            if r.rule in ("smooth", "rotate") and layer is not None:
                changed.add(layer.name)
                if not r.detail.endswith("when the model runs"):
                    readers.setdefault(layer.node.args[0], []).append(layer)  # type: ignore[arg-type]
            if (shifted := _SHIFTED.match(r.detail)) and (node := by_node.get(shifted[1])):
                producer(node.node, step.name)
        for x, own in readers.items():
            fold = plan_fold(reference.gm, x, readers={layer.node for layer in own})
            if isinstance(fold, Fold):
                producer(fold.producer, step.name)
    return found, changed


# --- whether it is the same model -------------------------------------------------------------------------------------
def _check_names(mine: Sequence[LayerSummary], layers: Sequence[Layer]) -> None:
    own, theirs = [q.name for q in mine], [layer.name for layer in layers]
    for here, there, which in ((own, theirs, "float"), (theirs, own, "compiled")):
        if missing := [name for name in here if name not in set(there)]:
            count = "" if len(missing) == 1 else f" (and {len(missing) - 1} more)"
            raise InputError(
                f"the float model is not the one that was compiled: the {which} model has no layer "
                f"{missing[0]!r}{count}; give the model that it was compiled from"
            )


def _check_shape(q: LayerSummary, layer: Layer) -> None:
    value = layer.weight.transpose(-1, -2) if layer.transposed and q.spec is not None else layer.weight
    if tuple(value.shape) != q.shape:
        raise InputError(
            f"the float model is not the one that was compiled: the weight of {q.name} is {list(value.shape)}, and "
            f"{list(q.shape)} in the compiled model; give the model that it was compiled from"
        )


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a tensor of floating point."""
    kind = info(node).type
    return isinstance(kind, TensorType) and kind.dtype.is_floating_point
