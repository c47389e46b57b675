"""The operators of a quantized graph, and what each one means.

The reference body of an op is its definition: every back end registers another implementation of the same op and is
tested against this one. Ops on packed codes never see a float weight::

    quantize(x, scale, zp, spec)                        codes of x                               uint8 [rows, cols]
    dequantize(codes, scale, zp, spec, shape)           real values of logical shape             QDQ form of a weight
    fake_quantize(x, scale, zp, spec)                   dequantize(quantize(x)), straight-through gradient
    fake_quantize_dynamic(x, spec)                      the same, scales found row by row
    dequantize_packed(packed, scale, zp, spec, shape)   real values of planar bytes              for any consumer
    linear_wq(x, packed, scale, zp, bias, spec, shape)  x @ W^T + bias,  W = dequantize_packed(...)
    linear_wq_fused(...)                                the same with what is around it, for a kernel that does both:
        activation(linear_wq(fake_quantize(x)) + thin @ wide^T) + residual
    conv2d_wq(x, packed, ..., stride, padding, dilation, groups)
    embedding_wq(indices, packed, scale, zp, spec, shape)   rows of W, only those that are asked for
    with_outliers(weight, index, values)                weight with some of its entries replaced, stored sparse
    kv_scale(x, spec)                                   a scale for every token of keys or values
    quantize_kv(x, scale, spec)                         their codes as they lie in a KV cache
    dequantize_kv(codes, scale, spec)                   real values of those codes

``spec`` is a QuantSpec's text, ``shape`` the logical shape of the weight, ``zp`` a zero point or None, and
``tensor_scale`` the scale of scales where the spec has one. Scales may be in their stored form (``store_scale``).
``exponent_bias`` (int8, one a channel) is what LLM-FP4 moves from activations to weights: a weight's column is
multiplied by 2^-bias; an activation's channel by 2^bias before it is rounded, and by 2^-bias after unless ``shifted``.
``index`` (int32 [n], increasing) are positions in the flattened weight, ``values`` ([n] or [1, n]) what stands there.
Keys and values are ``[b, heads, tokens, width]``, a scale of theirs ``[heads, 1, width]`` (channel) or ``[b, heads,
tokens, 1]`` (token); codes are uint8, two of at most 4 bits in a byte where width is even, the first one low.
W is decoded in float32, rounded once to ``dtype`` (float32 where None), or to the dtype of x where there is one.
Gradients flow to x and bias (codes have none); ``quantize`` then ``dequantize`` has no gradient, the fake forms have,
``linear_wq_fused``, which only inference makes, has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import packing, qtensor, scales
from fxquant.bulk import NAMESPACE as NAMESPACE
from fxquant.scales import Scales
from fxquant.scheme import QuantSpec, parse_spec

Shape = Sequence[int]
Zero = Tensor | None
Outer = Tensor | None
Bias = Tensor | None
DType = torch.dtype | None

_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero_point"
_OUTER = "Tensor? tensor_scale=None"
_BIAS = "Tensor? exponent_bias=None"
_SHIFT = f"{_BIAS}, bool shifted=False"
_DTYPE = "*, ScalarType? dtype=None"
SCHEMAS = (
    f"quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec, {_OUTER}) -> Tensor",
    f"dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, int[] shape, {_OUTER}, {_BIAS}, {_DTYPE}) "
    "-> Tensor",
    f"fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec, {_OUTER}, {_SHIFT}) -> Tensor",
    f"fake_quantize_dynamic(Tensor x, str spec, {_SHIFT}) -> Tensor",
    f"dequantize_packed({_WEIGHT}, str spec, int[] shape, {_OUTER}, {_BIAS}, {_DTYPE}) -> Tensor",
    f"linear_wq(Tensor x, {_WEIGHT}, Tensor? bias, str spec, int[] shape, {_OUTER}, {_BIAS}) -> Tensor",
    f"linear_wq_fused(Tensor x, {_WEIGHT}, Tensor? bias, str spec, int[] shape, {_OUTER}, {_BIAS}, *, "
    'str input_spec="", Tensor? input_scale=None, Tensor? input_bias=None, bool shifted=False, Tensor? thin=None, '
    'Tensor? wide=None, str activation="none", Tensor? residual=None) -> Tensor',
    f"conv2d_wq(Tensor x, {_WEIGHT}, Tensor? bias, str spec, int[] shape, int[] stride, int[] padding, int[] dilation, "
    f"int groups, {_OUTER}) -> Tensor",
    f"embedding_wq(Tensor indices, {_WEIGHT}, str spec, int[] shape, {_OUTER}, {_DTYPE}) -> Tensor",
    "with_outliers(Tensor weight, Tensor index, Tensor values) -> Tensor",
    "kv_scale(Tensor x, str spec) -> Tensor",
    "quantize_kv(Tensor x, Tensor scale, str spec) -> Tensor",
    f"dequantize_kv(Tensor codes, Tensor scale, str spec, int width, {_DTYPE}) -> Tensor",
)

operators: Any = torch.ops.fxquant
"""The registered operators: import them from here, and they are sure to be defined."""

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


def matrix_shape(shape: Shape, rows: int) -> tuple[int, int]:
    """The matrix view ``[rows, cols]`` of a weight of logical ``shape``."""
    return rows, math.prod(shape) // max(rows, 1)


def _scales(scale: Tensor, zero_point: Zero, tensor_scale: Outer, spec: QuantSpec) -> Scales:
    return Scales(qtensor.load_scale(scale, spec), zero_point, tensor_scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Zero, spec: str, tensor_scale: Outer = None) -> Tensor:
    parsed = parse_spec(spec)
    return scales.quantize(x, _scales(scale, zero_point, tensor_scale, parsed), parsed)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Zero, spec: str, shape: Shape, tensor_scale: Outer = None,
    exponent_bias: Bias = None, *, dtype: DType = None,
) -> Tensor:  # fmt: skip
    parsed = parse_spec(spec)
    given = _scales(scale, zero_point, tensor_scale, parsed)
    value = qtensor.decode(codes, given, parsed, exponent_bias, dtype or torch.float32)
    return qtensor.from_matrix(value, parsed, tuple(shape))


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Zero, spec: str, tensor_scale: Outer = None, exponent_bias: Bias = None,
    shifted: bool = False,
) -> Tensor:  # fmt: skip
    parsed = parse_spec(spec)
    given = _scales(scale, zero_point, tensor_scale, parsed)
    return qtensor.fake_quantize(x, parsed, given, exponent_bias, shifted=shifted)


def fake_quantize_dynamic(x: Tensor, spec: str, exponent_bias: Bias = None, shifted: bool = False) -> Tensor:
    return qtensor.fake_quantize(x, parse_spec(spec), None, exponent_bias, shifted=shifted)


def dequantize_packed(
    packed: Tensor, scale: Tensor, zero_point: Zero, spec: str, shape: Shape, tensor_scale: Outer = None,
    exponent_bias: Bias = None, *, dtype: DType = None,
) -> Tensor:  # fmt: skip
    bits = parse_spec(spec).format.bits
    codes = packing.unpack(packed, packing.planar(bits), matrix_shape(shape, packed.shape[0])[1])
    return dequantize(codes, scale, zero_point, spec, shape, tensor_scale, exponent_bias, dtype=dtype)


def linear_wq(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, bias: Tensor | None, spec: str, shape: Shape,
    tensor_scale: Outer = None, exponent_bias: Bias = None,
) -> Tensor:  # fmt: skip
    weight = dequantize_packed(packed, scale, zero_point, spec, shape, tensor_scale, exponent_bias, dtype=x.dtype)
    return F.linear(x, weight, bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
"""What may follow a linear in ``linear_wq_fused``."""


def linear_wq_fused(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, bias: Tensor | None, spec: str, shape: Shape,
    tensor_scale: Outer = None, exponent_bias: Bias = None, *, input_spec: str = "", input_scale: Tensor | None = None,
    input_bias: Bias = None, shifted: bool = False, thin: Tensor | None = None, wide: Tensor | None = None,
    activation: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if input_spec and input_scale is not None:
        x = fake_quantize(x, input_scale, None, input_spec, None, input_bias, shifted)
    elif input_spec:
        x = fake_quantize_dynamic(x, input_spec, input_bias, shifted)
    y = linear_wq(x, packed, scale, zero_point, bias, spec, shape, tensor_scale, exponent_bias)
    return finish(y, thin, wide, activation, residual)


def finish(y: Tensor, thin: Tensor | None, wide: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """``activation(y + thin @ wide^T) + residual``, each part where there is one. ValueError for an activation."""
    if thin is not None and wide is not None:
        y = y + F.linear(thin, wide)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def conv2d_wq(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, bias: Tensor | None, spec: str, shape: Shape,
    stride: Shape, padding: Shape, dilation: Shape, groups: int, tensor_scale: Outer = None,
) -> Tensor:  # fmt: skip
    weight = dequantize_packed(packed, scale, zero_point, spec, shape, tensor_scale=tensor_scale, dtype=x.dtype)
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def embedding_wq(
    indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, spec: str, shape: Shape,
    tensor_scale: Outer = None, *, dtype: DType = None,
) -> Tensor:  # fmt: skip
    parsed, flat, rows = parse_spec(spec), indices.reshape(-1), packed.shape[0]
    high = parsed.block(rows, shape[1])[0]  # rows that share a scale
    pick = {rows: flat, -(-rows // high): flat // high}

    def own(value: Tensor | None) -> Tensor | None:
        if value is None or (value.shape[0] == 1 and rows > 1):
            return value
        return value.index_select(0, pick[value.shape[0]])

    found = dequantize_by_row(
        packing.unpack(packed.index_select(0, flat), packing.planar(parsed.format.bits), shape[1]),
        _scales(own(scale), own(zero_point), own(tensor_scale), parsed),  # type: ignore[arg-type]
        parsed,
        dtype or torch.float32,
    )
    return found.reshape(*indices.shape, shape[1])


def with_outliers(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    flat = weight.flatten() if not weight.is_contiguous() else weight.reshape(-1).clone()
    flat[index.long()] = values.reshape(-1).to(weight.dtype)
    return flat.reshape(weight.shape)


def kv_scale(x: Tensor, spec: str) -> Tensor:
    parsed = parse_spec(spec)
    ideal = x.abs().amax(-1, keepdim=True).float() / parsed.format.max
    most = torch.finfo(parsed.scale_dtype)
    scale = ideal.clamp(max=most.max).to(parsed.scale_dtype).clamp(min=most.tiny)
    return torch.where(ideal == 0, torch.ones_like(scale), scale)


def two_a_byte(spec: QuantSpec, width: int) -> bool:
    """Whether two codes of a KV cache with ``width`` channels share a byte."""
    return spec.format.bits <= 4 and width % 2 == 0


def quantize_kv(x: Tensor, scale: Tensor, spec: str) -> Tensor:
    parsed = parse_spec(spec)
    codes = parsed.format.encode(x.float() / scale.float())
    return codes[..., ::2] | codes[..., 1::2] << 4 if two_a_byte(parsed, x.shape[-1]) else codes


def dequantize_kv(codes: Tensor, scale: Tensor, spec: str, width: int, *, dtype: DType = None) -> Tensor:
    parsed = parse_spec(spec)
    if two_a_byte(parsed, width):
        codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
    return parsed.format.decode(codes).mul_(scale.float()).to(dtype or torch.float32)


def dequantize_by_row(codes: Tensor, given: Scales, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Real values of rows that were picked out of a matrix, each with its own scales already picked out with it."""
    wide = spec.block(*codes.shape)[1]
    value = spec.format.decode(codes)
    if given.zero_point is not None:
        value = value - scales.spread(given.zero_point.float(), (1, wide), codes.shape)
    return (value * scales.spread(given.effective, (1, wide), codes.shape)).to(dtype)


