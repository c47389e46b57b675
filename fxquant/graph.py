"""What belongs to a node of a graph: one frozen ``NodeInfo`` in ``node.meta["fxquant"]``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxquant.dims import Dim
from fxquant.scheme import QuantSpec

META = "fxquant"


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype and shape of a tensor value; a symbolic size is an expression over dimension names (``dims``)."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number computed in the graph, such as a size."""

    kind: str
    value: Dim | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}({self.value})"


ValueType = TensorType | ScalarType | tuple["ValueType | None", ...]


@dataclass(frozen=True, slots=True)
class WeightQuant:
    """How a weight was quantized: on the ``dequantize`` node of the QDQ form and on the op it is lowered to.

    ``weight`` names the float tensor, which stays on the module until lowering. ``error`` is ||W - W'|| / ||W||.
    ``nbytes`` is the packed size with scales, ``float_nbytes`` the size before. ``transposed``: the float tensor is
    stored ``[..., in, out]``, the codes are those of its transpose. ``part_of`` names the weight that this one was
    added to, a factor of its compensation; the float model has no such weight, and ``float_nbytes`` is 0.
    """

    weight: str
    spec: QuantSpec
    method: str
    error: float
    nbytes: int
    float_nbytes: int
    transposed: bool = False
    part_of: str = ""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Type of the node's value, path and class of the module it came from, source line, and its quantization."""

    type: ValueType | None = None
    path: str = ""
    module: str = ""
    source: str = ""
    weight: WeightQuant | None = None

    @staticmethod
    def of_tensor(value: Tensor, path: str = "") -> NodeInfo:
        return NodeInfo(TensorType(value.dtype, tuple(value.shape)), path)


def info(node: fx.Node) -> NodeInfo:
    """The node's NodeInfo (an empty one where none was set)."""
    found = node.meta.get(META)
    return found if isinstance(found, NodeInfo) else NodeInfo()


def set_info(node: fx.Node, value: NodeInfo) -> None:
    node.meta[META] = value


def update_info(node: fx.Node, **changes: object) -> None:
    """Replace some fields of the node's NodeInfo."""
    set_info(node, replace(info(node), **changes))  # type: ignore[arg-type]


def tensor_type(node: fx.Node) -> TensorType:
    """The node's type, which must be a tensor's."""
    found = info(node).type
    assert isinstance(found, TensorType), f"node {node.name} has no tensor type"
    return found


def type_text(value: ValueType | None) -> str:
    """A type as text: ``float32[batch, 8]``, ``int(batch)``, ``(float32[2], int64[2])``."""
    return f"({', '.join(map(type_text, value))})" if isinstance(value, tuple) else str(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
