"""Building an ONNX graph value by value: operators, constants, casts, sizes and torch's type promotion.

Converters (``onnx_ops``) are written over a ``Builder``. A value of the torch program is, in here,

    a tensor                 an ir.Value with dtype and shape
    a static number          a Python int, float or bool
    a number known at run    an ir.Value of rank 0, marked by ``as_number`` (it promotes types as a Python number does)
    several of these         a tuple
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.dims import Dim
from fxquant.errors import ExportError
from fxquant.formats import Format
from fxquant.graph import ScalarType, TensorType, info

T = ir.DataType
TO_ONNX = {
    torch.float32: T.FLOAT, torch.float16: T.FLOAT16, torch.bfloat16: T.BFLOAT16, torch.float64: T.DOUBLE,
    torch.int64: T.INT64, torch.int32: T.INT32, torch.int16: T.INT16, torch.int8: T.INT8, torch.uint8: T.UINT8,
    torch.bool: T.BOOL,
}  # fmt: skip
TO_TORCH = {onnx: dtype for dtype, onnx in TO_ONNX.items()}
FLOATS = (T.FLOAT, T.FLOAT16, T.BFLOAT16, T.DOUBLE)
NARROW = (T.INT16, T.INT8, T.UINT8)  # onnxruntime has few kernels for these: arithmetic is done in INT32

FLOAT_ONLY = frozenset((
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "Celu", "Conv", "ConvTranspose", "Cosh", "Elu",
    "Erf", "Gelu", "HardSigmoid", "InstanceNormalization", "LeakyRelu", "NonZero", "Selu", "Sinh", "Softplus", "Tan",
))  # fmt: skip
"""Operators that onnxruntime's CPU has no float64 kernels for."""
MOVES = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators that onnxruntime's CPU runs in bfloat16."""

Number = int | float | bool
Arg = Any
"""A converter's argument: an ir.Value, a number, None, or a list of these."""

_NUMBER = "fxquant.number"
UNKNOWN = "?"
"""A size that has no name, such as the number of true elements of a mask."""


class UnsupportedError(Exception):
    """What a converter raises where ONNX cannot express the call; the exporter adds where in the model it is."""


Operators = Literal["auto", "fxquant", "standard"]
ActivationBits = Literal[32, 16, 8]
OptimizeFor = Literal["speed", "memory"]


@dataclass(frozen=True)
class Options:
    """How a program is written in ONNX. Raises ExportError for a value that is not one of those.

    ``operators``: which ones layers on packed weights become: ``auto`` takes MatMulNBits and GatherBlockQuantized where
    they are exact and fast, nodes of our own domain elsewhere; ``fxquant`` our nodes everywhere; ``standard`` our nodes
    only where onnxruntime has no operator for the format. ``activation_bits``: to how many bits a kernel of a linear
    may round x by itself, token by token and block by block; 32 is not at all. ``optimize_for``: ``speed`` has
    onnxruntime decode weights once, when it loads the file, into float32; ``memory`` has it keep them packed and
    decode them in every run, unless the custom-op library multiplies them as they are.
    """

    operators: Operators = "auto"
    activation_bits: ActivationBits = 32
    optimize_for: OptimizeFor = "speed"

    def __post_init__(self) -> None:
        kinds = {"operators": Operators, "activation_bits": ActivationBits, "optimize_for": OptimizeFor}
        for name, kind in kinds.items():
            if (given := getattr(self, name)) not in (allowed := get_args(kind)):
                raise ExportError(f"{name} is {given!r}; expected {', '.join(map(repr, allowed))}")


DEFAULT = Options()


@dataclass(frozen=True)
class Operator:
    """An operator of our own domain: a kind on a format, and how it finds scales where it finds any."""

    kind: str
    format: Format
    scale: str = "fp32"
    rounding: str = ""

    @property
    def name(self) -> str:
        """``Linear_e3m2``; n and p stand for the minus and the point of a bias, a checksum for the values of a table,
        and scales other than fp32 are told: ``FakeQuantizeDynamic_e2m1_e8m0_floor``."""
        format = str(self.format)
        if format.startswith("lut("):
            format = f"lut{self.format.bits}_{zlib.crc32(format.encode()):08x}"
        parts = [self.kind, format.replace("-", "n").replace(".", "p")]
        return "_".join([*parts, *(part for part in (self.scale, self.rounding) if part not in ("fp32", ""))])


