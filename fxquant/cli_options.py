"""What the commands share: options, models and texts from paths, and how figures and notes are printed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fxquant.errors import FormatError, FxquantError, InputError, ModelError, SaveError
from fxquant.files import MAX_TEXT, shown

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.checkpoints import LoadedModel
    from fxquant.compiled import CompiledModel
    from fxquant.config import Config
    from fxquant.program import Progress


class EngineName(StrEnum):
    """``fxquant.engines.ENGINES``."""

    in_process = "in-process"
    processes = "processes"
    ray = "ray"


Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, to stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
CalibrationText = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text for methods that need data; by default text that comes with Python."),
]


Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="How many layers are solved at a time. The result is the same for any number."
    ),
]
Engine = Annotated[
    EngineName | None,
    typer.Option(
        help="Where layers are solved: here, in processes of this machine (for 2 workers and more), or on Ray."
    ),
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster, or auto; without it one is started here.")
]


class FolderFormat(StrEnum):
    """What fxquant compile writes."""

    fxquant = "fxquant"
    hf = "hf"


def check_hf(settings: Config, out: Path, graph_only: bool, overwrite: bool) -> None:
    """Raise, before any work, for what cannot become a Hugging Face folder at ``out``."""
    from fxquant.checkpoints import is_packed
    from fxquant.pipeline import check_modules

    if graph_only:
        raise InputError(
            "--kv-cache and --stream are for compiled graphs, and do not go with --format hf: leave one out"
        )
    check_modules(settings)
    if out.exists() and not (overwrite and is_packed(out)):
        what = "is no model that fxquant packed, and is not overwritten" if overwrite else "exists already"
        raise SaveError(f"{out} {what}; choose another folder{'' if overwrite else ', or give --overwrite'}")


def streams(model: Path) -> bool:
    """Whether a model is compiled without being in memory as a whole, where nobody said; a note where it is."""
    from fxquant import memory
    from fxquant.headers import folder_tensors

    if not model.is_dir():
        return False
    needed = sum(4 * math.prod(tensor.shape) for tensor in folder_tensors(model).values())
    if 2 * needed <= (most := memory.total()):
        return False
    note(f"{model.resolve().name} takes {needed / 1e9:.1f} GB in float32, of {most / 1e9:.1f} GB of memory: its "
         f"weights are streamed; --no-stream compiles it in memory, and measures its outputs")  # fmt: skip
    return True


def save_hf(loaded: LoadedModel, out: Path) -> None:
    """Write the model, which ``quantize_`` has been run on, its tokenizer and a README.md to the folder ``out``."""
    from fxquant import checkpoints, hf

    if (out / "README.md").exists():
        note(f"{out / 'README.md'} was there before and stays as it is")
    with checkpoints.no_bars(checkpoints.transformers()):
        hf.save(loaded.model.to(loaded.dtype), out, tokenizer=loaded.tokenizer)


def load(out: Path) -> CompiledModel:
    from fxquant import pipeline
    from fxquant.checkpoints import is_packed

    if is_packed(out):
        raise ModelError(
            f"{out} is a Hugging Face folder with packed weights, which holds no graph; fxquant eval and fxquant "
            f"generate take it. For everything else compile the float model again, without --format hf"
        )
    if not (out / "graph.json").exists() and (why := _not_compiled(out)):
        raise ModelError(why)
    return pipeline.load(out)


def _not_compiled(path: Path) -> str:
    """What ``path`` is instead of a compiled model and what to do, where that is known; else nothing."""
    if (path / "config.json").is_file() or path.suffix == ".gguf":
        return f"{path} is a model that is not compiled; compile it first: fxquant compile {path} -o OUT"
    if path.is_file() and (path.parent / "graph.json").is_file():
        return f"{path} lies in a compiled model; give its folder, {path.parent}"
    if path.suffix == ".onnx" and path.is_file():
        return f"{path} is an ONNX file, which fxquant inspect and eval take; give the folder that it was exported from"
    return ""


def check_file(path: Path | None, overwrite: bool = True) -> None:
    """Raise a SaveError, before any work, for a file that cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise SaveError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise SaveError(f"{path} exists already; choose another file, or give --overwrite")
    if not path.parent.is_dir():
        raise SaveError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise SaveError(f"cannot write {path}: the folder {path.parent} is read-only for you; choose another")


