"""What safetensors files hold, from their headers alone: names, types, shapes and where the bytes lie.

    8 bytes: length N of the header, little endian | N bytes: JSON | the tensors, one after another

    {"w": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, "__metadata__": {"format": "pt"}}

Everything a header claims is checked against the file before anyone allocates or reads: counts, types, products of
sizes, offsets that overlap or leave holes, the end of the file. No tensor is made here.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fxquant import files
from fxquant.errors import ModelError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""The types of safetensors that torch has with whole bytes an element."""
_MAX_DIMS, _MAX_NAME = 16, 1024
_AGAIN = "fetch the file again"


class StoredTensor(NamedTuple):
    """A tensor in a file: element type, shape, and its bytes ``[begin, end)`` counted from the start of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path


def safetensors_header(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the order of its bytes.

    ModelError for a file that is not one: truncated, too long, a header above 32 MiB, a type, size or offset that
    does not fit. Costs a read of the header, whatever it claims.
    """
    path = Path(path)
    try:
        with files.regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _bad(path, f"it has {size} bytes, and its header claims {length}: it is truncated, or of another "
                                 f"kind")  # fmt: skip
            if length > files.MAX_JSON:
                raise _bad(path, f"its header claims {length} bytes; at most {files.MAX_JSON} are read")
            rows = files.strict_json(stream.read(length))
        if not isinstance(rows, dict):
            raise ValueError("its header is not a JSON object")
        _check_metadata(rows.get("__metadata__", {}))
        found = [(name, _entry(path, name, row, 8 + length)) for name, row in rows.items() if name != "__metadata__"]
    except ModelError:
        raise
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; fetch all files of the model") from None
    except (OSError, ValueError) as error:
        raise _bad(path, str(error)[:300]) from None
    found.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_places(path, found, 8 + length, size)
    return dict(found)


def _bad(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is not a valid safetensors file: {why}; {_AGAIN}")


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its __metadata__ is not an object of texts")


def _entry(path: Path, name: str, row: Any, start: int) -> StoredTensor:
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"tensor name {name[:60]!r} is empty, longer than {_MAX_NAME} characters, or not printable")
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:60]!r} has not the three fields dtype, shape and data_offsets")
    dtype = DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r} has type {str(row['dtype'])[:20]!r}; expected one of {', '.join(DTYPES)}")
    shape, offsets = row["shape"], row["data_offsets"]
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has shape {str(shape)[:60]}; expected at most {_MAX_DIMS} sizes from 0")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has data_offsets {str(offsets)[:60]}; expected two sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} lies at {begin} to {end}; {row['dtype']}{str(shape)[:60]} takes "
                         f"{math.prod(shape) * dtype.itemsize} bytes")  # fmt: skip
    return StoredTensor(dtype, tuple(shape), start + begin, start + end, path)


def _sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers from 0 below 2^63."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_places(path: Path, found: list[tuple[str, StoredTensor]], start: int, size: int) -> None:
    """Raise ModelError unless the tensors fill the file from ``start`` to its end, each byte once."""
    end = start
    for name, entry in found:
        if entry.begin != end:
            how = "overlaps the one before it" if entry.begin < end else "leaves a hole before it"
            raise _bad(path, f"tensor {name!r} {how} (byte {entry.begin - start}, expected {end - start})")
        end = entry.end
    if end != size:
        what = "it is truncated" if end > size else "more bytes follow"
        raise _bad(path, f"its tensors end at byte {end}, the file at {size}: {what}")


def folder_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder by name: of ``model.safetensors``, or of the shards that its index names.

    Where there is neither, of all ``*.safetensors`` in the folder. ModelError for a shard that is missing, is not a
    plain file name, or lies elsewhere (a link out of the folder), a tensor that is not in the shard that the
    index says, or in two, and what ``safetensors_header`` refuses.
    """
    folder = Path(folder)
    index = folder / INDEX
    single = folder / "model.safetensors"
    if os.path.lexists(single):
        return _header_in(folder, single.name)
    if not os.path.lexists(index):
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        if not names:
            raise ModelError(f"{folder} holds no model.safetensors; fetch all files of the model")
        return _merged(folder, names)
    places = weight_map(folder)
    found = _merged(folder, list(dict.fromkeys(places.values())))
    for name, shard in places.items():
        if name not in found or found[name].file.name != shard:
            raise ModelError(f"{index} says that {shard!r} holds tensor {name[:100]!r}, and it does not; fetch the "
                             f"folder's files again")  # fmt: skip
    return found


def weight_map(folder: Path) -> dict[str, str]:
    """Which shard holds a tensor, as the folder's index says; ModelError unless each is a file name."""
    index = folder / INDEX
    try:
        files.check_inside(folder, index)
        document = files.read_json(index)
        places = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError("it has no weight_map from names of tensors to names of files")
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read: {str(error)[:300]}; {_AGAIN}") from None
    for shard in set(places.values()):
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors") or not shard.isprintable():
            raise ModelError(f"{index} names the shard {shard[:100]!r}; expected a *.safetensors file of the folder "
                             f"itself: fetch the index again, or refuse the folder")  # fmt: skip
    return places


def _merged(folder: Path, names: list[str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for shard in names:
        more = _header_in(folder, shard)
        if twice := sorted(found.keys() & more.keys()):
            raise ModelError(f"tensor {twice[0]!r} is in {found[twice[0]].file.name!r} and in {shard!r} of {folder}; "
                             f"keep the file that belongs to the model")  # fmt: skip
        found |= more
    return found


def _header_in(folder: Path, name: str) -> dict[str, StoredTensor]:
    file = folder / name
    if not os.path.lexists(file):
        raise ModelError(f"{folder} lacks the shard {name}, which {INDEX} names; fetch it: hf download NAME {name}")
    try:
        files.check_inside(folder, file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    return safetensors_header(file)
