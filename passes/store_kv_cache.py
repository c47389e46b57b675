"""store_kv_cache: a KV cache that is rounded when it is read, as codes.

::

    past (float), dequantize_kv(quantize_kv(past, scale)),  present = cat([past, new])
 -> past (uint8), dequantize_kv(past, scale),               present = cat([past, quantize_kv(new, scale)])

Scales of tokens are part of the cache, ``past_0_value_scale``; those of channels are constants. Both forms compute the
same: a token's codes depend on that token only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.graph import NodeInfo, TensorType, info, set_info, tensor_type
from fxquant.ops import operators as ops
from fxquant.program import Pass, Program
from fxquant.rewrite import Log, aten
from fxquant.signature import Input, output_names

RULE = "store_kv_cache"


def store_kv_cache(program: Program, settings: Mapping[str, Any]) -> Log:
    """Changes the signature: pasts and presents are uint8, and scales of tokens join them."""
    graph, log = program.gm.graph, Log()
    signature = program.signature
    outputs: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    names, inputs = output_names(signature.output), list[Input]()
    for item, past in zip(signature.inputs, graph.find_nodes(op="placeholder"), strict=True):
        codes = next((n for n in past.users if n.target is ops.quantize_kv.default), None)
        present = next((n for n in past.users if n in outputs), None)
        if codes is None or present is None:
            inputs.append(item)
            continue
        kind, scale, at = tensor_type(codes), codes.args[1], outputs.index(present)
        assert isinstance(scale, fx.Node)
        new = present.args[0][1]
        inputs.append(Input(item.name, kind, item.empty))
        new_scale = scale
        if scale.target is ops.kv_scale.default:
            known = tensor_type(scale)
            with graph.inserting_after(past):
                held = graph.placeholder(f"{item.name}_scale")
            set_info(held, NodeInfo(known))
            inputs.append(Input(f"{item.name}_scale", known, item.empty))
            new_scale = _call(graph, present, known, ops.kv_scale.default, new, str(codes.args[2]))
            scale.replace_all_uses_with(held)
            outputs.append(_appended(graph, present, held, new_scale))
            names.append(f"{names[at]}_scale")
            graph.erase_node(scale)
        added = _call(graph, present, kind, ops.quantize_kv.default, new, new_scale, str(codes.args[2]))
        codes.replace_all_uses_with(past)
        outputs[at] = _appended(graph, present, past, added, kind)
        graph.output_node().args = (tuple(outputs),)
        graph.erase_node(codes)
        graph.erase_node(present)
        set_info(past, replace(info(past), type=kind))
        log.rewrote(RULE, outputs[at], f"{item.name} as {kind}")
    output = {"kind": "dict", "keys": names, "items": list(range(len(names)))}
    program.signature = replace(signature, inputs=tuple(inputs), output=output, out_spec=None)
    return log


def _call(graph: fx.Graph, at: fx.Node, type_: TensorType, target: Any, *args: Any) -> fx.Node:
    """A new node in front of ``at``, with its module and source; its tokens are those of the current call."""
    about = info(at)
    with graph.inserting_before(at):
        made = graph.call_function(target, args)
    new = tensor_type(args[0]).shape[2]
    shape = (*type_.shape[:2], new, *type_.shape[3:])
    set_info(made, NodeInfo(TensorType(type_.dtype, shape), about.path, about.module, about.source))
    return made


def _appended(
    graph: fx.Graph, present: fx.Node, past: fx.Node, new: fx.Node, type_: TensorType | None = None
) -> fx.Node:
    """``cat([past, new])`` along the tokens, in front of ``present``."""
    about, kind = info(present), type_ or tensor_type(past)
    shape = (*kind.shape[:2], tensor_type(present).shape[2], *kind.shape[3:])
    with graph.inserting_before(present):
        made = graph.call_function(aten.cat.default, ([past, new], *present.args[1:]))
    set_info(made, replace(about, type=TensorType(kind.dtype, shape)))
    return made


STORE_KV_CACHE = Pass("store_kv_cache", "the KV cache as codes", store_kv_cache)
