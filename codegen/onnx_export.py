"""Export a program to an ONNX file that onnxruntime executes, its weights packed as they are in torch.

Nodes are called by module and node of the fx graph (``onnx_words``), values like the latter, initializers like the
tensors of the model, inputs and outputs like those of its signature; a dynamic size is a ``dim_param`` of that name.
Layers on packed weights are nodes of the ``fxquant`` domain, which the file also defines in standard operators
(``onnx_functions``). What each operator becomes is one row of a table (``onnx_ops``).
"""

from __future__ import annotations

import importlib.metadata
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx

from fxquant.codegen.onnx_builder import DEFAULT, Builder, Options, UnsupportedError, is_number, no_kernel, onnx_dtype
from fxquant.codegen.onnx_complex import ComplexError, in_pairs
from fxquant.codegen.onnx_file import FILE_LIMIT, MAPPED, writable, write
from fxquant.codegen.onnx_functions import DOMAIN, VERSION, functions
from fxquant.codegen.onnx_metadata import described
from fxquant.codegen.onnx_ops import BY_NAME, CONVERTERS, NO_VALUE
from fxquant.codegen.onnx_rotary import fused
from fxquant.codegen.onnx_standard import MICROSOFT
from fxquant.codegen.onnx_words import name_nodes
from fxquant.errors import ExportError, SaveError
from fxquant.graph import NodeInfo, ScalarType, TensorType, info
from fxquant.program import Program, Progress, quiet, target_name
from fxquant.rewrite import fetch, identity
from fxquant.signature import output_names

OPSETS = range(21, min(26, onnx.defs.onnx_opset_version()) + 1)
"""What the exporter was tested with, as far as the installed onnx knows it."""


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int = 21,
    options: Options = DEFAULT,
    metadata: Mapping[str, str] = {},
    external_data: bool | None = None,
    progress: Progress = quiet,
) -> None:
    """Write ``program`` to ``path``; an existing file is replaced only once the new one is complete.

    ``external_data`` puts the weights into ``<path>.data`` beside it, which onnxruntime then maps; by default above
    64 MB. Raises ExportError, naming the node, for what ONNX cannot express; SaveError if ``path`` cannot be written.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; expected {OPSETS[0]} to {OPSETS[-1]}, or no opset")
    target = writable(Path(path))
    model = to_model(program, opset=opset, options=options, metadata=metadata, progress=progress)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if external_data is False and size > FILE_LIMIT:
        raise SaveError(f"{path}: {size} bytes of weights do not fit into one file; leave external_data at its default")
    write(model, target, external_data=size > MAPPED if external_data is None else external_data)


def to_model(
    program: Program, *, opset: int = 21, options: Options = DEFAULT, metadata: Mapping[str, str] = {},
    progress: Progress = quiet,
) -> ir.Model:  # fmt: skip
    """``program`` as an ONNX model in memory; its initializers share the program's memory."""
    return _Exporter(program, opset, options).run(metadata, progress)