_BODIES: dict[str, Callable[..., Tensor]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "fake_quantize": fake_quantize,
    "fake_quantize_dynamic": fake_quantize_dynamic,
    "dequantize_packed": dequantize_packed,
    "linear_wq": linear_wq,
    "linear_wq_fused": linear_wq_fused,
    "conv2d_wq": conv2d_wq,
    "embedding_wq": embedding_wq,
    "with_outliers": with_outliers,
    "kv_scale": kv_scale,
    "quantize_kv": quantize_kv,
    "dequantize_kv": dequantize_kv,
}
for _name, _body in _BODIES.items():
    _library.impl(_name, _body, "CompositeExplicitAutograd")


# --- shapes, for tracing without data --------------------------------------------------------------------------------
def _fake_codes(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_like_x(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_shape(codes: Tensor, scale: Tensor, zero_point: Zero, spec: str, shape: Shape, tensor_scale: Outer = None,
                exponent_bias: Bias = None, *, dtype: DType = None) -> Tensor:  # fmt: skip
    return codes.new_empty(tuple(shape), dtype=dtype or torch.float32)


def _fake_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, bias: Tensor | None, spec: str,
                 shape: Shape, tensor_scale: Outer = None, exponent_bias: Bias = None, **around: Any,
                 ) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], shape[0])


