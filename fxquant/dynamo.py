"""The backend ``fxquant`` of torch.compile: ``torch.compile(model, backend="fxquant", options={"config": ...})``.

Dynamo hands over a graph of torch calls in which parameters are inputs. They become weights again, under the names that
they have in the model; then the graph is compiled as any model is. What runs reads packed weights; the float ones stay
in the model, since they are its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing

from fxquant.compiled import CompiledModel
from fxquant.errors import CaptureError, ConfigError, InputError, near
from fxquant.graph import info
from fxquant.pipeline import compile as compile_model
from fxquant.rewrite import aten, attach, free_name

OPTIONS = {"config": "W6A16-E3M2", "calibration": None, "on_compiled": None}
"""``config``, ``calibration``: as ``fxquant.compile`` takes them; ``on_compiled``: called with every CompiledModel."""


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: Any = None
) -> Callable[..., Any]:
    """What runs in the place of ``gm``: its linears and convolutions on packed weights.

    A graph that has no weight, as a graph break can leave, runs as it is. Raises ConfigError for options
    that are not known and for rules that match no layer of the graph, CaptureError for what cannot be captured and for
    models in training mode; what it returns raises InputError once weights were changed after they were packed, and at
    a backward pass.
    """
    given = {**OPTIONS, **_checked(options, mode)}
    root, inputs, weights = _as_module(gm, example_inputs)
    examples = tuple(example_inputs[i] for i in inputs)
    if not any(value.dim() > 1 for value in weights.values()):
        return gm.forward
    with tracing(None):  # what dynamo is tracing is not what is captured here
        compiled = compile_model(
            root, examples, given["config"], calibration=given["calibration"], dynamic_shapes=tuple(inputs.values())
        )
    _check_inference(compiled)
    if given["on_compiled"] is not None:
        given["on_compiled"](compiled)
    return _runner(compiled, list(inputs), weights)


def _checked(options: Mapping[str, Any] | None, mode: Any) -> Mapping[str, Any]:
    options = options or {}
    if unknown := sorted(options.keys() - OPTIONS.keys()):
        raise ConfigError(f"unknown option {unknown[0]!r} of the backend fxquant{near(unknown[0], OPTIONS)}; expected "
                          f"{', '.join(OPTIONS)}: torch.compile(..., options={{'config': 'W6A16-E3M2'}})")  # fmt: skip
    if mode is not None:
        raise ConfigError(f"the backend fxquant has no mode {mode!r}; leave mode out and choose with options")
    return options


def _check_inference(compiled: CompiledModel) -> None:
    """CaptureError where the graph is that of a model in training: it drops values, or updates statistics."""
    for node in compiled.program.gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        position = next((at for word, at in _TRAINS.items() if name.startswith(word)), len(node.args))
        if node.op == "call_function" and position < len(node.args) and node.args[position] is True:
            raise CaptureError(
                f"{info(node).path or node.name} is in training mode ({name}), and the backend fxquant is for "
                f"inference; call model.eval() first"
            )


_TRAINS = {"dropout": 2, "native_dropout": 2, "batch_norm": 5, "_native_batch_norm_legit": 5, "instance_norm": 5}
"""Operators that do more when they train, and where they are told so."""


# --- the graph with its weights ---------------------------------------------------------------------------------------
Sizes = dict[int, Any]
"""Which dimensions of an input vary, as torch.export takes it."""


def _as_module(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, dict[int, Sizes], dict[int, Tensor]]:
    """``gm`` with its parameters and buffers on itself; by position, the inputs that are left, and the weights."""
    graph, root = fx.Graph(), nn.Module()
    nodes: dict[fx.Node, Any] = {}
    numbers: dict[fx.Node, float] = {}
    inputs: dict[int, Sizes] = {}
    weights: dict[int, Tensor] = {}
    sizes: list[fx.Node] = []
    by_source: dict[str, fx.Node] = {}
    attach_all(root, gm)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value, source = example_inputs[i], _source(node)
        if not isinstance(value, Tensor):
            sizes.append(node)
        elif _is_weight(node, value) or _is_number(node):
            weights[i] = value
            if _is_number(node):
                numbers[node] = float(value)
            name = free_name(root, _weight_name(source, node))
            attach(root, name, value.detach())
            nodes[node] = graph.get_attr(name)
        else:
            inputs[i] = _varying(node)
            nodes[node] = by_source[source] = graph.placeholder(_input_name(source, node))
    for node in sizes:
        nodes[node] = _size(graph, node, by_source)
    for node in gm.graph.nodes:
        if node.target == "item" and node.args[0] in numbers:
            nodes[node] = numbers[node.args[0]]
        elif node.op != "placeholder" and getattr(node.target, "__name__", "") not in _SAYS_NOTHING:
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
            nodes[node].meta["nn_module_stack"] = _paths(node)
    module = fx.GraphModule(root, graph)
    type(module).__call__ = nn.Module.__call__  # type: ignore[method-assign]  # fx prints what it raises
    return module, inputs, weights


def _paths(node: fx.Node) -> dict[str, Any]:
    """The modules that a node came from, by their paths in the model."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (_weight_name(path, node) if "." in path else "", kind) for key, (path, kind) in stack.items()}


