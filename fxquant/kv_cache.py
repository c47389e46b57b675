"""A decoder with its KV cache as inputs and outputs, so that a step computes one token and not the whole text.

    logits, present = model(input_ids [b, s], past)        past, present: keys and values of every layer
    past_<i>_key      [b, heads, p, width]                 present_<i>_key    [b, heads, p + s, width]
    past_<i>_value    [b, heads, p, width]                 present_<i>_value  [b, heads, p + s, width]

p may be 0, the first call, and s may be 1, a step. Token j of the call is at position p + j and sees the keys of the
positions 0 to p + j, or the last of them where a layer has a sliding window. All sequences of a batch are of the same
length: padding is not supported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import InputError, ModelError
from fxquant.examples import example_inputs
from fxquant.graph import TensorType
from fxquant.signature import Input, left_out

PAST, PRESENT = "past", "present"
_ATTENTION = "fxquant_cached"


class CachedDecoder(nn.Module):
    """A transformers causal language model whose ``forward(input_ids, past_0_key=..., ...)`` returns
    ``{"logits": ..., "present_0_key": ..., ...}``; the past that is left out is empty. Weights and paths are those of
    the model.

    ``declared_inputs`` are what ``capture`` names and keeps dynamic, ``declared_limits`` how long a text may get;
    ``example_inputs()`` are some to compile it with. Raises ModelError for a model whose layers keep something else
    than keys and values, or that does not give its own logits this way.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        vars(self)["decoder"] = model.eval()  # not a submodule: the paths of its parts stay as they are
        self.eval()
        _check_decoder(model)
        ids = example_inputs(model)["input_ids"][:, :8].to(next(model.parameters()).device)
        pasts, want = _plain_pasts(model, ids)
        self.declared_inputs = _inputs(pasts)
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.declared_limits = (f"{PAST} + sequence <= {most}",) if most else ()
        self._check_same(ids, want)

    @property
    def config(self) -> Any:
        """The model's own config."""
        return vars(self)["decoder"].config

    def example_inputs(self) -> dict[str, Tensor]:
        """Token ids with the cache of the tokens before them."""
        decoder = vars(self)["decoder"]
        ids = example_inputs(decoder)["input_ids"].to(next(self.parameters()).device)
        with torch.no_grad():
            found = self(ids[:, :5])
        past = {name.replace(PRESENT, PAST): value for name, value in found.items() if name != "logits"}
        return {"input_ids": ids[:, 5:], **past}

    def forward(self, input_ids: Tensor, **past: Tensor) -> dict[str, Tensor]:
        past = {**left_out(self.declared_inputs, {"input_ids": input_ids, **past}), **past}
        names = [item.name for item in self.declared_inputs[1:]]
        layers = _layers([(past[k], past[v]) for k, v in zip(names[::2], names[1::2], strict=True)])
        p, s = past[names[0]].shape[2], input_ids.shape[1]
        position = p + torch.arange(s, device=input_ids.device)
        dtype = past[names[0]].dtype
        from transformers import Cache

        with _own_attention(self.config):
            found = vars(self)["decoder"](
                input_ids=input_ids, attention_mask=_masks(self.config, position, p + s, dtype),
                position_ids=position.unsqueeze(0), past_key_values=Cache(layers=layers), use_cache=True,
                return_dict=True,
            )  # fmt: skip
        present = [value for layer in layers for value in (layer.keys, layer.values)]
        return {"logits": found.logits, **dict(zip((n.replace(PAST, PRESENT) for n in names), present, strict=True))}

    def _check_same(self, ids: Tensor, want: Tensor) -> None:
        """ModelError unless the model gives the same logits in one piece and in two."""
        name = type(vars(self)["decoder"]).__name__
        with torch.no_grad():
            try:
                first = self(ids[:, :5])
                past = {k.replace(PRESENT, PAST): v for k, v in first.items() if k != "logits"}
                got = torch.cat([first["logits"], self(ids[:, 5:], **past)["logits"]], dim=1)
            except Exception as error:  # whatever a model raises that does not take these arguments
                raise ModelError(f"{name} cannot be run with its KV cache as inputs ({type(error).__name__}: "
                                 f"{str(error)[:200]}); compile without kv_cache (--kv-cache)") from error  # fmt: skip
        if not torch.allclose(got, want, rtol=0, atol=1e-3 * float(want.abs().max())):
            raise ModelError(
                f"{name} gives other logits with its KV cache as inputs (by {float((got - want).abs().max()):.2g}): "
                f"its attention is neither full nor of a sliding window; compile without kv_cache (--kv-cache)"
            )


def with_cache(model: nn.Module) -> CachedDecoder:
    """``model``, a transformers causal language model, with its KV cache as inputs and outputs.

    ``cached = with_cache(model); fxquant.compile(cached, cached.example_inputs(), config)``. Raises ModelError.
    """
    return model if isinstance(model, CachedDecoder) else CachedDecoder(model)


