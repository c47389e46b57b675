"""Text from a language model, token by token: a compiled model in torch, a transformers model on packed weights, or an
ONNX file in onnxruntime.

An ``Engine`` is given token ids and returns the logits of what comes next; it keeps what it was given, as a KV cache
where the model has one (``fxquant compile --kv-cache``), else as ids that it computes anew in every step. ``generate``
is the loop over either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fxquant.dims import holds
from fxquant.errors import InputError
from fxquant.evaluate import OnnxModel
from fxquant.kv_cache import PAST, past_of
from fxquant.onnx_claims import said
from fxquant.signature import left_out

if TYPE_CHECKING:
    from fxquant.compiled import CompiledModel

IDS, LOGITS = "input_ids", "logits"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at ``temperature`` 0, else drawn from softmax(logits / t),
    among the ``top_k`` most likely (0: all) and the fewest of them whose probabilities reach ``top_p``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; expected a temperature of at "
                f"least 0, top_k of at least 0 and top_p above 0 and at most 1"
            )


@dataclass
class Speed:
    """Tokens and seconds of the prompt (all in one call) and of the steps after it, one call a token."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def step_rate(self) -> float:
        """New tokens a second, without the first one, which comes with the prompt."""
        return self.steps / self.step_seconds if self.step_seconds else 0.0


class Engine(Protocol):
    """What ``generate`` runs. ``cached``: whether a step computes its own tokens only; ``limits``: conditions on
    ``past`` and ``sequence``, as in a Signature."""

    cached: bool
    limits: Sequence[str]

    def reset(self) -> None:
        """Forget everything."""

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Logits float32 ``[vocabulary]`` of the token after ``ids``, which follow those of the calls before."""


def generate(
    engine: Engine, ids: Sequence[int], *, most: int = 64, sampling: Sampling = Sampling(), stop: Sequence[int] = (),
    speed: Speed | None = None,
) -> Iterator[int]:  # fmt: skip
    """New tokens after ``ids``, at most ``most``; one of ``stop`` ends it, and so does the model's last position.

    ``speed`` is filled in while it runs. InputError for an empty prompt, or one longer than the model's positions.
    """
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if broken := _broken(engine, 0, len(ids)):
        raise InputError(f"the prompt has {len(ids)} tokens; the model takes {broken}: shorten it")
    engine.reset()
    random, speed = torch.Generator().manual_seed(sampling.seed), speed or Speed()
    begin = time.perf_counter()
    logits = engine(ids)
    speed.prompt_tokens, speed.prompt_seconds = len(ids), time.perf_counter() - begin
    for done in range(most):
        token = choose(logits, sampling, random)
        if token in stop:
            return
        yield token
        if done + 1 == most or _broken(engine, len(ids) + done, 1):
            return
        begin = time.perf_counter()
        logits = engine([token])
        speed.steps, speed.step_seconds = speed.steps + 1, speed.step_seconds + time.perf_counter() - begin


def _broken(engine: Engine, past: int, sequence: int) -> str | None:
    """The limit that a call breaks."""
    sizes = {"batch": 1, PAST: past, "sequence": sequence if engine.cached else past + sequence}
    return next((limit for limit in engine.limits if not holds(limit, sizes)), None)


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """The next token for ``logits [vocabulary]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    count = min(sampling.top_k or len(logits), len(logits))
    best, tokens = logits.topk(count)  # falling
    p = torch.softmax(best.double() / sampling.temperature, dim=0)
    kept = int((p.cumsum(0) < sampling.top_p).sum()) + 1
    return int(tokens[torch.multinomial(p[:kept], 1, generator=random)])


# --- engines ----------------------------------------------------------------------------------------------------------
class TorchEngine:
    """A compiled model in torch, on ``device``. InputError where it is no language model."""

    def __init__(self, model: CompiledModel, device: torch.device | str = "cpu") -> None:
        signature = model.program.signature
        names = [item.name for item in signature.inputs]
        self.cached = _is_cached(names, "the compiled model")
        self.limits: Sequence[str] = signature.limits
        self._model, self._device = model, device
        self.reset()

    def reset(self) -> None:
        self._past: dict[str, Any] = {}
        self._ids: list[int] = []

    def __call__(self, ids: Sequence[int]) -> Tensor:
        self._ids = list(ids) if self.cached else [*self._ids, *ids]
        found = self._model(**{IDS: torch.tensor([self._ids], device=self._device)}, **self._past)
        found = found if isinstance(found, dict) else {LOGITS: getattr(found, LOGITS, None)}
        self._past = past_of(found) if self.cached else {}
        return _last(found.get(LOGITS))


