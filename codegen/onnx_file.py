"""Writing an ONNX model to a file, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir

from fxquant.errors import SaveError

FILE_LIMIT = 2**31 - 2**24
"""A protobuf file holds less than 2 GB; this leaves 16 MB for the graph."""


def writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise SaveError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise SaveError(f"cannot write {path}: it is a folder; name a file in it, such as {path / 'model.onnx'}")
    return path


def write(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Save beside ``path`` under a temporary name, then move into place: weights first, then the graph."""
    data = f"{path.name}.data"
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}; choose a folder that can be written") from error
    try:
        ir.save(model, folder / path.name, external_data=data if external_data else None)
        for name in (data, path.name):
            if (folder / name).exists():
                os.replace(folder / name, path.parent / name)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
