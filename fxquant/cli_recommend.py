"""``fxquant recommend``: a config for a goal. ``cli`` registers it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.cli_options import Json, Overwrite, check_file, check_specs, note, print_json, read_text
from fxquant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.calibrate import Calibration
    from fxquant.checkpoints import LoadedModel
    from fxquant.recommend import Measured, Recommendation

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def recommend(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder (safetensors) or a GGUF file.")],
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="All of the model's tensors, such as 90MB or 85.5MiB.")
    ] = None,
    max_ppl: Annotated[
        str | None, typer.Option(metavar="+N%", help="How much perplexity may rise above the float model's: +2%.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative error of the output, for what is no language model: 0.05.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure and calibrate on; by default text that comes with Python."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Safetensors named as the inputs, for what is no language model."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows from the end of the text to measure on.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    candidate: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A spec to choose from; give several.")
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="How many schemes are measured, rounded to nearest.")] = 5,
    finalists: Annotated[int, typer.Option(min=0, help="How many are tried with GPTQ too; 0 for none.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The config to write, .yaml or .json.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Recommend a config for a size or for a loss: many are sized and predicted, few are measured on held-out text.

    Ctrl-C ends it and shows what was measured so far.

    Examples:

        fxquant recommend ./SmolLM2-135M --target-size 90MB -o config.yaml

        fxquant recommend ./SmolLM2-135M --max-ppl +2%

        fxquant recommend ./vit --max-error 0.05 --data images.safetensors
    """
    from fxquant import checkpoints
    from fxquant.candidates import SPECS
    from fxquant.recommend import recommend as find
    from fxquant.recommend import rows, with_front
    from fxquant.show.console import progress_bars
    from fxquant.show.html import write_page

    target, loss = _goal(target_size, max_ppl, max_error)
    _check_place(out, overwrite)
    check_specs(candidate)
    told: list[Measured] = []
    try:
        with progress_bars() as progress:
            loaded = checkpoints.load_model(model, progress=progress)
            held, rest = _data(loaded, text, data, windows, length, perplexity=max_ppl is not None)
            methods: list[Any] = [{"gptq": {"float_targets": True}}] if rest is not None and finalists else []
            found = find(
                loaded.model, loaded.example_inputs, target_bytes=target, max_loss=loss, data=held, calibration=rest,
                candidates=candidate or SPECS, methods=methods, tries=tries, finalists=finalists, tell=told.append,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        if told:
            typer.echo("\n".join([*rows(with_front(told)), "", f"interrupted: {len(told)} measured"]))
        raise
    if out is not None:
        write_page(out, config_text(found, loaded.name, out))
    if as_json:
        print_json({"out": None if out is None else str(out), **found.to_dict()})
        return
    if loaded.quantized:
        note(f"{loaded.name} was quantized before ({loaded.quantized}): losses are measured against that")
    typer.echo(str(found))
    if out is not None:
        typer.echo(f"\nwrote {out}; next: fxquant compile {model} -c {out} -o OUT")
    else:
        typer.echo(f"\nnext: the same with -o config.yaml, then fxquant compile {model} -c config.yaml -o OUT")


# --- goals ------------------------------------------------------------------------------------------------------------
def _goal(size: str | None, max_ppl: str | None, max_error: float | None) -> tuple[int | None, float | None]:
    """The target in bytes, or the loss that is allowed."""
    if sum(goal is not None for goal in (size, max_ppl, max_error)) != 1:
        raise typer.BadParameter("give one goal: --target-size 90MB, --max-ppl +2% or --max-error 0.05")
    if size is not None:
        return parse_size(size), None
    if max_error is not None and max_error <= 0:
        raise typer.BadParameter(f"--max-error {max_error}: expected more than 0, such as 0.05 for 5 %")
    if max_ppl is None:
        return None, max_error
    match = re.fullmatch(r"\s*\+?(\d+(?:\.\d+)?)\s*%\s*", max_ppl)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"--max-ppl {max_ppl}: expected how much more is allowed, in per cent, such as +2%")
    return None, float(match[1]) / 100


def parse_size(text: str) -> int:
    """Bytes: ``90MB`` is 90,000,000, ``90MiB`` is 94,371,840, ``1234`` as it is."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise typer.BadParameter(f"--target-size {text}: expected a number with MB, MiB, GB, GiB, KB or KiB")
    return int(float(match[1]) * UNITS[match[2]])


def _check_place(out: Path | None, overwrite: bool) -> None:
    if out is not None and out.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise typer.BadParameter(f"{out} is no .yaml or .json file; name it {out.with_suffix('.yaml').name}")
    check_file(out, overwrite)


# --- data -------------------------------------------------------------------------------------------------------------
def _data(
    loaded: LoadedModel, text: Path | None, data: Path | None, windows: int, length: int, *, perplexity: bool
) -> tuple[Calibration, Tensor | None]:
    """What to measure on, and for a language model other windows to predict and calibrate on."""
    from fxquant.cli_measure import read_tensors
    from fxquant.examples import is_decoder

    if data is not None:
        if text is not None or perplexity:
            raise typer.BadParameter("--data is for models without perplexity; give --max-error or --target-size")
        tensors = read_tensors(data)
        tensors.pop("labels", None)
        return [tensors], None
    if is_decoder(loaded.model) and loaded.tokenizer is not None:
        return held_out(loaded, read_text(text), windows, length)
    if perplexity:
        why = "has no tokenizer" if is_decoder(loaded.model) else "is no causal language model"
        raise InputError(f"{loaded.name} {why}, so it has no perplexity; give --max-error, and inputs with --data FILE")
    note(f"{loaded.name}: measured by the output's error on example inputs; give real ones with --data FILE")
    return [loaded.example_inputs], None


def held_out(loaded: LoadedModel, text: str | None, windows: int, length: int) -> tuple[Tensor, Tensor]:
    """The last ``windows`` of the text, and up to 16 spread over what comes before them."""
    from fxquant.evaluate import text_windows

    assert loaded.tokenizer is not None
    length = min(length, getattr(loaded.model.config, "max_position_embeddings", length))
    every = text_windows(loaded.tokenizer, text, length=length)
    if len(every) <= windows:
        raise InputError(f"the text has {len(every)} windows of {length} tokens; {windows} to measure on and at least "
                         f"one to calibrate on are needed: give more text, or fewer or shorter windows")  # fmt: skip
    before = every[:-windows]
    return every[-windows:], before[:: max(1, len(before) // 16)][:16]


def config_text(found: Recommendation, name: str, path: Path) -> str:
    """The config as a file, with what was measured in a comment where there can be one."""
    import json

    import yaml

    if path.suffix.lower() == ".json":
        return json.dumps(found.config.to_dict(), indent=2) + "\n"
    head = f"# fxquant recommend for {name}, goal: {found.goal}.\n# {found.reason}\n"
    return head + yaml.safe_dump(found.config.to_dict(), sort_keys=False)
