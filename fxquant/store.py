"""Saved models: a folder with ``graph.json`` (``document``) and ``model.safetensors``. Data, never code.

Beside them ``manifest.json`` says what the model was made from (``origin``), with the checksums of both, and
``timings.json`` what a job took: all that differs when it is run again. Both may be removed.

A folder is complete or not there: it is written beside its place and renamed into it. Reading one can fail in one way
only, with a LoadError; nothing in it is executed, and no link is followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant import files, outputs
from fxquant.document import check_header, decode, encode, encode_tensors, kept_tensors
from fxquant.encoding import Json, MalformedError, decode_timings, encode_timings, fields, text
from fxquant.errors import LoadError, ModelError, SaveError
from fxquant.graph import TensorType
from fxquant.headers import safetensors_header
from fxquant.memory import ran_out
from fxquant.program import Program
from fxquant.tasks import ALIGNMENT
from fxquant.weight_file import Digests, WeightFile, digests_of

GRAPH, WEIGHTS, TIMINGS, MANIFEST = "graph.json", "model.safetensors", "timings.json", "manifest.json"
TOKENIZER, KERNELS = "tokenizer", "kernels"
KERNEL_MARK = "# Written by fxquant kernels"
"""How a file of kernels begins, which ``fxquant kernels`` may write again and ``save`` may remove."""
_MAX_JSON = files.MAX_JSON  # a graph of 2000 nodes with its trace takes about 2 MiB
_MANIFEST_FORMAT = 2


def save(
    program: Program,
    directory: str | Path,
    *,
    config: Mapping[str, Any],
    tokenizer: Any | None = None,
    overwrite: bool = False,
    origin: Mapping[str, Json] | None = None,
) -> None:
    """Write ``program`` and its plain-data ``config`` to the new folder ``directory``.

    A ``tokenizer`` (whatever has ``save_pretrained``) goes into its folder ``tokenizer``, for evaluation. ``origin`` is
    what the manifest says the model was made from.

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
    content = _content(document)
    try:
        with outputs.replacing_folder(target, overwrite=overwrite) as folder:
            digests = _write_weights(folder / WEIGHTS, tensors)
            _write_beside(folder, content, program, tokenizer, origin, digests)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SaveError(f"cannot write {target}: {error}. Free some space or choose another folder") from error


def finish(
    program: Program, folder: Path, *, config: Mapping[str, Any], digests: Digests, tokenizer: Any | None = None,
    origin: Mapping[str, Json] | None = None,
) -> None:  # fmt: skip
    """Write what belongs beside the weights of ``program``, which are in ``folder`` already, with these ``digests``.

    Raises SaveError.
    """
    try:
        document, _ = encode(program, config)
        content = _content(document)
        decode(json.loads(content), read_tensors(folder / WEIGHTS))
    except MalformedError as error:
        raise SaveError(f"this program cannot be saved: {error}") from None
    _write_beside(folder, content, program, tokenizer, origin, digests)


def stored_tensors(program: Program) -> dict[str, Tensor]:
    """The tensors that ``save`` writes for a program, as they lie in the file, a tied one once."""
    return encode_tensors(kept_tensors(program.gm))[1]


def types_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorType]:
    return {name: TensorType(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> Digests:
    with WeightFile(path, types_of(tensors)) as file:
        for name, value in tensors.items():
            file.write(name, value)
        return file.digests()


def _write_beside(
    folder: Path, content: bytes, program: Program, tokenizer: Any | None, origin: Mapping[str, Json] | None,
    digests: Digests,
) -> None:  # fmt: skip
    (folder / GRAPH).write_bytes(content)
    (folder / TIMINGS).write_bytes(json.dumps(encode_timings(program.trace)).encode())
    _write_manifest(folder, origin, digests)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder / TOKENIZER))


def _content(document: Json) -> bytes:
    content = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(content) > _MAX_JSON:
        raise SaveError(f"this program cannot be saved: its graph takes {len(content)} bytes, above {_MAX_JSON}")
    return content


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
    others = sorted(set(os.listdir(target)) - {GRAPH, WEIGHTS, TIMINGS, MANIFEST, TOKENIZER, KERNELS})
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


