"""Checkpoint: a compiled program as named weights, for files that hold a model's weights and not its graph.

Such a file says what a layer's weight is and, at most, that the layer rounds its input. A program fits where that is
all that was done to it: every packed weight is read by linears or embeddings, inputs are rounded for linears alone,
every other constant is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import packing
from fxquant.errors import ExportError
from fxquant.graph import info
from fxquant.ops import ROUNDINGS, is_op
from fxquant.ops import operators as ops
from fxquant.program import Program, target_name
from fxquant.qtensor import QuantizedTensor, load_scale
from fxquant.rewrite import fetch, get_attrs
from fxquant.scheme import QuantSpec, parse_spec


@dataclass(frozen=True)
class Rounding:
    """How a layer rounds its input: with scales found when it runs, or with the given ``scale``."""

    spec: QuantSpec
    scale: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """A packed weight: ``name`` is the parameter it stands for, ``reads`` the names of the values its linears take.

    ``embedding`` says that it is looked up too. ``rounding`` is None where its inputs are not rounded.
    """

    name: str
    tensor: QuantizedTensor
    reads: tuple[str, ...]
    embedding: bool
    rounding: Rounding | None

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a program by parameter name: packed ones, and all other constants as they are."""

    packed: dict[str, Weight]
    floats: dict[str, Tensor]


_LAYERS = {ops.linear_wq.default: 0, ops.embedding_wq.default: None}
"""Operators on packed weights that a checkpoint can hold, and the position of the input they may round."""
_ELSEWHERE = {
    "with_outliers": "keeps single weights in more bits (gwq, pb_llm)",
    "conv2d_wq": "is a quantized convolution",
    "dequantize_packed": "reads a quantized weight and is neither a linear nor an embedding",
    "kv_scale": "quantizes the KV cache",
    "quantize_kv": "quantizes the KV cache",
    "dequantize_kv": "quantizes the KV cache",
}
_ADVICE = (
    "What to do: compile with rules on linears, and of the methods only gptq, zq_local, zq_global, smooth or "
    "search_formats; or export to ONNX, which holds the whole graph"
)


def read(program: Program) -> Checkpoint:
    """The weights of ``program``. ExportError, naming the layer, for what a checkpoint cannot say of it."""
    packed: dict[str, Weight] = {}
    for node in program.gm.graph.nodes:
        if node.op != "call_function" or not is_op(node.target):
            continue
        if node.target in ROUNDINGS:
            _check_rounding(node)
        elif node.target in _LAYERS:
            weight = _weight(program, node)
            packed[weight.name] = _joined(packed.get(weight.name, weight), weight)
        else:
            names = [_name(user) for user in node.users if _name(user) == "with_outliers"] or [_name(node)]
            raise _cannot(node, _ELSEWHERE.get(names[0], f"is {target_name(node.target)}"))
    return Checkpoint(packed, _floats(program))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


def _cannot(node: fx.Node, why: str) -> ExportError:
    return ExportError(f"{info(node).path or node.name} {why}, which a checkpoint of weights cannot hold\n{_ADVICE}")


def _check_rounding(node: fx.Node) -> None:
    for user in node.users:
        if user.target is not ops.linear_wq.default or user.args[0] is not node:
            raise _cannot(node, f"rounds what {info(user).path or user.name} ({target_name(user.target)}) reads")
    if _given(node).get("exponent_bias") is not None:
        raise _cannot(node, "shifts the channels of its input by powers of two (pre_shift)")


