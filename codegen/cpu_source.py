"""C++ sources of the CPU kernels, ``native/``: for torch and for onnxruntime in one library.

They know no format: what a code means is a table of numbers that a host gives, and codes lie as they do on disk. One
source is compiled once for each instruction set.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.resources import files

UNITS = ("exact", "rounded", "encode", "library", "ort")
"""What is compiled by itself; products are the first two."""


@cache
def sources() -> dict[str, str]:
    """Name -> text of every file that a compiler needs, headers too."""
    native = files("fxquant.codegen") / "native"
    found = sorted(file.name for file in native.iterdir() if file.name.endswith((".h", ".cpp")))
    return {name: (native / name).read_text(encoding="utf-8") for name in found}


@cache
def origin() -> str:
    """All that the library is made from, as text: the key of what was compiled."""
    return "\0".join([version("fxquant"), *(f"{name}\0{text}" for name, text in sources().items())])