# --- the manifest -----------------------------------------------------------------------------------------------------
def _write_manifest(folder: Path, origin: Mapping[str, Json] | None, digests: Digests) -> None:
    """Write ``manifest.json`` beside the two files of a saved model: their checksums, and what it was made from."""
    sums = {GRAPH: sha256(folder / GRAPH), WEIGHTS: {"header": digests.header, "tensors": digests.tensors}}
    document = {"fxquant manifest": _MANIFEST_FORMAT, "origin": origin, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(document, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Json] | None:
    """``manifest.json`` of a saved model, None where there is none. Raises MalformedError."""
    file = folder / MANIFEST
    if not os.path.lexists(file):
        return None
    if not stat.S_ISREG(file.lstat().st_mode):
        raise MalformedError(f"{MANIFEST} is not a regular file")
    found = fields(read_json(file), MANIFEST, ["fxquant manifest", "origin", "sha256"])
    if (version := found["fxquant manifest"]) not in (1, _MANIFEST_FORMAT):
        raise MalformedError(f"{MANIFEST} has version {str(version)[:20]}; expected {_MANIFEST_FORMAT}")
    if found["origin"] is not None and not isinstance(found["origin"], dict):
        raise MalformedError(f"the origin in {MANIFEST} is not an object")
    sums = fields(found["sha256"], f"sha256 of {MANIFEST}", [GRAPH, WEIGHTS])
    text(sums[GRAPH], f"the checksum of {GRAPH}", 64)
    if version == 1:
        text(sums[WEIGHTS], f"the checksum of {WEIGHTS}", 64)
        return found
    weights = fields(sums[WEIGHTS], f"sha256 of {WEIGHTS} in {MANIFEST}", ["header", "tensors"])
    text(weights["header"], "the checksum of the header", 64)
    if not isinstance(weights["tensors"], dict):
        raise MalformedError(f"the checksums of tensors in {MANIFEST} are not an object")
    for name, digest in weights["tensors"].items():
        text(digest, f"the checksum of {name[:100]!r}", 64)
    return found


def check_sums(folder: Path, *, weights: bool = True) -> dict[str, Json] | None:
    """The manifest, after checking that the files are those that it was written for. Raises MalformedError."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    sums = manifest["sha256"]
    if sha256(folder / GRAPH) != sums[GRAPH]:
        raise MalformedError(f"{GRAPH} is not the file that was saved: its sha256 is not the one in {MANIFEST}")
    if weights and (wrong := _differences(folder, sums[WEIGHTS])):
        more = f" and of {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise MalformedError(
            f"{WEIGHTS} is not the file that was saved: the sha256 of {wrong[0]}{more} is not the one in {MANIFEST}"
        )
    return manifest


def _differences(folder: Path, saved: str | Mapping[str, Json]) -> list[str]:
    """What of a file of weights, its header or a tensor, is not what was saved, or not there; a manifest of version 1
    has one checksum for the file."""
    if isinstance(saved, str):
        return [] if sha256(folder / WEIGHTS) == saved else ["the file"]
    found = digests_of(folder / WEIGHTS)
    wrong = ["its header"] if found.header != saved["header"] else []
    names = sorted(found.tensors.keys() | saved["tensors"].keys())
    return wrong + [f"tensor {n[:100]!r}" for n in names if found.tensors.get(n) != saved["tensors"].get(n)]


def verify(directory: str | Path) -> bool:
    """Read the whole of a saved model and compare it with its manifest; False where there is none. Raises LoadError."""
    folder = Path(directory)
    check_files(folder)
    try:
        return check_sums(folder) is not None
    except (MalformedError, ModelError, OSError) as error:
        raise LoadError(f"{folder}: {error}; save it again, or fetch it again") from None


# --- reading ----------------------------------------------------------------------------------------------------------
def load(directory: str | Path) -> tuple[Program, dict[str, Any]]:
    """The program saved in ``directory``, and its config. Its tensors are mapped from the file, on the CPU.

    A loaded program returns plain dicts, lists and tuples (its ``out_spec`` is None). Raises LoadError for anything
    that is not what ``save`` writes, naming the file and what is wrong. Of ``manifest.json``, where there is one, the
    checksum of the graph is checked; ``verify`` checks that of the weights too.
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
        check_sums(folder, weights=False)
        file = folder / TIMINGS
        if os.path.lexists(file):
            program.trace = decode_timings(read_json(file), program.trace)
        return program, config
    except MalformedError as error:
        raise LoadError(f"{file}: {error}; {error.hint}") from None
    except Exception as error:  # a file made to break its reader gets the same answer as any other bad file
        if ran_out(error):
            raise
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
    """All tensors of a safetensors file, mapped into memory, none of them read; floats that lie badly are copied."""
    try:
        stored = safetensors_header(file)
        mapped = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
    except (ModelError, OSError, RuntimeError) as error:
        raise MalformedError(f"it cannot be read: {str(error)[:400]}") from None
    found: dict[str, Tensor] = {}
    for key, (dtype, shape, begin, end, _) in stored.items():
        if begin % dtype.itemsize:
            raise MalformedError(f"tensor {key[:100]!r} does not lie at a multiple of its element size")
        own = mapped[begin:end]  # a storage for each: tensors that share one are taken for views of each other
        value = torch.empty(0, dtype=dtype).set_(own).view(shape)
        if value.is_floating_point() and value.data_ptr() % ALIGNMENT:
            value = value.clone()  # matrix products differ in the last bit with the alignment of their operands
        found[key] = value
    return found
