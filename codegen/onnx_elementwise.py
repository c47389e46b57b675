"""ONNX converters of elementwise operators: arithmetic, comparison, logic, casts, activations.

A converter takes the builder, then the operator's arguments as torch names and orders them. The dtype a result is
computed in is torch's: the result's for arithmetic, the promoted one for comparisons.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from fxquant.codegen.onnx_builder import (
    FLOATS,
    NARROW,
    Arg,
    Builder,
    T,
    UnsupportedError,
    as_number,
    promote,
)  # fmt: skip
from fxquant.rewrite import aten

Converter = Callable[..., Any]


def wide(dtype: ir.DataType) -> ir.DataType:
    """The dtype in which arithmetic on ``dtype`` is done: onnxruntime lacks kernels for narrow integers."""
    return T.INT32 if dtype in NARROW else dtype


# --- one operand ----------------------------------------------------------------------------------------------------
def unary(op_type: str) -> Converter:
    """A torch function that is one ONNX operator, computed in the result's dtype."""

    def convert(b: Builder, x: Arg, **_: Any) -> ir.Value:
        return b.cast(b.like(op_type, b.cast(x, wide(b.dtype))), b.dtype)

    return convert


def predicate(op_type: str) -> Converter:
    def convert(b: Builder, x: ir.Value) -> ir.Value:
        if x.dtype not in FLOATS:
            x = b.cast(x, T.FLOAT)
        return b.op(op_type, x, dtype=T.BOOL, shape=x.shape)

    return convert


def logical_not(b: Builder, x: Arg) -> ir.Value:
    return b.op("Not", b.cast(x, T.BOOL), dtype=T.BOOL)


