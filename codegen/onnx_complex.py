"""Complex numbers as pairs of real ones, ``[..., 2]`` for a complex ``[...]``: onnxruntime has no others.

    polar(r, t)                            ->  stack([r cos(t), r sin(t)], -1)
    z w,   z = [a, b],  w = [c, d]         ->  stack([a c - b d, a d + b c], -1)
    view_as_complex(x), view_as_real(z)    ->  x, z
    unsqueeze(z, 1)                        ->  unsqueeze(z, 1), and the like: the pair stays the last dimension

Rotary embeddings of DeepSeek-V2 and Llama 4 are such products. A graph without complex numbers stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.codegen.onnx_builder import UnsupportedError
from fxquant.dims import Dim
from fxquant.graph import NodeInfo, TensorType, info, set_info
from fxquant.rewrite import aten

_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class ComplexError(UnsupportedError):
    """An operator on complex numbers that has no form in real ones; ``node`` is its call."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__("onnxruntime has no complex numbers, and this has no form in real ones")
        self.node = node


def in_pairs(graph: fx.Graph) -> fx.Graph:
    """``graph``, or a copy of it in which no value is complex. Raises ComplexError for what has no such form."""
    touched = {n for n in graph.nodes if _is_complex(n) or any(map(_is_complex, n.all_input_nodes))}
    return _Pairs(touched).run(graph) if touched else graph


def _is_complex(node: fx.Node) -> bool:
    found = info(node).type
    return isinstance(found, TensorType) and found.dtype in _PARTS


