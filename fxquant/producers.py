"""Scaling the channels of a value for free: in the constants of what produces it.

::

    x = mul(weight, normalized)        x * s = mul(weight * s, normalized)                    RMS norm
    x = layer_norm(h, weight, bias)    x * s = layer_norm(h, weight * s, bias * s)
    x = linear(h, W, b)                x * s = linear(h, diag(s) W, s * b)
    x = linear(h, dequantize(c, S))    x * s = linear(h, dequantize(c, diag(s) S))            s powers of two
    x = mul(gate, linear(h, W))        x * s = mul(gate, linear(h, diag(s) W))                also relu, casts, views

Between a linear and x may lie whatever is linear, or homogeneous, in it: views that move channels about, heads that
are repeated, the product with attention's probabilities. Channel k of x then comes from channel ``sources[k]`` of the
constants; where several channels have one source, they take one scale. With powers of two nothing is rounded: unless a
value over- or underflows, x * s is what it was times s in every bit. SmoothQuant (2211.10438), section 4.1; LLM-FP4
(2310.16836), section 4.2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.dims import Dim, evaluate, names
from fxquant.graph import ScalarType, TensorType, info, update_info
from fxquant.layers import Layer, swaps_matrix
from fxquant.lazy import real
from fxquant.ops import operators as ops
from fxquant.qdq import float_weight, quant_of, quantized_of, weight_error
from fxquant.qtensor import load_scale, store_scale
from fxquant.rewrite import Decline, aten, attach, detach, fetch, free_name, get_attr, get_attrs
from fxquant.scheme import parse_spec


@dataclass(frozen=True)
class Edit:
    """A constant to scale: the one that ``holder`` takes at ``position``, with its channels along ``axis``."""

    holder: fx.Node
    position: int
    axis: int


@dataclass(frozen=True)
class Fold:
    """How the channels of ``x`` are scaled in the constants of ``producer``.

    ``sources``: int64 [K], the channel of the constants that each channel of x comes from; ``channels``: how many the
    constants have. ``exact``: only powers of two can be folded, since codes have their scales multiplied.
    ``linear``: x is linear in a float linear's outputs, alike in all channels: they may be mixed, not only scaled;
    behind attention, where each head has probabilities of its own, only those of one head, ``head`` channels (else 0).
    """

    gm: fx.GraphModule
    x: fx.Node
    producer: fx.Node
    edits: tuple[Edit, ...]
    sources: Tensor
    channels: int
    exact: bool = False
    linear: bool = False
    head: int = 0

    def merge(self, s: Tensor) -> Tensor:
        """``s`` [K] with channels of one source given the largest of their values."""
        most = s.new_zeros(self.channels).scatter_reduce(0, self.sources, s, "amax", include_self=False)
        return most[self.sources]

    def can_mix(self, size: int) -> bool:
        """Whether runs of ``size`` channels of x come from runs of channels, so that a matrix can be folded in."""
        if not self.linear or len(self.sources) % size:
            return False
        runs = self.sources.reshape(-1, size)
        if self.head and (self.head % size or not torch.equal(runs[:, 0] // self.head, runs[:, -1] // self.head)):
            return False
        starts = runs[:, 0].unique()
        return torch.equal(runs, runs[:, :1] + torch.arange(size)) and bool((starts.diff() >= size).all())

    def mix(self, matrix: Tensor) -> None:
        """Edit constants so that every run of ``size`` channels of x becomes ``x_run @ matrix``, ``[size, size]``.

        ValueError where ``can_mix(size)`` does not hold.
        """
        if not self.can_mix(len(matrix)):
            raise ValueError(f"runs of {len(matrix)} channels of {self.x.name} are no runs of {self.producer.name}")
        runs = self.sources.reshape(-1, len(matrix)).unique(dim=0)
        for edit in self.edits:
            mix_constant(self.gm, edit, matrix, runs)

    def apply(self, s: Tensor) -> None:
        """Edit constants so that x becomes ``x * s``; ``s``: floats [K], positive. It may be called again.

        The graph is to be recompiled afterwards (the runner of passes does).

        ValueError for a vector of another size, values that are not positive and finite, different ones for one
        source, and for codes: what is no power of two, or takes a scale out of the range it is stored in.
        """
        if tuple(s.shape) != (len(self.sources),):
            raise ValueError(f"scales are {tuple(s.shape)}; {self.x.name} has {len(self.sources)} channels")
        wide = s.detach().double().cpu()
        if not bool((wide.isfinite() & (wide > 0)).all()):
            raise ValueError("a scale is not a positive finite number")
        if not torch.equal(self.merge(wide), wide):
            raise ValueError(f"channels of {self.x.name} from one source have different scales; merge() makes them one")
        if self.exact and not bool((torch.frexp(wide).mantissa == 0.5).all()):
            raise ValueError(f"{self.producer.name} has codes: only powers of two can be folded into their scales")
        factors = torch.ones(self.channels, dtype=torch.float64).scatter(0, self.sources, wide)
        for edit in self.edits:
            scale_constant(self.gm, edit.holder, edit.position, factors, axis=edit.axis)


def plan_fold(gm: fx.GraphModule, x: fx.Node, *, readers: Collection[fx.Node] | None = None) -> Fold | Decline:
    """How to scale the channels (last dimension) of ``x`` in constants, or why that cannot be done.

    ``readers``: the nodes that undo the scale; where x has another one, that is a Decline. None: all undo it.
    """
    others = [user for user in x.users if readers is not None and user not in readers and not _reads_size(user)]
    if others:
        return Decline(f"{_name(others[0])} reads it too and would see it scaled")
    found = _search(gm, x, ())
    if isinstance(found, Decline):
        return found
    root, edits, chain = found
    if not isinstance(_width(root), int):
        return Decline(f"the number of channels of {_name(root)} is not fixed")
    sources = _sources(root, chain)
    if isinstance(sources, Decline):
        return sources
    exact = any(_is_codes(edit.holder.args[edit.position]) for edit in edits)
    linear = root.target is aten.linear.default and not exact
    linear = linear and all(node.target in _MOVES or node.target in _PRODUCTS for node in chain)
    heads = [_concrete(node, {})[-1] for node in chain if node.target in _PRODUCTS]
    return Fold(gm, x, root, edits, sources, _concrete(root, {})[-1], exact, linear, math.gcd(*heads))


def columns_of(layer: Layer) -> Edit:
    """The float weight of a linear, with the channels of its input: its columns."""
    return Edit(layer.operand, 0, 0) if layer.transposed else Edit(layer.node, layer.position, 1)


# --- the way up -------------------------------------------------------------------------------------------------------
_SELECTS = (
    aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, operator.getitem,
)  # fmt: skip
_MOVES = (
    *_SELECTS, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip
"""Operators that move values and change none."""
_ELEMENTWISE: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1), aten.mul.Scalar: (0,), aten.div.Tensor: (0,), aten.div.Scalar: (0,),
    aten.neg.default: (0,), aten.relu.default: (0,), aten.leaky_relu.default: (0,), aten.to.dtype: (0,),
    aten._to_copy.default: (0,),
}  # fmt: skip
"""Operators with f(s x) = s f(x) for every s > 0, element by element; and the operands of which that is true."""
_PRODUCTS: dict[Any, tuple[int, ...]] = {
    aten.scaled_dot_product_attention.default: (2,), aten.matmul.default: (1,), aten.bmm.default: (1,),
}  # fmt: skip
"""Operators that sum over the dimension before the last of an operand: its channels stay channels."""
_SIZES = (aten.sym_size.int, aten.sym_numel.default)

_Found = tuple[fx.Node, tuple[Edit, ...], tuple[fx.Node, ...]]
"""The producer, what to edit there, and the nodes from behind it down to x."""


def _search(gm: fx.GraphModule, node: fx.Node, chain: tuple[fx.Node, ...]) -> _Found | Decline:
    edits = _edits(gm, node)
    if isinstance(edits, Decline):
        return edits
    if edits:
        return node, edits, chain
    positions = (0,) if node.target in _MOVES else (_ELEMENTWISE | _PRODUCTS).get(node.target, ())
    operands = [a for i in positions if isinstance(a := node.args[i], fx.Node) and a.op != "get_attr"]
    if not operands or not _is_float(node):
        return Decline(f"it comes from {_name(node)}, through which no scale can be moved")
    reasons = []
    for operand in operands:
        if reason := _seen_elsewhere(operand, node):
            found: _Found | Decline = Decline(reason)
        else:
            found = _search(gm, operand, (node, *chain))
        if not isinstance(found, Decline):
            return found
        reasons.append(found)
    return reasons[-1]


def _seen_elsewhere(operand: fx.Node, node: fx.Node) -> str | None:
    """Why the operand cannot be scaled for ``node`` alone; who takes a part of it is looked at later (``_overlap``)."""
    if sum(a is operand for a in node.args) > 1:
        return f"{_name(node)} takes {operand.name} twice"
    others = [u for u in operand.users if u is not node and u.target not in _SELECTS and not _reads_size(u)]
    return f"{_name(others[0])} reads {operand.name} too and would see it scaled" if others else None


def _edits(gm: fx.GraphModule, node: fx.Node) -> tuple[Edit, ...] | Decline:
    """The constants that scale the channels of ``node``; none where it has no such constants."""
    if node.op != "call_function":
        return Decline(f"it is the {'input' if node.op == 'placeholder' else 'constant'} {node.name}")
    if node.target is aten.linear.default:
        return _linear_edits(node)
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        return _norm_edits(node)
    if node.target is aten.mul.Tensor:
        width = _width(node)
        for i, a in enumerate(node.args[:2]):
            if isinstance(a, fx.Node) and a.op == "get_attr":
                value = fetch(gm, str(a.target))
                if value.dim() and value.shape[-1] == value.numel() == width:
                    return (Edit(node, i, -1),)
    return ()


def _linear_edits(node: fx.Node) -> tuple[Edit, ...] | Decline:
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(weight, fx.Node)
    if bias is not None and not _is_constant(bias):
        return Decline(f"the bias of {_name(node)} is computed")
    rest = () if bias is None else (Edit(node, 2, 0),)
    if _is_constant(weight):
        return (Edit(node, 1, 0), *rest)
    if _is_codes(weight):
        if len(weight.users) > 1:
            return Decline(f"the codes of {_name(node)} are shared with another layer")
        if _scale_part(weight) is None:
            return Decline(f"{weight.args[3]} has scales that several channels of {_name(node)} share")
        return (Edit(node, 1, 0), *rest)
    if swaps_matrix(weight) and _is_constant(weight.args[0]):
        if len(weight.users) > 1 or len(weight.args[0].users) > 1:  # type: ignore[union-attr]
            return Decline(f"the weight of {_name(node)} is shared with another layer")
        return (Edit(weight, 0, 1), *rest)
    return Decline(f"the weight of {_name(node)} is computed")


def _norm_edits(node: fx.Node) -> tuple[Edit, ...] | Decline:
    constants = [(i, a) for i, a in enumerate(node.args[2:4], start=2) if isinstance(a, fx.Node)]
    if not constants or constants[0][0] != 2 or not all(_is_constant(a) for _, a in constants):
        return Decline(f"{_name(node)} has no constant weight")
    if len(node.args[1]) != 1:  # type: ignore[arg-type]
        return Decline(f"{_name(node)} takes the norm over more than the channels")
    return tuple(Edit(node, i, 0) for i, _ in constants)


# --- which channel comes from where -----------------------------------------------------------------------------------
def _sources(root: fx.Node, chain: tuple[fx.Node, ...]) -> Tensor | Decline:
    """The channel of ``root`` that each channel of the last node of ``chain`` comes from, int64 [K].

    Channel numbers are sent through the operators in place of values, at small sizes. Declined where a channel of x
    comes from different ones at different places, or where a part of the value is seen elsewhere.
    """
    sizes = _sizes((root, *chain))
    try:
        index = torch.arange(_concrete(root, sizes)[-1]).expand(_concrete(root, sizes))
        passed: list[tuple[fx.Node, fx.Node, Any]] = []
        for parent, node in zip((root, *chain), chain, strict=False):
            passed.append((parent, node, index))
            index = _moved(node, parent, index, sizes)
        flat = index.reshape(-1, index.shape[-1])
        if not bool((flat == flat[0]).all()):
            return Decline(f"its channels are no fixed channels of {_name(root)}")
        for parent, node, before in passed:
            if other := _overlap(parent, node, before, flat[0], sizes):
                return Decline(f"{_name(other)} reads the same channels of {parent.name} and would see them scaled")
    except (RuntimeError, ValueError, IndexError) as error:
        return Decline(f"its channels cannot be followed from {_name(root)}: {str(error).splitlines()[0][:120]}")
    return flat[0].clone()


def _moved(node: fx.Node, parent: fx.Node, index: Any, sizes: dict[str, int]) -> Any:
    """What ``node`` makes of the channel numbers ``index`` of its operand ``parent``."""
    if node.target in _MOVES:
        args = fx.node.map_arg(node.args[1:], lambda n: _size(n, sizes))
        target = aten.reshape.default if node.target is aten.view.default else node.target
        return target(index, *args)  # type: ignore[operator]
    shape = _concrete(node, sizes)
    if node.target in _ELEMENTWISE:
        return index.expand(shape)
    row = index[..., :1, :]
    if not torch.equal(row.expand_as(index), index):
        raise ValueError(f"{_name(node)} sums over different channels")
    if node.kwargs.get("enable_gqa"):
        row = row.repeat_interleave(shape[-3] // row.shape[-3], -3)
    return row.expand(shape)


def _overlap(parent: fx.Node, node: fx.Node, index: Any, used: Tensor, sizes: dict[str, int]) -> fx.Node | None:
    """A user of ``parent`` beside ``node`` that takes one of the channels ``used``."""
    for user in parent.users:
        if user is node or _reads_size(user):
            continue
        parts = _moved(user, parent, index, sizes)
        for part in parts if isinstance(parts, (list, tuple)) else (parts,):
            if bool(torch.isin(part, used).any()):
                return user
    return None


def _sizes(nodes: tuple[fx.Node, ...]) -> dict[str, int]:
    """A small size for each dimension name that the types of ``nodes`` and of their operands have."""
    found: dict[str, int] = {}
    for node in (n for own in nodes for n in (own, *own.all_input_nodes)):
        for dim in _dims(node):
            for name in sorted(names(dim)) if isinstance(dim, str) else ():
                found.setdefault(name, 2 + len(found))
    return found


def _dims(node: fx.Node) -> Iterator[Dim]:
    kind = info(node).type
    if isinstance(kind, TensorType):
        yield from kind.shape
    elif isinstance(kind, ScalarType) and kind.value is not None:
        yield kind.value


def _concrete(node: fx.Node, sizes: dict[str, int]) -> list[int]:
    """The shape of ``node`` at the given sizes; sizes of a name that is not given are 2."""
    kind = info(node).type
    if not isinstance(kind, TensorType):
        raise ValueError(f"{node.name} has no tensor type")
    known = {name: 2 for dim in kind.shape if isinstance(dim, str) for name in names(dim)} | sizes
    return [dim if isinstance(dim, int) else evaluate(dim, known) for dim in kind.shape]


def _size(node: fx.Node, sizes: dict[str, int]) -> int:
    kind = info(node).type
    if not isinstance(kind, ScalarType) or kind.value is None:
        raise ValueError(f"the size {node.name} is not known")
    return kind.value if isinstance(kind.value, int) else evaluate(kind.value, sizes)


# --- writing ----------------------------------------------------------------------------------------------------------
def scale_constant(gm: fx.GraphModule, holder: fx.Node, position: int, factors: Tensor, *, axis: int) -> None:
    """Multiply, along ``axis``, the constant or the quantized weight that ``holder`` takes at ``position``.

    ``factors``: float64, one for each channel. The product is rounded once to the dtype of the constant. Nobody else
    sees it: memory is never written to, and a constant that others read is copied under a new name.
    """
    node = holder.args[position]
    assert isinstance(node, fx.Node)
    if _is_codes(node):
        _scale_codes(gm, node, factors)
        return
    _rewrite(gm, holder, position, _scaled(fetch(gm, str(node.target)), factors, axis))


def mix_constant(gm: fx.GraphModule, edit: Edit, matrix: Tensor, runs: Tensor) -> None:
    """Replace the channels ``runs`` (int64 ``[n, size]``) of a constant, along its axis, by ``channels @ matrix``.

    Computed in float64 and rounded once. As in ``scale_constant``, nobody else sees it.
    """
    node = edit.holder.args[edit.position]
    assert isinstance(node, fx.Node)
    old = real(fetch(gm, str(node.target)))
    new = old.to(torch.float64, copy=True)  # the model's own memory is not written to
    view = new.movedim(edit.axis, -1)
    view[..., runs] = view[..., runs] @ matrix.double().to(old.device)
    _rewrite(gm, edit.holder, edit.position, new.to(old.dtype))


def _rewrite(gm: fx.GraphModule, holder: fx.Node, position: int, value: Tensor) -> None:
    """Put ``value`` in the place of the constant that ``holder`` takes at ``position``, for ``holder`` alone."""
    node = holder.args[position]
    assert isinstance(node, fx.Node)
    if len(node.users) == 1 and not _read_elsewhere(gm, str(node.target), node):
        _exchange(gm, str(node.target), value)
        return
    name = free_name(gm, str(node.target))
    attach(gm, name, value)
    with gm.graph.inserting_before(holder):
        new = get_attr(gm.graph, name, value)
    holder.args = (*holder.args[:position], new, *holder.args[position + 1 :])


def _scaled(value: Tensor, factors: Tensor, axis: int) -> Tensor:
    shape = [1] * value.dim()
    shape[axis] = -1
    return (value.double() * factors.to(value.device).reshape(shape)).to(value.dtype)


def _scale_codes(gm: fx.GraphModule, node: fx.Node, factors: Tensor) -> None:
    """Powers of two into the scales of a ``dequantize`` node, and into the float weight that it stands for."""
    spec, part = parse_spec(str(node.args[3])), _scale_part(node)
    assert part is not None
    old = fetch(gm, str(part.target))
    new = _scaled(old, factors, 0)
    on_grid = part is not node.args[1] or torch.equal(load_scale(store_scale(new, spec), spec), new)
    if not on_grid or not torch.equal(new.double(), old.double() * factors[:, None]) or not bool(new.isfinite().all()):
        raise ValueError(f"a scale of {info(node).path or node.name} leaves the range of {spec.scale}")
    _exchange(gm, str(part.target), new)
    quant, value = quant_of(node), fetch(gm, quant_of(node).weight)
    value = _scaled(value, factors, value.dim() - 1 if quant.transposed else 0)
    if _read_elsewhere(gm, quant.weight, node):
        quant = replace(quant, weight=free_name(gm, quant.weight))
        attach(gm, quant.weight, value)
    else:
        _exchange(gm, quant.weight, value)
    update_info(node, weight=quant)
    update_info(node, weight=replace(quant, error=weight_error(float_weight(gm, node), quantized_of(gm, node))))


def _scale_part(node: fx.Node) -> fx.Node | None:
    """The scales of a ``dequantize`` node that belong to one output channel each: the outer ones, else the inner."""
    outer = node.kwargs.get("tensor_scale")
    shape = list(node.args[4])  # type: ignore[arg-type]
    for part in (outer, node.args[1]):
        kind = info(part).type if isinstance(part, fx.Node) else None
        if isinstance(kind, TensorType) and kind.shape[0] == shape[0] and len(shape) == 2:
            return part  # type: ignore[return-value]
    return None


def _exchange(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    detach(gm, name)
    attach(gm, name, value)


def _read_elsewhere(gm: fx.GraphModule, name: str, reader: fx.Node) -> bool:
    """Whether another node than ``reader`` reads the tensor ``name``, or stands for it in QDQ form."""
    if any(str(n.target) == name and n is not reader and n.users for n in get_attrs(gm.graph)):
        return True
    nodes = gm.graph.find_nodes(op="call_function", target=ops.dequantize.default)
    return any(n is not reader and (weight := info(n).weight) is not None and weight.weight == name for n in nodes)


# --- small questions --------------------------------------------------------------------------------------------------
def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _is_codes(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is ops.dequantize.default


def _is_float(node: fx.Node) -> bool:
    """Whether the node's value is one of floats, or several (split)."""
    kind = info(node).type
    return not isinstance(kind, TensorType) or kind.dtype.is_floating_point


def _reads_size(node: fx.Node) -> bool:
    return node.target in _SIZES


def _width(node: fx.Node) -> Dim | None:
    kind = info(node).type
    return kind.shape[-1] if isinstance(kind, TensorType) and kind.shape else None


def _name(node: fx.Node) -> str:
    """The node for people: its operator and module."""
    what = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    return f"{what} of {info(node).path}" if info(node).path else f"{what} ({node.name})"
