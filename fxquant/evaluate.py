"""Accuracy of a model: perplexity on fixed text, accuracy of a classifier, and how far both are from another model.

    perplexity = exp(sum of -log p(token t | tokens < t of its window) / number of predicted tokens)

Windows are consecutive, do not overlap and are evaluated cold (no state from one to the next), one at a time. Intervals
are those of ``intervals``: the data's independent parts are blocks of consecutive tokens, or the samples.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxquant import intervals
from fxquant.errors import InputError, ModelError
from fxquant.graph import TensorType
from fxquant.intervals import Estimate
from fxquant.onnx_claims import check_onnx, said
from fxquant.program import Progress, quiet
from fxquant.signature import Input, left_out

LENGTH = 2048
BLOCK = 128
"""Consecutive tokens that count as one independent part of a text; a shorter window is one part as a whole."""
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


@dataclass(frozen=True)
class Comparison:
    """A language model against a reference on the same windows.

    ``ratio`` of the perplexities, ``top1`` the share of positions with the same most likely token, ``kl`` the mean
    KL(reference || model) in nats; each with its interval over blocks of ``block`` consecutive tokens of a window.
    """

    perplexity: Perplexity
    reference: Perplexity
    ratio: Estimate
    top1: Estimate
    kl: Estimate
    block: int

    def to_dict(self) -> dict[str, Any]:
        """The figures against the reference as plain values for JSON."""
        value = self.reference.value
        parts = {"perplexity_ratio": self.ratio, "top1_agreement": self.top1, "kl": self.kl}
        return {
            "perplexity": value if math.isfinite(value) else None, "nll": self.reference.nll,
            "block_tokens": self.block,
            **{name: part.to_dict() for name, part in parts.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """A classifier on ``samples`` labelled samples, ``correct`` of them right, with Wilson's interval.

    Against a reference: its own accuracy, ``change`` = accuracy - the reference's (paired), ``top1`` the share of
    samples with the same class, ``kl`` the mean KL(reference || model) in nats; None without one.
    """

    accuracy: Estimate
    correct: int
    samples: int
    reference: Estimate | None = None
    change: Estimate | None = None
    top1: Estimate | None = None
    kl: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        named = {"reference_accuracy": self.reference, "accuracy_change": self.change,
                 "top1_agreement": self.top1, "kl": self.kl}  # fmt: skip
        against = {name: part.to_dict() for name, part in named.items() if part is not None}
        figures = {"accuracy": self.accuracy.to_dict(), "correct": self.correct, "samples": self.samples}
        return figures | ({"against": against} if against else {})


@dataclass(frozen=True)
class Cosine:
    """Cosine similarity of ``vectors`` hidden states with a reference's: the mean with its interval, and the least."""

    mean: Estimate
    least: float
    vectors: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return {"cosine": self.mean.to_dict(), "least": self.least, "vectors": self.vectors}


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


def compare(
    model: Callable[..., Any], reference: Callable[..., Any], windows: Tensor, *,
    block: int = BLOCK, progress: Progress = quiet,
) -> Comparison:  # fmt: skip
    """``model`` (quantized, say) against ``reference`` on ``windows [n, length]``, one window at a time.

    Perplexities are over the predicted tokens, agreement and KL over every position. InputError where the vocabularies
    differ, and where the windows hold fewer than two blocks, which give no interval.
    """
    _check_windows(windows)
    if len(windows) * math.ceil((windows.shape[1] - 1) / block) < 2:
        raise InputError(
            f"one window of {windows.shape[1]} tokens gives no confidence interval: it is one block of {block}; give "
            f"more windows, or longer ones"
        )
    nll = _Blocks(), _Blocks()
    same, kl = _Blocks(), _Blocks()
    with _without_cache(model), _without_cache(reference), torch.inference_mode():
        for i, window in enumerate(windows):
            progress("compare", i, len(windows))
            logits = logits_of(model, window), logits_of(reference, window)
            _check_alike(*logits)
            for start in range(0, len(window), block):
                a, b = (torch.log_softmax(part[start : start + block].float(), -1) for part in logits)
                targets = window[start + 1 : start + 1 + block].unsqueeze(1)
                for sums, part in zip(nll, (a, b), strict=True):
                    if len(targets):
                        sums.add(float(-part[: len(targets)].gather(1, targets).double().sum()), len(targets))
                same.add(int((a.argmax(-1) == b.argmax(-1)).sum()), len(a))
                kl.add(float(_kl(b, a).sum()), len(a))
    progress("compare", len(windows), len(windows))
    change = [a - b for a, b in zip(nll[0].sums, nll[1].sums, strict=True)]
    total, tokens = [sum(sums.sums) for sums in nll], sum(nll[0].counts)
    found = [Perplexity(_exp(part / tokens), part, tokens) for part in total]
    ratio = intervals.mean(change, nll[0].counts).map(_exp)
    top1 = intervals.share([int(s) for s in same.sums], same.counts)
    return Comparison(found[0], found[1], ratio, top1, kl.mean().clipped(low=0.0), min(block, windows.shape[1]))