class TransformersEngine:
    """A transformers model, with the KV cache that it makes itself. InputError where it is no language model."""

    cached = True

    def __init__(self, model: Any) -> None:
        if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} does not generate text; generation takes a causal language model")
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.limits: Sequence[str] = [f"{PAST} + sequence <= {most}"] if most else []
        self._model = model
        self.reset()

    def reset(self) -> None:
        self._past: Any = None

    def __call__(self, ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            given = torch.tensor([list(ids)], device=self._model.device)
            found = self._model(input_ids=given, past_key_values=self._past, use_cache=True)
        self._past = found.past_key_values
        return _last(found.logits)


class OnnxEngine:
    """An ONNX file that fxquant exported, in onnxruntime; the cache goes from call to call without a copy.

    Packed weights are read by the library of ``custom_ops_library`` where it can be had, unless ``library`` is False.
    ModelError if onnxruntime cannot load the file, InputError where it is no language model.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, library: bool = True) -> None:
        from fxquant.codegen.ort_library import onnx_session  # loads onnx

        model = OnnxModel(path, threads=threads, session=onnx_session if library else None)
        self.session, self._outputs = model.session, model.outputs
        self.cached = _is_cached(model.inputs, str(path))
        self.limits: Sequence[str] = said(model.metadata, "limits", [])
        if LOGITS not in self._outputs:
            raise InputError(f"{path} gives {', '.join(self._outputs[:4])} and no {LOGITS}; generation takes a causal "
                             f"language model")  # fmt: skip
        nothing = left_out(model.declared, {IDS: torch.zeros(1, 1, dtype=torch.int64)})
        self._empty = {name: _value(value.numpy()) for name, value in nothing.items()}
        self.reset()

    def reset(self) -> None:
        self._past: dict[str, Any] = dict(self._empty)
        self._ids: list[int] = []

    def __call__(self, ids: Sequence[int]) -> Tensor:
        self._ids = list(ids) if self.cached else [*self._ids, *ids]
        given = {IDS: _value(np.array([self._ids], dtype=np.int64)), **self._past}
        found = dict(zip(self._outputs, self.session.run_with_ort_values(self._outputs, given), strict=True))
        self._past = past_of(found)
        return _last(torch.from_numpy(found[LOGITS].numpy()))


def _is_cached(names: Sequence[str], what: str) -> bool:
    """Whether the inputs are token ids and a past, or token ids alone; InputError for anything else."""
    others = [name for name in names if name != IDS]
    if IDS not in names or not all(name.startswith(f"{PAST}_") for name in others):
        raise InputError(f"{what} takes {', '.join(names[:4])}; generation takes a causal language model, of token ids "
                         f"({IDS}), with or without a KV cache")  # fmt: skip
    return bool(others)


def _last(logits: Any) -> Tensor:
    """The logits of the last token of ``[1, s, vocabulary]``."""
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise InputError("the model gives no logits [batch, sequence, vocabulary]; generation takes a causal language "
                         "model")  # fmt: skip
    return logits[0, -1].float().cpu()


def _value(array: Any) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


# --- text -------------------------------------------------------------------------------------------------------------
def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool | None = None) -> list[int]:
    """Token ids of ``prompt``, as a user's message in the tokenizer's chat template where it has one (``chat`` None).

    InputError for an empty prompt, for ``chat=True`` without a template, and for one that fails.
    """
    if not prompt:
        raise InputError("the prompt is empty; give some text")
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise InputError("the tokenizer has no chat template; give the prompt as it is, with --raw")
    if chat or (chat is None and template):
        message = [{"role": "user", "content": prompt}]
        try:  # transformers renders it in a sandbox of jinja2
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InputError(f"the tokenizer's chat template cannot be rendered: {type(error).__name__}: "
                             f"{str(error)[:200]}; give the prompt as it is, with --raw") from None  # fmt: skip
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def pieces(tokenizer: Any, ids: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text of ``tokens`` after ``ids``, as soon as it is whole characters."""

    def text(all_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(all_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    seen, shown = list(ids), len(text(ids))
    for token in tokens:
        seen.append(token)
        if not (now := text(seen)).endswith("\N{REPLACEMENT CHARACTER}"):
            yield now[shown:]
            shown = len(now)
    yield text(seen)[shown:]


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The token that ends a text, where the tokenizer has one."""
    found = getattr(tokenizer, "eos_token_id", None)
    return () if found is None else (int(found),)
