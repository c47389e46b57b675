"""``fxquant export`` to checkpoints: folders of compressed-tensors, GGUF files."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path

import typer

from fxquant.cli_options import load, note, print_json
from fxquant.errors import ExportError, InputError


class Format(StrEnum):
    onnx = "onnx"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


def format_of(path: Path, given: Format | None) -> Format:
    """The format that is asked for, by its name or by the suffix of the file."""
    if given is not None:
        return given
    return Format.gguf if path.suffix.lower() == ".gguf" else Format.onnx


def checkpoint(
    format: Format, out: Path, path: Path, *, model: Path | None, overwrite: bool, check: bool, as_json: bool
) -> None:
    """Write the weights of the compiled model in ``out`` to ``path``, and read them back where ``check`` is set."""
    from fxquant.export_check import check_compressed_tensors, check_gguf
    from fxquant.export_folder import export_compressed_tensors
    from fxquant.export_ggml import export_gguf
    from fxquant.show.console import progress_bars
    from fxquant.show.units import size

    if model is None:
        raise InputError(
            f"{format.value} files hold the model's config and tokenizer, which {out} does not have; give the model "
            f"that was compiled with --model MODEL"
        )
    compiled, found = load(out), None
    with warnings.catch_warnings(record=True) as told, progress_bars() as progress:
        if format is Format.gguf:
            export_gguf(compiled, path, model=model, overwrite=overwrite, progress=progress)
            found = check_gguf(compiled, path) if check else None
        else:
            export_compressed_tensors(compiled, path, model=model, overwrite=overwrite, progress=progress)
            found = check_compressed_tensors(compiled, path) if check else None
    for warning in told:
        note(str(warning.message))
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    nbytes = sum(f.stat().st_size for f in files)
    if as_json:
        checked = {} if found is None else {"check": found.to_dict()}
        print_json({"path": str(path), "format": format.value, "bytes": nbytes, **checked})
    else:
        typer.echo(f"wrote {path}, {size(nbytes)}, {format.value}")
        if found is not None:
            typer.echo(str(found))
    if found is not None and not found.ok:
        raise ExportError(f"{path} was written, and does not hold what the compiled model computes")
