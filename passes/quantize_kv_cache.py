"""quantize_kv_cache: keys and values of past tokens rounded, those of the current tokens exact.

::

    keys = cat([past, key])
 -> keys = cat([dequantize_kv(quantize_kv(past, scale), scale), key]);  present = cat([past, key])

That only past tokens are rounded is WKVQuant's (2402.12065). Keys have a scale for every head and channel, found on
calibration data since the cache grows: their outliers stay in a few channels; values a scale for every head and token
(KIVI, 2402.02750). RoPE turns two channels of a key into each other by the token's position: both get the range of
their norm, which holds at positions that calibration does not reach (SmolLM2 at 2,048 tokens, calibrated on 512, int8:
the keys' error is 0.6 % and not 7 %). The cache stays in float here; ``store_kv_cache`` makes it codes later on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import scales
from fxquant.calibrate import Statistics, walk
from fxquant.errors import ConfigError
from fxquant.graph import NodeInfo, TensorType, info, set_info, tensor_type
from fxquant.ops import operators as ops
from fxquant.ops import two_a_byte
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import place
from fxquant.rewrite import Log, aten
from fxquant.scheme import QuantSpec, parse_spec

RULE = "quantize_kv_cache"


def quantize_kv_cache(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``key``, ``value`` (specs), ``progress``, and ``calibration`` where a spec has channels.

    Raises ConfigError for a model without a KV cache.
    """
    gm, log = program.gm, Log()
    specs = {kind: parse_spec(settings[kind]) for kind in ("key", "value")}
    found = [(cat, specs[kind]) for kind, cat in _appends(program)]
    if not found:
        raise ConfigError(
            f"{RULE}: the model has no KV cache; compile it with one: fxquant compile --kv-cache, or in Python "
            f"fxquant.hf.with_cache(model)"
        )
    static = [cat for cat, spec in found if not spec.dynamic]
    absmax = _ranges(gm, static, settings) if static else {}
    for cat, spec in found:
        _round_past(gm, cat, spec, absmax.get(cat))
        log.rewrote(RULE, cat, f"past tokens as {spec}")
    return log


def _appends(program: Program) -> list[tuple[str, fx.Node]]:
    """``cat([past, new])`` along the tokens for every input that may be left out, with what it holds."""
    placeholders = program.gm.graph.find_nodes(op="placeholder")
    found = []
    for item, node in zip(program.signature.inputs, placeholders, strict=True):
        cats = [n for n in node.users if n.target is aten.cat.default and n.args[0][0] is node]
        if item.empty and len(cats) == 1 and len(item.type.shape) == 4:
            found.append((item.name.rpartition("_")[2], cats[0]))
    return found


def _new(cat: fx.Node) -> fx.Node:
    new = cat.args[0][1]  # type: ignore[index]
    assert isinstance(new, fx.Node)
    return new


def _ranges(gm: fx.GraphModule, cats: list[fx.Node], settings: Mapping[str, Any]) -> dict[fx.Node, Tensor]:
    """The largest magnitude of every head and channel ``[heads, width]`` of what each appends, in all batches."""
    turned = {cat: turned_channels(_new(cat)) for cat in cats}
    found, probes = dict[fx.Node, Tensor](), dict[fx.Node, fx.Node]()
    for cat in cats:
        with gm.graph.inserting_before(cat):
            probe = gm.graph.call_function(aten.alias.default, (_new(cat),))
        set_info(probe, info(_new(cat)))
        probes[probe] = cat

    def reached(probe: fx.Node, seen: Statistics) -> None:
        cat = probes[probe]
        found[cat] = torch.stack([magnitudes(x.float(), turned[cat]).amax((0, 2)) for x in seen.inputs]).amax(0)

    walk(gm, settings["calibration"], list(probes), reached, progress=settings.get("progress", quiet), what=RULE)
    for probe in probes:
        gm.graph.erase_node(probe)
    return found


def magnitudes(x: Tensor, turned: int) -> Tensor:
    """``|x|``, for the first ``turned`` channels the norm of the pair (i, i + turned / 2) that each is of."""
    norm = torch.hypot(x[..., : turned // 2], x[..., turned // 2 : turned])
    return torch.cat([norm, norm, x[..., turned:].abs()], dim=-1)


def turned_channels(node: fx.Node) -> int:
    """How many channels of a key RoPE turns, ``k cos + cat([-k2, k1]) sin``, the first of them; 0 where it does not."""
    first = node.args[0]
    if node.target is aten.cat.default and isinstance(first, (list, tuple)):  # with those that it leaves as they are
        return turned_channels(first[0]) if isinstance(first[0], fx.Node) else 0
    if node.target in _AS_IT_IS and isinstance(first, fx.Node):
        return turned_channels(first)
    products = [a for a in node.args if isinstance(a, fx.Node) and a.target is aten.mul.Tensor]
    turns = any(_is_half_turn(a) for product in products for a in product.all_input_nodes)
    return int(tensor_type(node).shape[-1]) if node.target is aten.add.Tensor and turns else 0


def _is_half_turn(node: fx.Node) -> bool:
    """``cat([-k2, k1])``"""
    parts = node.args[0] if node.target is aten.cat.default else None
    return isinstance(parts, (list, tuple)) and len(parts) == 2 and (
        isinstance(parts[0], fx.Node) and parts[0].target is aten.neg.default
    )  # fmt: skip


_AS_IT_IS = (aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.alias.default)


def _round_past(gm: fx.GraphModule, cat: fx.Node, spec: QuantSpec, absmax: Tensor | None) -> None:
    """Put the rounded past in front of what readers of ``cat`` see; outputs of the graph keep the exact one."""
    graph, past, about = gm.graph, cat.args[0][0], info(cat)  # type: ignore[index]
    assert isinstance(past, fx.Node)
    kind = tensor_type(past)
    width = int(kind.shape[-1])

    def call(target: Any, type_: TensorType, *args: Any, **kwargs: Any) -> fx.Node:
        with graph.inserting_before(cat):
            made = graph.call_function(target, args, kwargs)
        set_info(made, NodeInfo(type_, about.path, about.module, about.source))
        return made

    if absmax is None:
        shape = (*kind.shape[:-1], 1)
        scale = call(ops.kv_scale.default, TensorType(spec.scale_dtype, shape), past, str(spec))
    else:
        matrix = absmax.reshape(-1, 1)
        value = scales.choose(matrix, spec, name=f"the keys of {about.path}").scale.reshape(absmax.shape[0], 1, width)
        scale = place(gm, cat, f"{past.name}_scale", value)
    stored = (*kind.shape[:-1], width // 2 if two_a_byte(spec, width) else width)
    codes = call(ops.quantize_kv.default, TensorType(torch.uint8, stored), past, scale, str(spec))
    rounded = call(ops.dequantize_kv.default, kind, codes, scale, str(spec), width, dtype=kind.dtype)
    seen = call(aten.cat.default, tensor_type(cat), [rounded, _new(cat)], *cat.args[1:])
    output = graph.output_node()
    cat.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not output and user is not seen)


QUANTIZE_KV_CACHE = Pass("quantize_kv_cache", "round the keys and values of past tokens", quantize_kv_cache)
