"""The fallback capture: torch.fx.symbolic_trace, for models that torch.export refuses.

    y = self.act(self.conv(x))      fx: call_module conv, call_module act  ->  aten.conv2d(x, w, b), aten.relu(_)

fx records which functions and modules the forward calls; each of those is then run on the example and replaced by the
aten operators that it dispatches to, so that the result is spelled as torch.export spells it. Sizes are those of the
example. A number taken from data (``x.sum().item()``) stays a number computed in the graph.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxquant.eager import copies, difference, is_users, run_model, unchanged
from fxquant.errors import CaptureError
from fxquant.graph import NodeInfo, ScalarType, TensorType, ValueType, info, set_info
from fxquant.program import Program
from fxquant.rewrite import aten, attach, remove_unused, tensors
from fxquant.signature import Input, Signature, by_parameter, named_leaves, parameters_of, structure_of

Function = Callable[..., Any]
Values = dict[fx.Node, Any]


def trace_symbolically(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The program of ``model`` for inputs of exactly the example's sizes; arguments that are no tensors are fixed.

    Raises CaptureError for what cannot be traced, naming it, and where the program's result is not that of the model.
    """
    call = inspect.signature(model.forward).bind(*args, **kwargs)
    call.apply_defaults()
    bound = named_leaves(by_parameter(call))
    with unchanged(model), torch.no_grad():
        lowering = _Lowering(model, bound)
        outputs = lowering.run(_Tracer(call, bound).trace(model))
    flat, out_spec = pytree.tree_flatten(outputs)
    lowering.graph.output(tuple(flat))
    remove_unused(lowering.graph)
    inputs = tuple(Input(str(n.target), t) for n in lowering.inputs if isinstance(t := info(n).type, TensorType))
    fixed = {k: v for k, v in bound.items() if v is None or isinstance(v, (bool, int, float, str))}
    gm = fx.GraphModule(lowering.root, lowering.graph)
    program = Program(gm, Signature(inputs, structure_of(out_spec), fixed, out_spec, parameters_of(model)))
    _check_same(model, program, args, kwargs, [v for v in bound.values() if isinstance(v, Tensor)])
    return program


class _Tracer(fx.Tracer):
    """fx's tracer on one call: a placeholder for each of its tensors, every other argument as it is."""

    def __init__(self, call: inspect.BoundArguments, bound: dict[str, Any]) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.call, self.bound = call, bound

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [
            self.create_proxy("placeholder", name, (), {}) if isinstance(value, Tensor) else value
            for name, value in self.bound.items()
        ]
        spec = pytree.tree_structure(dict(self.call.arguments))
        self.call.arguments.update(pytree.tree_unflatten(proxies, spec))
        return lambda root: root_fn(root, *self.call.args, **self.call.kwargs), [self.root]


