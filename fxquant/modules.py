"""Modules on packed weights: what ``quantize_`` puts in the place of a float module, and checkpoints load into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxquant.errors import CaptureError, ConfigError
from fxquant.graph import info
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.rewrite import fetch

_PARTS = ("packed", "scale", "zero_point", "tensor_scale", "exponent_bias")


class PackedWeight(nn.Module):
    """A packed weight as buffers: uint8 codes, scales, zero point and scale of scales where there are any.

    ``dtype`` is what it decodes to. A cast of the module (``model.half()``) changes that and leaves the buffers, whose
    dtypes belong to the spec, as they are. ``transposed`` says that the parameter it stands for has its last two
    dimensions in the other order. ``factors``, U and V, are added to the weight as their product: what LoRC found.
    ``error`` is ||W - W'|| / ||W||, where it is known. While the weight is ``pending``, waiting for its values, it
    decodes to a tensor on the meta device, which anyone may fill.
    """

    pending = False
    error: float | None = None

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
        if self.pending:
            nothing = torch.empty(self.shape, dtype=self.dtype, device="meta")
            return nothing.transpose(-1, -2) if self.transposed else nothing
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

        return super()._apply(_keeping_dtypes(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.spec}, {'x'.join(map(str, self.shape))}"


def _keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``module.to(...)`` without its cast."""

    def move(value: Tensor) -> Tensor:
        moved = fn(value)
        return moved if moved.dtype == value.dtype else value.to(moved.device)

    return move


