"""What is left of a download or a clone that was interrupted, told apart from damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fxquant import files
from fxquant.errors import ModelError
from fxquant.headers import INDEX, weight_map

_POINTER = b"version https://git-lfs.github.com/spec/"
_SMALL = 1024  # bytes: a pointer has about 130
_SUFFIXES = (".safetensors", ".gguf", ".json", ".model")
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".aria2", ".download", ".tmp")
_AGAIN = "fetch it again, which goes on where it stopped: hf download NAME --local-dir FOLDER"


def check_complete(path: Path) -> None:
    """Raise ModelError where files of the model at ``path`` are not there yet, saying what fetches them.

    Pointers of Git LFS in the place of weights, links of the hub's cache to what was not fetched, shards that an
    index names and that are missing. Whether a file is whole is told by its header (``headers``).
    """
    for file in [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES):
        if file.is_symlink() and not file.exists():
            raise ModelError(f"{file} is a link to {os.readlink(file)}, which is not there: the download was "
                             f"interrupted or a cache was cleaned; {_AGAIN}")  # fmt: skip
        if (size := _pointer(file)) is not None:
            raise ModelError(f"{file} is a pointer of Git LFS, in the place of a file of {size} bytes: run git lfs "
                             f"pull in the folder, or hf download NAME --local-dir FOLDER")  # fmt: skip
    if path.is_file():
        return
    names = dict.fromkeys(weight_map(path).values()) if (path / INDEX).is_file() else ["model.safetensors"]
    missing = [name for name in names if not (path / name).exists()]
    unfinished = next(_unfinished(path), None)
    if missing and (len(names) > 1 or unfinished is not None) and not _other_weights(path, list(names)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f"; its download was interrupted ({unfinished} is there)" if unfinished else ""
        raise ModelError(f"{path} lacks {missing[0]}{more} of {len(names)} files of weights{why}; {_AGAIN}")


def _other_weights(path: Path, names: list[str]) -> bool:
    """Whether there are weights under other names than these, with no index."""
    return not (path / INDEX).is_file() and any(f.name not in names for f in path.glob("*.safetensors"))


def _pointer(file: Path) -> int | None:
    """The size that a pointer of Git LFS claims, None for any other file."""
    try:
        if not file.is_file() or file.stat().st_size > _SMALL:
            return None
        text = files.read(file, _SMALL)
    except OSError:
        return None  # its reader says what is wrong
    if not text.startswith(_POINTER):
        return None
    sizes = [line[5:] for line in text.splitlines() if line.startswith(b"size ")]
    return int(sizes[0]) if sizes and sizes[0].isdigit() else 0


def _unfinished(path: Path) -> Iterator[str]:
    """Names of what downloads in progress are kept in: of browsers, hf download, and the hub's cache."""
    home = path.resolve()
    places = [home.glob("*"), home.glob(".cache/huggingface/download/*")]
    if home.parent.name == "snapshots":
        places.append((home.parent.parent / "blobs").glob("*"))
    return (f.name for f in chain(*places) if f.suffix in _UNFINISHED)
