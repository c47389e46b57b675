"""Capture: a PyTorch module to a Program in one spelling of fx.

``torch.export(strict=False)`` first, ``torch.fx.symbolic_trace`` where export cannot. Either way the result is a flat
graph of aten calls: inputs are placeholders, weights are get_attr nodes that share the model's memory, every node
knows its type, its module's path and the source line it came from.
"""

from __future__ import annotations

import operator
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from fxquant.errors import CaptureError, WeightError
from fxquant.graph import META, NodeInfo, ScalarType, TensorType, ValueType, info, set_info, update_info
from fxquant.rewrite import Log, attach, fetch, remove_unused
from fxquant.program import Program, record
from fxquant.signature import Input, Signature, as_call, structure_of
from fxquant.symbolic import trace_symbolically

Inputs = Any
"""A tuple of positional inputs, or a dict of keyword inputs."""


def capture(model: nn.Module | ExportedProgram, example_inputs: Inputs = None, *, dynamic_shapes: Any = None) -> Program:
    """The program of ``model``, which runs as the model does in eval mode, with no difference in any bit.

    ``dynamic_shapes`` is torch.export's; by default the batch dimension of every input, and the sequence dimension of
    integer, boolean and 3-D inputs, may vary where the model allows. An example of size 1 there is repeated to 2, since
    export would otherwise fix it. Raises CaptureError, naming the module and the source line, or WeightError for
    weights without values.
    """
    begin = time.perf_counter()
    if isinstance(model, ExportedProgram):
        program = _from_export(model, {})
    else:
        check_model(model)
        with _evaluating(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _capture_module(model, example_inputs, dynamic_shapes)
    program.gm.graph.lint()
    program.gm.recompile()
    record(program, "capture", Log(), time.perf_counter() - begin)
    return program


def check_model(model: nn.Module) -> None:
    """Raise an error for what cannot be captured: not a module, or weights on the meta device."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}; expected a torch.nn.Module or an ExportedProgram")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise WeightError(f"{name} is on the meta device and has no values; load the model's weights first")


def _capture_module(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any) -> Program:
    if example_inputs is None:
        raise CaptureError("example_inputs is missing; give a tuple of positional inputs or a dict of keyword inputs")
    args, kwargs = as_call(example_inputs)
    if dynamic_shapes is None:
        args, kwargs = enlarge((args, kwargs))
        shapes = default_dynamic_shapes(model, args, kwargs)
    else:
        shapes = dynamic_shapes
    fixed = {k: v for k, v in kwargs.items() if v is None or isinstance(v, (bool, int, float, str))}
    try:
        exported = export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        if any(_mutates(n) for n in exported.graph.nodes):
            exported = exported.run_decompositions({})  # functional form; linear and convolution stay whole
        return _from_export(exported, fixed)
    except Exception as export_error:
        try:
            return trace_symbolically(model, args, kwargs)
        except Exception as trace_error:
            raise _capture_error(model, export_error, trace_error) from export_error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no KV cache, restored afterwards: module by module, since a model may mix modes."""
    modes = [(m, m.training) for m in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


# --- example inputs and dynamic sizes --------------------------------------------------------------------------------
def dynamic_dims(value: Tensor) -> tuple[int, ...]:
    """The dimensions that may vary: batch; and sequence for token ids, masks and embeddings ``[batch, seq, dim]``."""
    if value.dim() == 0:
        return ()
    tokens = value.dim() == 2 and not value.is_floating_point()
    return (0, 1) if tokens or value.dim() == 3 else (0,)


def enlarge(inputs: Any) -> Any:
    """Inputs with every dynamic dimension of size 1 repeated to 2, if all inputs that have it are of size 1 there."""
    leaves = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    single = {d for d in (0, 1) if all(v.shape[d] == 1 for v in leaves if d in dynamic_dims(v))}

    def grow(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for d in dynamic_dims(value):
            if d in single:
                value = torch.cat([value, value], dim=d)
        return value

    return pytree.tree_map(grow, inputs)


def default_dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dim.AUTO for every dynamic dimension of size 2 or more: export keeps what the model allows and fixes the rest."""

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {d: Dim.AUTO for d in dynamic_dims(value) if value.shape[d] > 1} or None

    by_position = [pytree.tree_map(shape, a) for a in args]
    by_name = {k: pytree.tree_map(shape, v) for k, v in kwargs.items()}
    return by_name if not args else (tuple(by_position) if not kwargs else _merge(model, by_position, by_name))


def _merge(model: nn.Module, by_position: list[Any], by_name: dict[str, Any]) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, by_position, strict=False)), **by_name}


# --- from an ExportedProgram -----------------------------------------------------------------------------------------
_NO_EFFECT = (torch.ops.aten._assert_tensor_metadata.default,)
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def _from_export(exported: ExportedProgram, fixed: dict[str, Any]) -> Program:
    source = exported.module(check_guards=False)
    symbols = _symbol_names(source.graph)
    builder = _Builder(source, symbols)
    builder.run()
    in_names = [Input(n.name, t) for n in builder.inputs if isinstance(t := info(n).type, TensorType)]
    out_spec = source._out_spec
    fixed = {**{n: v for n, v in builder.fixed.items()}, **fixed}
    signature = Signature(tuple(in_names), structure_of(out_spec), fixed, out_spec)
    return Program(builder.module(), signature)


class _Builder:
    """Copies an exported graph node by node into a flat one, inlining submodule calls that only set the grad mode."""

    def __init__(self, source: fx.GraphModule, symbols: dict[str, str]) -> None:
        self.source, self.symbols = source, symbols
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.fixed: dict[str, Any] = {}
        self.root = nn.Module()
        self.outputs: list[Any] = []

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
                result = fx.map_arg(node.args[0], lambda n: env[n])
                return list(result) if isinstance(result, (tuple, list)) else [result]
            elif node.op == "call_function" and node.target not in _NO_EFFECT:
                env[node] = self.call(node, env)
        return []

    def placeholder(self, node: fx.Node) -> fx.Node:
        new = self.graph.placeholder(node.name)
        self.describe(new, node)
        if isinstance(info(new).type, TensorType):
            self.inputs.append(new)
        else:
            self.fixed[node.name] = _plain(node.meta.get("val"))
            self.graph.erase_node(new)
        return new

    def get_attr(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        value: Any = gm
        for part in node.target.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            return value  # a submodule: the body of a higher order operator
        if not hasattr(self.root, node.target):
            _place(self.root, node.target, value)
        new = self.graph.create_node("get_attr", node.target, name=node.name)
        set_info(new, NodeInfo.of_tensor(value, path=node.target.rpartition(".")[0]))
        return new

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg(node.args, lambda n: env[n]), fx.map_arg(node.kwargs, lambda n: env[n])
        if node.target is _GRAD_MODE:
            return self.inline(args[1], list(args[2:]))
        if node.target is operator.getitem and isinstance(args[0], list):
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            path, _ = _module_of(node)
            raise CaptureError(
                f"the model uses {node.target.name()!r} in module {path or '(root)'} ({_source_line(node)}), which has "
                f"no flat graph; rewrite that control flow with tensor operators such as torch.where"
            )
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self.describe(new, node)
        return new

    def describe(self, new: fx.Node, old: fx.Node) -> None:
        path, module = _module_of(old)
        type_ = value_type(old.meta.get("val"), self.symbols)
        new.meta = {META: NodeInfo(type_, path, module, _source_line(old))}


def _place(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer where the model has it, without a copy, so that ties stay ties."""
    attach(root, name, value.detach() if not isinstance(value, nn.Parameter) else value.detach())


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
    return re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), text)


def _symbol_names(graph: fx.Graph) -> dict[str, str]:
    """Export's symbols (s12) to words: batch, sequence, or input_dimN where that name is taken."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for d, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            word = "batch" if d == 0 else "sequence" if d == 1 and d in dynamic_dims(value) else f"{node.name}_dim{d}"
            if word in names.values():
                word = f"{node.name}_dim{d}" if d or word not in names.values() else f"{node.name}_{word}"
            names[symbol] = word
    return names


def _module_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the module whose forward made this node; ``("", "")`` for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, cls = list(stack.values())[-1]
    name = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"@\d+", "", path), name.rpartition(".")[2]


def _source_line(node: fx.Node) -> str:
    """``file.py:123`` of the model's own code, from the trace that export kept."""
    found = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    own = [(f, n) for f, n in found if "/torch/" not in f] or found
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


# --- errors ----------------------------------------------------------------------------------------------------------
def _capture_error(model: nn.Module, exported: Exception, traced: Exception) -> CaptureError:
    where = _where(model, exported)
    reason = str(exported).strip().splitlines() or [type(exported).__name__]
    other = str(traced).strip().splitlines() or [type(traced).__name__]
    return CaptureError(
        f"cannot capture {type(model).__name__}{where}: {type(exported).__name__}: {' '.join(reason[:3])[:400]}\n"
        f"torch.fx.symbolic_trace could not either: {type(traced).__name__}: {other[0][:200]}\n"
        f"What to do: replace data-dependent Python control flow at that line by tensor operators (torch.where, masks), "
        f"move it out of forward, or compile the part of the model that has none."
    )


def _where(model: nn.Module, error: Exception) -> str:
    """`` in module 'a.b' (Class) at file.py:12`` for the innermost frame of the traceback in a forward of the model."""
    names = {id(m): n for n, m in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        code = frame.tb_frame.f_code
        if isinstance(owner, nn.Module) and id(owner) in names and "/torch/nn/" not in code.co_filename:
            path = names[id(owner)] or "(root)"
            found = f" in module {path!r} ({type(owner).__name__}) at {code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found
