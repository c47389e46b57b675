"""The layers of a model on disk, found without reading its weights, and what a config would make of them.

The model is built on the meta device from its config alone and exported there, so the layers, their names and their
ties are those that ``compile`` finds. What cannot be exported so is loaded with its weights and captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import nn
from torch.export import export
from torch.utils._pytree import tree_map_only

from fxquant import checkpoints
from fxquant.choice import choose
from fxquant.eager import evaluating
from fxquant.errors import ModelError
from fxquant.examples import example_inputs
from fxquant.flatten import from_export
from fxquant.layers import Layer, find_layers, ties
from fxquant.program import Program, Progress, quiet
from fxquant.qtensor import packed_nbytes
from fxquant.rewrite import Decline, fetch, get_attrs, identity
from fxquant.scheme import LayerRule, QuantSpec
from fxquant.sensitivity import float_program, normalized

Choice = LayerRule | Decline


@dataclass(frozen=True)
class Outline:
    """A model's layers in graph order, their weights without values; ``nbytes`` of all its tensors, each counted once.

    ``tied``: layers that share a weight, by the name of each.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    tied: dict[str, list[Layer]]
    nbytes: int

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def group(self, layer: Layer) -> list[Layer]:
        """The layers that share this layer's weight, itself among them."""
        return self.tied.get(layer.name, [layer])

    def choices(self, rules: Sequence[LayerRule]) -> dict[str, Choice]:
        """For every layer the rule that it follows, or why it stays in float."""
        return {layer.name: choose(layer, rules, self.group(layer)) for layer in self.layers}

    def quantized_nbytes(self, rules: Sequence[LayerRule]) -> int:
        """Bytes of the whole model once ``rules`` are followed, as ``Summary.bytes_after`` of a compiled one.

        What methods add (factors of ``lorc``, outliers, exponent biases) is not counted.
        """
        total = self.nbytes
        choices = self.choices(rules)
        for layer in self.units(self.layers):
            rule = choices[layer.name]
            if isinstance(rule, LayerRule) and rule.weight is not None:
                total += spec_nbytes(layer, rule.weight) - layer.weight.nbytes
        return total

    def units(self, layers: Iterable[Layer]) -> list[Layer]:
        """One layer for every weight that ``layers`` have."""
        return list({layer.target: layer for layer in reversed(list(layers))}.values())[::-1]


def matrix_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of the weight as the layer sees it, ``[..., out, in]``."""
    shape = tuple(layer.weight.shape)
    return (*shape[:-2], shape[-1], shape[-2]) if layer.transposed else shape


def spec_nbytes(layer: Layer, spec: QuantSpec) -> int:
    """Bytes of the layer's weight as ``spec``, scales included."""
    shape = matrix_shape(layer)
    rows = prod(shape[: layer.channel_dims])
    return packed_nbytes(spec, rows, prod(shape) // max(rows, 1))


def outline(path: str | Path, *, progress: Progress = quiet) -> Outline:
    """The layers of the model at ``path``, a Hugging Face folder or a GGUF file. Raises ModelError."""
    path = Path(path)
    name = path.stem if path.is_file() else path.resolve().name
    progress("find layers", 0, 0)
    try:
        model = checkpoints.empty_model(path)
        if model is not None:
            return _outline(name, type(model).__name__, _exported(model), by_name=True)
    except ModelError:
        raise
    except Exception:  # a forward that looks at values, or a library that does: with the weights it may work
        pass
    loaded = checkpoints.load_model(path, progress=progress)
    program = float_program(loaded.model, loaded.example_inputs)
    return _outline(name, type(loaded.model).__name__, program, by_name=False)


def _exported(model: nn.Module) -> Program:
    inputs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), example_inputs(model))
    with evaluating(model), torch.no_grad():
        program = from_export(export(model, (), inputs, strict=False))
    return normalized(program)


def _outline(name: str, kind: str, program: Program, *, by_name: bool) -> Outline:
    """``by_name``: tensors have no memory that would tell which are the same; export gave those one name."""
    layers = find_layers(program.gm)
    values = {str(node.target): fetch(program.gm, str(node.target)) for node in get_attrs(program.gm.graph)}
    if by_name:
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(layer.target, []).append(layer)
        tied = {layer.name: group for group in groups.values() if len(group) > 1 for layer in group}
    else:
        tied = ties(layers)
        values = {str(identity(value)): value for value in values.values()}
    return Outline(name, kind, tuple(layers), tied, sum(value.nbytes for value in values.values()))
