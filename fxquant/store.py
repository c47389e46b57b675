"""Saved models: a folder with ``graph.json`` (``document``) and ``model.safetensors``. Data, never code.

Beside them ``timings.json`` holds what a job took: all that differs when it is run again. It may be removed.

A folder is complete or not there: it is written beside its place and renamed into it. Reading one can fail in one way
only, with a LoadError; nothing in it is executed, and no link is followed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant import files
from fxquant.document import check_header, decode, encode
from fxquant.encoding import Json, MalformedError, decode_timings, encode_timings
from fxquant.errors import LoadError, SaveError
from fxquant.program import Program

GRAPH, WEIGHTS, TIMINGS = "graph.json", "model.safetensors", "timings.json"
TOKENIZER, KERNELS = "tokenizer", "kernels"
KERNEL_MARK = "# Written by fxquant kernels"
"""How a file of kernels begins, which ``fxquant kernels`` may write again and ``save`` may remove."""
_ALIGNMENT = 64  # bytes: what torch gives its own tensors
_MAX_JSON = files.MAX_JSON  # a graph of 2000 nodes with its trace takes about 2 MiB


def save(
    program: Program,
    directory: str | Path,
    *,
    config: Mapping[str, Any],
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``program`` and its plain-data ``config`` to the new folder ``directory``.

    A ``tokenizer`` (whatever has ``save_pretrained``) goes into its folder ``tokenizer``, for evaluation.

    With ``overwrite`` a saved model that is there already is replaced; any other folder never is. Raises SaveError,
    and leaves what was there as it was, for a program that a saved model cannot hold (naming the node), a folder that
    exists, a parent that does not, and whatever the file system refuses.
    """
    target = Path(os.path.abspath(directory))
    check_place(target, overwrite)
    try:
        document, tensors = encode(program, config)
        decode(document, tensors)  # what load would refuse is not written
    except MalformedError as error:
        raise SaveError(f"this program cannot be saved: {error}. Keep it in memory, or change that") from None
    content = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(content) > _MAX_JSON:
        raise SaveError(f"this program cannot be saved: its graph takes {len(content)} bytes, above {_MAX_JSON}")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        _write(temporary, content, tensors, json.dumps(encode_timings(program.trace)).encode())
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary / TOKENIZER))
        _move(temporary, target)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_place(target: Path, overwrite: bool) -> None:
    """Raise SaveError unless ``target`` is free, or a saved model that may be overwritten; its parent must exist."""
    if not target.parent.is_dir():
        raise SaveError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise SaveError(f"cannot write {target}: the folder {target.parent} is not writable; choose another place")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise SaveError(f"{target} exists already; choose another folder, or pass overwrite (--overwrite)")
    if target.is_symlink() or not target.is_dir():
        raise SaveError(f"{target} is not a folder, so it is not overwritten; remove it or choose another place")
    others = sorted(set(os.listdir(target)) - {GRAPH, WEIGHTS, TIMINGS, TOKENIZER, KERNELS})
    if others := others + [f"{KERNELS}/{name}" for name in not_kernels(target / KERNELS)]:
        raise SaveError(
            f"{target} holds {others[0]!r}, which is not part of a saved model, so it is not overwritten; "
            f"move that away or choose another folder"
        )


def not_kernels(folder: Path) -> list[str]:
    """Names in ``folder`` that are not files of kernels, nor what Python keeps of them."""
    if folder.is_symlink() or not folder.is_dir():
        return [""] if os.path.lexists(folder) else []
    return [path.name for path in sorted(folder.iterdir()) if path.name != "__pycache__" and not _is_kernels(path)]


def _is_kernels(path: Path) -> bool:
    if path.suffix != ".py" or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(KERNEL_MARK)) == KERNEL_MARK.encode()


