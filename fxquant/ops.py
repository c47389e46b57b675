"""The operators of a quantized graph, and what each one means.

The reference body of an op is its definition: every back end registers another implementation of the same op and is
tested against this one. Ops on packed codes never see a float weight::

    quantize(x, scale, zp, spec)                     codes of x                                       uint8 [rows, cols]
    dequantize(codes, scale, zp, spec, shape)        real values, reshaped to shape                   QDQ form
    dequantize_packed(packed, scale, zp, spec, shape)   the same from planar bytes                    any consumer
    linear_wq(x, packed, scale, zp, bias, spec, shape)      x @ W^T + bias,  W = dequantize_packed(...)
    conv2d_wq(x, packed, ..., stride, padding, dilation, groups)
    embedding_wq(indices, packed, scale, zp, spec, shape)   rows of W, only those that are asked for

``spec`` is a QuantSpec's text, ``shape`` the logical shape of the weight, ``zp`` a zero point or None. W is decoded in
float32, rounded once to ``dtype`` (float32 where None), or to the dtype of x where there is one. Gradients flow to x
and bias (codes have none); ``quantize`` followed by ``dequantize`` has no gradient, ``fake_quantize`` is the
straight-through form of the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import packing, qtensor
from fxquant.scheme import QuantSpec, parse_spec

NAMESPACE = "fxquant"
DType = torch.dtype | None

_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero_point"
_DECODED = "str spec, int[] shape, *, ScalarType? dtype=None"
SCHEMAS = (
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec) -> Tensor",
    f"dequantize(Tensor codes, Tensor scale, Tensor? zero_point, {_DECODED}) -> Tensor",
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec) -> Tensor",
    f"dequantize_packed({_WEIGHT}, {_DECODED}) -> Tensor",
    f"linear_wq(Tensor x, {_WEIGHT}, Tensor? bias, str spec, int[] shape) -> Tensor",
    f"conv2d_wq(Tensor x, {_WEIGHT}, Tensor? bias, str spec, int[] shape, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    f"embedding_wq(Tensor indices, {_WEIGHT}, str spec, int[] shape, *, ScalarType? dtype=None) -> Tensor",
)
# quantize and dequantize: the QDQ form that passes edit. The rest: what lowering makes of it.

operators: Any = torch.ops.fxquant
"""The registered operators: import them from here, and they are sure to be defined."""

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


def matrix_shape(shape: Sequence[int], rows: int) -> tuple[int, int]:
    """The matrix view ``[rows, cols]`` of a weight of logical ``shape``."""
    return rows, math.prod(shape) // max(rows, 1)


def _decode(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, shape: Sequence[int], dtype: DType
) -> Tensor:
    cols = matrix_shape(shape, packed.shape[0])[1]
    codes = packing.unpack(packed, spec.format.bits, cols)
    return qtensor.dequantize(codes, scale, zero_point, spec, dtype or torch.float32).reshape(tuple(shape))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    return qtensor.quantize(x, scale, zero_point, parse_spec(spec))


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, shape: Sequence[int], *, dtype: DType = None
) -> Tensor:
    value = qtensor.dequantize(codes, scale, zero_point, parse_spec(spec), dtype or torch.float32)
    return value.reshape(tuple(shape))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    parsed = parse_spec(spec)
    codes = qtensor.quantize(x, scale, zero_point, parsed)
    return qtensor.dequantize(codes, scale, zero_point, parsed, x.dtype)


def dequantize_packed(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, shape: Sequence[int], *, dtype: DType = None
) -> Tensor:
    return _decode(packed, scale, zero_point, parse_spec(spec), shape, dtype)


def linear_wq(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    spec: str,
    shape: Sequence[int],
) -> Tensor:
    return F.linear(x, _decode(packed, scale, zero_point, parse_spec(spec), shape, x.dtype), bias)


def conv2d_wq(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    spec: str,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weight = _decode(packed, scale, zero_point, parse_spec(spec), shape, x.dtype)
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def embedding_wq(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    shape: Sequence[int],
    *,
    dtype: DType = None,
) -> Tensor:
    parsed, flat = parse_spec(spec), indices.reshape(-1)
    per_row = scale.shape[0] > 1
    rows = _decode(
        packed.index_select(0, flat),
        scale.index_select(0, flat) if per_row else scale,
        zero_point.index_select(0, flat) if per_row and zero_point is not None else zero_point,
        parsed,
        (flat.shape[0], shape[1]),
        dtype,
    )
    return rows.reshape(*indices.shape, shape[1])


_BODIES: dict[str, Callable[..., Tensor]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "fake_quantize": fake_quantize,
    "dequantize_packed": dequantize_packed,
    "linear_wq": linear_wq,
    "conv2d_wq": conv2d_wq,
    "embedding_wq": embedding_wq,
}
for _name, _body in _BODIES.items():
    _library.impl(_name, _body, "CompositeExplicitAutograd")


# --- shapes, for tracing without data --------------------------------------------------------------------------------
def _fake_quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_like_x(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_shape(codes: Tensor, *args: Any, dtype: DType = None) -> Tensor:
    return codes.new_empty(tuple(args[-1]), dtype=dtype or torch.float32)


def _fake_linear(x: Tensor, *args: Any) -> Tensor:
    shape = args[-1]
    return x.new_empty(*x.shape[:-1], shape[0])


def _fake_conv2d(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
                 spec: str, shape: Sequence[int], *window: Any) -> Tensor:  # fmt: skip
    weight = x.new_empty(tuple(shape))
    return F.conv2d(x, weight, bias, *window)


def _fake_embedding(indices: Tensor, packed: Tensor, *args: Any, dtype: DType = None) -> Tensor:
    return packed.new_empty(*indices.shape, args[-1][1], dtype=dtype or torch.float32)


for _name, _fake in (
    ("quantize", _fake_quantize_codes),
    ("dequantize", _fake_shape),
    ("fake_quantize", _fake_like_x),
    ("dequantize_packed", _fake_shape),
    ("linear_wq", _fake_linear),
    ("conv2d_wq", _fake_conv2d),
    ("embedding_wq", _fake_embedding),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


# --- gradients: straight through ------------------------------------------------------------------------------------
def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = inputs


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d fake_quantize / dx = 1 where x is inside the range of its scale, 0 where it was clipped."""
    x, scale, zero_point, spec = ctx.inputs
    parsed = parse_spec(spec)
    wide = qtensor.spread(scale.to(x.dtype), parsed.group_size(x.shape[1]), x.shape[1])
    if zero_point is None:
        inside = x.abs() <= parsed.format.max * wide
    else:
        zero = qtensor.spread(zero_point.to(x.dtype), parsed.group_size(x.shape[1]), x.shape[1])
        inside = (x >= -zero * wide) & (x <= (parsed.format.max - zero) * wide)
    return torch.where(inside, grad, torch.zeros_like(grad)), None, None, None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, packed, scale, zero_point, bias, spec, shape = ctx.inputs
    weight = torch.ops.fxquant.dequantize_packed(packed, scale, zero_point, spec, shape).to(grad.dtype)
    grad_bias = grad.reshape(-1, shape[0]).sum(0) if bias is not None and ctx.needs_input_grad[4] else None
    return grad @ weight, None, None, None, grad_bias, None, None


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scale, zero_point, bias, spec, shape, stride, padding, dilation, groups = ctx.inputs
    weight = torch.ops.fxquant.dequantize_packed(packed, scale, zero_point, spec, shape).to(grad.dtype)
    grad_x = torch.nn.grad.conv2d_input(  # type: ignore[attr-defined]
        x.shape, weight, grad, stride, padding, dilation, groups
    )
    grad_bias = grad.sum((0, 2, 3)) if bias is not None and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, None, None, None


for _name, _backward in (
    ("fake_quantize", _straight_through),
    ("linear_wq", _linear_backward),
    ("conv2d_wq", _conv2d_backward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_keep_inputs, lib=_library)


def is_op(target: object) -> bool:
    """Whether an fx target is an operator of ours."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
