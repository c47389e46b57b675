"""Layers of a captured graph: which nodes multiply by a constant weight, and which weights they share.

A layer is an aten node with a weight operand. Its name is the path of the module it came from where the weight is that
module's ``weight``, else the weight's own name (``attn.in_proj_weight``, ``experts.gate_up_proj``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxquant.graph import info
from fxquant.rewrite import aten, fetch, identity

_OPERAND: dict[Any, tuple[str, int]] = {
    aten.linear.default: ("linear", 1),
    aten.conv1d.default: ("conv", 1),
    aten.conv1d.padding: ("conv", 1),
    aten.conv2d.default: ("conv", 1),
    aten.conv2d.padding: ("conv", 1),
    aten.conv3d.default: ("conv", 1),
    aten.conv3d.padding: ("conv", 1),
    aten.embedding.default: ("embedding", 0),
}  # target -> (layer type, position of the weight)
_SWAPS = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default)
"""Views that swap the two dimensions of a matrix; ``aten.mT`` the last two of any tensor."""
_PAIRED = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_FOLLOWED = (
    aten.index.Tensor, aten.index_select.default, aten.select.int, aten.contiguous.default, *_PAIRED, *_SWAPS,
)  # fmt: skip
_PRODUCTS = (aten.bmm.default, aten.mm.default, aten.matmul.default, aten._grouped_mm.default)


@dataclass(frozen=True)
class Layer:
    """One weight use: ``node`` takes ``operand`` (a get_attr node, or a transposed view of one) at ``position``.

    ``transposed`` says that the weight is stored ``[..., in, out]``; ``channel_dims`` how many leading dimensions of
    the ``[..., out, in]`` view are output channels.
    """

    name: str
    type: str
    node: fx.Node
    position: int
    operand: fx.Node
    source: fx.Node
    weight: Tensor
    transposed: bool = False
    channel_dims: int = 1

    @property
    def target(self) -> str:
        """The name of the weight tensor."""
        return str(self.source.target)


def find_layers(gm: fx.GraphModule) -> list[Layer]:
    """Every layer of the graph, in graph order."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _OPERAND:
            layer = _plain_layer(gm, node, *_OPERAND[node.target])
        elif node.op == "get_attr":
            layer = _batched_layer(gm, node)
        else:
            continue
        if layer is not None:
            found.append(layer)
    return found


def ties(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Layers by the weight they use, where more than one uses the same memory: name of each -> all of them."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(identity(layer.weight)[:1], []).append(layer)
    return {layer.name: group for group in groups.values() if len(group) > 1 for layer in group}


def _plain_layer(gm: fx.GraphModule, node: fx.Node, kind: str, position: int) -> Layer | None:
    operand = node.args[position]
    if not isinstance(operand, fx.Node):
        return None
    source, transposed = operand, False
    if operand.op == "call_function" and swaps_matrix(operand):
        source, transposed = operand.args[0], True  # type: ignore[assignment]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    weight = fetch(gm, str(source.target))
    return Layer(_name(node, str(source.target)), kind, node, position, operand, source, weight, transposed)


def swaps_matrix(node: fx.Node, rank: int = 2) -> bool:
    """Whether the node swaps the last two of ``rank`` dimensions: t(w), w.T, transpose(w, 0, 1), permute(w, [1, 0])."""
    if node.target in _SWAPS:
        return rank == 2 or node.target is aten.mT.default
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return node.target in _PAIRED and {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def _batched_layer(gm: fx.GraphModule, source: fx.Node) -> Layer | None:
    """Expert weights ``[E, in, out]`` or ``[E, out, in]``: a 3-D constant that reaches a batched product."""
    weight = fetch(gm, str(source.target))
    if weight.dim() != 3 or not weight.is_floating_point():
        return None
    reached = _reaches_product(source, swapped=False)
    if reached is None:
        return None
    product, side, swapped = reached
    stored_in_out = swapped if side == 0 else not swapped  # W x sums over W's last dimension, x W over the one before
    name = _name(product, str(source.target))
    return Layer(name, "matmul", product, side, source, source, weight, stored_in_out, channel_dims=2)


def _is_product(target: Any) -> bool:
    """A batched product: torch's, or the stand-in that transformers registers for it where torch has no kernel."""
    return target in _PRODUCTS or str(target).startswith("transformers.grouped_mm_fallback")


def _reaches_product(node: fx.Node, *, swapped: bool, rank: int = 3) -> tuple[fx.Node, int, bool] | None:
    """The batched product that takes ``node``, on which side, and whether its last two dims were swapped before.

    ``w[i]`` of one expert is followed to its product as well, ``x @ w[i]`` or ``linear(x, w[i])``, which is x w[i]^T.
    """
    for user in node.users:
        if _is_product(user.target) and node in user.args[:2]:
            return user, user.args.index(node), swapped
        if user.target is aten.linear.default and rank == 2 and user.args[1] is node:
            return user, 1, not swapped
        if user.target in _FOLLOWED and user.args[0] is node:
            one = user.target is aten.select.int
            if one and (rank != 3 or int(user.args[1]) % 3 != 0):  # type: ignore[arg-type]
                continue  # a row of a matrix: no weight of a product
            swap = swaps_matrix(user, rank)
            if reached := _reaches_product(user, swapped=swapped ^ swap, rank=2 if one else rank):
                return reached
    return None


def other_uses(layers: list[Layer]) -> list[tuple[fx.Node, Layer]]:
    """Nodes that read a layer's weight and are no layer on it, with that layer: they keep its float copy in use."""
    own = {layer.node for layer in layers}
    found = []
    for source, layer in {layer.source: layer for layer in layers if layer.type != "matmul"}.items():
        users = [u for user in source.users for u in ([*user.users] if swaps_matrix(user) else [user])]
        found += [(user, layer) for user in dict.fromkeys(users) if user not in own]
    return found


def _name(node: fx.Node, target: str) -> str:
    owner, _, leaf = target.rpartition(".")
    if leaf != "weight":
        return target
    path = info(node).path
    inside = not path or owner.startswith(f"{path}.")  # a module that uses the weight of one it holds
    return (owner if inside else path) or target