class Builder:
    """Appends nodes to a graph under construction. ``at`` names the scope of new nodes and values.

    ``memo`` is for values that many nodes share, such as an attention mask in additive form; ``calls`` are the
    operators of our own domain that were used, with what they ask of their functions; ``tensors`` are initializers made
    here, their names made free by ``unique``.
    """

    def __init__(
        self, opset: int, options: Options = DEFAULT, unique: Callable[[str], str] = lambda name: name
    ) -> None:
        self.opset, self.options, self.unique = opset, options, unique
        self.nodes: list[ir.Node] = []
        self.memo: dict[object, ir.Value] = {}
        self.calls: dict[Operator, frozenset[str]] = {}
        self.tensors: list[ir.Value] = []
        self.result: Any = None
        self._scope, self._count = "value", 0
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def at(self, node: fx.Node) -> None:
        """Start converting ``node``: ``result`` is its type, and new names begin with its name."""
        self.result, self._scope, self._count = info(node).type, node.name, 0

    @property
    def dtype(self) -> ir.DataType:
        """The dtype of the node being converted."""
        if isinstance(self.result, TensorType):
            return onnx_dtype(self.result.dtype)
        if isinstance(self.result, ScalarType):
            return {"int": T.INT64, "float": T.DOUBLE}.get(self.result.kind, T.BOOL)
        raise UnsupportedError("its result has no tensor type")

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the node being converted."""
        return self.result.shape if isinstance(self.result, TensorType) else ()

    # --- operators --------------------------------------------------------------------------------------------------
    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """One node with one output. ``dtype`` and ``shape`` describe the output, ``domain`` the operator."""
        return self.multi(1, op_type, *inputs, **attributes)[0]

    def multi(
        self,
        outputs: int,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """One node with several outputs; attributes that are None are left out, ``dtype`` is the first input's."""
        first = next((v for v in inputs if v is not None), None)
        values = [ir.Value(name=self._fresh()) for _ in range(outputs)]
        for value in values:
            if (found := dtype if dtype is not None else first.dtype if first is not None else None) is not None:
                value.type = ir.TensorType(found)
            value.shape = None if shape is None else ir.Shape(None if d == UNKNOWN else d for d in shape)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = {name: a for name, a in attributes.items() if a is not None}
        self.nodes.append(ir.node(op_type, inputs, given, domain=domain, outputs=values, name=values[0].name))
        return tuple(values)

    def _fresh(self) -> str:
        self._count += 1
        return f"{self._scope}.{self._count}"

    def const(self, value: Any, dtype: ir.DataType = T.INT64) -> ir.Value:
        """A constant of ``dtype``, made once for each value and type; it is a Constant node."""
        array = np.asarray(value).astype(dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            out = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))
            tensor = ir.tensor(array, dtype=dtype, name=out.name)
            self.nodes.append(ir.node("Constant", [], {"value": tensor}, outputs=[out], name=out.name))
            self._constants[key] = out
        return self._constants[key]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer, of ``name`` where that is free."""
        value = ir.Value(name=self.unique(name), type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape)))  # type: ignore[arg-type]
        tensor.name = value.name
        value.const_value = tensor
        self.tensors.append(value)
        return value

    # --- types ------------------------------------------------------------------------------------------------------
    def cast(self, x: Arg, dtype: ir.DataType) -> ir.Value:
        """``x`` as a tensor of ``dtype``: a number becomes a constant, a tensor of that type stays as it is."""
        if not isinstance(x, ir.Value):
            return self.const(x, dtype)
        return x if x.dtype == dtype else self.op("Cast", x, to=int(dtype), dtype=dtype, shape=x.shape)

    def like(self, op_type: str, x: ir.Value, *others: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node whose output has the type and the shape of ``x``."""
        return self.op(op_type, x, *others, dtype=x.dtype, shape=x.shape, **attributes)

    # --- sizes ------------------------------------------------------------------------------------------------------
    def size(self, x: ir.Value, axis: int) -> Arg:
        """The size of ``x`` along ``axis``: a number where static, else a rank 0 value, one for each symbolic size."""
        shape = dims(x)
        axis %= len(shape)
        dim = shape[axis]
        if isinstance(dim, int):
            return dim
        if ("size", dim) not in self.memo:
            one = self.op("Shape", x, start=axis, end=axis + 1, dtype=T.INT64, shape=[1])
            size = as_number(self.op("Squeeze", one, dtype=T.INT64, shape=[]))
            self.memo["size1", id(size)], self.memo["keep", id(size)] = one, size
            if dim == UNKNOWN:
                return size
            self.memo["size", dim] = size
        return self.memo["size", dim]

    def sizes(self, values: Sequence[Arg]) -> ir.Value:
        """A 1-D INT64 tensor of sizes that are numbers or rank 0 values."""
        if not any(isinstance(v, ir.Value) for v in values):
            return self.const(np.array(values, dtype=np.int64).reshape(-1))
        parts = [self._as_vector(v) if isinstance(v, ir.Value) else self.const([v]) for v in values]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0, dtype=T.INT64, shape=[len(parts)])

    def _as_vector(self, number: ir.Value) -> ir.Value:
        key = ("size1", id(number))
        if key not in self.memo:
            self.memo[key] = self.op("Reshape", self.cast(number, T.INT64), self.const([1]), dtype=T.INT64, shape=[1])
            self.memo["keep", id(number)] = number  # its id stays taken
        return self.memo[key]

    def reshape(self, x: ir.Value, sizes: Sequence[Arg], shape: Sequence[Dim]) -> ir.Value:
        """``x`` with ``sizes``, whose static description is ``shape``; a constant target wherever that is possible."""
        before = dims(x)
        if tuple(before) == tuple(shape):
            return x
        target: list[Any] = [
            dim if isinstance(dim, int) else 0 if before[i : i + 1] == (dim,) else None for i, dim in enumerate(shape)
        ]
        static_zero = any(dim == 0 and isinstance(dim, int) for dim in shape)
        if target.count(None) > 1 or static_zero:
            allow = 1 if static_zero else None
            return self.op("Reshape", x, self.sizes(sizes), allowzero=allow, dtype=x.dtype, shape=shape)
        return self.op("Reshape", x, self.const([-1 if t is None else t for t in target]), dtype=x.dtype, shape=shape)

    def axes(self, *axes: int) -> ir.Value:
        return self.const(list(axes))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """``x`` with new dimensions of size 1 at ``axes`` of the result."""
        shape = list(dims(x))
        for axis in sorted(a % (len(shape) + len(axes)) for a in axes):
            shape.insert(axis, 1)
        return self.op("Unsqueeze", x, self.axes(*axes), dtype=x.dtype, shape=shape)

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        shape = dims(x)
        if list(perm) == list(range(len(shape))):
            return x
        return self.op("Transpose", x, perm=list(perm), dtype=x.dtype, shape=[shape[p] for p in perm])


