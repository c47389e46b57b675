"""Models of fxquant in EleutherAI's lm-evaluation-harness: importing this registers ``fxquant`` with it.

    python -m fxquant.lm_eval --model fxquant --model_args path=OUT --tasks lambada_openai

OUT is a folder that ``fxquant compile`` wrote, with ``--format hf`` or without, or ``save_pretrained``. The harness has
no plugins, so that its own command cannot find this class: the line above is that command with this module imported. In
Python: ``lm_eval.simple_evaluate(fxquant.lm_eval.FxquantLM("OUT"), tasks=[...])``. Needs the ``lm-eval`` extra.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant import checkpoints, pipeline
from fxquant import generate as loop
from fxquant.dims import holds
from fxquant.errors import FxquantError, InputError, ModelError
from fxquant.store import TOKENIZER

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ImportError(f"evaluation with lm-eval needs {error.name}; run: pip install 'fxquant[hf,lm-eval]'") from error

_LENGTH, _NEW = 2048, 256
Request = tuple[Any, list[int], list[int]]
"""What a score is asked of: the texts or None, the tokens before, the tokens to score."""


@register_model("fxquant")
class FxquantLM(TemplateLM):  # type: ignore[misc]
    """A compiled model, or a transformers model on packed weights, as lm-eval asks for it.

    ``path``: the folder. ``tokenizer``: the folder of one, where the model has none. ``batch_size``: rows that are
    scored in one call, padded on the right. ``max_length``: tokens of a window; by default what the model takes, at
    most 2048. ``device``: a GPU that is not there means the CPU, since the harness asks for one by default. Raises
    ModelError and LoadError for a folder that cannot be read, InputError for a model that is no causal language model.
    """

    def __init__(
        self, path: str | Path, *, tokenizer: str | Path | None = None, batch_size: int | str = 1,
        max_length: int | None = None, device: str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size}; expected a whole number from 1, such as 8")
        self.batch_size = int(batch_size)
        wanted = torch.device(device or "cpu")
        self._device = wanted if wanted.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        folder = None if tokenizer is None else Path(tokenizer)
        self.tokenizer, self._model, self._engine = _open(Path(path), folder, self._device)
        self.max_length = int(max_length) if max_length else _longest(self._engine)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special ones as the tokenizer adds them, unless the text begins with its first one already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        ))  # fmt: skip

    # --- scores -------------------------------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """``sum log p(token | those before it)`` over each request's last tokens; whether they are the likeliest."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                for i, score in zip(chosen, self._score([requests[i] for i in chosen]), strict=True):
                    found[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(len(chosen))
        return [found[i] for i in range(len(requests))]

    def _score(self, requests: Sequence[Request]) -> Iterator[tuple[float, bool]]:
        rows = [(*before, *scored)[-self.max_length - 1 :] for _, before, scored in requests]
        for (_, before, scored), row in zip(requests, rows, strict=True):
            if not before or not 0 < len(scored) < len(row):
                raise InputError(
                    f"{len(scored)} tokens after {len(before)} are to be scored; the model takes {self.max_length} at "
                    f"a time, and at least one token comes before: give a larger max_length where the model allows it"
                )
        wide = max(map(len, rows)) - 1
        ids = torch.tensor([[*row[:-1], *[0] * (wide - len(row) + 1)] for row in rows])
        logits = self._logits(ids)
        for i, ((_, _, scored), row) in enumerate(zip(requests, rows, strict=True)):
            here = torch.log_softmax(logits[i, len(row) - 1 - len(scored) : len(row) - 1].float(), dim=-1)
            wanted = torch.tensor(scored)
            total = here.gather(1, wanted[:, None]).double().sum()
            yield float(total), bool((here.argmax(-1) == wanted).all())

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            found = self._model(input_ids=ids.to(self._device))
        logits: Tensor = found["logits"]
        return logits.cpu()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that each token is scored in once, with as much before it as fits."""
        scores = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            score = sum(total for total, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
            scores.append(score)
        return scores

    # --- text ---------------------------------------------------------------------------------------------------------
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop, which is left out; of a context that is too long, the end."""
        found = []
        for context, options in tqdm([request.args for request in requests], disable=disable_tqdm, desc="generate"):
            text = self._generate(context, dict(options))
            self.cache_hook.add_partial("generate_until", (context, options), text)
            found.append(text)
        return found

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = int(next((options[name] for name in names if options.get(name)), _NEW))
        if most >= self.max_length:
            raise InputError(f"{most} new tokens are asked for, and the model takes {self.max_length} in all; give "
                             f"--gen_kwargs max_gen_toks=N")  # fmt: skip
        ids = self.tok_encode(context)[most - self.max_length :]
        draw = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        sampling = loop.Sampling(
            float(options.get("temperature") or 1.0) if draw else 0.0, int(options.get("top_k") or 0),
            float(options.get("top_p") or 1.0), int(options.get("seed") or 0),
        )  # fmt: skip
        tokens, text = list[int](), ""
        for token in loop.generate(self._engine, ids, most=most, sampling=sampling, stop=[self.eot_token_id]):
            tokens.append(token)
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            if any(stop in text for stop in stops):
                break
        return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


def _open(path: Path, tokenizer: Path | None, device: torch.device) -> tuple[Any, Any, loop.Engine]:
    """The tokenizer, what to call with ``input_ids``, and the same as what generates text."""
    if (path / "graph.json").is_file():
        compiled = pipeline.load(path)
        compiled = compiled if device.type == "cpu" else compiled.to(device)
        return _tokenizer(path, tokenizer), compiled, loop.TorchEngine(compiled, device)
    if not checkpoints.is_packed(path):
        raise ModelError(
            f"{path} is no folder that fxquant compile or save_pretrained wrote after quantization; float models are "
            f"evaluated with --model hf --model_args pretrained={path}"
        )
    model, own = checkpoints.load_packed(path)
    model = model.to(device)
    words = own if own is not None and tokenizer is None else _tokenizer(path, tokenizer)
    return words, model, loop.TransformersEngine(model)


def _tokenizer(path: Path, tokenizer: Path | None) -> Any:
    folder = tokenizer or path
    place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if not (place / "tokenizer_config.json").is_file():
        raise InputError(
            f"{folder} holds no tokenizer; give the folder of one: --model_args path={path},tokenizer=FOLDER"
        )
    return checkpoints.read_tokenizer(place)


def _longest(engine: loop.Engine) -> int:
    """The most tokens, at most 2048, that the model takes in one call."""
    short, long = 1, _LENGTH + 1
    while long - short > 1:
        middle = (short + long) // 2
        sizes = {"batch": 1, "past": 0, "sequence": middle}
        if all(holds(limit, sizes) for limit in engine.limits):
            short = middle
        else:
            long = middle
    return short


def main() -> None:
    """lm-eval's command with ``--model fxquant``."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except FxquantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