class _Pairs:
    """Copies a graph; what touches complex values is written anew by a row of ``FORMS``."""

    def __init__(self, touched: set[fx.Node]) -> None:
        self.touched, self.graph = touched, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.node: fx.Node

    def run(self, graph: fx.Graph) -> fx.Graph:
        for self.node in graph.nodes:
            if self.node not in self.touched:
                self.env[self.node] = self.graph.node_copy(self.node, self.env.__getitem__)
                continue
            form = FORMS.get(self.node.target) if self.node.op == "call_function" else None
            if form is None:
                raise ComplexError(self.node)
            self.env[self.node] = form(self, *self.node.args)
        return self.graph

    def new(self, value: Any) -> Any:
        return fx.map_arg(value, self.env.__getitem__)

    def call(self, target: Any, args: tuple[Any, ...], shape: tuple[Dim, ...]) -> fx.Node:
        """A call on nodes of the new graph, of the parts' dtype."""
        made = self.graph.call_function(target, args)
        old = info(self.node)
        set_info(made, NodeInfo(TensorType(self.dtype, shape), old.path, old.module, old.source))
        return made

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts of the complex numbers at hand."""
        types = [info(n).type for n in (self.node, *self.node.all_input_nodes)]
        return next(_PARTS[t.dtype] for t in types if isinstance(t, TensorType) and t.dtype in _PARTS)

    @property
    def shape(self) -> tuple[Dim, ...]:
        """That of the call's result, without the pairs."""
        return _shape(self.node)

    def stacked(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self.call(aten.stack.default, ([real, imaginary], -1), (*self.shape, 2))

    def part(self, z: fx.Node, which: int) -> fx.Node:
        """The real (0) or imaginary (1) part of a complex operand."""
        return self.call(aten.select.int, (self.env[z], len(_shape(z)), which), _shape(z))


def _shape(node: fx.Node) -> tuple[Dim, ...]:
    found = info(node).type
    assert isinstance(found, TensorType)
    return found.shape


def polar(p: _Pairs, radius: fx.Node, angle: fx.Node) -> fx.Node:
    r, t = p.new((radius, angle))
    turned = [p.call(f, (t,), _shape(angle)) for f in (aten.cos.default, aten.sin.default)]
    return p.stacked(*(p.call(aten.mul.Tensor, (r, part), p.shape) for part in turned))


def from_parts(p: _Pairs, real: fx.Node, imaginary: fx.Node) -> fx.Node:
    return p.stacked(*p.new((real, imaginary)))


def same(p: _Pairs, x: fx.Node, *_: Any) -> fx.Node:
    """The pairs are those of the operand: a cast between complex and real numbers is none of these."""
    if p.node.target is not aten.view_as_real.default and p.node.target is not aten.view_as_complex.default:
        _require(p, info(x).type == info(p.node).type)
    return p.env[x]


def part(which: int) -> Callable[..., fx.Node]:
    return lambda p, z: p.part(z, which)


def product(p: _Pairs, x: Any, y: Any) -> fx.Node:
    """Of two complex values, or of one with real ones or a real number."""
    if not all(isinstance(v, fx.Node) and _is_complex(v) for v in (x, y)):
        z, factor = (x, y) if isinstance(x, fx.Node) and _is_complex(x) else (y, x)
        _require(p, not isinstance(factor, complex))
        if isinstance(factor, fx.Node):
            factor = p.call(aten.unsqueeze.default, (p.env[factor], -1), (*_shape(factor), 1))
        return p.call(aten.mul.Tensor, (p.env[z], factor), (*p.shape, 2))
    (a, b), (c, d) = ((p.part(v, 0), p.part(v, 1)) for v in (x, y))
    ac, bd, ad, bc = (p.call(aten.mul.Tensor, pair, p.shape) for pair in ((a, c), (b, d), (a, d), (b, c)))
    return p.stacked(
        p.call(aten.sub.Tensor, (ac, bd), p.shape), p.call(aten.add.Tensor, (ad, bc), p.shape)
    )  # fmt: skip


def conjugate(p: _Pairs, z: fx.Node) -> fx.Node:
    return p.stacked(p.part(z, 0), p.call(aten.neg.default, (p.part(z, 1),), p.shape))


def along(p: _Pairs, z: fx.Node, *args: Any) -> fx.Node:
    """An operator on one or more dimensions counted from the front, the pair being the last one."""
    ranks = len(_shape(z)) + (p.node.target is aten.unsqueeze.default)
    count = {aten.transpose.int: 2, aten.flatten.using_ints: 2}.get(p.node.target, 1)
    moved = [a % ranks for a in args[:count]]
    return p.call(p.node.target, (p.env[z], *moved, *p.new(args[count:])), (*p.shape, 2))


def resized(p: _Pairs, z: fx.Node, sizes: Any, *rest: Any) -> fx.Node:
    return p.call(p.node.target, (p.env[z], [*p.new(sizes), 2], *rest), (*p.shape, 2))


def expanded(p: _Pairs, z: fx.Node, sizes: Any, *_: Any) -> fx.Node:
    return p.call(aten.expand.default, (p.env[z], [*p.new(sizes), 2]), (*p.shape, 2))


def picked(p: _Pairs, z: fx.Node, indices: Any) -> fx.Node:
    return p.call(aten.index.Tensor, (p.env[z], p.new(indices)), (*p.shape, 2))


def _require(p: _Pairs, holds: bool) -> None:
    if not holds:
        raise ComplexError(p.node)


FORMS: dict[Any, Callable[..., fx.Node]] = {
    aten.polar.default: polar,
    aten.complex.default: from_parts,
    **dict.fromkeys((aten.view_as_complex.default, aten.view_as_real.default), same),
    **dict.fromkeys((aten.to.dtype, aten.to.device, aten.contiguous.default, aten.clone.default), same),
    aten.real.default: part(0),
    aten.imag.default: part(1),
    aten.mul.Tensor: product,
    **dict.fromkeys((aten.conj.default, aten._conj.default, aten.conj_physical.default), conjugate),
    **dict.fromkeys((aten.unsqueeze.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
                     aten.flatten.using_ints, aten.index_select.default), along),
    **dict.fromkeys((aten.view.default, aten.reshape.default), resized),
    aten.expand.default: expanded,
    aten.index.Tensor: picked,
}  # fmt: skip
"""Operators that take or give complex values, and how they are said of pairs."""
