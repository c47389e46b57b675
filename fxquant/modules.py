"""Modules on packed weights: what ``quantize_`` puts in the place of a float module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxquant.errors import CaptureError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.rewrite import fetch

_PARTS = ("packed", "scale", "zero_point", "tensor_scale")


class PackedWeight(nn.Module):
    """A packed weight as buffers: uint8 codes, scales, zero point and scale of scales where there are any."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, parts: Mapping[str, Tensor | None], spec: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        for name, value in parts.items():
            self.register_buffer(name, value)

    def decode(self) -> Tensor:
        """The real weight, float32 of the logical shape."""
        return ops.dequantize_packed(*self.parts, self.spec, list(self.shape), **self.outer)  # type: ignore[no-any-return]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.scale, self.zero_point

    @property
    def outer(self) -> dict[str, Tensor | None]:
        return {"tensor_scale": self.tensor_scale}

    def extra_repr(self) -> str:
        return f"{self.spec}, {'x'.join(map(str, self.shape))}"


class QuantizedLinear(nn.Module):
    """``y = x W^T + bias`` with W packed."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight_packed = weight
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_packed
        return ops.linear_wq(x, *w.parts, self.bias, w.spec, list(w.shape), **w.outer)  # type: ignore[no-any-return]


class QuantizedConv2d(nn.Module):
    """A 2-D convolution, zero padding, with its kernel packed."""

    def __init__(self, weight: PackedWeight, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight_packed, self.bias = weight, conv.bias
        self.window = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_packed
        return ops.conv2d_wq(x, *w.parts, self.bias, w.spec, list(w.shape), *self.window, **w.outer)  # type: ignore[no-any-return]


class QuantizedEmbedding(nn.Module):
    """Rows of a packed table."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight_packed = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, indices: Tensor) -> Tensor:
        w = self.weight_packed
        return ops.embedding_wq(indices, *w.parts, w.spec, list(w.shape), **w.outer)  # type: ignore[no-any-return]


class DecodedParameter(nn.Module):
    """A parametrization: the parameter of any other module, decoded from packed codes each time it is read."""

    def __init__(self, weight: PackedWeight, transposed: bool) -> None:
        super().__init__()
        self.weight_packed, self.transposed = weight, transposed

    def forward(self, original: Tensor) -> Tensor:
        value = self.weight_packed.decode().to(original.dtype)
        return value.transpose(-1, -2) if self.transposed else value


def write_back(model: nn.Module, program: Program) -> None:
    """Replace, in ``model``, every module whose weight ``program`` has packed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    packed = _packed_weights(program)
    missing = [name for name in packed if name not in parameters]
    if missing:
        raise CaptureError(f"the compiled weights {missing[:3]} are not parameters of {type(model).__name__}")
    for name, weight in packed.items():
        original = parameters[name]
        for other in [n for n, p in parameters.items() if p is original]:  # a tie has several names
            _replace(model, other, weight, original)


def _packed_weights(program: Program) -> dict[str, PackedWeight]:
    found: dict[str, PackedWeight] = {}
    for node in program.gm.graph.nodes:
        quant = info(node).weight
        if quant is None or node.op != "call_function":
            continue
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        parts = {k: None if given.get(k) is None else fetch(program.gm, str(given[k].target)) for k in _PARTS}
        found[quant.weight] = PackedWeight(parts, given["spec"], tuple(given["shape"]))
    return found


def _replace(model: nn.Module, name: str, weight: PackedWeight, original: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    new = _quantized(module, weight) if leaf == "weight" and path else None
    if new is not None:
        new.train(module.training)
        model.set_submodule(path, new)
        return
    transposed = tuple(original.shape) != weight.shape
    parametrize.register_parametrization(module, leaf, DecodedParameter(weight, transposed), unsafe=True)
    module.parametrizations[leaf].original.data = original.new_empty(0)  # type: ignore[index,union-attr]


def _quantized(module: nn.Module, weight: PackedWeight) -> nn.Module | None:
    """The packed form of a module of a known type, None for any other."""
    kind = type(module)
    if kind is nn.Linear or kind.__name__ == "Conv1D":  # transformers' Conv1D is a linear, stored [in, out]
        return QuantizedLinear(weight, module.bias)  # type: ignore[arg-type]
    if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return QuantizedConv2d(weight, module)  # type: ignore[arg-type]
    if kind is nn.Embedding and module.max_norm is None:
        return QuantizedEmbedding(weight)
    return None