_SAYS_NOTHING = ("_log_api_usage_once",)


def attach_all(root: nn.Module, gm: fx.GraphModule) -> None:
    """Give ``root`` the tensors and graphs that ``gm`` holds itself: constants, bodies of higher-order operators."""
    for name, child in gm.named_children():
        root.add_module(name, child)
    for name, value in {**dict(gm.named_parameters(recurse=False)), **dict(gm.named_buffers(recurse=False))}.items():
        root.register_buffer(name, value.detach())


def _size(graph: fx.Graph, node: fx.Node, by_source: Mapping[str, fx.Node]) -> fx.Node:
    """A size that dynamo hands over as an input, taken from the input it is the size of."""
    found = re.fullmatch(r"(.*)\.size\(\)\[(\d+)\]", _source(node))
    if found is None or found[1] not in by_source:
        raise CaptureError(
            f"the graph takes the number {_source(node) or node.name}, which varies from call to call and is no size "
            f"of one of its inputs; make it a constant, or compile with torch.compile(..., dynamic=False)"
        )
    return graph.call_function(aten.sym_size.int, (by_source[found[1]], int(found[2])))


def _varying(node: fx.Node) -> Sizes:
    value = node.meta.get("example_value")
    shape = value.shape if isinstance(value, Tensor) else ()
    return {d: torch.export.Dim.AUTO for d, size in enumerate(shape) if not isinstance(size, int)}


def _source(node: fx.Node) -> str:
    """Where dynamo found an input, such as ``L['self']._modules['head']._parameters['weight']``."""
    found = node.meta.get("grapharg")
    return str(getattr(getattr(found, "source", None), "name", "")) if found is not None else ""


def _is_weight(node: fx.Node, value: Tensor) -> bool:
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return isinstance(value, nn.Parameter) or static is not None or "._buffers['" in _source(node)


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a float attribute of the model, such as an epsilon, that dynamo hands over in a tensor."""
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


_STRUCTURE = ("_modules", "_parameters", "_buffers", "kwargs", "args")


def _weight_name(source: str, node: fx.Node) -> str:
    """``layers.0.weight`` for ``L['self']._modules['layers']._modules['0']._parameters['weight']``."""
    found = re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", source)
    words = [key or attribute for key, attribute in found if (key or attribute) not in _STRUCTURE]
    return ".".join(words[1:] or words) or node.name  # the first is what the model is called where it is compiled


def _input_name(source: str, node: fx.Node) -> str:
    """``input_ids`` for ``L['kwargs']['input_ids']``; the node's own name for what has none of its own."""
    last = re.findall(r"\['(\w+)'\]$", source)
    return last[0] if last and last[0] not in _STRUCTURE else node.name


# --- calls ------------------------------------------------------------------------------------------------------------
class _Inference(torch.autograd.Function):
    """Its outputs are what the program computed; a gradient of them is an error."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *outputs: Any) -> Any:
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            "the backend fxquant computes no gradients: packed weights are for inference; train the float model, or "
            "put the packed weights into it with fxquant.quantize_, whose layers pass gradients to their inputs"
        )


def _runner(compiled: CompiledModel, inputs: list[int], weights: Mapping[int, Tensor]) -> Callable[..., Any]:
    versions = {i: (value.data_ptr(), value._version) for i, value in weights.items()}
    buffers = {i: value.clone() for i, value in weights.items() if not isinstance(value, nn.Parameter)}

    def run(*args: Any) -> Any:
        for i, known in versions.items():
            if (now := (args[i].data_ptr(), args[i]._version)) != known:
                if i in buffers and torch.equal(args[i], buffers[i]):  # written anew with what it was
                    versions[i] = now
                    continue
                raise InputError(
                    "a weight or a number of the model was changed after the backend fxquant packed it; call "
                    "torch._dynamo.reset() and run the model again to pack it anew"
                )
        outputs = compiled(*[args[i] for i in inputs])
        anchor = next((a for a in args if isinstance(a, Tensor) and a.requires_grad), None)
        if anchor is None or not torch.is_grad_enabled():
            return outputs
        return _Inference.apply(anchor, *outputs)  # type: ignore[no-untyped-call]

    return run