def _check_decoder(model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    missing = {"input_ids", "attention_mask", "position_ids", "past_key_values"} - set(parameters)
    if missing:
        raise ModelError(
            f"{type(model).__name__} takes no {' and no '.join(sorted(missing))}: it is no decoder with a KV cache, or "
            f"one that finds positions on its own; compile without kv_cache (--kv-cache)"
        )


def _plain_pasts(model: Any, ids: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of every layer after ``ids``, and the logits, as the model itself computes them."""
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=True, return_dict=True)
    layers = getattr(found.past_key_values, "layers", None)
    pasts = [(getattr(y, "keys", None), getattr(y, "values", None)) for y in layers or ()]
    odd = next(
        (i for i, pair in enumerate(pasts) if any(not isinstance(t, Tensor) or t.dim() != 4 for t in pair)), None
    )
    if not pasts or odd is not None:
        kept = "its cache has no layers" if odd is None else f"layer {odd} keeps something else"
        raise ModelError(
            f"{type(model).__name__}: {kept} where keys and values [batch, heads, tokens, width] are needed; compile "
            f"without kv_cache (--kv-cache)"
        )
    return pasts, found.logits  # type: ignore[return-value]


def _inputs(pasts: list[tuple[Tensor, Tensor]]) -> tuple[Input, ...]:
    found = [Input("input_ids", TensorType(torch.int64, ("batch", "sequence")))]
    for i, pair in enumerate(pasts):
        for what, value in zip(("key", "value"), pair, strict=True):
            shape = ("batch", value.shape[1], PAST, value.shape[3])
            found.append(Input(f"{PAST}_{i}_{what}", TensorType(value.dtype, shape), empty=PAST))
    return tuple(found)


# --- what transformers is given ---------------------------------------------------------------------------------------
def _layers(pasts: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """The caches of the layers, as the attention modules of transformers use them."""
    from transformers import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        def get_seq_length(self) -> int:  # transformers' own asks whether it is empty, which fixes a size
            assert self.keys is not None
            return self.keys.shape[2]  # type: ignore[no-any-return]

    found = []
    for keys, values in pasts:
        layer = Layer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        found.append(layer)
    return found


def _masks(config: Any, position: Tensor, keys: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What is added to the scores ``[1, 1, s, p + s]``: 0 where a query sees the key, else -inf; by kind of layer where
    there are several."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ())
    distance = position.unsqueeze(1) - torch.arange(keys, device=position.device)
    hidden = {"full_attention": distance < 0}
    if window is not None:
        hidden["sliding_attention"] = hidden["full_attention"] | (distance >= window)
    if kinds - set(hidden):
        raise InputError(f"layers of {', '.join(sorted(kinds - set(hidden)))} are not known")
    zero = torch.zeros((), dtype=dtype, device=position.device)
    added = {kind: torch.where(h, -math.inf, zero)[None, None] for kind, h in hidden.items()}
    if len(kinds) > 1:
        return {kind: added[kind] for kind in sorted(kinds)}
    return added[next(iter(kinds), "full_attention" if window is None else "sliding_attention")]


@contextmanager
def _own_attention(config: Any) -> Iterator[None]:
    """Attention without a branch on sizes, and grouped queries without repeated keys, where the model uses sdpa."""
    from transformers import AttentionInterface

    text = config.get_text_config()
    before = text._attn_implementation
    if before == "sdpa":
        AttentionInterface.register(_ATTENTION, _attention)
        text._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        text._attn_implementation = before


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """``softmax(q k^T scaling + mask) v`` as transformers calls it: operands ``[b, heads, n, width]``, the result
    ``[b, s, heads, width]``."""
    if options.get("softcap") is not None or options.get("position_bias") is not None or dropout:
        raise InputError("attention with softcap, a position bias or dropout")
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return y.transpose(1, 2), None


def past_of(present: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a call as the past of the next."""
    return {name.replace(PRESENT, PAST, 1): value for name, value in present.items() if name.startswith(f"{PRESENT}_")}


class InPieces:
    """A model with a KV cache as one without, given ``size`` tokens at a time. Only so does a cache in few bits show:
    what is read from it is tokens of earlier calls."""

    def __init__(self, model: Callable[..., Any], size: int) -> None:
        self._model, self._size = model, size

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits ``[b, s, vocabulary]`` of ``input_ids [b, s]``."""
        past: dict[str, Any] = {}
        logits = []
        for piece in input_ids.split(self._size, dim=1):
            found = self._model(input_ids=piece, **past)
            past = past_of(found)
            logits.append(found["logits"])
        return {"logits": torch.cat(logits, dim=1)}