def dims(x: ir.Value) -> tuple[Dim, ...]:
    """The shape of a value: numbers and symbolic sizes."""
    if x.shape is None:
        raise UnsupportedError("an operand has no known rank")
    return tuple(d if isinstance(d, int) else d.value or UNKNOWN for d in x.shape)


def rank(x: ir.Value) -> int:
    return len(dims(x))


def product(shape: Sequence[Dim]) -> int | None:
    """The number of elements, None where a size is symbolic."""
    return math.prod(d for d in shape if isinstance(d, int)) if all(isinstance(d, int) for d in shape) else None


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    if dtype not in TO_ONNX:
        raise UnsupportedError(f"ONNX has no tensors of {dtype}")
    return TO_ONNX[dtype]


def no_kernel(node: ir.Node) -> str | None:
    """Why plain onnxruntime cannot run ``node``, None where it can."""
    dtype = next((v.dtype for v in node.inputs if v is not None), None)
    if dtype == T.BFLOAT16 and node.op_type not in MOVES:
        kind = "bfloat16"
    elif dtype == T.DOUBLE and node.op_type.partition("_")[0].rstrip("2d") in FLOAT_ONLY:  # also Conv2d_<format>
        kind = "float64"
    else:
        return None
    return f"onnxruntime has no {kind} {node.op_type}; convert the model with model.float() before it is compiled"


def as_number(x: ir.Value) -> ir.Value:
    """Mark a rank 0 value as a Python number of the program."""
    x.meta[_NUMBER] = True
    return x


def is_number(x: Arg) -> bool:
    return not isinstance(x, ir.Value) or bool(x.meta.get(_NUMBER))


def promote(a: Arg, b: Arg) -> ir.DataType:
    """The dtype in which torch computes with ``a`` and ``b``: tensors, rank 0 tensors and numbers weigh differently."""
    return onnx_dtype(torch.result_type(_probe(a), _probe(b)))


def _probe(x: Arg) -> Any:
    if not isinstance(x, ir.Value):
        return x
    assert x.dtype is not None
    dtype = TO_TORCH[x.dtype]
    if is_number(x):
        return torch.zeros((), dtype=dtype).item()
    return torch.empty((1,) * min(rank(x), 1), dtype=dtype, device="meta")
