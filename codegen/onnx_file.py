"""Writing an ONNX model to a file, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir

from fxquant import outputs
from fxquant.errors import SaveError

MAPPED = 64 << 20
"""Bytes of weights from which on they get a file of their own: onnxruntime maps that, where it copies a graph's own."""
FILE_LIMIT = 2**31 - 2**24
"""A protobuf file holds less than 2 GB; this leaves 16 MB for the graph."""


def writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise SaveError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise SaveError(f"cannot write {path}: it is a folder; name a file in it, such as {path / 'model.onnx'}")
    return path


def write(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Save beside ``path`` under a temporary name, then move into place: the file, or its weights and its graph.

    Whatever fails, the files that were there stay or come back. Raises SaveError.
    """
    data = f"{path.name}.data"
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}; choose a folder that can be written") from error
    try:
        ir.save(model, folder / path.name, external_data=data if external_data else None)
        for file in folder.iterdir():
            outputs.sync(file)
        with outputs.taking_turns(path):  # or a graph could meet another one's weights
            _move(folder, path, data)
        outputs.sync(path.parent)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, path: Path, data: str) -> None:
    """Put the new files in the place of the old ones; the weights of a file that is replaced go with it."""
    old, aside = path.parent / data, folder / f"{data}.old"
    had = old.is_file() and (folder / data).is_file()
    stale = old.is_file() and not had and path.is_file() and _names(path, data)
    if had or stale:
        os.replace(old, aside)
    try:
        if (folder / data).exists():
            os.replace(folder / data, old)
        os.replace(folder / path.name, path)
    except BaseException:
        if aside.exists():
            os.replace(aside, old)
        elif old.exists() and not had:
            old.unlink()
        raise


def _names(path: Path, data: str) -> bool:
    """Whether an ONNX file keeps its weights in the file ``data``; then it is a small one."""
    return path.stat().st_size < FILE_LIMIT and data.encode() in path.read_bytes()
