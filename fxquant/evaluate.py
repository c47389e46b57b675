"""Accuracy of a causal language model: perplexity on fixed text, and agreement of its logits with another model's.

    perplexity = exp(sum of -log p(token t | tokens < t of its window) / number of predicted tokens)

Windows are consecutive, do not overlap and are evaluated cold (no state from one to the next), one at a time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError, ModelError
from fxquant.program import Progress, quiet

LENGTH = 2048
_CHUNK = 256  # positions whose log-probabilities exist at the same time: 50 MB for a vocabulary of 49,152


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(nll / tokens); ``nll`` the sum of negative log-likelihoods in nats, ``tokens`` how many."""

    value: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """Of ``tokens`` positions: the share with the same most likely token, and the mean KL(a || b) in nats."""

    top1: float
    kl: float
    tokens: int


# --- text -------------------------------------------------------------------------------------------------------------
def stdlib_text() -> str:
    """English text that comes with every Python: the language reference's topics, as ``help()`` shows them.

    It differs between Python releases, so figures compare only where ``fingerprint(text_ids(tokenizer))`` is the same.
    On CPython 3.11.7 it has 465,126 characters; SmolLM2's tokenizer makes 113,108 tokens of them, whose fingerprint is
    25fdc1fd6c....
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def text_ids(tokenizer: Callable[..., Any], text: str | None = None) -> Tensor:
    """Token ids ``[tokens]`` (int64) of ``text``, by default stdlib_text(), as a transformers tokenizer gives them."""
    return torch.tensor(tokenizer(stdlib_text() if text is None else text)["input_ids"], dtype=torch.int64)


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of the token ids written as a JSON list, ``[1, 2, 3]``: which text, and which tokenizer."""
    return hashlib.sha256(json.dumps(ids.flatten().tolist()).encode()).hexdigest()


def text_windows(tokenizer: Callable[..., Any], text: str | None = None, *, length: int = LENGTH) -> Tensor:
    """The ids of ``text_ids`` as consecutive windows ``[n, length]``, the remainder dropped.

    InputError if the text has fewer than ``length`` tokens, or ``length`` is less than 2.
    """
    if length < 2:
        raise InputError(f"windows of {length} tokens predict nothing; length must be at least 2")
    ids = text_ids(tokenizer, text)
    count = ids.numel() // length
    if count == 0:
        raise InputError(
            f"the text has {ids.numel()} tokens and one window needs {length}; give more text or a smaller length"
        )
    return ids[: count * length].reshape(count, length)


def calibration_windows(
    tokenizer: Callable[..., Any], text: str | None = None, *, count: int = 16, length: int = 512
) -> Tensor:
    """Token windows ``[n, length]`` for calibration: the first ``length`` tokens of the first ``count`` windows.

    Spread over the text: every 2,048 tokens where it is long enough, else closer, down to one behind the other; fewer
    than ``count`` where the text is short. InputError if it has fewer than ``length`` tokens.
    """
    ids = text_ids(tokenizer, text)
    if ids.numel() < length:
        raise InputError(f"the text has {ids.numel()} tokens and one calibration window needs {length}; give more text")
    step = min(LENGTH, max(length, ids.numel() // count))
    return ids.unfold(0, length, step)[:count].contiguous()


# --- measures ---------------------------------------------------------------------------------------------------------
def perplexity(model: Callable[..., Any], windows: Tensor, *, progress: Progress = quiet) -> Perplexity:
    """Perplexity of ``model(input_ids=window)`` over ``windows [n, length]``, in fp32 logits, a window at a time."""
    _check_windows(windows)
    nll, tokens = 0.0, 0
    with _without_cache(model), torch.inference_mode():
        for i, window in enumerate(windows):
            progress("perplexity", i, len(windows))
            logits = logits_of(model, window)
            for start in range(0, len(window) - 1, _CHUNK):
                part = logits[start : min(start + _CHUNK, len(window) - 1)].float()
                nll += float(
                    nn.functional.cross_entropy(part, window[start + 1 : start + 1 + len(part)], reduction="sum")
                )
            tokens += len(window) - 1
    progress("perplexity", len(windows), len(windows))
    return Perplexity(_exp(nll / tokens), nll, tokens)


def logit_agreement(
    model_a: Callable[..., Any], model_b: Callable[..., Any], windows: Tensor, *, progress: Progress = quiet
) -> Agreement:
    """How far ``model_b`` (quantized, say) predicts as ``model_a`` does, over every position of ``windows``."""
    _check_windows(windows)
    same, kl, tokens = 0, 0.0, 0
    with _without_cache(model_a), _without_cache(model_b), torch.inference_mode():
        for i, window in enumerate(windows):
            progress("logit agreement", i, len(windows))
            logits_a, logits_b = logits_of(model_a, window), logits_of(model_b, window)
            for start in range(0, len(window), _CHUNK):
                a, b = logits_a[start : start + _CHUNK], logits_b[start : start + _CHUNK]
                same += int((a.argmax(-1) == b.argmax(-1)).sum())
                log_a, log_b = torch.log_softmax(a.float(), -1), torch.log_softmax(b.float(), -1)
                kl += float(nn.functional.kl_div(log_b, log_a, reduction="sum", log_target=True))
            tokens += len(window)
    progress("logit agreement", len(windows), len(windows))
    return Agreement(same / tokens, kl / tokens, tokens)


def logits_of(model: Callable[..., Any], window: Tensor) -> Tensor:
    """Logits ``[length, vocabulary]`` of one window: ``.logits``, ``["logits"]``, the first output, or the output."""
    output = model(input_ids=window.unsqueeze(0))
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", None)
    if not isinstance(output, Tensor) or output.dim() != 3 or tuple(output.shape[:2]) != (1, len(window)):
        got = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"no tensor ({type(output).__name__})"
        raise InputError(f"the model gave {got} where logits [1, {len(window)}, vocabulary] are needed; "
                         f"perplexity takes a causal language model")  # fmt: skip
    return output[0]


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def _check_windows(windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.is_floating_point():
        raise InputError(f"windows are {windows.dtype} {list(windows.shape)}; expected token ids [n, length >= 2], as "
                         f"text_windows makes them")  # fmt: skip


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """A transformers model's KV cache off: nothing reads it here, and it costs memory."""
    config = getattr(model, "config", None)
    old = getattr(config, "use_cache", None)
    if old:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if old:
            config.use_cache = old  # type: ignore[union-attr]


# --- ONNX -------------------------------------------------------------------------------------------------------------
class OnnxModel:
    """An ONNX file as a callable: keyword tensors in, a dict of tensors by output name out; runs in onnxruntime.

    Inputs the file does not have are refused, missing ones too (InputError). ModelError if onnxruntime cannot load it.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ModelError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}") from error
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if set(inputs) != set(self.inputs):
            raise InputError(f"inputs {sorted(inputs)} given; the ONNX model takes {self.inputs}")
        feed = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
        return dict(zip(self.outputs, map(torch.from_numpy, self.session.run(self.outputs, feed)), strict=True))
