"""What the commands share: options, models and texts from paths, and how figures and notes are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fxquant.errors import InputError, ModelError, SaveError

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.checkpoints import LoadedModel
    from fxquant.compiled import CompiledModel
    from fxquant.config import Config
    from fxquant.program import Progress

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, to stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
CalibrationText = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text for methods that need data; by default text that comes with Python."),
]


class FolderFormat(StrEnum):
    """What fxquant compile writes."""

    fxquant = "fxquant"
    hf = "hf"


def check_hf(settings: Config, out: Path, kv_cache: bool, overwrite: bool) -> None:
    """Raise, before any work, for what cannot become a Hugging Face folder at ``out``."""
    from fxquant.checkpoints import is_packed
    from fxquant.pipeline import check_modules

    if kv_cache:
        raise InputError("--kv-cache is for compiled graphs; with --format hf transformers has its own: leave it out")
    check_modules(settings)
    if out.exists() and not (overwrite and is_packed(out)):
        what = "is no model that fxquant packed, and is not overwritten" if overwrite else "exists already"
        raise SaveError(f"{out} {what}; choose another folder{'' if overwrite else ', or give --overwrite'}")


def save_hf(loaded: LoadedModel, out: Path) -> None:
    """Write the model, which ``quantize_`` has been run on, its tokenizer and a README.md to the folder ``out``."""
    from fxquant import hf

    if (out / "README.md").exists():
        note(f"{out / 'README.md'} was there before and stays as it is")
    hf.save(loaded.model.to(loaded.dtype), out, tokenizer=loaded.tokenizer)


def load(out: Path) -> CompiledModel:
    from fxquant import pipeline
    from fxquant.checkpoints import is_packed

    if is_packed(out):
        raise ModelError(
            f"{out} is a Hugging Face folder with packed weights, which holds no graph; fxquant eval and fxquant "
            f"generate take it. For everything else compile the float model again, without --format hf"
        )
    return pipeline.load(out)


def calibration_data(settings: Config, loaded: LoadedModel, path: Path | None) -> Tensor | None:
    """Token windows of the text at ``path``, by default of Python's own; None where no method needs data."""
    from fxquant.evaluate import calibration_windows

    text = read_text(path)
    if settings.needs_data() is None:
        if text is not None:
            note(f"no method of this config needs data: {path} is not used")
        return None
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.name} came without a tokenizer; compile it in Python, with calibration=batches")
    length = min(512, getattr(loaded.model.config, "max_position_embeddings", 512))
    windows = calibration_windows(loaded.tokenizer, text, length=length)
    source = path or "text that comes with Python; give your own with --calibration FILE"
    note(f"calibrating on {len(windows)} windows of {length} tokens of {source}")
    return windows


def open_model(model: Path, progress: Progress) -> tuple[Any, Any | None]:
    """What to call, and the tokenizer that was loaded with it: a compiled folder, ONNX file, HF folder or GGUF file."""
    from fxquant import checkpoints, evaluate

    if model.suffix == ".onnx":
        if not model.is_file():
            raise ModelError(f"{model} does not exist; give a file that fxquant export wrote")
        return evaluate.OnnxModel(model), None
    if (model / "graph.json").is_file():
        return load(model), None
    if checkpoints.is_packed(model):
        return checkpoints.load_packed(model, progress=progress)
    loaded = checkpoints.load_model(model, progress=progress)
    return loaded.model, loaded.tokenizer


def language_model(model: Path, tokenizer: Path | None, progress: Progress) -> tuple[Any, Any]:
    """What to call with ``input_ids``, and its tokenizer."""
    call, words = open_model(model, progress)
    if tokenizer is None and words is None and (model / "config.json").is_file():
        raise InputError(f"{model} came without a tokenizer; give one with --tokenizer FOLDER")
    if tokenizer is not None or words is None:
        compiled = model if (model / "graph.json").is_file() else None
        words = tokenizer_in(tokenizer or compiled, model)
    return call, words


def tokenizer_in(folder: Path | None, model: Path) -> Any:
    """The tokenizer in ``folder``, or in its folder ``tokenizer``."""
    from fxquant import checkpoints

    if folder is None:
        raise InputError(f"{model} has no tokenizer; give the folder of one with --tokenizer FOLDER")
    from fxquant.store import TOKENIZER

    place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if not (place / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} holds no tokenizer; give the folder of one with --tokenizer FOLDER")
    return checkpoints.transformers().AutoTokenizer.from_pretrained(
        place, local_files_only=True, trust_remote_code=False
    )


def read_text(text: Path | None) -> str | None:
    if text is None:
        return None
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {text}: {error}; give a file of UTF-8 text") from error


def print_json(value: dict[str, Any] | Iterable[Any]) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(f"note: {text}", style="yellow"))