def accuracy(
    model: Callable[..., Any], inputs: Mapping[str, Tensor] | Tensor, labels: Tensor, *,
    reference: Callable[..., Any] | None = None, batch_size: int = 32, progress: Progress = quiet,
) -> Accuracy:  # fmt: skip
    """How many of ``labels [n]`` (integers) are the most likely class of ``model(**inputs)``, logits ``[n, classes]``.

    ``inputs`` are tensors by name, or the one input, each with n samples along its first dimension. InputError for
    sizes that do not fit, labels that are no class, logits of another shape.
    """
    _check_labels(inputs, labels)
    hits, hits_b, same, kl = _Blocks(), _Blocks(), _Blocks(), _Blocks()
    with torch.inference_mode():
        for start, batch, call in _batches(inputs, batch_size, "accuracy", progress):
            logits = _class_logits(call(model), batch)
            want = labels[start : start + batch]
            if int(want.min()) < 0 or int(want.max()) >= logits.shape[1]:
                raise InputError(f"labels run from {int(labels.min())} to {int(labels.max())}, and the model has "
                                 f"{logits.shape[1]} classes, 0 to {logits.shape[1] - 1}")  # fmt: skip
            hits.each(logits.argmax(1) == want)
            if reference is None:
                continue
            other = _class_logits(call(reference), batch)
            _check_alike(logits, other)
            hits_b.each(other.argmax(1) == want)
            same.each(logits.argmax(1) == other.argmax(1))
            kl.each(_kl(torch.log_softmax(other.float(), 1), torch.log_softmax(logits.float(), 1)))
    correct, samples = int(sum(hits.sums)), len(labels)
    found = intervals.wilson(correct, samples)
    if reference is None:
        return Accuracy(found, correct, samples)
    change = _Blocks([a - b for a, b in zip(hits.sums, hits_b.sums, strict=True)], hits.counts).mean()
    other_share, top1 = (intervals.wilson(int(sum(part.sums)), samples) for part in (hits_b, same))
    return Accuracy(found, correct, samples, other_share, change, top1, kl.mean().clipped(low=0.0))


Pooling = Literal["none", "mean", "first"]


def cosine(
    model: Callable[..., Any], reference: Callable[..., Any], inputs: Mapping[str, Tensor] | Tensor, *,
    pooling: Pooling = "none", batch_size: int = 32, progress: Progress = quiet,
) -> Cosine:  # fmt: skip
    """Cosine similarity of the hidden states of two models on the same inputs, samples along the first dimension.

    States are ``last_hidden_state``, or the first output: ``[n, width]``, or ``[n, length, width]``, of which every
    token is a vector (``none``), the mean over tokens, or the ``first`` token. Where the inputs have an
    ``attention_mask [n, length]``, tokens it masks do not count.
    """
    sums, least = _Blocks(), 1.0
    with torch.inference_mode():
        for start, batch, call in _batches(inputs, batch_size, "cosine", progress):
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            part = None if mask is None else mask[start : start + batch]
            a, b = (_states(call(each), batch, part, pooling) for each in (model, reference))
            for x, y in zip(a, b, strict=True):
                _check_alike(x, y)
                each_cosine = nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
                sums.add(float(each_cosine.sum()), len(each_cosine))
                least = min(least, float(each_cosine.min()))
    return Cosine(sums.mean().clipped(-1.0, 1.0), least, sum(sums.counts))


@dataclass
class _Blocks:
    """Sums over the blocks of the data, and how many members each has."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, total: float, count: int) -> None:
        self.sums.append(total)
        self.counts.append(count)

    def each(self, values: Tensor) -> None:
        """Every one of ``values [n]`` a block of its own."""
        self.sums += values.double().tolist()
        self.counts += [1] * len(values)

    def mean(self) -> Estimate:
        return intervals.mean(self.sums, self.counts)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of every row, in float64."""
    return (log_p.exp() * (log_p - log_q)).double().sum(-1)


def _check_alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(f"the model gives {list(a.shape)} and the reference {list(b.shape)} for the same inputs; "
                         f"compare a model with the float model it was made from")  # fmt: skip


def _check_labels(inputs: Mapping[str, Tensor] | Tensor, labels: Tensor) -> None:
    if labels.dim() != 1 or labels.is_floating_point() or not len(labels):
        raise InputError(f"labels are {labels.dtype} {list(labels.shape)}; expected integers [samples]")
    for name, value in (inputs if isinstance(inputs, Mapping) else {"inputs": inputs}).items():
        if value.dim() < 1 or len(value) != len(labels):
            raise InputError(f"{name} is {list(value.shape)} for {len(labels)} labels; its first dimension must be the "
                             f"samples")  # fmt: skip


Call = Callable[[Callable[..., Any]], Any]


