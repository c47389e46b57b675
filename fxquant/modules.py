"""Modules on packed weights: what ``quantize_`` puts in the place of a float module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxquant.errors import CaptureError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.rewrite import fetch

_PARTS = ("packed", "scale", "zero_point", "tensor_scale", "exponent_bias")


class PackedWeight(nn.Module):
    """A packed weight as buffers: uint8 codes, scales, zero point and scale of scales where there are any.

    ``dtype`` is what it decodes to. A cast of the module (``model.half()``) changes that and leaves the buffers, whose
    dtypes belong to the spec, as they are. ``transposed`` says that the parameter it stands for has its last two
    dimensions in the other order. ``factors``, U and V, are added to the weight as their product: what LoRC found.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None
    exponent_bias: Tensor | None

    def __init__(
        self, parts: Mapping[str, Tensor | None], *, spec: str, shape: tuple[int, ...], dtype: torch.dtype,
        transposed: bool = False, factors: tuple[PackedWeight, PackedWeight] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spec, self.shape, self.dtype, self.transposed = spec, shape, dtype, transposed
        self.factors = nn.ModuleList(factors or ())
        for name, value in parts.items():
            self.register_buffer(name, value)

    def decode(self) -> Tensor:
        """The parameter this stands for: its values rounded to the grid, with U V where it has factors; ``dtype``."""
        value: Tensor = ops.dequantize_packed(*self.parts, self.spec, list(self.shape), **self.outer, dtype=self.dtype)
        if self.factors:
            U, V = self._thin
            value = value + U.decode() @ V.decode()
        return value.transpose(-1, -2) if self.transposed else value

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``, the factors as two thin products."""
        y: Tensor = ops.linear_wq(x, *self.parts, bias, self.spec, list(self.shape), **self.outer)
        if self.factors:
            U, V = self._thin
            y = y + U.linear(V.linear(x))
        return y

    @property
    def _thin(self) -> list[Any]:
        return list(self.factors)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.scale, self.zero_point

    @property
    def outer(self) -> dict[str, Tensor | None]:
        """What lies above the scales, as the operators take it; biases of input channels only linears have."""
        found = {"tensor_scale": self.tensor_scale, "exponent_bias": self.exponent_bias}
        return {name: value for name, value in found.items() if value is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype

        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.spec}, {'x'.join(map(str, self.shape))}"


class _Quantized(nn.Module):
    """What stands in the place of a float module: its bias, its plain attributes, its hooks, and a packed weight."""

    bias: Tensor | None

    def __init__(self, weight: PackedWeight, old: nn.Module) -> None:
        super().__init__()
        adopt(self, old)
        self.weight_packed = weight
        self.register_parameter("bias", getattr(old, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The weight, decoded anew each time it is read; it cannot be set."""
        return self.weight_packed.decode()


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the public attributes of ``old`` (``in_features``, ``stride``, ``training``) and its hooks.

    The tables of hooks are shared, so that the handles that ``register_forward_hook`` returned still remove them.
    """
    for name, value in vars(old).items():
        if name in _HOOKS or not (name.startswith("_") or name == "forward"):
            object.__setattr__(new, name, value)


class QuantizedLinear(_Quantized):
    """``y = x W^T + bias`` with W packed."""

    def __init__(self, weight: PackedWeight, old: nn.Module) -> None:
        super().__init__(weight, old)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_packed.linear(x, self.bias)


class QuantizedConv2d(_Quantized):
    """A 2-D convolution, zero padding, with its kernel packed."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        w, window = self.weight_packed, (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        return ops.conv2d_wq(x, *w.parts, self.bias, w.spec, list(w.shape), *window, **w.outer)  # type: ignore[no-any-return]


class QuantizedEmbedding(_Quantized):
    """Rows of a packed table, in the dtype of the table it replaces."""

    def forward(self, indices: Tensor) -> Tensor:
        w = self.weight_packed
        return ops.embedding_wq(indices, *w.parts, w.spec, list(w.shape), dtype=w.dtype, **w.outer)  # type: ignore[no-any-return]


class DecodedParameter(nn.Module):
    """A parametrization: the parameter of any other module, decoded from packed codes each time it is read."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight_packed = weight

    def forward(self, *originals: Tensor) -> Tensor:
        return self.weight_packed.decode()


def write_back(model: nn.Module, program: Program) -> None:
    """Replace, in ``model``, every module whose weight ``program`` has packed.

    Raises CaptureError, before any change, for a weight that is no parameter of the model or is packed in two ways.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    nodes, factors = _packed_nodes(program), _factors(program)
    computed = {n: parts for n in nodes if n not in parameters and (parts := _parametrization(model, n)) is not None}
    if missing := [name for name in nodes if name not in parameters and name not in computed]:
        raise CaptureError(f"the compiled weights {missing[:3]} are not parameters of {type(model).__name__}")
    for name, node in nodes.items():
        if name in computed:
            dtype = next(computed[name].parameters()).dtype
            _replace_computed(computed[name], _packed_weight(program, node, dtype, factors.get(name)))
            continue
        original = parameters[name]
        weight = _packed_weight(program, node, original.dtype, factors.get(name))
        for other in [n for n, p in parameters.items() if p is original]:  # a tie has several names
            _replace(model, other, weight, original)


def _packed_nodes(program: Program) -> dict[str, fx.Node]:
    """The node that reads each packed weight, by the name of the parameter it was."""
    found: dict[str, fx.Node] = {}
    for node in program.gm.graph.nodes:
        quant = info(node).weight
        if quant is None or quant.part_of or node.op != "call_function":
            continue
        first = found.setdefault(quant.weight, node)
        if _given(first)["packed"].target != _given(node)["packed"].target:
            raise CaptureError(
                f"{quant.weight} is used as it is and transposed, which one packed weight cannot be both of; keep its "
                f"layers in float with a rule, or use fxquant.compile, which packs it twice"
            )
    return found


def _factors(program: Program) -> dict[str, tuple[fx.Node, fx.Node]]:
    """The nodes that read the factors U and V of a weight's compensation, by the name of that weight: V comes first."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.gm.graph.nodes:
        quant = info(node).weight
        if quant is not None and quant.part_of and node.op == "call_function":
            found.setdefault(quant.part_of, []).append(node)
    return {name: (U, V) for name, (V, U) in found.items()}


def _given(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _packed_weight(
    program: Program, node: fx.Node, dtype: torch.dtype, factors: tuple[fx.Node, fx.Node] | None = None
) -> PackedWeight:
    given, quant = _given(node), info(node).weight
    assert quant is not None
    parts = {k: None if given.get(k) is None else fetch(program.gm, str(given[k].target)) for k in _PARTS}
    transposed = str(given["packed"].target).removeprefix(quant.weight).startswith("_t_")  # as insert_qdq names it
    U, V = (None, None) if factors is None else (_packed_weight(program, factor, dtype) for factor in factors)
    return PackedWeight(
        parts, spec=given["spec"], shape=tuple(given["shape"]), dtype=dtype, transposed=transposed,
        factors=None if U is None or V is None else (U, V),
    )  # fmt: skip


def _replace(model: nn.Module, name: str, weight: PackedWeight, original: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    new = _quantized(module, weight) if leaf == "weight" and path else None
    if new is not None:
        model.set_submodule(path, new)
        return
    if parametrize.is_parametrized(module, leaf):  # a module that has two paths
        return
    parametrize.register_parametrization(module, leaf, DecodedParameter(weight), unsafe=True)
    module.parametrizations[leaf].original.data = original.new_empty(0)  # type: ignore[index,union-attr]


def _parametrization(model: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """What computes a weight that a module has no parameter of: weight_norm, say."""
    path, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    return module.parametrizations[leaf] if parametrize.is_parametrized(module, leaf) else None  # type: ignore


def _replace_computed(parts: parametrize.ParametrizationList, weight: PackedWeight) -> None:
    """Have ``parts`` decode its weight; what it was computed from goes. The class of the module stays, for copies."""
    for original in parts.parameters():
        original.data = original.new_empty(0)
    del parts[1:]
    parts[0] = DecodedParameter(weight)


def _quantized(module: nn.Module, weight: PackedWeight) -> nn.Module | None:
    """The packed form of a module of a known type, None for any other."""
    kind = type(module)
    if kind is nn.Linear or kind.__name__ == "Conv1D":  # transformers' Conv1D is a linear, stored [in, out]
        return QuantizedLinear(weight, module)
    if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return QuantizedConv2d(weight, module)
    if kind is nn.Embedding and module.max_norm is None:
        return QuantizedEmbedding(weight, module)
    return None