def bitwise_not(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Not" if x.dtype == T.BOOL else "BitwiseNot", x)


def rsqrt(b: Builder, x: ir.Value) -> ir.Value:
    root = b.like("Sqrt", b.cast(x, b.dtype))
    found = b.like("Reciprocal", root)
    b.memo["root", id(found)], b.memo["keep", id(found)] = root, found  # its id stays taken
    return found


def of_scaled_log(factor: float) -> Converter:
    """log2, log10: log(x) * factor."""

    def convert(b: Builder, x: ir.Value) -> ir.Value:
        return b.like("Mul", b.like("Log", b.cast(x, b.dtype)), b.const(factor, b.dtype))

    return convert


def log1p(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Log", b.like("Add", b.cast(x, b.dtype), b.const(1, b.dtype)))


def expm1(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Sub", b.like("Exp", b.cast(x, b.dtype)), b.const(1, b.dtype))


def erfc(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Sub", b.const(1, b.dtype), b.like("Erf", b.cast(x, b.dtype)))


def square(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Mul", x, x)


def trunc(b: Builder, x: ir.Value) -> ir.Value:
    if x.dtype not in FLOATS:
        return x
    return b.like("Mul", b.like("Sign", x), b.like("Floor", b.like("Abs", x)))


def round_decimals(b: Builder, x: ir.Value, *, decimals: int) -> ir.Value:
    factor = b.const(10.0**decimals, b.dtype)
    return b.like("Div", b.like("Round", b.like("Mul", x, factor)), factor)


def cast_to(b: Builder, x: Arg, *_: Any, **__: Any) -> ir.Value:
    """Every form of ``to``: the result's type says all."""
    return b.cast(x, b.dtype)


# --- two operands ---------------------------------------------------------------------------------------------------
def binary(op_type: str, of_bools: str = "") -> Converter:
    """One ONNX operator on operands of the result's dtype; ``of_bools`` is its form for BOOL."""

    def convert(b: Builder, x: Arg, y: Arg, *, alpha: Arg = 1) -> ir.Value:
        if alpha != 1:
            y = arithmetic(b, "Mul", y, alpha, dtype=b.dtype)
        return arithmetic(b, of_bools if of_bools and b.dtype == T.BOOL else op_type, x, y, dtype=b.dtype)

    return convert


def arithmetic(b: Builder, op_type: str, x: Arg, y: Arg, *, dtype: ir.DataType) -> ir.Value:
    """One ONNX operator on both operands in ``dtype``, in INT32 where that is a narrow integer."""
    inner = wide(dtype)
    return b.cast(b.op(op_type, b.cast(x, inner), b.cast(y, inner), dtype=inner), dtype)


def multiply(b: Builder, x: Arg, y: Arg) -> ir.Value:
    """x * rsqrt(z) is x / sqrt(z): onnxruntime knows a norm by that, and runs it as one operator."""
    for one, other in ((x, y), (y, x)):
        root = b.memo.get(("root", id(other)))
        if root is not None and isinstance(one, ir.Value) and one.dtype == root.dtype:
            return b.op("Div", one, root, dtype=b.dtype)
    return arithmetic(b, "And" if b.dtype == T.BOOL else "Mul", x, y, dtype=b.dtype)


def reversed_subtract(b: Builder, x: Arg, y: Arg, alpha: Arg = 1) -> ir.Value:
    if alpha != 1:
        x = arithmetic(b, "Mul", x, alpha, dtype=b.dtype)
    return arithmetic(b, "Sub", y, x, dtype=b.dtype)


def divide(b: Builder, x: Arg, y: Arg, *, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode == "floor":
        return floor_divide(b, x, y)
    if rounding_mode == "trunc" and b.dtype in FLOATS:
        return trunc(b, arithmetic(b, "Div", x, y, dtype=b.dtype))
    return arithmetic(b, "Div", x, y, dtype=b.dtype)


def floor_divide(b: Builder, x: Arg, y: Arg) -> ir.Value:
    """floor(x / y); of integers (x - x mod y) / y, since ONNX rounds their quotient towards zero."""
    if b.dtype in FLOATS:
        return b.op("Floor", arithmetic(b, "Div", x, y, dtype=b.dtype))
    whole = arithmetic(b, "Sub", x, arithmetic(b, "Mod", x, y, dtype=b.dtype), dtype=b.dtype)
    return arithmetic(b, "Div", whole, y, dtype=b.dtype)


def remainder(b: Builder, x: Arg, y: Arg) -> ir.Value:
    """x - floor(x / y) * y: the sign of the divisor, as in Python."""
    if b.dtype not in FLOATS:
        return arithmetic(b, "Mod", x, y, dtype=b.dtype)
    whole = b.op("Floor", arithmetic(b, "Div", x, y, dtype=b.dtype))
    return arithmetic(b, "Sub", x, b.op("Mul", whole, b.cast(y, b.dtype)), dtype=b.dtype)


def fmod(b: Builder, x: Arg, y: Arg) -> ir.Value:
    inner = wide(b.dtype)
    return b.cast(b.op("Mod", b.cast(x, inner), b.cast(y, inner), fmod=1), b.dtype)


def power(b: Builder, x: Arg, y: Arg) -> ir.Value:
    if isinstance(y, (int, float)) and b.dtype in FLOATS:
        base = b.cast(x, b.dtype)
        simple = {1: lambda: base, 0.5: lambda: b.like("Sqrt", base), -1: lambda: b.like("Reciprocal", base),
                  -0.5: lambda: rsqrt(b, base), 3: lambda: b.like("Mul", b.like("Mul", base, base), base)}  # fmt: skip
        if y in simple:
            return simple[y]()
    return arithmetic(b, "Pow", x, y, dtype=b.dtype)


def bitwise(bools: str, integers: str) -> Converter:
    def convert(b: Builder, x: Arg, y: Arg) -> ir.Value:
        return b.op(bools if b.dtype == T.BOOL else integers, b.cast(x, b.dtype), b.cast(y, b.dtype))

    return convert


def logical(op_type: str) -> Converter:
    def convert(b: Builder, x: Arg, y: Arg) -> ir.Value:
        return b.op(op_type, b.cast(x, T.BOOL), b.cast(y, T.BOOL))

    return convert


def compare(op_type: str, negate: bool = False) -> Converter:
    def convert(b: Builder, x: Arg, y: Arg) -> ir.Value:
        dtype = wide(promote(x, y))
        if dtype == T.BOOL and op_type != "Equal":
            dtype = T.INT32
        found = b.op(op_type, b.cast(x, dtype), b.cast(y, dtype), dtype=T.BOOL)
        return b.op("Not", found) if negate else found

    return convert


# --- three operands and choices -------------------------------------------------------------------------------------
def where(b: Builder, condition: ir.Value, x: Arg, y: Arg) -> ir.Value:
    """``condition ? x : y``; BOOL and narrow integers pass through INT32, which has a kernel."""
    inner = T.INT32 if b.dtype == T.BOOL else wide(b.dtype)
    chosen = b.op("Where", b.cast(condition, T.BOOL), b.cast(x, inner), b.cast(y, inner), dtype=inner)
    return b.cast(chosen, b.dtype)


def masked_fill(b: Builder, x: ir.Value, mask: ir.Value, value: Arg) -> ir.Value:
    return where(b, mask, value, x)


def clamp(b: Builder, x: ir.Value, low: Arg = None, high: Arg = None) -> ir.Value:
    inner = wide(b.dtype)
    value = b.cast(x, inner)
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            value = b.op(op_type, value, b.cast(bound, inner), dtype=inner)
    return b.cast(value, b.dtype)


def clamp_min(b: Builder, x: ir.Value, low: Arg) -> ir.Value:
    return clamp(b, x, low)


def clamp_max(b: Builder, x: ir.Value, high: Arg) -> ir.Value:
    return clamp(b, x, None, high)


def lerp(b: Builder, start: ir.Value, end: ir.Value, weight: Arg) -> ir.Value:
    return b.op("Add", start, b.op("Mul", b.cast(weight, b.dtype), b.op("Sub", end, start)))


def fused(op_type: str) -> Converter:
    """addcmul, addcdiv: x + value * (y op z)."""

    def convert(b: Builder, x: Arg, y: Arg, z: Arg, *, value: Arg = 1) -> ir.Value:
        term = arithmetic(b, op_type, y, z, dtype=b.dtype)
        return arithmetic(b, "Add", x, arithmetic(b, "Mul", term, value, dtype=b.dtype), dtype=b.dtype)

    return convert


# --- activations ----------------------------------------------------------------------------------------------------
def gelu(b: Builder, x: ir.Value, *, approximate: str = "none") -> ir.Value:
    return b.like("Gelu", x, approximate=approximate)


def silu(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Mul", x, b.like("Sigmoid", x))


def with_float(op_type: str, *names: str) -> Converter:
    """An activation whose scalar arguments are the attributes ``names``, in order."""

    def convert(b: Builder, x: ir.Value, *values: Any) -> ir.Value:
        given = {n: float(v) for n, v in zip(names, values, strict=False) if v is not None}
        return b.like(op_type, x, **given)

    return convert


def elu(b: Builder, x: ir.Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> ir.Value:
    if scale == 1 and input_scale == 1:
        return b.like("Elu", x, alpha=float(alpha))
    if input_scale != 1:
        raise UnsupportedError("elu with an input_scale")
    return b.like("Selu", x, alpha=float(alpha), gamma=float(scale))


def hardtanh(b: Builder, x: ir.Value, low: Arg = -1, high: Arg = 1) -> ir.Value:
    return clamp(b, x, low, high)


def hardsigmoid(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def hardswish(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Mul", x, hardsigmoid(b, x))


def softplus(b: Builder, x: ir.Value, beta: Arg = 1, threshold: Arg = 20) -> ir.Value:
    """log(1 + e^(beta x)) / beta, and x itself where beta x > threshold."""
    scaled = b.like("Mul", x, b.const(beta, b.dtype))
    soft = b.like("Div", b.like("Softplus", scaled), b.const(beta, b.dtype))
    above = b.op("Greater", scaled, b.const(threshold, b.dtype), dtype=T.BOOL)
    return b.op("Where", above, x, soft, dtype=b.dtype, shape=x.shape)


def mish(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Mul", x, b.like("Tanh", b.like("Softplus", x)))


def log_sigmoid(b: Builder, x: ir.Value) -> ir.Value:
    return b.like("Neg", b.like("Softplus", b.like("Neg", x)))


def threshold(b: Builder, x: ir.Value, limit: Arg, value: Arg) -> ir.Value:
    above = b.op("Greater", x, b.cast(limit, b.dtype), dtype=T.BOOL)
    return b.op("Where", above, x, b.cast(value, b.dtype), dtype=b.dtype)


# --- numbers --------------------------------------------------------------------------------------------------------
def on_numbers(convert: Converter) -> Converter:
    """A Python operator on sizes: the same converter, its result marked as a number."""

    def number(b: Builder, *args: Arg) -> ir.Value:
        return as_number(convert(b, *args))

    return number


def integer(op_type: str) -> Converter:
    """math.floor, math.ceil, math.trunc of a number computed in the graph."""

    def convert(b: Builder, x: Arg) -> ir.Value:
        if not isinstance(x, ir.Value) or x.dtype not in FLOATS:
            return b.cast(x, T.INT64)
        return b.cast(b.like(op_type, x) if op_type else x, T.INT64)

    return convert


_UNARY = {
    "Abs": ("abs",), "Neg": ("neg",), "Exp": ("exp",), "Log": ("log",), "Sqrt": ("sqrt",), "Sin": ("sin",),
    "Cos": ("cos",), "Tan": ("tan",), "Asin": ("asin",), "Acos": ("acos",),
    "Atan": ("atan",), "Sinh": ("sinh",), "Cosh": ("cosh",),
    "Asinh": ("asinh",), "Acosh": ("acosh",), "Atanh": ("atanh",), "Tanh": ("tanh",), "Sigmoid": ("sigmoid",),
    "Erf": ("erf", "special_erf"), "Floor": ("floor",), "Ceil": ("ceil",), "Round": ("round",), "Sign": ("sign", "sgn"),
    "Reciprocal": ("reciprocal",), "Relu": ("relu",),
}  # fmt: skip
_OPERATORS: dict[Any, Converter] = {
    operator.add: binary("Add"), operator.sub: binary("Sub"), operator.mul: binary("Mul"), operator.neg: unary("Neg"),
    operator.floordiv: floor_divide, operator.mod: remainder, operator.truediv: divide, operator.pow: power,
    operator.eq: compare("Equal"), operator.ne: compare("Equal", negate=True), operator.lt: compare("Less"),
    operator.le: compare("LessOrEqual"), operator.gt: compare("Greater"), operator.ge: compare("GreaterOrEqual"),
    operator.and_: logical("And"), operator.or_: logical("Or"), operator.not_: logical_not,
    torch.sym_max: binary("Max"), torch.sym_min: binary("Min"), torch.sym_not: logical_not, torch.sym_float: cast_to,
    torch.sym_int: integer(""), math.floor: integer("Floor"), math.ceil: integer("Ceil"), math.trunc: integer(""),
    round: integer("Round"), abs: unary("Abs"),
}  # fmt: skip


def rows(*table: tuple[Converter, tuple[Any, ...]]) -> dict[Any, Converter]:
    """``(converter, targets)`` pairs as target -> converter."""
    return {target: convert for convert, targets in table for target in targets}


def both(name: str) -> tuple[Any, ...]:
    """The Tensor and Scalar overloads of an operator."""
    packet = getattr(aten, name)
    return tuple(getattr(packet, overload) for overload in ("Tensor", "Scalar") if overload in packet.overloads())


ELEMENTWISE: dict[Any, Converter] = {
    **{getattr(aten, name).default: unary(op_type) for op_type, names in _UNARY.items() for name in names},
    **{target: on_numbers(convert) for target, convert in _OPERATORS.items()},
    **rows(
        (predicate("IsNaN"), (aten.isnan.default,)),
        (predicate("IsInf"), (aten.isinf.default,)),
        (logical_not, (aten.logical_not.default,)),
        (bitwise_not, (aten.bitwise_not.default,)),
        (rsqrt, (aten.rsqrt.default,)),
        (of_scaled_log(1 / math.log(2)), (aten.log2.default,)),
        (of_scaled_log(1 / math.log(10)), (aten.log10.default,)),
        (log1p, (aten.log1p.default,)),
        (expm1, (aten.expm1.default,)),
        (erfc, (aten.erfc.default,)),
        (square, (aten.square.default,)),
        (trunc, (aten.trunc.default, aten.fix.default)),
        (round_decimals, (aten.round.decimals,)),
        (cast_to, (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
                   aten.type_as.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
                   aten.lift_fresh.default, aten.clone.default, aten.contiguous.default, aten.positive.default)),
        (binary("Add", "Or"), both("add")),
        (binary("Sub"), both("sub")),
        (reversed_subtract, both("rsub")),
        (multiply, both("mul")),
        (divide, (*both("div"), aten.div.Tensor_mode, aten.div.Scalar_mode, aten.true_divide.Tensor)),
        (floor_divide, (aten.floor_divide.default, aten.floor_divide.Scalar)),
        (remainder, both("remainder")),
        (fmod, both("fmod")),
        (power, (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)),
        (binary("Max", "Or"), (aten.maximum.default, aten.max.other)),
        (binary("Min", "And"), (aten.minimum.default, aten.min.other)),
        (bitwise("And", "BitwiseAnd"), (*both("bitwise_and"), *both("__and__"))),
        (bitwise("Or", "BitwiseOr"), (*both("bitwise_or"), *both("__or__"))),
        (bitwise("Xor", "BitwiseXor"), (*both("bitwise_xor"), *both("__xor__"))),
        (logical("And"), (aten.logical_and.default,)),
        (logical("Or"), (aten.logical_or.default,)),
        (logical("Xor"), (aten.logical_xor.default,)),
        (compare("Equal"), both("eq")),
        (compare("Equal", negate=True), both("ne")),
        (compare("Less"), both("lt")),
        (compare("LessOrEqual"), both("le")),
        (compare("Greater"), both("gt")),
        (compare("GreaterOrEqual"), both("ge")),
        (where, (aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)),
        (masked_fill, (aten.masked_fill.Scalar, aten.masked_fill.Tensor)),
        (clamp, (aten.clamp.default, aten.clamp.Tensor, aten.clip.default)),
        (clamp_min, (aten.clamp_min.default, aten.clamp_min.Tensor)),
        (clamp_max, (aten.clamp_max.default, aten.clamp_max.Tensor)),
        (lerp, (aten.lerp.Scalar, aten.lerp.Tensor)),
        (fused("Mul"), (aten.addcmul.default,)),
        (fused("Div"), (aten.addcdiv.default,)),
        (gelu, (aten.gelu.default,)),
        (silu, (aten.silu.default,)),
        (elu, (aten.elu.default,)),
        (with_float("Celu", "alpha"), (aten.celu.default,)),
        (with_float("Selu"), (aten.selu.default,)),
        (with_float("LeakyRelu", "alpha"), (aten.leaky_relu.default,)),
        (hardtanh, (aten.hardtanh.default,)),
        (lambda b, x: clamp(b, x, 0, 6), (aten.relu6.default,)),
        (hardsigmoid, (aten.hardsigmoid.default,)),
        (hardswish, (aten.hardswish.default,)),
        (softplus, (aten.softplus.default,)),
        (mish, (aten.mish.default,)),
        (log_sigmoid, (aten.log_sigmoid.default,)),
        (threshold, (aten.threshold.default,)),
    ),
}  # fmt: skip