def _write(folder: Path, content: bytes, tensors: dict[str, Tensor], timings: bytes) -> None:
    save_file(tensors, folder / WEIGHTS)
    (folder / GRAPH).write_bytes(content)
    (folder / TIMINGS).write_bytes(timings)
    for path in (folder / WEIGHTS, folder / GRAPH, folder):
        _sync(path)


def _move(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; a model that is there is put aside first, and back if the rename fails."""
    aside = temporary.with_name(f"{temporary.name}.old")
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Have the file system write ``path`` to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(directory: str | Path) -> tuple[Program, dict[str, Any]]:
    """The program saved in ``directory``, and its config. Its tensors are mapped from the file, on the CPU.

    A loaded program returns plain dicts, lists and tuples (its ``out_spec`` is None). Raises LoadError for anything
    that is not what ``save`` writes, naming the file and what is wrong.
    """
    folder = Path(directory)
    file = folder / GRAPH
    check_files(folder)
    try:
        document = check_header(read_json(file))
        file = folder / WEIGHTS
        stored = read_tensors(file)
        file = folder
        program, config = decode(document, stored)
        file = folder / TIMINGS
        if os.path.lexists(file):
            program.trace = decode_timings(read_json(file), program.trace)
        return program, config
    except MalformedError as error:
        raise LoadError(f"{file}: {error}; {error.hint}") from None
    except Exception as error:  # a file made to break its reader gets the same answer as any other bad file
        raise LoadError(f"{file} cannot be read: {type(error).__name__}: {str(error)[:300]}; save it again") from error


def check_files(folder: Path) -> None:
    """Raise LoadError unless ``folder`` holds the files of a saved model, as files of its own."""
    timings = [folder / TIMINGS] if os.path.lexists(folder / TIMINGS) else []
    for file in (folder, folder / GRAPH, folder / WEIGHTS, *timings):
        try:
            mode = file.stat().st_mode if file == folder else file.lstat().st_mode
        except (OSError, ValueError) as error:
            what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise LoadError(f"{file} {what}; give a folder that fxquant saved a model to{_other(folder)}") from None
        if file == folder and not stat.S_ISDIR(mode):
            raise LoadError(f"{file} is not a folder; give a folder that fxquant saved a model to")
        if file != folder and not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            raise LoadError(f"{file} is {kind}, and links are not followed; copy the file itself into the folder")


def _other(folder: Path) -> str:
    """What a folder without a graph is for, if it is a model of transformers."""
    if not (folder / "config.json").is_file():
        return ""
    return ": this is one of transformers, which from_pretrained reads (import fxquant.hf first if it is packed)"


def read_json(file: Path) -> Json:
    """The document in ``file``: strict JSON, without repeated keys, NaN or infinities."""
    try:
        if (size := file.stat().st_size) > _MAX_JSON:
            raise MalformedError(f"it has {size} bytes; at most {_MAX_JSON} are read")
        return files.strict_json(file.read_bytes())
    except OSError as error:
        raise MalformedError(f"it cannot be read: {error}") from None
    except ValueError as error:
        raise error if isinstance(error, MalformedError) else MalformedError(f"it is not valid JSON: {error}") from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory; floats that lie badly there are copied."""
    try:
        with file.open("rb") as stream:
            if (length := int.from_bytes(stream.read(8), "little")) > _MAX_JSON:
                raise MalformedError(f"its header claims {length} bytes; at most {_MAX_JSON} are read")
        with safe_open(file, framework="pt") as tensors:
            found: dict[str, Tensor] = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except MalformedError:
        raise
    except Exception as error:  # the reader's own errors are of many types
        raise MalformedError(f"it is not a valid safetensors file: {str(error)[:300]}") from None
    for key, value in found.items():
        if value.data_ptr() % value.element_size():
            raise MalformedError(f"tensor {key[:100]!r} does not lie at a multiple of its element size")
        if value.is_floating_point() and value.data_ptr() % _ALIGNMENT:
            found[key] = value.clone()  # matrix products differ in the last bit with the alignment of their operands
    return found
