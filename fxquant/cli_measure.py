"""Commands that measure a model. ``cli`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fxquant.cli_options import (
    Json,
    Overwrite,
    check_file,
    check_language_model,
    check_specs,
    language_model,
    note,
    open_model,
    print_json,
    read_text,
    within_context,
)
from fxquant.errors import InputError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.allocation import Plan
    from fxquant.calibrate import Calibration
    from fxquant.checkpoints import LoadedModel
    from fxquant.intervals import Estimate
    from fxquant.program import Progress
    from fxquant.sensitivity import Sensitivity

FloatModel = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder (safetensors) or a GGUF file.")
]
Text_ = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text to measure on; by default text that comes with Python."),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Safetensors named as the inputs, for what is no language model."),
]


def eval_(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A compiled folder, an ONNX file, a Hugging Face folder or a GGUF file."),
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="FLOAT", help="The float model it was made from: compare with it.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure on; by default text that comes with Python.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Safetensors named as the model's inputs: with labels, a classifier's accuracy; without and with "
            "--against, the cosine similarity of hidden states.",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows, counted from the end of the text.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the tokenizer is, if not with the model (an ONNX file)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model, compiled or not: perplexity on text, accuracy on labelled data, agreement with the float model.

    Examples:

        fxquant eval smollm2-fp6

        fxquant eval smollm2-fp6 --against ./SmolLM2-135M

        fxquant eval smollm2-fp6.onnx --tokenizer smollm2-fp6 --windows 4 --length 1024

        fxquant eval vit-fp6 --data images.safetensors --against ./vit
    """
    from fxquant.show.console import progress_bars

    if data is not None and text is not None:
        raise typer.BadParameter("--data and --text are two kinds of data; give one of them")
    with progress_bars() as progress:
        if data is not None:
            figures, lines = _on_data(model, against, data, progress)
        else:
            tokenizer = tokenizer or (against if model.suffix == ".onnx" and against and against.is_dir() else None)
            figures, lines = _on_text(model, against, read_text(text), windows, length, tokenizer, progress)
    if as_json:
        print_json({"model": str(model), **figures})
    else:
        typer.echo("\n".join(lines))


