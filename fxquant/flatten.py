"""From an ExportedProgram to a flat graph: every call an aten operator that writes nothing in place, no submodules.

relu_(x)                                ->  relu(x), and later readers of x read that
wrap_with_set_grad_enabled(f, x)        ->  the nodes of f
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxquant.eager import is_users
from fxquant.errors import CaptureError
from fxquant.graph import META, NodeInfo, ScalarType, TensorType, ValueType, info, set_info
from fxquant.program import Program
from fxquant.rewrite import attach, remove_unused
from fxquant.signature import Input, Signature, named_leaves, structure_of
from fxquant.sizes import in_words, limits, symbol_names
from fxquant.symbolic import pure_form

_NO_EFFECT = (torch.ops.aten._assert_tensor_metadata.default,)
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def from_export(
    exported: ExportedProgram, *, fixed: Mapping[str, Any] | None = None, parameters: tuple[str, ...] | None = None,
    share_batch: bool = False, declared: Sequence[Input] = (),
) -> Program:  # fmt: skip
    """The program of an exported one. ``fixed``: arguments that are no tensors, by name, over those found in it.

    ``share_batch``: first dimensions of the same example size are one. ``declared``: inputs whose dimensions have these
    names, and which of them may be left out. Raises UnkeptGuardError where a size is
    limited by what no condition can say, CaptureError for what has no flat graph.
    """
    traced = [n for n in exported.graph.nodes if n.op == "placeholder"]
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    functional = exported
    if any(_mutates(n) and not _writes_alone(n) for graph in graphs for n in graph.nodes):
        functional = exported.run_decompositions({})  # functional form; linear and convolution stay whole
    source = functional.module(check_guards=False)
    assert isinstance(source, fx.GraphModule)
    outer, names = _input_names(source)
    inputs = [
        (name, node.meta.get("val")) for name, node in zip(names, traced[len(traced) - len(names) :], strict=True)
    ]
    kept = limits(exported, inputs, symbol_names(inputs, share_batch, declared))
    values = [n.meta.get("val") for n in source.graph.nodes if n.op == "placeholder"]
    builder = _Builder(source, names, symbol_names(zip(names, values, strict=True), share_batch, declared))
    builder.run()
    empty = {item.name: item.empty for item in declared}
    found = tuple(
        Input(name := str(n.target), t, empty.get(name, ""))
        for n in builder.inputs if isinstance(t := info(n).type, TensorType)
    )  # fmt: skip
    out_spec = source._out_spec
    assert out_spec is not None
    signature = Signature(
        found, structure_of(out_spec), {**builder.fixed, **(fixed or {})}, out_spec,
        outer if parameters is None else parameters, kept,
    )  # fmt: skip
    return Program(builder.module(), signature)


def _input_names(source: fx.GraphModule) -> tuple[tuple[str, ...], list[str]]:
    """The parameters of an exported module, and the name of every flat input: that of its path in the call."""
    spec, codegen = source._in_spec, source.graph._codegen
    assert spec is not None
    assert isinstance(codegen, fx.graph._PyTreeCodeGen)
    outer = tuple(codegen.pytree_info.orig_args)
    args, kwargs = pytree.tree_unflatten(range(spec.num_leaves), spec)
    flat = named_leaves({**dict(zip(outer, args, strict=False)), **kwargs})
    if len(flat) < spec.num_leaves:
        raise CaptureError(f"two inputs have the same name among {list(flat)}; rename the keys of their containers")
    return outer, list(flat)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _writes_alone(node: fx.Node) -> bool:
    """Whether an in-place call writes to a tensor of its own, so that its pure form does as well: no view of it was
    taken, it is no input or weight, and no other dtype takes part."""
    written = node.args[0] if node.args else None
    source = written
    while isinstance(source, fx.Node) and source.target is operator.getitem:
        source = source.args[0]
    if not isinstance(written, fx.Node) or not isinstance(source, fx.Node) or source.op != "call_function":
        return False
    owners = {written, source}
    views = [n for n in owners if n is not source and _is_view(n)] + [u for n in owners for u in n.users if _is_view(u)]
    dtypes = {v.dtype for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dim()}
    own = not _is_view(source) or _mutates(source)
    return own and not views and len(dtypes) <= 1 and pure_form(node.target) is not None


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value shares memory with an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem
    return any(r.alias_info is not None for r in node.target._schema.returns) and not _mutates(node)


class _Builder:
    """Copies an exported graph node by node into a flat one, inlining submodule calls that only set the grad mode."""

    def __init__(self, source: fx.GraphModule, names: list[str], symbols: dict[str, str]) -> None:
        self.source, self.names, self.symbols = source, iter(names), symbols
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.fixed: dict[str, Any] = {}
        self.root = nn.Module()
        self.outputs: list[Any] = []
        self.newest: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        self.outputs = self.inline(self.source, None)
        self.graph.output(tuple(self.outputs))
        remove_unused(self.graph)

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(self.root, self.graph)

    def inline(self, gm: fx.GraphModule, arguments: list[Any] | None) -> list[Any]:
        """Copy the nodes of ``gm``; its inputs are ``arguments``, or new placeholders. Returns its outputs."""
        env: dict[fx.Node, Any] = {}
        given = iter(arguments) if arguments is not None else None
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given) if given is not None else self.placeholder(node)
            elif node.op == "get_attr":
                env[node] = self.get_attr(gm, node)
            elif node.op == "output":
                result = self.read(env, node.args[0])
                return list(result) if isinstance(result, (tuple, list)) else [result]
            elif node.op == "call_function" and node.target not in _NO_EFFECT:
                env[node] = self.call(node, env)
        return []

    def placeholder(self, node: fx.Node) -> fx.Node:
        name = next(self.names)
        new = self.graph.placeholder(name)  # the node's own name may differ: fx avoids those of Python builtins
        self.describe(new, node)
        if isinstance(info(new).type, TensorType):
            self.inputs.append(new)
        else:
            self.fixed[name] = _plain(node.meta.get("val"))
            self.graph.erase_node(new)
        return new

    def get_attr(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        name = str(node.target)
        value = operator.attrgetter(name)(gm)
        if not isinstance(value, Tensor):
            return value  # a submodule: the body of a higher order operator
        attach(self.root, name, value.detach())  # the model's own memory, so that ties stay ties
        new = self.graph.create_node("get_attr", name, name=node.name)
        set_info(new, NodeInfo.of_tensor(value, path=name.rpartition(".")[0]))
        return new

    def read(self, env: dict[fx.Node, Any], value: Any) -> Any:
        """Arguments of an exported node in the new graph, after what has been written to them in place."""

        def current(node: fx.Node) -> Any:
            new = env[node]
            while isinstance(new, fx.Node) and new in self.newest:
                new = self.newest[new]
            return new

        return fx.map_arg(value, current)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args: Any = self.read(env, node.args)
        if node.target is _GRAD_MODE:
            return self.inline(args[1], list(args[2:]))
        if node.target is operator.getitem and isinstance(args[0], list):
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise _no_flat_graph(node, args)
        target: Any = pure_form(node.target) if _mutates(node) else node.target
        name = node.name.removesuffix("_") if _mutates(node) else node.name
        new = self.graph.create_node("call_function", target, args, self.read(env, node.kwargs), name=name)
        self.describe(new, node)
        if _mutates(node):
            self.newest[args[0]] = new
        return new

    def describe(self, new: fx.Node, old: fx.Node) -> None:
        path, module = _module_of(old)
        type_ = value_type(old.meta.get("val"), self.symbols)
        new.meta = {META: NodeInfo(type_, path, module, _source_line(old))}


def value_type(value: Any, symbols: dict[str, str]) -> ValueType | None:
    """The type of a traced value (a fake tensor, a symbolic number, a tuple of these)."""
    if isinstance(value, Tensor):
        return TensorType(value.dtype, tuple(_dim(s, symbols) for s in value.shape))
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return ScalarType("int", _dim(value, symbols))
    if isinstance(value, (torch.SymFloat, float)):
        return ScalarType("float")
    if isinstance(value, (torch.SymBool, bool)):
        return ScalarType("bool")
    if isinstance(value, (tuple, list)):
        return tuple(value_type(v, symbols) for v in value)
    return None


def _dim(size: Any, symbols: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    text = str(size.node.expr)
    if text.lstrip("-").isdigit():
        return int(text)
    return in_words(text, symbols)


def _module_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the module whose forward made this node; ``("", "")`` for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [v for v in stack.values() if not v[0].startswith("_empty_nn_module_stack")]  # nodes that torch made up
    if not entries:
        return "", ""
    path, cls = entries[-1]
    name = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"@\d+", "", path), name.rpartition(".")[2]


def _source_line(node: fx.Node) -> str:
    """``file.py:123`` of the model's own code, from the trace that export kept."""
    found = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    own = [(f, n) for f, n in found if is_users(f)] or found
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


_ADVICE = (
    ("autocast", "convert the model with model.to(dtype) in place of autocast"),
    ("cond", "rewrite that control flow with tensor operators such as torch.where"),
    ("", "rewrite it with plain tensor operators, or compile the part of the model that has none of it"),
)
"""What to do about a higher order operator, by a part of its name."""


def _no_flat_graph(node: fx.Node, args: Any) -> CaptureError:
    """For a higher order operator other than the grad mode; its place is that of its body where it has none."""
    bodies = [a for a in pytree.tree_leaves(args) if isinstance(a, fx.GraphModule)]
    inner = [n for body in bodies for n in body.graph.nodes if n.op == "call_function"]
    traced = next((n for n in (node, *inner) if _source_line(n)), node)
    name = str(node.target)
    advice = next(text for part, text in _ADVICE if part in name)
    return CaptureError(
        f"the model uses {name} in module {_module_of(traced)[0] or '(root)'} at {_source_line(traced)}, which has no "
        f"flat graph\nWhat to do: {advice}"
    )
