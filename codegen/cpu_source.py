"""C++ sources of the CPU kernels: the decoding of every format printed from its layout, around ``native/gemm.h``.

One source is compiled once for each instruction set; the compiler's vector types stand for its registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files

import jinja2

from fxquant.codegen import bit_printers
from fxquant.decodings import KERNEL_FORMATS, Decoding, decoding
from fxquant.formats import Format, parse_format

RUN = 8
"""Words side by side: a vector of 256 bits, two of 128, or half of one of 512."""
FORMATS: tuple[Format, ...] = (
    *KERNEL_FORMATS,
    *(
        parse_format(name)
        for name in ("int2", "int3", "int5", "int6", "int7", "uint2", "uint3", "uint5", "uint6", "uint7")
    ),
)
"""Formats of the library."""
NUMBERS = {format: number for number, format in enumerate(FORMATS)}
"""What the library calls a format: its place in ``FORMATS``."""


@dataclass(frozen=True)
class Printed:
    """A format as the template takes it."""

    name: str
    log2: int
    words: int
    slices: int
    lines: list[str]


def cpu_decoding(format: Format) -> Decoding:
    """The decoding that the library has for a format. Raises FormatError where there is none."""
    return decoding(format, run=RUN)


@cache
def library_source(*, threads: bool) -> str:
    """The text of the library; ``threads``: with OpenMP."""
    text = (files("fxquant.codegen") / "native" / "library.cpp.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    formats = [_printed(cpu_decoding(format)) for format in FORMATS]
    return template.from_string(text).render(version=version("fxquant"), threads=threads, formats=formats)


@cache
def header() -> str:
    """``gemm.h``."""
    return (files("fxquant.codegen") / "native" / "gemm.h").read_text(encoding="utf-8")


@cache
def origin() -> str:
    """All that ``library_source`` is made from, as text: cheaper than the library itself, and as good a key."""
    own = [files("fxquant") / name for name in ("bitops.py", "tilings.py", "decodings.py", "layouts.py", "grids.py")]
    codegen = files("fxquant.codegen")
    made = [codegen / name for name in ("bit_printers.py", "cpu_source.py", "native/library.cpp.j2", "native/gemm.h")]
    texts = [file.read_text(encoding="utf-8") for file in (*own, *made)]
    return "\0".join([version("fxquant"), *texts, *onnxruntime_sources().values()])


@cache
def onnxruntime_sources() -> dict[str, str]:
    """What the operators of onnxruntime are made of, by file name."""
    native = files("fxquant.codegen") / "native"
    names = ("packed.h", "activations.h", "formats.h", "ort_abi.h", "ort_node.h", "ort.cpp", "portable.cpp")
    return {name: (native / name).read_text(encoding="utf-8") for name in names}


def _printed(of: Decoding) -> Printed:
    steps = bit_printers.steps_of(of.outputs, {word.name: f"q[{i}]" for i, word in enumerate(of.words)})
    lines = [
        *bit_printers.cpp(steps, vector="words"),
        *(f"out[{i}] = {name};" for i, name in enumerate(steps.results)),
    ]
    return Printed(str(of.format), of.log2, len(of.words), of.slices, lines)