class _Exporter:
    """Converts a graph node by node; ``env`` holds the ONNX value of every fx node."""

    def __init__(self, program: Program, opset: int, options: Options) -> None:
        self.program, self.opset, self.options = program, opset, options
        self.builder = Builder(opset, options, self.unique)
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[ir.Value] = []
        self.initializers: dict[tuple[object, ...], ir.Value] = {}
        self.results = output_names(program.signature.output)
        self.names = {item.name for item in program.signature.inputs} | set(self.results)

    def run(self, metadata: Mapping[str, str], progress: Progress) -> ir.Model:
        try:
            nodes = list(in_pairs(self.program.gm.graph).nodes)
        except ComplexError as reason:
            raise ExportError(self.refusal(reason.node, f"cannot be written in ONNX: {reason}")) from reason
        names = iter(self.program.signature.inputs)
        outputs: list[ir.Value] = []
        for done, node in enumerate(nodes):
            progress("export to ONNX", done, len(nodes))
            if node.op == "placeholder":
                self.env[node] = self.input(node, next(names).name)
            elif node.op == "get_attr":
                self.env[node] = self.initializer(str(node.target))
            elif node.op == "output":
                outputs = self.outputs(node)
            elif node.target not in NO_VALUE:
                self.env[node] = self.call(node)
        progress("export to ONNX", len(nodes), len(nodes))
        return self.model(outputs, metadata)

    def unique(self, name: str) -> str:
        """``name``, or ``name_1``, ... where a value has it already."""
        found, count = name, 0
        while found in self.names:
            count += 1
            found = f"{name}_{count}"
        self.names.add(found)
        return found

    def input(self, node: fx.Node, name: str) -> ir.Value:
        value = _describe(ir.Value(name=name), info(node))
        self.inputs.append(value)
        return value

    def initializer(self, name: str) -> ir.Value:
        """The tensor ``name`` of the module; tied tensors are one initializer, under the first name."""
        tensor = fetch(self.program.gm, name).detach()
        key = identity(tensor)
        if key not in self.initializers:
            unique = self.unique(name)
            value = _describe(ir.Value(name=unique), NodeInfo.of_tensor(tensor))
            value.const_value = TorchTensor(tensor.contiguous(), name=unique)
            self.initializers[key] = value
        return self.initializers[key]

    def call(self, node: fx.Node) -> Any:
        """The ONNX value of a call: a static number as it is, else what the table's converter makes."""
        found = info(node).type
        if isinstance(found, ScalarType) and isinstance(found.value, int):
            return found.value
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return self.element(node)
        args, kwargs = fx.map_arg(_arguments(node), lambda n: self.env[n])
        if not isinstance(node.target, torch._ops.OpOverload) and not any(isinstance(a, ir.Value) for a in args):
            return node.target(*args)  # type: ignore[operator]
        converter = CONVERTERS.get(node.target) or BY_NAME.get(str(node.target))
        if converter is None:
            raise ExportError(self.refusal(node, "has no ONNX converter"))
        self.builder.at(node)
        before = len(self.builder.nodes)
        try:
            value = converter(self.builder, *args, **kwargs)
        except UnsupportedError as reason:
            raise ExportError(self.refusal(node, f"cannot be written in ONNX: {reason}")) from reason
        except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:  # a graph made by hand
            raise ExportError(self.refusal(node, f"has arguments that fit no call of it ({error})")) from error
        if missing := next(filter(None, map(no_kernel, self.builder.nodes[before:])), None):
            raise ExportError(self.refusal(node, f"would not run: {missing}"))
        made = self.builder.nodes[before:]
        value = self.named(node, value, {id(n) for n in made})
        name_nodes(node, made)
        return value

    def refusal(self, node: fx.Node, reason: str) -> str:
        found = info(node)
        return (
            f"cannot export node {node.name!r}: operator {target_name(node.target)} {reason} (layer "
            f"{found.path or '(root)'!r}{f', at {found.source}' if found.source else ''}). What to do: rewrite that "
            f"line of the model with other tensor operators, or run the compiled program in torch"
        )

    def element(self, node: fx.Node) -> Any:
        """getitem of an operator with several results: that result, under this node's name."""
        value = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if value is None:
            raise ExportError(self.refusal(node, f"asks for result {node.args[1]}, which ONNX does not give"))
        if isinstance(value, ir.Value) and value.producer() is not None and "." in str(value.name):
            value.name = self.unique(node.name)
        return value

    def named(self, node: fx.Node, value: Any, new: set[int]) -> Any:
        """Give the result, if this call made it, the node's name and type."""
        types = info(node).type
        for i, item in enumerate(value if isinstance(value, tuple) else (value,)):
            producer = item.producer() if isinstance(item, ir.Value) else None
            if producer is None or id(producer) not in new or producer.op_type == "Constant":
                continue
            if not is_number(item):
                _describe(item, NodeInfo(types[i] if isinstance(types, tuple) else types))
            if not isinstance(value, tuple):
                item.name = self.unique(node.name)
                producer.name = node.name
            elif i == 0 and len(producer.outputs) > 1:
                producer.name = node.name
        return value

    def outputs(self, node: fx.Node) -> list[ir.Value]:
        """The graph's outputs, renamed as the signature says; what is no node's own result goes through Identity.

        None and texts are left out: they are part of the output's structure, the same at every call.
        """
        found: list[ir.Value] = []
        taken: set[str] = set()
        own: set[int] = set()
        self.builder.at(node)
        for item, name in zip(node.args[0], self.results, strict=True):  # type: ignore[arg-type]
            value = self.env[item] if isinstance(item, fx.Node) else item
            if value is None or isinstance(value, str):
                continue
            if isinstance(value, tuple):
                raise ExportError(
                    f"output {name!r} is a list of values, which ONNX cannot return; return each by itself"
                )
            if not isinstance(value, ir.Value):
                value = self.builder.const(value)
            while name in taken or name in {i.name for i in self.inputs}:
                name = self.unique(f"{name}_output")
            producer = value.producer()
            if producer is None or producer.op_type == "Constant" or id(value) in own:
                value = self.builder.like("Identity", value)
            value.name = name
            taken.add(name)
            own.add(id(value))
            found.append(value)
        if not found:
            raise ExportError("the model returns no tensor, so there is nothing to export; return one")
        return found

    def model(self, outputs: list[ir.Value], metadata: Mapping[str, str]) -> ir.Model:
        made = self.builder.nodes
        nodes = _alive(fused(self.builder, made) if self.options.operators == "auto" else made, outputs)
        held = [*self.initializers.values(), *self.builder.tensors]
        used = [v for v in held if any(True for _ in v.uses())]
        domains = {node.domain for node in nodes}
        graph = ir.Graph(
            self.inputs, outputs, nodes=nodes, initializers=used, name="fxquant",
            opset_imports={"": self.opset, DOMAIN: VERSION, **({MICROSOFT: 1} if MICROSOFT in domains else {})},
        )  # fmt: skip
        version = importlib.metadata.version("fxquant")
        about = {"fxquant.version": version, **described(self.program, self.options)}
        return ir.Model(
            graph, ir_version=onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", self.opset], producer_name="fxquant",
            producer_version=version, functions=functions(self.builder),
            metadata_props={**about, **metadata},
        )  # fmt: skip


def _alive(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that something reads; what only dead ones read is dead too."""
    wanted, found = {id(v) for v in outputs}, []
    for node in reversed(nodes):
        if any(id(v) in wanted or any(True for _ in v.uses()) for v in node.outputs):
            found.append(node)
        else:
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)
    return found[::-1]


def _describe(value: ir.Value, about: NodeInfo) -> ir.Value:
    """Set dtype and shape of a value from its type in the program."""
    if isinstance(about.type, TensorType):
        value.type = ir.TensorType(onnx_dtype(about.type.dtype))
        value.shape = ir.Shape(about.type.shape)
    return value


def _arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, defaults of the operator's schema filled in: positional ones, keyword-only ones."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    given = dict(node.kwargs)
    positional, by_name = list(node.args), dict[str, Any]()
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.kwarg_only:
            by_name[argument.name] = given.get(argument.name, argument.default_value)
        elif i >= len(positional):
            positional.append(given.get(argument.name, argument.default_value))
    return positional, by_name