def _check_same(model: nn.Module, program: Program, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
    want = run_model(model, args, kwargs)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        got = list(program.gm(*copies(inputs)))
    if different := difference(got, want):
        raise CaptureError(
            f"{different} of the traced graph differs from the model's: its forward depends on state or changes "
            f"tensors through views; make it a function of its inputs"
        )


# --- from recorded calls to aten operators ----------------------------------------------------------------------------
_FROM_DATA = {"item": aten.item.default}  # methods whose result is a number computed in the graph
_OF_TYPE = (
    getattr, len, "size", "dim", "ndimension", "numel", "nelement", "stride", "type", "is_floating_point", "is_complex",
    "is_contiguous", "element_size", "get_device", "new_tensor", torch.is_tensor, torch.is_floating_point, torch.numel,
)  # fmt: skip
"""Calls whose result follows from a tensor's type, which is fixed here."""
_SCALAR = {getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow")}
"""Arithmetic on numbers, kept as it is."""
_SIZED = (aten.view.default, aten.reshape.default, aten.expand.default, aten.unflatten.int, aten.arange.default)
"""Operators that take the size of their result."""


class _Lowering:
    """Builds the graph of aten calls, call by call. ``value[n]`` is what node ``n`` gives for the example.

    A call that writes in place becomes the call that does not, and ``newest`` sends later readers to its result.
    ``resized`` holds the nodes whose size depends on data.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.bound = model, inputs
        self.graph, self.root = fx.Graph(), nn.Module()
        self.inputs: list[fx.Node] = []
        self.value: dict[fx.Node, Any] = {}
        self.newest: dict[fx.Node, fx.Node] = {}
        self.resized: set[fx.Node] = set()
        self.names = {id(t): name for name, t in reversed(tensors(model).items())}
        self.where = NodeInfo()

    def run(self, graph: fx.Graph) -> Any:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            self.where = NodeInfo(None, *_origin(self.model, node))
            if node.op == "placeholder":
                env[node] = self.placeholder(str(node.target), self.bound[str(node.target)])
            elif node.op == "get_attr":
                found = operator.attrgetter(str(node.target))(self.model)
                env[node] = self.constant(found) if isinstance(found, Tensor) else found
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                if node.op == "output":
                    return _plain(fx.map_arg(args[0], self.current))
                env[node] = self.call(node, *fx.map_arg((args, kwargs), self.current))
        raise AssertionError("a graph without output")

    def placeholder(self, name: str, example: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self.inputs.append(node)
        return self.describe(node, example.clone())

    def constant(self, value: Tensor) -> fx.Node:
        """The node that reads a tensor of the model, or one that its forward made."""
        name = self.names.setdefault(id(value), f"constant_{len(self.names)}")
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return self.current(node)
        attach(self.root, name, value.detach())
        node = self.graph.create_node("get_attr", name, name=re.sub(r"\W", "_", name))
        set_info(node, NodeInfo.of_tensor(value, path=name.rpartition(".")[0]))
        self.value[node] = value.detach()
        return node

    def current(self, node: fx.Node) -> fx.Node:
        while node in self.newest:
            node = self.newest[node]
        return node

    def describe(self, node: fx.Node, value: Any) -> fx.Node:
        self.value[node] = value
        set_info(node, NodeInfo(_type_of(value), self.where.path, self.where.module, self.where.source))
        return node

    def emit(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A call in the new graph, run on the example; one that writes in place as its pure form."""
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        pure = pure_form(target) if writes else target
        if pure is None:
            raise CaptureError(f"{target} writes to its argument and has no form that does not")
        args, kwargs = fx.map_arg((args, kwargs), self.current)
        values = fx.map_arg((args, kwargs), lambda n: self.value[n])
        node = self.describe(self.graph.call_function(pure, args, kwargs), pure(*values[0], **values[1]))
        if writes:
            self.newest[args[0]] = node
        if any(n in self.resized for n in node.all_input_nodes):
            self.resized.add(node)
        return node

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a recorded call gives: nodes of the new graph for tensors and numbers from data, else plain values."""
        nodes = [v for v in pytree.tree_leaves(_open_slices((args, kwargs))) if isinstance(v, fx.Node)]
        numbers = [n for n in dict.fromkeys(nodes) if _is_number(self.value[n])]
        function = _function(self.model, node)
        if node.op == "call_method" and node.target in _FROM_DATA:
            return self.emit(_FROM_DATA[str(node.target)], args, kwargs)
        if node.target in _SCALAR and nodes and all(_is_number(self.value[n]) for n in nodes):
            return self.emit(node.target, args, kwargs)
        if not nodes and node.op != "call_module":
            result = function(*args, **kwargs)
            return self.constant(result) if isinstance(result, Tensor) else result
        if node.target in _OF_TYPE and not numbers:
            values = fx.map_arg((args, kwargs), lambda n: self.value[n])
            result = function(*values[0], **values[1])
            if not isinstance(result, Tensor):  # x.shape, but not x.T
                if self.resized.intersection(nodes):
                    raise CaptureError(f"{_describe(node)} asks for the size of a tensor whose size depends on data")
                return result
        return self.inline(node, function, args, kwargs, numbers)

    def inline(self, node: fx.Node, function: Function, args: Any, kwargs: Any, numbers: list[fx.Node]) -> Any:
        """The aten operators that ``function`` dispatches to on the example, copied into the graph."""
        record = _record(function, args, kwargs, self.value)
        again = self.record_varied(node, record, function, args, kwargs, numbers) if numbers else record
        self.check_sizes(node, record)
        given, env = iter(record.inputs), dict[fx.Node, Any]()
        for old, other in zip(record.gm.graph.nodes, again.gm.graph.nodes, strict=True):
            if old.op == "placeholder":
                env[old] = next(given)
            elif old.op == "get_attr":
                env[old] = self.constant(getattr(record.gm, str(old.target)))
            elif old.op == "output":
                leaves = [env[v] if isinstance(v, fx.Node) else v for v in old.args[0]]
                if any(_is_number(v) for v in leaves):
                    raise CaptureError(f"{_describe(node)} gives a number, which cannot be traced")
                if record.shapes != again.shapes:
                    self.resized.update(v for v in leaves if isinstance(v, fx.Node))
                return pytree.tree_unflatten(leaves, record.out_spec)
            elif isinstance(old.target, torch._ops.OpOverload) or old.target is operator.getitem:
                arguments, keywords, _ = self.arguments(node, old, other, again)
                env[old] = self.emit(old.target, *fx.map_arg((arguments, keywords), lambda n: env.get(n, n)))
        raise AssertionError("a graph without output")

    def check_sizes(self, node: fx.Node, record: _Record) -> None:
        """Refuse a function that reshapes by sizes that it asked for (literals by now) where they depend on data."""
        sized = [n for n in record.gm.graph.nodes if n.target in _SIZED]
        if sized and len(record.gm.graph.nodes) > len(record.inputs) + 2 and self.resized.intersection(record.inputs):
            raise CaptureError(f"{_describe(node)} reshapes a tensor whose size depends on data")

    def record_varied(
        self, node: fx.Node, first: _Record, function: Function, args: Any, kwargs: Any, numbers: list[fx.Node]
    ) -> _Record:
        """The same call with each of ``numbers`` another value, to see which arguments follow from them: a record of
        the same operators, in which every number shows."""
        for sign in (1, -1):
            varied = {n: self.value[n] + sign * (i + 1) for i, n in enumerate(numbers)}
            try:
                again = _record(function, args, kwargs, {**self.value, **varied}, varied)
            except Exception:  # out of range, say: the other sign may do
                continue
            if [n.target for n in first.gm.graph.nodes] != [n.target for n in again.gm.graph.nodes]:
                continue
            pairs = zip(first.gm.graph.nodes, again.gm.graph.nodes, strict=True)
            if {n for a, b in pairs for n in self.arguments(node, a, b, again)[2]} == set(numbers):
                return again
        raise CaptureError(f"{_describe(node)} uses a number computed from data in a way that cannot be traced")

    def arguments(self, node: fx.Node, old: fx.Node, other: fx.Node, again: _Record) -> tuple[Any, Any, set[fx.Node]]:
        """The arguments of ``old`` with the node in place of each number that differs in ``other``; those nodes."""
        flat, spec = pytree.tree_flatten((old.args, old.kwargs))
        second, used = pytree.tree_leaves((other.args, other.kwargs)), set()
        for i, (a, b) in enumerate(zip(flat, second, strict=True)):
            if isinstance(a, fx.Node) or (type(a) is type(b) and a == b):
                continue
            found = [n for n, v in again.varied.items() if self.value[n] == a and v == b]
            if not found:
                raise CaptureError(f"{_describe(node)} uses a number computed from data in a way that cannot be traced")
            flat[i] = found[0]
            used.add(found[0])
        arguments, keywords = pytree.tree_unflatten(flat, spec)
        return arguments, keywords, used


@dataclass
class _Record:
    """The aten graph of one call: ``inputs`` are its tensors in order, ``shapes`` those of its outputs."""

    gm: fx.GraphModule
    inputs: list[fx.Node]
    out_spec: pytree.TreeSpec
    shapes: list[Any]
    varied: Values


def _record(function: Function, args: Any, kwargs: Any, value: Values, varied: Values | None = None) -> _Record:
    """Run ``function`` on copies of the example and keep the operators that it dispatches to."""
    flat, spec = pytree.tree_flatten(_open_slices((args, kwargs)))
    inputs = list(dict.fromkeys(v for v in flat if isinstance(v, fx.Node) and isinstance(value[v], Tensor)))
    seen: list[Any] = []

    def call(*given: Tensor) -> list[Any]:
        tensors_ = dict(zip(inputs, given, strict=True))
        leaves = [tensors_.get(v, value.get(v)) if isinstance(v, fx.Node) else v for v in flat]
        call_args, call_kwargs = _restore_slices(pytree.tree_unflatten(leaves, spec))
        results, out_spec = pytree.tree_flatten(function(*call_args, **call_kwargs))
        seen[:] = [out_spec, [tuple(r.shape) if isinstance(r, Tensor) else r for r in results]]
        return results

    gm = make_fx(call, pre_dispatch=True)(*(value[n].clone() for n in inputs))
    return _Record(gm, inputs, seen[0], seen[1], varied or {})


class _Slice(NamedTuple):
    """A slice as a container, which pytree can look into."""

    start: Any
    stop: Any
    step: Any


def _open_slices(value: Any) -> Any:
    return pytree.tree_map(lambda v: _Slice(v.start, v.stop, v.step) if isinstance(v, slice) else v, value)


def _restore_slices(value: Any) -> Any:
    is_slice = lambda v: isinstance(v, _Slice)  # noqa: E731
    return pytree.tree_map(lambda v: slice(*v) if isinstance(v, _Slice) else v, value, is_leaf=is_slice)


def _plain(value: Any) -> Any:
    """fx's immutable lists and dicts as the model's own."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return tuple(_plain(v) for v in value) if type(value) is tuple else value


def _function(model: nn.Module, node: fx.Node) -> Function:
    """What a recorded call runs."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    if node.op == "call_method":
        return lambda owner, *args, **kwargs: getattr(owner, str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target


def pure_form(target: Any) -> Any | None:
    """The operator that returns what an in-place one writes (aten.relu_ -> aten.relu), or None if there is none."""
    name = target._schema.name.partition("::")[2]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = packet is not None and target._overloadname in packet.overloads()
    return getattr(packet, target._overloadname) if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _type_of(value: Any) -> ValueType | None:
    if isinstance(value, Tensor):
        return TensorType(value.dtype, tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(_type_of(v) for v in value)
    return ScalarType(type(value).__name__) if _is_number(value) else None


def _origin(model: nn.Module, node: fx.Node) -> tuple[str, str, str]:
    """Path and class of the module that a recorded call belongs to, and its source line."""
    if node.op == "call_module":
        path = str(node.target)
    else:
        path = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
    return path, type(model.get_submodule(path)).__name__, _line(node)


def _line(node: fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', str(node.stack_trace or ""))
    own = [(file, line) for file, line in found if is_users(file)] or found
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def _describe(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{name} at {_line(node) or 'an unknown line'}"
