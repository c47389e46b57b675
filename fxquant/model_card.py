"""model_card: the README.md of a Hugging Face folder with packed weights, from the model alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fxquant.errors import ModelError
from fxquant.show.units import percent, size
from fxquant.weight_table import HELD, Entry, holders, table_of

_TASKS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForImageClassification": "image-classification",
}  # fmt: skip
"""The task of the hub that a class name's end says; other classes get none."""


def model_card(model: Any, *, base_model: str | None = None) -> str:
    """Markdown with YAML front matter: formats, sizes, weight errors, how to load it, and the config.

    ``model`` is a transformers model on packed weights. ``base_model`` is the float model's name on the hub; by default
    the name that the model was loaded by, where that can be one. ModelError where no weight is packed.
    """
    table = table_of(model)
    if not table:
        raise ModelError(
            f"{type(model).__name__} has no packed weights to describe; call fxquant.quantize_(model, config) first"
        )
    entries = {name: entry for name, entry in table.items() if isinstance(entry, Entry)}
    base = base_model or _hub_name(getattr(model.config, "name_or_path", ""))
    config = model.config.quantization_config.config.to_dict()
    return "\n".join([
        "---", yaml.safe_dump(_front(model, entries, base), sort_keys=False).rstrip(), "---", "",
        f"# {base.rpartition('/')[2] if base else type(model).__name__}, quantized by fxquant", "",
        _what(model, base), "",
        *_formats(entries), "",
        *_sizes(model, entries), "",
        "## How to load it", "",
        "```bash", "pip install 'fxquant[hf]'", "```", "",
        "```python", "import fxquant.hf  # makes transformers know the packed weights",
        f"from transformers import {type(model).__name__}", "",
        f'model = {type(model).__name__}.from_pretrained("PATH")', "```", "",
        "The weights stay packed in memory and are decoded by the kernels that read them. Without the first line,",
        "transformers does not know what they are.", "",
        "## Config", "", *_fenced(yaml.safe_dump(config, sort_keys=False).rstrip()), "",
    ])  # fmt: skip


def write_card(folder: Path, text: str) -> bool:
    """Write README.md into ``folder`` unless there is one; whether it was written."""
    try:
        with (folder / "README.md").open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _hub_name(name: str) -> str | None:
    """``owner/model``, None for a path of this machine."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", str(name), re.ASCII) or Path(name).exists():
        return None
    return str(name)


def _fenced(text: str) -> list[str]:
    """A block of YAML, whose fence is longer than any that the text holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}yaml", text, fence]


def _front(model: Any, entries: dict[str, Entry], base: str | None) -> dict[str, Any]:
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    formats = sorted({str(entry.spec.format) for entry in entries.values()})
    return {
        "library_name": "transformers",
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **({"pipeline_tag": task} if task else {}),
        "tags": ["fxquant", "quantized", *formats],
        "quantized_by": f"fxquant {metadata.version('fxquant')}",
    }


def _what(model: Any, base: str | None) -> str:
    source = f"[{base}](https://huggingface.co/{base})" if base else f"A {type(model).__name__}"
    return f"{source} with its weights in low-bit formats, packed, by fxquant {metadata.version('fxquant')}."


def _formats(entries: dict[str, Entry]) -> list[str]:
    """A row for each format: what has it, its size, and how far its weights are from the float ones."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries.values():
        rank = f"rank {entry.factors[0].shape[1]}, {entry.factors[0].spec}" if entry.factors else ""
        groups.setdefault((str(entry.spec), str(entry.activation or ""), rank), []).append(entry)
    inputs, factors = (any(key[i] for key in groups) for i in (1, 2))
    head = [
        "weights", *(["inputs"] if inputs else []), *(["factors"] if factors else []), "tensors", "parameters",
        "packed", "bits a weight", "weight error",
    ]  # fmt: skip
    rows = [
        [f"`{spec}`", *([rounding or "float"] if inputs else []), *([rank or "none"] if factors else []), *_row(found)]
        for (spec, rounding, rank), found in groups.items()
    ]
    errors = "The weight error is ‖W − W'‖ / ‖W‖: the median over the tensors, and the largest."
    return ["## Formats", "", *_markdown(head, rows), "", errors]


def _row(found: Sequence[Entry]) -> list[str]:
    count, nbytes = sum(math.prod(e.shape) for e in found), sum(e.nbytes for e in found)
    errors = [e.error for e in found if e.error is not None]
    error = f"{percent(statistics.median(errors))}, {percent(max(errors))}" if errors else "not known"
    return [str(len(found)), f"{count:,}", size(nbytes), f"{8 * nbytes / count:.2f}", error]


def _sizes(model: Any, entries: dict[str, Entry]) -> list[str]:
    widths = {name: getattr(module, HELD).dtype for name, module, _ in holders(model)}
    packed = sum(entry.nbytes for entry in entries.values())
    before = sum(math.prod(entry.shape) * widths[name].itemsize for name, entry in entries.items())
    tensors = {t.data_ptr(): t.nbytes for name, t in model.state_dict().items() if f".{HELD}." not in f".{name}"}
    rest = sum(tensors.values())
    dtype = str(model.dtype).removeprefix("torch.")
    rows = [
        ["quantized weights", size(before), size(packed), f"{before / packed:.2f}x"],
        [f"everything else, {dtype}", size(rest), size(rest), ""],
        ["whole model", size(before + rest), size(packed + rest), f"{(before + rest) / (packed + rest):.2f}x"],
    ]
    return ["## Sizes", "", *_markdown(["", f"as {dtype}", "packed", "smaller by"], rows)]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