def _fake_conv2d(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, bias: Tensor | None, spec: str,
                 shape: Shape, stride: Any, padding: Any, dilation: Any, groups: int, tensor_scale: Outer = None,
                 ) -> Tensor:  # fmt: skip
    return F.conv2d(x, x.new_empty(tuple(shape)), bias, stride, padding, dilation, groups)


def _fake_embedding(indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Zero, spec: str, shape: Shape,
                    tensor_scale: Outer = None, *, dtype: DType = None) -> Tensor:  # fmt: skip
    return indices.new_empty(*indices.shape, shape[1], dtype=dtype or torch.float32)


def _fake_kv_scale(x: Tensor, spec: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=parse_spec(spec).scale_dtype)


def _fake_kv_codes(x: Tensor, scale: Tensor, spec: str) -> Tensor:
    width = x.shape[-1] // 2 if two_a_byte(parse_spec(spec), x.shape[-1]) else x.shape[-1]
    return x.new_empty(*x.shape[:-1], width, dtype=torch.uint8)


def _fake_kv(codes: Tensor, scale: Tensor, spec: str, width: int, *, dtype: DType = None) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], width, dtype=dtype or torch.float32)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "quantize": _fake_codes,
    "dequantize": _fake_shape,
    "fake_quantize": _fake_like_x,
    "fake_quantize_dynamic": _fake_like_x,
    "dequantize_packed": _fake_shape,
    "linear_wq": _fake_linear,
    "linear_wq_fused": _fake_linear,
    "conv2d_wq": _fake_conv2d,
    "embedding_wq": _fake_embedding,
    "with_outliers": _fake_like_x,
    "kv_scale": _fake_kv_scale,
    "quantize_kv": _fake_kv_codes,
    "dequantize_kv": _fake_kv,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


