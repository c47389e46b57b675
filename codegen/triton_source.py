"""Triton sources: a module of kernels for a format, written out from a decoding and a template.

A family is a template of ``codegen/templates``; a format is a ``Decoding``, whose bit expressions are printed twice
into the module, as Triton and as PTX: the kernels take either (``USE_ASM``). What is emitted imports triton and nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2

from fxquant.bitops import Expr, widen
from fxquant.codegen import bit_printers
from fxquant.decodings import Decoding
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat


@dataclass(frozen=True)
class Source:
    """A module: ``name`` is the stem of its file, ``text`` what stands in it."""

    name: str
    text: str


@cache
def gemm(decoding: Decoding) -> Source:
    """Kernels ``gemm``, ``reduce`` and ``dense`` for weights of a format, times activations of float16 or FP8."""
    return _half_gemm(decoding) if decoding.target is None else _byte_gemm(decoding, decoding.target)


def _half_gemm(decoding: Decoding) -> Source:
    """Activations of 16 bits: registers of two float16, each of them two operands of the assembly."""
    text = _render(
        decoding,
        x="float16",
        word="int32",
        width="2 * RUN",
        byte="",
        **_assembly(decoding.outputs, decoding, halves=True),
    )
    return Source(f"weight_only_{decoding.format}", text)


def _byte_gemm(decoding: Decoding, target: FloatFormat) -> Source:
    """Activations of FP8: the assembly decodes four bytes at a time, each for itself."""
    wide = [widen(output) for output in decoding.outputs]
    text = _render(
        decoding, x="E4M3 or E5M2", word="uint8", width="RUN", byte=str(target), byte_type=_BYTE_TYPES[str(target)],
        **_assembly(wide, decoding, halves=False),
    )  # fmt: skip
    return Source(f"fp8_{decoding.format}_{target}", text)


def _assembly(outputs: Sequence[Expr], decoding: Decoding, *, halves: bool) -> dict[str, str]:
    """The PTX of ``outputs`` and the constraints of its operands: results first, with ``halves`` two of 16 bits."""
    results = len(outputs) * (2 if halves else 1)
    names = {word.name: f"${results + i}" for i, word in enumerate(decoding.words)}
    return {
        "constraints": ",".join(["=h" if halves else "=r"] * results + ["r"] * len(names)),
        "asm": bit_printers.ptx(bit_printers.steps_of(outputs, names), halves=halves),
    }


_BYTE_TYPES = {"e4m3": "float8e4nv", "e5m2": "float8e5"}
"""What Triton calls the byte floats that tensor cores multiply."""


@cache
def rows() -> Source:
    """Kernels over rows of activations."""
    return Source("rows", _environment().get_template("rows.py.j2").render(version=version("fxquant")))


def _render(decoding: Decoding, **values: Any) -> str:
    body = bit_printers.steps_of(decoding.outputs)
    return _filled(
        "gemm.py.j2",
        title=f"Weights of {decoding.format} times activations of {values['x']}.",
        log2=decoding.log2,
        slices=decoding.slices,
        words=[word.name for word in decoding.words],
        picture=picture(decoding),
        body=bit_printers.triton(body),
        results=body.results,
        **values,
    )


@dataclass(frozen=True, slots=True)
class Scaled:
    """Operands that tensor cores multiply with their scales: element formats, and ``size`` elements to a scale.

    A scale is E8M0 for 32 elements (OCP MX), E4M3 for 16 (NVFP4, both operands E2M1).
    """

    x: str
    w: str
    size: int = 32

    @property
    def name(self) -> str:
        return f"{'mx' if self.size == 32 else 'nv'}_{self.w}_{self.x}"

    @property
    def bits(self) -> float:
        """Bits of a weight, its share of the scale included."""
        return parse_format(self.w).bits + 8 / self.size


SCALED = (Scaled("e2m1", "e2m1"), Scaled("e4m3", "e2m1"), Scaled("e4m3", "e4m3"), Scaled("e2m1", "e2m1", size=16))


@cache
def scaled(operands: Scaled) -> Source:
    """Kernels ``gemm`` and ``reduce`` for MX or NVFP4 operands on tensor cores that take them."""
    x, w = parse_format(operands.x), parse_format(operands.w)
    exponent = "2^(scale - 127)" if operands.size == 32 else "scale"
    text = _filled(
        "mx.py.j2",
        title=f"Weights of {w} times activations of {x}, each with a scale for {operands.size} of a row.",
        exponent=exponent,
        size=operands.size,
        scale_type="uint8" if operands.size == 32 else "float8e4nv",
        x_format=operands.x,
        w_format=operands.w,
        x_codes=8 // x.bits,
        w_codes=8 // w.bits,
    )
    return Source(operands.name, text)


def _filled(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(version=version("fxquant"), **values)


@cache
def _environment() -> jinja2.Environment:
    def load(name: str) -> str:
        return (files("fxquant.codegen") / "templates" / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load), autoescape=False, keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def picture(decoding: Decoding) -> str:
    """How codes lie in words, line by line."""
    layout, bits = decoding.layout, decoding.words[0].bits
    places = ", ".join(str(place) for place in layout.places)
    shown = [
        f"A unit is {len(decoding.words)} words of {bits} bits and holds {layout.unit_slots} codes. They come out in",
        f"lanes of {bits // len(layout.lanes)} bits, the bits of a code, lowest first, at {places}:",
        "",
    ]
    for g, (expr, slots) in enumerate(zip(layout.decode, _slots(decoding), strict=True)):
        shown.append(f"    T{g} = {str(expr).removeprefix('(').removesuffix(')')}")
        shown.append(f"         {slots}")
    return "\n".join(shown)


def _slots(decoding: Decoding) -> list[str]:
    """For each decoded word the slices and columns of its lanes."""
    per = decoding.slices // len(decoding.layout.decode)
    if decoding.target is not None:
        return [f"slice {g}, column r" for g in range(decoding.slices)]
    return [
        "slice " + " and ".join(str(per * g + q) for q in range(per)) + ", columns 2r and 2r + 1"
        for g in range(len(decoding.layout.decode))
    ]