def _on_text(
    model: Path, against: Path | None, text: str | None, count: int, length: int, tokenizer: Path | None,
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """The figures on windows of a text, and the lines that tell them."""
    from fxquant import evaluate
    from fxquant.show.units import plural

    call, words = language_model(model, tokenizer, progress)
    tokens = evaluate.text_windows(words, text, length=length)[-count:]
    more: dict[str, Any] = {}
    told: list[str] = []
    other = None
    if against is not None:
        other = open_model(against, progress)[0]
        check_language_model(other, against)
    with within_context(model, f"windows of {length} tokens", "--length"):
        if other is None:
            found = evaluate.perplexity(call, tokens, progress=progress)
        else:
            result = evaluate.compare(call, other, tokens, progress=progress)
    if other is not None:
        found = result.perplexity
        more = {"against": {"model": str(against), **result.to_dict()}}
        told = [
            f"against {against} (perplexity {result.reference.value:.4f}), 95 % intervals from {result.kl.blocks} "
            f"blocks of {result.block} tokens",
            f"  perplexity ratio  {_figure(result.ratio)}",
            f"  top-1 agreement   {_figure(result.top1, percent=True)}",
            f"  KL divergence     {_figure(result.kl)} nats",
        ]
    figures = {"perplexity": found.value, "nll": found.nll, "tokens": found.tokens, "windows": len(tokens)}
    line = f"perplexity {found.value:.4f} ({found.tokens} tokens, {plural(len(tokens), 'window')} of {length})"
    return {**figures, "length": length, **more}, [line, *told]


def _on_data(model: Path, against: Path | None, data: Path, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """The figures on tensors from a file, and the lines that tell them."""
    from fxquant import evaluate

    inputs = read_tensors(data)
    labels = inputs.pop("labels", None)
    if labels is None and against is None:
        raise InputError(f"{data} holds {', '.join(inputs)} and no labels; add integers [samples] named labels, or "
                         f"give --against FLOAT to compare hidden states")  # fmt: skip
    call = open_model(model, progress)[0]
    other = None if against is None else open_model(against, progress)[0]
    if labels is None and other is not None:
        cosine = evaluate.cosine(call, other, inputs, progress=progress)
        line = f"cosine similarity {_figure(cosine.mean)}, at least {cosine.least:.4f} ({cosine.vectors} vectors)"
        return {**cosine.to_dict(), "against": str(against)}, [line]
    assert labels is not None
    found = evaluate.accuracy(call, inputs, labels, reference=other, progress=progress)
    lines = [f"accuracy {_figure(found.accuracy, percent=True)}, {found.correct} of {found.samples}"]
    if found.reference and found.change and found.top1 and found.kl:
        lines += [
            f"against {against} (accuracy {_figure(found.reference, percent=True)}), 95 % intervals",
            f"  accuracy change   {_figure(found.change, percent=True)}",
            f"  top-1 agreement   {_figure(found.top1, percent=True)}",
            f"  KL divergence     {_figure(found.kl)} nats",
        ]
    return found.to_dict(), lines


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fxquant import claims
    from fxquant.headers import safetensors_header

    try:
        claims.check_memory(path, sum(t.end - t.begin for t in safetensors_header(path).values()))
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ModelError) as error:
        raise InputError(f"cannot read {path}: {error}; give a safetensors file with the model's inputs") from error
    return tensors


def _figure(found: Estimate, *, percent: bool = False) -> str:
    """``1.0577 (1.0512 to 1.0643)``, or in per cent."""
    if percent:
        return f"{100 * found.value:.2f} % ({100 * found.low:.2f} to {100 * found.high:.2f})"
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def sensitivity(
    model: FloatModel,
    config: Annotated[
        str, typer.Option("--config", "-c", help="A recipe's name (see fxquant recipes) or a YAML, TOML or JSON file.")
    ] = "W4A16-RTN",
    text: Text_ = None,
    data: Data = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the losses, in the order of the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize one layer at a time, the others in float, and show what each costs: the most sensitive layers first.

    Examples:

        fxquant sensitivity ./SmolLM2-135M -c W4A16-RTN --svg layers.svg

        fxquant sensitivity ./vit -c W4A16-INT --data images.safetensors
    """
    from fxquant import checkpoints
    from fxquant import sensitivity as measuring
    from fxquant.config import load_config
    from fxquant.show import bars
    from fxquant.show.console import print_table, progress_bars
    from fxquant.show.html import write_page

    settings = load_config(config)
    check_file(svg)
    with progress_bars() as progress:
        loaded = checkpoints.load_model(model, progress=progress)
        given = _batches(loaded, text, data, windows, length)
        found = measuring.measure(loaded.model, loaded.example_inputs, settings, data=given, progress=progress)
    if settings.methods():
        note("weights are rounded to nearest; the methods of this config are not run")
    lines = [bars.Bar(q.name, q.loss, f"{q.loss:.4g}", found.level(q)) for q in found.layers]
    if svg is not None:
        write_page(svg, bars.svg(lines, f"{loaded.name} as {config}: {_MEASURES[found.measure]}, one layer at a time"))
        typer.echo(f"wrote {svg}", err=True)
    if as_json:
        print_json({"model": str(model), "config": config, **found.to_dict()})
        return
    largest = max(q.loss for q in found.layers)
    rows = [
        (
            q.name,
            q.spec,
            f"{q.loss:.4g}",
            "" if q.perplexity is None else f"{q.perplexity:+.4f}",
            f"{q.weight_error:.4f}",
            bars.text_bar(q.loss, largest),
        )
        for q in found.ranked()
    ]
    columns = ("layer", "weight", _MEASURES[found.measure], "perplexity\nabove float", "weight error", "")
    print_table(columns, rows, right=columns[2:5], spare=("", "weight error"))
    typer.echo(f"\n{_whole(found)}")


_MEASURES = {"kl": "KL in nats", "error": "relative output error"}


def _whole(found: Sensitivity) -> str:
    """``all layers together: KL in nats 0.3; perplexity 15.76 -> 20.10, Class-3 (ZeroQuant-V2: ...)``."""
    told = f"all layers together: {_MEASURES[found.measure]} {found.whole.loss:.4g}"
    if found.float_perplexity is None or found.whole.perplexity is None:
        return told
    total = found.float_perplexity + found.whole.perplexity
    return (
        f"{told} (the layers' sum is {sum(q.loss for q in found.layers):.4g}); perplexity {found.float_perplexity:.4f} "
        f"-> {total:.4f}, Class-{found.v2_class} (ZeroQuant-V2: up to 0.1 above float, up to 0.5, more)"
    )


def _batches(loaded: LoadedModel, text: Path | None, data: Path | None, windows: int, length: int) -> Calibration:
    """Token windows for a language model; a file's tensors, or the example inputs, for others."""
    from fxquant.evaluate import calibration_windows
    from fxquant.examples import is_decoder

    if data is not None:
        if text is not None:
            raise typer.BadParameter("--data and --text are two kinds of data; give one of them")
        tensors = read_tensors(data)
        tensors.pop("labels", None)
        return [tensors]
    if is_decoder(loaded.model):
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.name} came without a tokenizer; give its inputs with --data FILE")
        length = min(length, getattr(loaded.model.config, "max_position_embeddings", length))
        return calibration_windows(loaded.tokenizer, read_text(text), count=windows, length=length)
    note(f"{loaded.name} is no causal language model: measured on example inputs; give real ones with --data FILE")
    return [loaded.example_inputs]


def allocate(
    model: FloatModel,
    bits: Annotated[float, typer.Option(min=0.0, help="The budget: bits a weight, scales included.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The config to write, .yaml or .json.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="A spec to choose from; give several. Default: 3 to 8 bits."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--pass", metavar="NAME", help="A method for the config to run, such as gptq.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Layers to keep in float; by default output heads.")
    ] = None,
    probe: Annotated[
        Literal["gradient", "noise"], typer.Option(help="How losses are predicted; noise takes far longer.")
    ] = "gradient",
    text: Text_ = None,
    data: Data = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    check: Annotated[bool, typer.Option("--check", help="Measure the outcome on other text too.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose a format for every layer, so that the model loses least within a size, and write the config.

    Embeddings and output heads stay in float and are not in the budget.

    Examples:

        fxquant allocate ./SmolLM2-135M --bits 4.5 -o mixed.yaml --check

        fxquant allocate ./SmolLM2-135M --bits 4.25 --pass gptq -o mixed.yaml
    """
    from fxquant import allocation, checkpoints
    from fxquant.show.console import progress_bars
    from fxquant.show.html import write_page

    if out.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise typer.BadParameter(f"{out} is no .yaml or .json file; name it {out.with_suffix('.yaml').name}")
    check_file(out, overwrite)
    check_specs(candidate)
    with progress_bars() as progress:
        loaded = checkpoints.load_model(model, progress=progress)
        given = _batches(loaded, text, data, windows, length)
        plan = allocation.plan(
            loaded.model, loaded.example_inputs, budget=bits, candidates=candidate or allocation.CANDIDATES,
            calibration=given, methods=method or (), keep=keep, probe=probe, progress=progress,
        )  # fmt: skip
        figures = _checked(loaded, plan, given, read_text(text), progress) if check else {}
    write_page(out, _config_text(plan, out))
    if as_json:
        print_json({"out": str(out), **plan.to_dict(), **figures})
    else:
        _print_plan(plan, figures)
        typer.echo(f"\nwrote {out}; next: fxquant compile {model} -c {out} -o OUT")


def _checked(
    loaded: LoadedModel, plan: Plan, given: Calibration, text: str | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """What the plan does, rounded to nearest, on as many windows from the end of the text, or on the same batches."""
    from dataclasses import asdict

    from torch import Tensor

    from fxquant import allocation
    from fxquant.evaluate import text_windows

    if isinstance(given, Tensor) and loaded.tokenizer is not None:
        given = text_windows(loaded.tokenizer, text, length=given.shape[1])[-len(given) :]
    found = allocation.check(loaded.model, loaded.example_inputs, plan.config, given, progress=progress)
    return {"check": asdict(found)}


def _config_text(plan: Plan, path: Path) -> str:
    import json

    import yaml

    if path.suffix.lower() == ".json":
        return json.dumps(plan.config.to_dict(), indent=2) + "\n"
    head = f"# fxquant allocate: {plan.bits:.4f} bits a weight of a budget of {plan.budget:g}, predicted loss "
    return f"{head}{plan.loss:.4f} ({plan.measure})\n{yaml.safe_dump(plan.config.to_dict(), sort_keys=False)}"


def _print_plan(plan: Plan, figures: dict[str, dict[str, Any]]) -> None:
    from fxquant.show import bars
    from fxquant.show.console import print_table

    what = {"kl": "predicted KL", "error": "predicted error^2"}[plan.measure]
    largest = max(row.loss for row in plan.rows)
    rows = [
        (row.name, row.spec, f"{row.bits:.3f}", f"{row.weight_error:.4f}", f"{row.loss:.3g}",
         bars.text_bar(row.loss, largest))
        for row in plan.rows
    ]  # fmt: skip
    columns = ("layer", "weight", "bits", "weight error", what, "")
    print_table(columns, rows, right=columns[2:5], spare=("", "weight error"))
    fits = {True: "yes", False: "no"}
    uniform = [
        (u.spec, f"{u.bits:.4f}", f"{u.loss:.4g}", fits[u.fits]) for u in sorted(plan.uniform, key=lambda u: u.bits)
    ]
    typer.echo("\nall layers the same:")
    print_table(("weight", "bits", what, "within the budget"), uniform, right=("bits", what))
    sure = "no choice is better" if plan.exact else f"no choice is below {plan.bound:.4g}"
    typer.echo(f"\nthis choice: {plan.bits:.4f} bits a weight, {what} {plan.loss:.4g} ({sure} by this prediction)")
    if figures:
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures["check"].items() if value is not None)
        typer.echo(f"measured, rounded to nearest: {told}")