class RoundedInput(nn.Module):
    """Rounds what a linear reads: to ``spec`` with scales found row by row, or with one ``scale`` from calibration."""

    scale: Tensor | None

    def __init__(self, spec: str, scale: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return ops.fake_quantize_dynamic(x, self.spec)  # type: ignore[no-any-return]
        return ops.fake_quantize(x, self.scale, None, self.spec)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_keeping_dtypes(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return self.spec


class Quantized(nn.Module):
    """What stands in the place of a float module: its bias, its plain attributes, its hooks, and a packed weight."""

    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight | None, old: nn.Module) -> None:
        super().__init__()
        adopt(self, old)
        self.float_type = type(old)
        self.weight_packed: Any = weight
        self.register_parameter("bias", getattr(old, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The weight, decoded anew each time it is read; it cannot be set."""
        return self.weight_packed.decode()  # type: ignore[no-any-return]

    def float_module(self, weight: nn.Parameter) -> nn.Module:
        """A module of the type that this one replaced, with ``weight``."""
        new: nn.Module = self.float_type.__new__(self.float_type)
        nn.Module.__init__(new)
        adopt(new, self)
        for name in ("float_type", "input_rounding", "weight_packed"):
            vars(new).pop(name, None)
        new.register_parameter("weight", weight)
        new.register_parameter("bias", self.bias)
        return new


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


class QuantizedLinear(Quantized):
    """``y = x W^T + bias`` with W packed, and x rounded first where ``input_rounding`` says so."""

    def __init__(self, weight: PackedWeight | None, old: nn.Module, rounding: RoundedInput | None = None) -> None:
        super().__init__(weight, old)
        self.input_rounding = rounding
        if weight is not None:
            self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        if self.input_rounding is not None:
            x = self.input_rounding(x)
        return self.weight_packed.linear(x, self.bias)  # type: ignore[no-any-return]


class QuantizedConv2d(Quantized):
    """A 2-D convolution, zero padding, with its kernel packed."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        w, window = self.weight_packed, (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        return ops.conv2d_wq(x, *w.parts, self.bias, w.spec, list(w.shape), *window, **w.outer)  # type: ignore[no-any-return]


class QuantizedEmbedding(Quantized):
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

    Raises CaptureError, before any change, for a weight that is no parameter of the model or is packed in two ways,
    ConfigError for rounded inputs of anything but quantized linears, which modules cannot hold.
    """
    parameters = weights_of(model)
    nodes, factors = _packed_nodes(program), _factors(program)
    if missing := [name for name in nodes if name not in parameters]:
        raise CaptureError(f"the compiled weights {missing[:3]} are not parameters of {type(model).__name__}")
    roundings = _roundings(model, program, nodes)
    for name, node in nodes.items():
        original = parameters[name]
        weight = _packed_weight(program, node, original.dtype, factors.get(name))
        for other in [n for n, p in parameters.items() if p is original]:  # a tie has several names
            replace(model, other, weight, original, roundings.get(name))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by all of their names, and the weights that are computed from others, by weight_norm say."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf in getattr(module, "parametrizations", ()):
            found.setdefault(f"{path}.{leaf}".lstrip("."), getattr(module, leaf))
    return found


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


def _roundings(model: nn.Module, program: Program, nodes: Mapping[str, fx.Node]) -> dict[str, RoundedInput]:
    """The rounding of the input of each weight, by the weight's name; each has a scale of its own."""
    found: dict[str, RoundedInput] = {}
    held = set[fx.Node]()
    for node in program.gm.graph.nodes:
        quant = info(node).weight
        x = node.args[0] if quant is not None and node.target == ops.linear_wq.default else None
        if quant is None or not isinstance(x, fx.Node) or x.target not in ROUNDINGS:
            continue
        held.add(node)
        given, name = _given(x), quant.part_of or quant.weight
        scale = given.get("scale")
        rounding = RoundedInput(given["spec"], None if scale is None else fetch(program.gm, str(scale.target)).clone())
        before = found.setdefault(name, rounding)
        path = name.rpartition(".")[0]
        same = before.spec == rounding.spec and (
            before.scale is None or rounding.scale is None or torch.equal(before.scale, rounding.scale)
        )
        if not same or not is_linear(model.get_submodule(path)) or name.rpartition(".")[2] != "weight":
            held.discard(node)
    rounded = [n for n in program.gm.graph.nodes if n.target in ROUNDINGS]
    if loose := [user for n in rounded for user in n.users if user not in held]:
        raise ConfigError(
            f"the rule's activation rounds what {info(loose[0]).module or loose[0].name} reads, which no module can be "
            f"made to do; use fxquant.compile, or leave activation out of the rule"
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
    weight = PackedWeight(
        parts, spec=given["spec"], shape=tuple(given["shape"]), dtype=dtype, transposed=transposed,
        factors=None if U is None or V is None else (U, V),
    )  # fmt: skip
    weight.error = quant.error if math.isfinite(quant.error) else None
    return weight


def replace(
    model: nn.Module, name: str, weight: PackedWeight | None, original: Tensor, rounding: RoundedInput | None = None
) -> None:
    """Put ``weight`` in the place of the parameter ``name`` of ``model``, whose tensor is ``original``.

    A module of a known type is replaced as a whole, any other decodes the parameter when it is read. None leaves the
    place for a packed weight that is still to come.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    new = _quantized(module, weight, rounding) if leaf == "weight" and path else None
    if new is not None:
        model.set_submodule(path, new)
        return
    if parametrize.is_parametrized(module, leaf):  # by weight_norm, say; or replaced already, by another path
        _replace_computed(module.parametrizations[leaf], weight)  # type: ignore[index]
        return
    if weight is None:
        delattr(module, leaf)
        module.register_buffer(leaf, original.new_empty(0), persistent=False)
        return
    parametrize.register_parametrization(module, leaf, DecodedParameter(weight), unsafe=True)
    table: Any = module.parametrizations[leaf]  # type: ignore[index]
    delattr(table, "original")  # torch keeps it with the model's tensors; here it is nothing, and no checkpoint has it
    table.register_buffer("original", original.new_empty(0), persistent=False)


def _replace_computed(parts: Any, weight: PackedWeight | None) -> None:
    """Have ``parts`` decode its weight; what it was computed from goes. The class of the module stays, for copies."""
    if weight is None or isinstance(parts[0], DecodedParameter):
        return
    for name, original in list(parts.named_parameters()):
        delattr(parts, name)
        parts.register_buffer(name, original.new_empty(0), persistent=False)
    del parts[1:]
    parts[0] = DecodedParameter(weight)


def _quantized(module: nn.Module, weight: PackedWeight | None, rounding: RoundedInput | None) -> nn.Module | None:
    """The packed form of a module of a known type, None for any other."""
    kind = type(module)
    if is_linear(module):
        return QuantizedLinear(weight, module, rounding)
    if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return QuantizedConv2d(weight, module)
    if kind is nn.Embedding and module.max_norm is None:
        return QuantizedEmbedding(weight, module)
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear of torch or transformers' Conv1D, which is a linear stored [in, out]."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
