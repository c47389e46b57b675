"""quantize_kv_cache: keys and values of past tokens rounded, those of the current tokens exact.

::

    keys = cat([past, key])
 -> keys = cat([dequantize_kv(quantize_kv(past, scale), scale), key]);  present = cat([past, key])

Keys have a scale for every head and channel, from calibration data, since their outliers stay in a few channels; values
a scale for every head and token (WKVQuant, 2402.12065, section 3: past only quantization, two-dimensional). Here the
cache itself stays in float; ``store_kv_cache`` makes it codes when the weights are packed.
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
    found, probes = dict[fx.Node, Tensor](), dict[fx.Node, fx.Node]()
    for cat in cats:
        with gm.graph.inserting_before(cat):
            probe = gm.graph.call_function(aten.alias.default, (_new(cat),))
        set_info(probe, info(_new(cat)))
        probes[probe] = cat

    def reached(probe: fx.Node, seen: Statistics) -> None:
        found[probes[probe]] = torch.stack([x.abs().amax((0, 2)).float() for x in seen.inputs]).amax(0)

    walk(gm, settings["calibration"], list(probes), reached, progress=settings.get("progress", quiet), what=RULE)
    for probe in probes:
        gm.graph.erase_node(probe)
    return found


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
