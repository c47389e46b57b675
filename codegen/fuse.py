"""fuse_epilogues: what surrounds a packed linear goes into it, so that one kernel does both.

::

    linear(fake_quantize(x))            -> fused(x, input_spec)          W4A8: the kernel takes the codes of x
    linear(x) + linear(thin, U)         -> fused(x, thin, U)            LoRC, thin = linear(x, V); U decoded now
    gelu | silu | relu (linear(x))      -> fused(x, activation)
    linear(x) + residual                -> fused(x, residual)

Only where nothing else reads what lies between. The body of ``linear_wq_fused`` does the same operations in the same
order, so no bit changes where it runs; a kernel rounds less often. Graphs in this form are for running: what is saved
and exported is the graph before (``fused``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxquant.graph import info, tensor_type, update_info
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program, copied
from fxquant.qdq import rounding_spec
from fxquant.rewrite import Call, Decline, Log, Match, Rule, Var, apply_rules, aten, fetch, free_name

_LINEARS = (ops.linear_wq.default, ops.linear_wq_fused.default)
_ACTIVATIONS = {aten.relu.default: "relu", aten.silu.default: "silu", aten.gelu.default: "gelu"}


def fused(program: Program) -> Program:
    """A program that shares the tensors of ``program`` and whose graph is fused; ``program`` stays as it is."""
    copy = copied(program)
    fuse(copy, {})
    copy.gm.graph.lint()
    copy.gm.recompile()
    return copy


def fuse(program: Program, settings: Mapping[str, Any]) -> Log:
    return apply_rules(program.gm, FUSION)


def fuse_input(match: Match) -> fx.Node | Decline:
    rounding = match["rounding"]
    spec = rounding_spec(rounding)
    if other := next((u for u in rounding.users if u.target not in _LINEARS or u.args[0] is not rounding), None):
        return Decline(f"its rounded input is also read by {other.name}")
    static = rounding.target is ops.fake_quantize.default
    if static and (rounding.args[2] is not None or rounding.kwargs.get("tensor_scale") is not None):
        return Decline(f"its input is rounded to {spec} with a zero point or a scale of scales")
    if not (spec.static if static else spec.dynamic):
        return Decline(f"its input is rounded to {spec}; kernels take a scale a row, or one")
    given = _named(rounding)
    return _fused(
        match, match.node, x=rounding.args[0], input_spec=str(spec), input_scale=given.get("scale"),
        input_bias=given.get("exponent_bias"), shifted=given.get("shifted", False),
    )  # fmt: skip


def fuse_compensation(match: Match) -> fx.Node | Decline:
    base, wide = sorted((match["a"], match["b"]), key=_is_factor)
    reason = _problem(match, base) or _problem(match, wide)
    if reason or base.kwargs.get("activation", "none") != "none" or base.kwargs.get("residual") is not None:
        return Decline(reason or "an activation or a residual comes between")
    given = _named(wide)
    if wide.target is not ops.linear_wq.default or given.get("bias") is not None:
        return Decline("the compensation is not a plain product")
    operands = {
        k: fetch(match.gm, str(v.target)) if isinstance(v, fx.Node) else v for k, v in given.items() if k != "x"
    }
    U = ops.dequantize_packed(
        *(operands[k] for k in ("packed", "scale", "zero_point", "spec", "shape")),
        *(operands.get(k) for k in ("tensor_scale", "exponent_bias")), dtype=tensor_type(match.node).dtype,
    )  # fmt: skip
    name = free_name(match.gm, str(given["packed"].target).removesuffix("_packed"))
    return _fused(match, base, thin=given["x"], wide=match.constant(name, U))


def fuse_activation(match: Match) -> fx.Node | Decline:
    name = _ACTIVATIONS[match.node.target]
    if name == "gelu" and match.node.kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    y = match["y"]
    if reason := _problem(match, y):
        return Decline(reason)
    if y.kwargs.get("activation", "none") != "none" or y.kwargs.get("residual") is not None:
        return Decline("an activation or a residual comes between")
    return _fused(match, y, activation=name)


def fuse_residual(match: Match) -> fx.Node | Decline:
    reason = ""
    for y, residual in ((match["a"], match["b"]), (match["b"], match["a"])):
        if not _is_linear(y):
            continue
        reason = _problem(match, y) or ""
        if not reason and y.kwargs.get("residual") is not None:
            reason = "another residual is added before"
        if not reason and not (isinstance(residual, fx.Node) and info(residual).type == info(match.node).type):
            reason = "what is added has another type or shape"
        if not reason:
            return _fused(match, y, residual=residual)
    return Decline(reason)


def _problem(match: Match, y: fx.Node) -> str | None:
    """Why what ``y`` computes cannot go into what is computed from it."""
    if other := next((user for user in y.users if user is not match.node), None):
        return f"{y.name} is also read by {other.name}"
    if match.node.kwargs.get("alpha", 1) != 1:
        return "what is added is multiplied by alpha"
    return None if info(y).type == info(match.node).type else "it changes the type or the shape"


def _fused(match: Match, linear: fx.Node, **more: Any) -> fx.Node:
    """The packed linear with ``more`` around it, in front of the matched node."""
    given = _named(linear) | more
    positional = [a.name for a in ops.linear_wq_fused.default._schema.arguments if not a.kwarg_only]
    args = [given.pop(name, None) for name in positional]
    new = match.call(ops.linear_wq_fused.default, *args, **{k: v for k, v in given.items() if v is not None})
    about = info(linear)
    update_info(new, weight=about.weight, path=about.path, module=about.module, source=about.source)
    return new


def _named(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_linear(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in _LINEARS


def _is_factor(value: fx.Node) -> bool:
    """Whether it multiplies with a factor of another weight's compensation."""
    quant = info(value).weight
    return quant is not None and bool(quant.part_of)


def _adds_compensation(match: Match) -> bool:
    a, b = match["a"], match["b"]
    return _is_linear(a) and _is_linear(b) and _is_factor(a) != _is_factor(b)


_ADD = Call(aten.add.Tensor, Var("a"), Var("b"))
FUSION = (
    Rule(Call(ops.linear_wq.default, Var("rounding")), fuse_input,
         where=lambda m: isinstance(m["rounding"], fx.Node) and m["rounding"].target in ROUNDINGS),
    Rule(_ADD, fuse_compensation, where=_adds_compensation),
    Rule(Call(tuple(_ACTIVATIONS), Var("y")), fuse_activation, where=lambda m: _is_linear(m["y"])),
    Rule(_ADD, fuse_residual, where=lambda m: _is_linear(m["a"]) or _is_linear(m["b"])),
)  # fmt: skip

FUSE_EPILOGUES = Pass("fuse_epilogues", "what surrounds a packed linear, into its kernel", fuse)