# --- gradients: straight through ------------------------------------------------------------------------------------
def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = inputs


def _inside_its_range(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d fake_quantize / dx = 1 where x is inside the range of its scale, 0 where it was clipped."""
    x, scale, zero_point, text, tensor_scale, exponent_bias, shifted = ctx.inputs
    spec = parse_spec(text)
    matrix = x.reshape(-1, x.shape[-1] if x.dim() else 1) if x.numel() else x.reshape(0, 1)
    shift = None if exponent_bias is None else scales.power_of_two(exponent_bias, x.dtype)
    if shift is not None:
        matrix = matrix * shift
        grad = grad * shift if shifted else grad
    given = _scales(scale, zero_point, tensor_scale, spec)
    block = spec.block(*matrix.shape)
    wide = scales.spread(given.effective.to(x.dtype), block, matrix.shape)
    if zero_point is None:
        inside = matrix.abs() <= spec.format.max * wide
    else:
        zero = scales.spread(zero_point.to(x.dtype), block, matrix.shape)
        inside = (matrix >= -zero * wide) & (matrix <= (spec.format.max - zero) * wide)
    return torch.where(inside.reshape(x.shape), grad, torch.zeros_like(grad)), None, None, None, None, None, None


def _keep_shift(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.exponent_bias = inputs[2] if inputs[3] else None


def _unchanged(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A scale of the row's absolute maximum clips nothing: d fake_quantize_dynamic / dx = 1, or 2^bias if shifted."""
    if ctx.exponent_bias is not None:
        grad = grad * scales.power_of_two(ctx.exponent_bias, grad.dtype)
    return grad, None, None, None


def _decoded(ctx: Any, dtype: torch.dtype, *above: Tensor | None) -> Tensor:
    _, packed, scale, zero_point, _, spec, shape = ctx.inputs[:7]
    return operators.dequantize_packed(  # type: ignore[no-any-return]
        packed, scale, zero_point, spec, shape, *above, dtype=dtype
    )


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bias, shape = ctx.inputs[4], ctx.inputs[6]
    grad_bias = grad.reshape(-1, shape[0]).sum(0) if bias is not None and ctx.needs_input_grad[4] else None
    return grad @ _decoded(ctx, grad.dtype, *ctx.inputs[7:]), None, None, None, grad_bias, None, None, None, None


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, window = ctx.inputs[0], ctx.inputs[4], ctx.inputs[7:11]
    grad_x = torch.nn.grad.conv2d_input(x.shape, _decoded(ctx, grad.dtype, ctx.inputs[-1]), grad, *window)  # type: ignore[attr-defined]
    grad_bias = grad.sum((0, 2, 3)) if bias is not None and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, *[None] * 7


for _name, _backward, _setup in (
    ("fake_quantize", _inside_its_range, _keep),
    ("fake_quantize_dynamic", _unchanged, _keep_shift),
    ("linear_wq", _linear_backward, _keep),
    ("conv2d_wq", _conv2d_backward, _keep),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=_library)


def outliers_problem(index: Tensor, size: int, count: int) -> str | None:
    """What is wrong with the positions of ``count`` outliers in a weight of ``size`` values; None where nothing is."""
    if index.dtype != torch.int32 or index.dim() != 1 or len(index) != count:
        return f"positions are {index.dtype} {list(index.shape)}; {count} outliers want int32 [{count}]"
    if count and not (int(index[0]) >= 0 and int(index[-1]) < size and bool((index.diff() > 0).all())):
        return f"positions of outliers do not increase inside 0..{size - 1}"
    return None


ROUNDINGS = (operators.fake_quantize.default, operators.fake_quantize_dynamic.default)
"""Operators that round an activation."""


def is_op(target: object) -> bool:
    """Whether an fx target is an operator of ours."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