def _given(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _weight(program: Program, node: fx.Node) -> Weight:
    given, quant, x = _given(node), info(node).weight, node.args[0]
    assert quant is not None
    assert isinstance(x, fx.Node)
    if quant.part_of:
        raise _cannot(node, f"adds thin factors to {quant.part_of} (lorc)")
    if quant.transposed:
        raise _cannot(node, f"reads {quant.weight}, which is stored [in, out]")
    if given.get("exponent_bias") is not None:
        raise _cannot(node, "has an exponent bias for each input channel (fold_activation_scales)")

    def part(name: str) -> Tensor | None:
        return None if given.get(name) is None else fetch(program.gm, str(given[name].target))

    spec, shape, packed, scale = parse_spec(given["spec"]), tuple(given["shape"]), part("packed"), part("scale")
    assert packed is not None
    assert scale is not None
    codes = packing.unpack(packed, packing.planar(spec.format.bits), shape[1])
    tensor = QuantizedTensor(
        codes, load_scale(scale, spec), part("zero_point"), spec, shape, tensor_scale=part("tensor_scale")
    )
    embedding = node.target is ops.embedding_wq.default
    reads = () if embedding else (x.name,)
    return Weight(quant.weight, tensor, reads, embedding, None if embedding else _rounding(program, x))


def _rounding(program: Program, x: fx.Node) -> Rounding | None:
    if x.target not in ROUNDINGS:
        return None
    given = _given(x)
    scale = given.get("scale")
    return Rounding(parse_spec(given["spec"]), None if scale is None else fetch(program.gm, str(scale.target)))


def _joined(first: Weight, again: Weight) -> Weight:
    """One weight that several nodes read; they must round their inputs alike."""
    if not (first.embedding or again.embedding) and not _alike(first.rounding, again.rounding):
        raise ExportError(f"{first.name} is read by layers that round their inputs differently, which a checkpoint "
                          f"cannot say\n{_ADVICE}")  # fmt: skip
    reads = tuple(dict.fromkeys((*first.reads, *again.reads)))
    return replace(
        first, reads=reads, embedding=first.embedding or again.embedding, rounding=first.rounding or again.rounding
    )


def _alike(a: Rounding | None, b: Rounding | None) -> bool:
    if a is None or b is None:
        return a is b
    same = a.scale is b.scale or (a.scale is not None and b.scale is not None and torch.equal(a.scale, b.scale))
    return a.spec == b.spec and same


def _floats(program: Program) -> dict[str, Tensor]:
    """Constants that no operator of ours reads, by name. ExportError for one that the captured model did not have."""
    captured = {line.rpartition(" = ")[2] for line in program.trace[0].text.splitlines()} if program.trace else None
    found = {}
    for node in get_attrs(program.gm.graph):
        readers = [user for user in node.users if not is_op(user.target) or _as_value(node, user)]
        if not readers:
            continue
        name = str(node.target)
        if captured is not None and name not in captured:
            raise _cannot(readers[0], f"reads {name}, a constant that a method added")
        found[name] = fetch(program.gm, name)
    return found


def _as_value(node: fx.Node, user: fx.Node) -> bool:
    """Whether one of our operators reads ``node`` as the model did, as its input or bias, not as part of a weight."""
    given = _given(user)
    return any(given.get(name) is node for name in ("x", "indices", "bias"))


def complete(checkpoint: Checkpoint, groups: Iterable[tuple[str, ...]]) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Packed weights and floats under the first name of every parameter; ``groups`` are the names of each.

    ExportError for a parameter that the program has no value of, and for a packed weight that is none.
    """
    packed, floats, known = {}, {}, set[str]()
    for names in groups:
        known.update(names)
        if name := next((n for n in names if n in checkpoint.packed), None):
            packed[names[0]] = replace(checkpoint.packed[name], name=names[0])
        elif name := next((n for n in names if n in checkpoint.floats), None):
            floats[names[0]] = checkpoint.floats[name]
        else:
            raise ExportError(
                f"the compiled model has no weight {names[0]}, which the model's config asks for\n"
                f"What to do: give the folder of the model that was compiled, with its whole graph"
            )
    if strange := sorted(checkpoint.packed.keys() - known):
        raise ExportError(
            f"{strange[0]} is no weight of the model that was given\n"
            f"What to do: give the folder of the model that was compiled"
        )
    return packed, floats
