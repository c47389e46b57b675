"""What a compiled model was made from: versions, machine, config, model, data and seeds.

Plain JSON without paths and times, so that the same input gives the same bytes. It is written beside a saved model
(``manifest.json``), and tells one job from another (``jobs``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.config import Config
from fxquant.encoding import Json
from fxquant.errors import ModelError
from fxquant.program import Pass, Program, text
from fxquant.rewrite import fetch, get_attrs

SEED = 0
"""What the generators of solvers start from, where a method has no seed of its own."""
WHOLE = 1 << 24
"""Bytes up to which a model's file is hashed whole."""
BLOCKS, BLOCK = 64, 1 << 16
"""Of a larger one: its header, and so many blocks of so many bytes, spread evenly from its first to its last byte."""
_KINDS = (".json", ".txt", ".jinja", ".model", ".safetensors", ".gguf")
_VECTOR = ("avx", "fma", "f16c", "amx", "sse4", "asimd", "sve", "bf16", "i8mm")


def origin(
    program: Program,
    config: Config,
    *,
    source: Mapping[str, Json] | None = None,
    examples: Any = None,
    calibration: Sequence[Any] = (),
    passes: Sequence[Pass] = (),
    packages: Iterable[str] = (),
) -> dict[str, Json]:
    """What ``program``, just captured, is to be made into a compiled model with.

    ``source`` tells the model's weights where it came from a file (``of_path``), else their values are hashed:
    ``calibration`` are its batches; ``passes`` own ones, of which only the names are known; ``packages`` those that
    made the model, beside torch.
    """
    seeds = {name: options.seed for name, options in config.methods() if hasattr(options, "seed")}
    return {
        "versions": versions(packages),
        "machine": machine(program),
        "config": {"sha256": of_config(config)},
        "model": {
            "graph": _sha(text(program.gm).encode()),
            **(dict(source) if source is not None else {"weights": of_tensors(_weights(program))}),
        },
        "examples": None if examples is None else of_tensors(examples),
        "calibration": {"batches": len(calibration), "sha256": of_tensors(calibration)} if len(calibration) else None,
        "passes": [own.name for own in passes],
        "seeds": {"default": SEED, **seeds},
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of what computes: other ones may give other bits."""
    return {
        "fxquant": importlib.metadata.version("fxquant"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def machine(program: Program) -> dict[str, Json]:
    """The type of machine: what the bits of sums and products depend on."""
    devices = {str(fetch(program.gm, str(node.target)).device) for node in get_attrs(program.gm.graph)}
    found: dict[str, Json] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "features": _features(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
    if gpus := sorted(d for d in devices if d.startswith("cuda")):
        found |= {"gpus": [torch.cuda.get_device_name(d) for d in gpus], "cuda": torch.version.cuda}
    return found


def _features() -> str:
    """Instruction sets of the processor that libraries choose their code by, as Linux lists them; else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    flags = next((q.partition(":")[2].split() for q in lines if q.startswith(("flags", "Features"))), [])
    return " ".join(sorted(f for f in flags if f.startswith(_VECTOR)))


def of_config(config: Config) -> str:
    return _sha(json.dumps(config.to_dict(), sort_keys=True).encode())


def _weights(program: Program) -> dict[str, Tensor]:
    names = dict.fromkeys(str(node.target) for node in get_attrs(program.gm.graph))
    return {name: fetch(program.gm, name) for name in names}


def of_tensors(value: Any) -> str:
    """sha256 of every bit of tensors in tuples, lists and dicts, their names, types and shapes, and of plain values."""
    tensors: list[Tensor] = []

    def shape(value: Any) -> Json:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": [str(value.dtype), list(value.shape)]}
        if isinstance(value, Mapping):
            return {"dict": [[str(k), shape(v)] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [shape(v) for v in value]
        return repr(value)

    structure = json.dumps(shape(value))
    with ThreadPoolExecutor(4) as pool:  # sha256 lets other threads run
        return _sha(structure.encode() + b"".join(pool.map(_bits, tensors)))


def _bits(value: Tensor) -> bytes:
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).digest()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- models on disk ---------------------------------------------------------------------------------------------------
def of_path(path: str | Path) -> dict[str, Json]:
    """``{"files": {name: sha256}}`` of a model's folder, or of the file at ``path``.

    Files up to 16 MiB are hashed whole. Of larger ones the size, the header, and 64 blocks of 64 KiB: a model of 13 GB
    is known in a moment, and a change of a few weights between the blocks is not seen (``times`` tells it).
    """
    return {"files": {name: _fingerprint(file) for name, file in _files(Path(path)).items()}}


def times(path: str | Path) -> dict[str, int]:
    """When each of the files was last written, in nanoseconds: for this machine alone."""
    return {name: file.stat().st_mtime_ns for name, file in _files(Path(path)).items()}


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    return {file.name: file for file in sorted(path.iterdir()) if file.suffix in _KINDS and file.is_file()}


def _fingerprint(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size <= WHOLE:
                return _sha(stream.read(WHOLE + 1))
            found = hashlib.sha256(f"{size} bytes".encode())
            length = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
            stream.seek(0)
            found.update(stream.read(min(length + 8, WHOLE)))
            for i in range(BLOCKS):
                stream.seek((size - BLOCK) * i // (BLOCKS - 1))
                found.update(stream.read(BLOCK))
            return found.hexdigest()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}; fetch it again") from error
