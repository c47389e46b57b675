"""``fxquant compare`` and ``fxquant diff``: a compiled model beside its float original, and beside another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.cli_options import Json, check_file, load, note, print_json, read_text, tokenizer_in
from fxquant.errors import InputError

if TYPE_CHECKING:
    from fxquant.checkpoints import LoadedModel
    from fxquant.compiled import CompiledModel
    from fxquant.program import Progress
    from fxquant.show.numerics import Comparison

Compiled = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that fxquant compile wrote.")]


class Sort(StrEnum):
    local = "local"
    accumulated = "accumulated"


def compare(
    out: Compiled,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="What OUT was compiled from: a Hugging Face folder or a GGUF file.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for a language model; by default text that comes with Python."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inputs by name, as safetensors, for other models.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows, counted from the end of the text.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    sort: Annotated[
        Sort,
        typer.Option(
            help="local: the layer alone, fed what the float model's layer is fed. accumulated: inside the quantized "
            "model, with the errors of all layers before it."
        ),
    ] = Sort.local,
    limit: Annotated[int, typer.Option(min=1, help="How many layers to print, worst first.")] = 20,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report, with these figures.")] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write graphs and overlays for Model Explorer, with these figures."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run OUT and the float MODEL on the same inputs, and rank the layers by their error: which layer hurts?

    Examples:

        fxquant compare smollm2-fp6 ./SmolLM2-135M

        fxquant compare smollm2-fp6 ./SmolLM2-135M --sort accumulated --html report.html

        fxquant compare vit-int8 ./vit --data images.safetensors --json
    """
    from fxquant.show.console import progress_bars, stdout

    check_file(html)
    check_file(model_explorer)
    compiled = load(out)
    with progress_bars() as progress:
        found = comparison(compiled, out, model, text, data, windows, length, progress)
    if html is not None:
        compiled.report(html, comparison=found, title=f"{out.resolve().name}: fxquant report")
        typer.echo(f"wrote {html}", err=as_json)
    if model_explorer is not None:
        show_written(compiled.model_explorer(model_explorer, found))
    if as_json:
        print_json(found.to_dict())
    else:
        console = stdout()
        width = console.width if console.is_terminal else None
        typer.echo("\n".join(found.lines(sort.value, limit, width=width)))


def show_written(files: list[Path]) -> None:
    """Say on stderr what was written for Model Explorer, and how to open it."""
    overlays = ", ".join(file.name for file in files[1:])
    typer.echo(f"wrote {files[0]}; open it with: model-explorer {files[0]}", err=True)
    typer.echo(f"overlays to load there, as custom node data: {overlays}", err=True)


def comparison(
    compiled: CompiledModel, out: Path, model: Path, text: Path | None = None, data: Path | None = None,
    windows: int = 1, length: int = 512, progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """``compiled`` beside the float model at ``model``, on windows of a text or on the tensors of a file."""
    from fxquant import checkpoints
    from fxquant.program import quiet

    progress = progress or quiet
    past = any(item.empty for item in compiled.program.signature.inputs)
    loaded = checkpoints.load_model(model, kv_cache=past, progress=progress)
    known = [item.name for item in compiled.program.signature.inputs]
    if not past and not set(loaded.example_inputs) & set(known):
        raise InputError(
            f"{model} is not what {out} was compiled from: it takes {', '.join(loaded.example_inputs)}, and {out} "
            f"takes {', '.join(known)}; give the model that it was compiled from"
        )
    return compiled.compare(loaded.model, _inputs(loaded, out, text, data, windows, length), progress=progress)


def _inputs(
    loaded: LoadedModel, out: Path, text: Path | None, data: Path | None, windows: int, length: int
) -> Any:  # fmt: skip
    """Token windows for a language model; a file's tensors, or the example inputs, for others."""
    from fxquant.cli_measure import read_tensors
    from fxquant.evaluate import text_windows
    from fxquant.examples import is_decoder

    if data is not None:
        if text is not None:
            raise typer.BadParameter("--data and --text are two kinds of data; give one of them")
        tensors = read_tensors(data)
        tensors.pop("labels", None)
        return [tensors]
    if hasattr(loaded.model, "declared_inputs") or is_decoder(loaded.model):
        words = loaded.tokenizer or tokenizer_in(out, out)
        length = min(length, getattr(loaded.model.config, "max_position_embeddings", length))
        return text_windows(words, read_text(text), length=length)[-windows:]
    note(f"{loaded.name} is no causal language model: compared on example inputs; give real ones with --data FILE")
    return [loaded.example_inputs]


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder that fxquant compile wrote.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    limit: Annotated[int, typer.Option(min=1, help="How many layers to print.")] = 20,
    as_json: Json = False,
) -> None:
    """Compare two compiled models: sizes, formats, errors, stored bytes, passes and configs. Nothing is run.

    Examples:

        fxquant diff smollm2-fp6 smollm2-gptq

        fxquant diff before after --json
    """
    from fxquant.show.difference import compare_models

    found = compare_models(load(a), load(b), (str(a), str(b)))
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo("\n".join(found.lines(limit)))