def _batches(
    inputs: Mapping[str, Tensor] | Tensor, size: int, what: str, progress: Progress
) -> Iterator[tuple[int, int, Call]]:
    """Where each batch starts, how many samples it has, and what calls a model on it."""
    tensors = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    counts = {name: len(value) for name, value in tensors.items()}
    if not counts or not min(counts.values()) or len(set(counts.values())) > 1:
        raise InputError(f"inputs have {counts or 'no tensors'} samples along their first dimension; expected the "
                         f"same number in each, at least 1")  # fmt: skip
    total = max(counts.values())
    for start in range(0, total, size):
        progress(what, start, total)
        part = {name: value[start : start + size] for name, value in tensors.items()}

        def call(model: Callable[..., Any], part: dict[str, Tensor] = part) -> Any:
            return model(**part) if isinstance(inputs, Mapping) else model(part[""])

        yield start, min(size, total - start), call
    progress(what, total, total)


def _class_logits(output: Any, batch: int) -> Tensor:
    found = _pick(output, "logits")
    if found is None or found.dim() != 2 or len(found) != batch:
        raise InputError(f"the model gave {_got(found, output)} where logits [{batch}, classes] are needed; accuracy "
                         f"takes a classifier")  # fmt: skip
    return found


def _states(output: Any, batch: int, mask: Tensor | None, pooling: Pooling) -> Iterator[Tensor]:
    """The vectors ``[vectors, width]`` of every sample."""
    found = _pick(output, "last_hidden_state")
    if found is None or found.dim() not in (2, 3) or len(found) != batch or not found.is_floating_point():
        raise InputError(f"the model gave {_got(found, output)} where hidden states [{batch}, width] or [{batch}, "
                         f"length, width] are needed")  # fmt: skip
    states = found.unsqueeze(1) if found.dim() == 2 else found
    if mask is not None and mask.shape == states.shape[:2]:
        tokens = [sample[own.bool()] for sample, own in zip(states, mask, strict=True)]
    else:
        tokens = list(states)
    for sample in tokens:
        yield {"none": sample, "mean": sample.mean(0, keepdim=True), "first": sample[:1]}[pooling]


def logits_of(model: Callable[..., Any], window: Tensor) -> Tensor:
    """Logits ``[length, vocabulary]`` of one window: ``.logits``, ``["logits"]``, the first output, or the output."""
    output = model(input_ids=window.unsqueeze(0))
    found = _pick(output, "logits")
    if found is None or found.dim() != 3 or tuple(found.shape[:2]) != (1, len(window)):
        raise InputError(f"the model gave {_got(found, output)} where logits [1, {len(window)}, vocabulary] are "
                         f"needed; perplexity takes a causal language model")  # fmt: skip
    return found[0]


def _pick(output: Any, name: str) -> Tensor | None:
    """The tensor ``name`` of a model's output, the first of a sequence, or the output itself."""
    if isinstance(output, Mapping):
        output = output.get(name)
    elif not isinstance(output, Tensor):
        output = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, name, None)
    return output if isinstance(output, Tensor) else None


def _got(found: Tensor | None, output: Any) -> str:
    if found is not None:
        return f"a tensor {list(found.shape)}"
    names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"no tensor ({type(output).__name__}{names})"


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

    What a KV cache holds may be left out, and is empty then; other inputs may not, and those the file does not have are
    refused (InputError). ``threads`` 0 leaves their number to onnxruntime; ``session`` opens the file, by default in
    plain onnxruntime. ModelError if it cannot be loaded.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, session: Callable[..., Any] | None = None) -> None:
        import onnxruntime

        check_onnx(path)
        try:
            self.session = (session or plain_session)(path, threads=threads)
        except Exception as error:  # onnxruntime's exceptions share no base class
            told = f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}"
            raise ModelError(f"{told}; give a file that fxquant export wrote") from error
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        empty = said(self.metadata, "empty", {})
        self.declared = tuple(
            Input(
                item.name,
                TensorType(_DTYPES.get(item.type, torch.float32), tuple(item.shape)),
                empty.get(item.name, ""),
            )
            for item in self.session.get_inputs()
        )
        self.inputs = [item.name for item in self.declared]
        self.outputs = [item.name for item in self.session.get_outputs()]

    def __call__(self, /, **inputs: Tensor) -> dict[str, Tensor]:
        inputs |= left_out(self.declared, inputs)
        if set(inputs) != set(self.inputs):
            raise InputError(f"inputs {sorted(inputs)} given; the ONNX model takes {self.inputs}")
        feed = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
        return dict(zip(self.outputs, map(torch.from_numpy, self.session.run(self.outputs, feed)), strict=True))


def plain_session(path: str | Path, *, threads: int = 0) -> Any:
    """An onnxruntime session of a file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


_DTYPES = {"tensor(float16)": torch.float16, "tensor(double)": torch.float64, "tensor(uint8)": torch.uint8,
           "tensor(int64)": torch.int64}  # fmt: skip