def check_specs(candidates: list[str] | None) -> None:
    """Raise, before any work, for a ``--candidate`` that is no spec."""
    from fxquant.scheme import parse_spec

    for text in candidates or ():
        try:
            parse_spec(text)
        except FormatError as error:
            raise typer.BadParameter(f"--candidate {text}: {error}") from error


def calibration_data(settings: Config, loaded: LoadedModel, path: Path | None) -> Tensor | None:
    """Token windows of the text at ``path``, by default of Python's own; None where no method needs data."""
    from fxquant.evaluate import calibration_windows

    text = read_text(path)
    if settings.needs_data() is None:
        if text is not None:
            note(f"no method of this config needs data: {path} is not used")
        return None
    if loaded.tokenizer is None:
        raise InputError(
            f"{settings.needs_data()} needs calibration data, which this command makes of text, and {loaded.name} came "
            f"without a tokenizer; compile it in Python with calibration=batches, or take a recipe without such methods"
        )
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
    check_language_model(call, model)
    if tokenizer is None and words is None and (model / "config.json").is_file():
        raise InputError(f"{model} came without a tokenizer; give one with --tokenizer FOLDER")
    if tokenizer is not None or words is None:
        compiled = model if (model / "graph.json").is_file() else None
        words = tokenizer_in(tokenizer or compiled, model)
    return call, words


@contextmanager
def within_context(model: Path, what: str, option: str) -> Iterator[None]:
    """What a model raises for more tokens than it has positions, as an InputError: ``option`` takes fewer."""
    try:
        yield
    except FxquantError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        if not isinstance(error, (IndexError, RuntimeError)) and not type(error).__module__.startswith("onnxruntime"):
            raise
        raise InputError(
            f"{model} cannot be run on {what} ({type(error).__name__}: {str(error)[:300]}); if that is more than it "
            f"has positions for, give a smaller {option}"
        ) from error


def check_language_model(call: Any, model: Path) -> None:
    """Raise an InputError for what takes no tokens."""
    import inspect

    from torch import nn

    from fxquant.compiled import CompiledModel

    if isinstance(call, CompiledModel):
        takes = [item.name for item in call.program.signature.inputs]
    else:
        takes = list(inspect.signature(call.forward).parameters) if isinstance(call, nn.Module) else call.inputs
    if "decoder_input_ids" in takes:
        raise InputError(f"{model} is an encoder-decoder, whose perplexity on plain text says nothing; give its inputs "
                         f"with --data FILE, and the float model with --against")  # fmt: skip
    if "input_ids" not in takes:
        raise InputError(f"{model} takes {', '.join(takes[:3])} and no input_ids: it is no language model; give its "
                         f"inputs with --data FILE")  # fmt: skip


def tokenizer_in(folder: Path | None, model: Path) -> Any:
    """The tokenizer in ``folder``, or in its folder ``tokenizer``."""
    from fxquant import checkpoints

    if folder is None:
        raise InputError(f"{model} has no tokenizer; give the folder of one with --tokenizer FOLDER")
    from fxquant.store import TOKENIZER

    place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if not (place / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} holds no tokenizer; give the folder of one with --tokenizer FOLDER")
    return checkpoints.read_tokenizer(place)


def read_text(text: Path | None) -> str | None:
    if text is None:
        return None
    try:
        with text.open("rb") as stream:  # a pipe too: the user named it
            content = stream.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise InputError(f"the text {text} has more than {MAX_TEXT} bytes; give a part of it")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {text}: {error}; give a file of UTF-8 text") from error


def print_json(value: dict[str, Any] | Iterable[Any]) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(f"note: {shown(text)}", style="yellow"))
