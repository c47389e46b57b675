"""``fxquant export`` (to checkpoints: ``cli_export``), and what ``fxquant inspect`` says of an ONNX file."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from fxquant.cli_export import Format, checkpoint, format_of
from fxquant.cli_options import Json, Overwrite, check_file, load, note, print_json


class Operators(StrEnum):
    auto = "auto"
    fxquant = "fxquant"
    standard = "standard"


class ActivationBits(StrEnum):
    float32 = "32"
    int16 = "16"
    int8 = "8"


_BITS: dict[ActivationBits, Literal[32, 16, 8]] = {
    ActivationBits.float32: 32, ActivationBits.int16: 16, ActivationBits.int8: 8,
}  # fmt: skip


class OptimizeFor(StrEnum):
    speed = "speed"
    memory = "memory"


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that fxquant compile wrote.")],
    path: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write, or the folder.")],
    format: Annotated[
        Format | None,
        typer.Option(
            help="onnx: the whole graph, packed. compressed-tensors: a Hugging Face folder for vLLM. gguf: a file for "
            "llama.cpp. The last two hold weights alone and refuse what they cannot hold exactly. By default gguf for "
            "a FILE that ends so, else onnx."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", help="The model that was compiled: for compressed-tensors and gguf."),
    ] = None,
    opset: Annotated[int, typer.Option(help="The ONNX operator set, 21 to 26.")] = 21,
    operators: Annotated[
        Operators,
        typer.Option(
            help="What layers on packed weights become. auto: onnxruntime's MatMulNBits and GatherBlockQuantized where "
            "they are exact and fast, elsewhere nodes of the domain fxquant, which the file also defines in standard "
            "operators. fxquant: these nodes alone. standard: these nodes only where onnxruntime has no operator."
        ),
    ] = Operators.auto,
    activation_bits: Annotated[
        ActivationBits,
        typer.Option(
            help="32: linears read their input in full. 16, 8: kernels may round it to so many bits, token by token "
            "and block by block, and are faster; MatMulNBits then takes accuracy_level 4 for 8."
        ),
    ] = ActivationBits.float32,
    optimize_for: Annotated[
        OptimizeFor,
        typer.Option(
            help="Without fxquant's custom-op library. speed: onnxruntime decodes weights to float32 when it loads the "
            "file. memory: they stay packed and are decoded in every run, which is several times slower."
        ),
    ] = OptimizeFor.speed,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run the file in onnxruntime (read the checkpoint with transformers), compare it with torch, and exit "
            "with 1 if it is too far off.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a compiled model with its weights still packed: to ONNX, which plain onnxruntime runs, or as a checkpoint.

    Examples:

        fxquant export smollm2-fp6 -o smollm2-fp6.onnx --check

        fxquant export smollm2-int4 -o smollm2-int4.onnx --activation-bits 8

        fxquant export smollm2-fp6 -o small.onnx --optimize-for memory

        fxquant export smollm2-fp8 --format compressed-tensors --model ./SmolLM2-135M -o for-vllm

        fxquant export smollm2-mxfp4 --model ./SmolLM2-135M -o smollm2.gguf --check
    """
    if (chosen := format_of(path, format)) is not Format.onnx:
        onnx_only = {"--opset": opset != 21, "--operators": operators is not Operators.auto,
                     "--activation-bits": activation_bits is not ActivationBits.float32,
                     "--optimize-for": optimize_for is not OptimizeFor.speed}  # fmt: skip
        if given := [name for name, changed in onnx_only.items() if changed]:
            raise typer.BadParameter(f"{given[0]} is for --format onnx; {chosen.value} has no such choice")
        checkpoint(chosen, out, path, model=model, overwrite=overwrite, check=check, as_json=as_json)
        return
    from fxquant.show.console import progress_bars
    from fxquant.show.units import size

    if format is None and path.suffix.lower() != ".onnx":
        raise typer.BadParameter(
            f"{path} ends neither in .onnx nor in .gguf; name it {path.with_suffix('.onnx').name}, or say --format"
        )
    check_file(path, overwrite)
    compiled = load(out)
    with progress_bars() as progress:
        compiled.export_onnx(
            path, opset=opset, operators=operators.value, activation_bits=_BITS[activation_bits],
            optimize_for=optimize_for.value, progress=progress,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as told:
            found = compiled.check_onnx(path, progress=progress) if check else None
    for warning in told:
        note(str(warning.message))
    nbytes = sum(f.stat().st_size for f in (path, path.with_name(f"{path.name}.data")) if f.exists())
    if as_json:
        checked = {} if found is None else {"check": found.to_dict()}
        print_json({"path": str(path), "bytes": nbytes, "opset": opset, **checked})
    else:
        typer.echo(f"wrote {path}, {size(nbytes)}, opset {opset}")
        if found is not None:
            typer.echo(f"\n{found}")
    if found is not None and not found.ok:
        typer.echo(f"error: {path} was written, and does not compute what the model does in torch", err=True)
        raise typer.Exit(1)


def inspect(path: Path, as_json: bool) -> None:
    """Print what an ONNX file says of itself."""
    from fxquant.codegen.onnx_metadata import summarize

    found = summarize(path)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
