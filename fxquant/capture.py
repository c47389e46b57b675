"""Capture: a PyTorch module to a Program in one spelling of fx.

``torch.export(strict=False)`` first, ``torch.fx.symbolic_trace`` where export cannot. Either way the result is a flat
graph of aten calls: inputs are placeholders, weights are get_attr nodes that share the model's memory, every node
knows its type, its module's path and the source line it came from.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from fxquant.errors import CaptureError, WeightError
from fxquant.graph import META, NodeInfo, ScalarType, TensorType, ValueType, info, set_info
from fxquant.program import Program, record
from fxquant.rewrite import Log, attach, remove_unused
from fxquant.signature import Input, Signature, as_call, structure_of
from fxquant.symbolic import pure_form, trace_symbolically

Inputs = Any
"""A tuple of positional inputs, or a dict of keyword inputs."""


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Inputs = None, *, dynamic_shapes: Any = None
) -> Program:
    """The program of ``model``, which runs as the model does in eval mode, with no difference in any bit.

    ``dynamic_shapes`` is torch.export's; by default the batch dimension of every input, and the sequence dimension of
    integer, boolean and 3-D inputs, may vary where the model allows. An example of size 1 there is repeated to 2, since
    export would otherwise fix it. Inputs whose examples have the same batch size share that dimension. Raises
    CaptureError, naming the module and the source line, or WeightError for weights without values.
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
        head = name.partition(".")[0]
        if hasattr(fx.GraphModule, head) or head in ("meta", "_graph"):
            raise CaptureError(f"{name}: torch.fx keeps the name {head!r} for itself; rename that attribute")


def _capture_module(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any) -> Program:
    if example_inputs is None:
        raise CaptureError("example_inputs is missing; give a tuple of positional inputs or a dict of keyword inputs")
    args, kwargs = as_call(example_inputs)
    kwargs = _in_order_of_forward(model, kwargs)
    fixed = {k: v for k, v in kwargs.items() if v is None or isinstance(v, (bool, int, float, str))}
    try:
        return _from_export(_export(model, args, kwargs, dynamic_shapes), fixed, share_batch=dynamic_shapes is None)
    except Exception as export_error:
        try:
            return trace_symbolically(model, args, kwargs)
        except Exception as trace_error:
            raise _capture_error(model, export_error, trace_error) from export_error


def _in_order_of_forward(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of forward's parameters, which is their order in a positional call."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """``torch.export``, by default with dynamic sizes on an enlarged example, else on the example as it is."""
    if dynamic_shapes is not None:
        return _export_quietly(model, args, kwargs, dynamic_shapes)
    large_args, large_kwargs = enlarge((args, kwargs))
    shapes = default_dynamic_shapes(model, large_args, large_kwargs)
    try:
        return _export_quietly(model, large_args, large_kwargs, shapes)
    except Exception:
        try:
            return _export_quietly(model, args, kwargs, None)  # a model of fixed sizes
        except Exception:
            pass  # the first error says more
        raise


def _export_quietly(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> ExportedProgram:
    """Export without what torch prints on the way to an error: the graph so far, and hints for its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            return export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no KV cache, restored afterwards: module by module, since a model may mix modes."""
    modes = [(m, m.training) for m in model.modules()]
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", None)}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in configs.values():
            config.use_cache = True


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
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, by_position, strict=False)), **by_name}


# --- from an ExportedProgram -----------------------------------------------------------------------------------------
_NO_EFFECT = (torch.ops.aten._assert_tensor_metadata.default,)
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def _from_export(exported: ExportedProgram, fixed: dict[str, Any], *, share_batch: bool = False) -> Program:
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if any(_mutates(n) and not _writes_alone(n) for graph in graphs for n in graph.nodes):
        exported = exported.run_decompositions({})  # functional form; linear and convolution stay whole
    source = exported.module(check_guards=False)
    assert isinstance(source, fx.GraphModule)
    builder = _Builder(source, _symbol_names(source.graph, share_batch))
    builder.run()
    inputs = tuple(Input(str(n.target), t) for n in builder.inputs if isinstance(t := info(n).type, TensorType))
    out_spec = source._out_spec
    assert out_spec is not None
    signature = Signature(inputs, structure_of(out_spec), {**builder.fixed, **fixed}, out_spec)
    return Program(builder.module(), signature)


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

    def __init__(self, source: fx.GraphModule, symbols: dict[str, str]) -> None:
        self.source, self.symbols = source, symbols
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
        new = self.graph.placeholder(str(node.target))  # its name may differ: fx avoids those of Python builtins
        self.describe(new, node)
        if isinstance(info(new).type, TensorType):
            self.inputs.append(new)
        else:
            self.fixed[str(node.target)] = _plain(node.meta.get("val"))
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
            path, _ = _module_of(node)
            raise CaptureError(
                f"the model uses {node.target!s} in module {path or '(root)'} ({_source_line(node)}), which has "
                f"no flat graph; rewrite that control flow with tensor operators such as torch.where"
            )
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
    return re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), text)


def _symbol_names(graph: fx.Graph, share_batch: bool) -> dict[str, str]:
    """Export's symbols (s12) to words: batch, sequence, or input_dimN where that name is taken.

    With ``share_batch``, first dimensions of the same example size are one dimension, also where export found no
    operator that needs it.
    """
    names: dict[str, str] = {}
    batch: int | None = None
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for d, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            hint = getattr(size.node, "hint", None)
            word = "batch" if d == 0 else "sequence" if d == 1 and d in dynamic_dims(value) else f"{node.name}_dim{d}"
            shared = share_batch and d == 0 and hint is not None and hint == batch
            if word in names.values() and not shared:
                word = f"{node.name}_dim{d}" if d else f"{node.name}_{word}"
            elif word == "batch":
                batch = hint
            names[symbol] = word
    return names


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
    own = [(f, n) for f, n in found if "/torch/" not in f] or found
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


# --- errors ----------------------------------------------------------------------------------------------------------
def _capture_error(model: nn.Module, exported: Exception, traced: Exception) -> CaptureError:
    where = _where(model, exported)
    advice = ""
    if hasattr(model, "set_experts_implementation"):
        advice = "call model.set_experts_implementation('batched_mm') first, which has no loop over the experts; or "
    return CaptureError(
        f"cannot capture {type(model).__name__}{where}: {type(exported).__name__}: {_summary(exported, 400)}\n"
        f"torch.fx.symbolic_trace could not either: {type(traced).__name__}: {_summary(traced, 200)}\n"
        f"What to do: {advice}replace data-dependent Python control flow at that line by tensor operators "
        f"(torch.where, masks), move it out of forward, or compile the part of the model that has none."
    )


def _summary(error: Exception, length: int) -> str:
    """The first paragraph of an error's text."""
    return " ".join(str(error).strip().partition("\n\n")[0].split())[:length]


def _where(model: nn.Module, error: Exception) -> str:
    """`` in module 'a.b' (Class) at file.py:12`` for the innermost frame of the traceback in a forward of the model."""
    names = {id(m): n for n, m in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        owner = frame.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in names and "/torch/" not in code.co_filename:
            path = names[id(owner)] or "(root)"
            found = f" in module {path!r} ({type(owner).__name__}) at {code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found
