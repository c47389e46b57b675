"""Kernels as files and as figures: write the emitted ones to a folder, compile them for GPUs that need not be here.

catalogue.variants(formats) --> files, one a family   --write-->   OUT/*.py
                            \\-> (variant, sm_90), ...  --measure-->  Row: registers, instructions a weight, verdicts
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fxquant import outputs, store
from fxquant.codegen import roofline
from fxquant.codegen.aot import compile_variant
from fxquant.codegen.sass import Statistics, statistics
from fxquant.codegen.variants import Variant, arch
from fxquant.errors import FormatError, LoadError, SaveError, near
from fxquant.formats import parse_format
from fxquant.program import Progress, quiet
from fxquant.scheme import parse_spec
from fxquant.show.summary import summarize


class Catalogue(Protocol):
    """Where kernels come from: the formats it has kernels for, variants of some, and the source of a family's file."""

    @property
    def formats(self) -> Sequence[str]: ...
    def variants(self, formats: Sequence[str]) -> Sequence[Variant]: ...
    def emit(self, family: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One variant on one architecture: its figures, and the verdict for each GPU that has the architecture.

    There are verdicts for kernels that serve few rows of x, for which reading weights is what there is to do, and that
    fit on an SM.
    """

    variant: Variant
    arch: int
    figures: Statistics
    verdicts: tuple[roofline.Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Counts per weight are null for a kernel that reads no weights."""
        v, f = self.variant, self.figures
        return {
            "name": v.name, "kind": v.kind, "arch": f"sm_{self.arch}", "file": f"{v.family}.py",
            "registers": f.registers, "spills": f.spills, "stack_bytes": f.stack, "shared_bytes": f.shared,
            "mma": f.mma, "mma_in_loop": f.mmas, "copies": f.copies, "copies_128": f.copies128, "bulk_copies": f.tma,
            "shared_stores": f.sts, "barriers": f.bars, "loop": f.loop, "instructions": f.instructions,
            "logic_per_weight": _rounded(f.logic), "integer_per_weight": _rounded(f.integer),
            "half_mul_per_weight": _rounded(f.half), "i2f_per_weight": _rounded(f.i2f),
            "issued_per_weight": _rounded(f.issued), "bits_per_weight": v.bits, "warps": v.warps, "stages": v.stages,
            "blocks_per_sm": f.blocks, "occupancy": round(f.occupancy, 4),
            "verdicts": {q.gpu: {k: _rounded(x) for k, x in asdict(q).items() if k != "gpu"} for q in self.verdicts},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Skipped:
    """A variant that is not meant for an architecture, and what it needs."""

    name: str
    arch: int
    needs: str


def catalogue() -> Catalogue:
    """The kernels of this version of fxquant."""
    found: Any = importlib.import_module("fxquant.codegen.triton_kernels")
    catalogue: Catalogue = found
    return catalogue


def formats_of(folder: Path, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """The formats of the linear layers of a compiled model: those in ``known``, and the others."""
    program, _ = store.load(folder)
    layers = (q for q in summarize(program).layers if q.spec is not None and q.type == "linear")
    found = sorted({str(parse_spec(q.spec).format) for q in layers if q.spec})
    if not found:
        raise LoadError(f"{folder} has no quantized linear layer, so no kernels; name formats with --format")
    return [f for f in found if f in known], [f for f in found if f not in known]


def check_formats(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of formats, as users write them, in the form of ``known``. Raises FormatError."""
    found = [str(parse_format(name)) for name in names]
    for name in found:
        if name not in known:
            raise FormatError(f"there is no kernel for {name!r}{near(name, known)}; expected one of {', '.join(known)}")
    return list(dict.fromkeys(found))


def is_model(folder: Path) -> bool:
    return (folder / store.GRAPH).is_file()


# --- files ------------------------------------------------------------------------------------------------------------
def sources(variants: Sequence[Variant], kernels: Catalogue) -> dict[str, str]:
    """The file of each family, by its name."""
    families = dict.fromkeys(v.family for v in variants)
    return {
        f"{family}.py": f"{store.KERNEL_MARK}; edits are lost when it runs again.\n{kernels.emit(family)}"
        for family in families
    }


def write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write the files to ``folder``, which may be new, empty, or hold kernels that were written before.

    Raises SaveError, before anything is written, where it holds anything else.
    """
    check_folder(folder)
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            outputs.write(folder / name, text.encode())
    except OSError as error:
        raise SaveError(f"cannot write kernels to {folder}: {error}; choose another folder") from error
    return [folder / name for name in files]


def check_folder(folder: Path) -> None:
    """Raise SaveError unless ``write`` may write there."""
    if not folder.parent.is_dir():
        raise SaveError(f"cannot write {folder}: the folder {folder.parent} does not exist; create it first")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise SaveError(f"{folder} is not a folder; choose another place for the kernels")
    if others := store.not_kernels(folder.resolve()):
        raise SaveError(f"{folder} holds {others[0]!r}, which fxquant kernels did not write; choose another folder")


# --- figures ----------------------------------------------------------------------------------------------------------
def split(variants: Sequence[Variant], archs: Sequence[int]) -> tuple[list[tuple[Variant, int]], list[Skipped]]:
    """What to compile, by architecture and then as the catalogue has it; and what is not meant for one.

    Several variants may have one name, each for other architectures.
    """
    pairs = [(v, arch(number).number) for number in archs for v in variants]
    there = {(v.name, number) for v, number in pairs if number in v.archs}
    skipped = {(v.name, number): v.needs for v, number in pairs if (v.name, number) not in there}
    return (
        [(v, number) for v, number in pairs if number in v.archs],
        [Skipped(name, number, needs) for (name, number), needs in skipped.items()],
    )


def measure(
    pairs: Sequence[tuple[Variant, int]], files: dict[str, str], *, progress: Progress = quiet
) -> Iterator[Row]:
    """Compile each variant for its architecture and take it apart: 1 to 5 seconds for each.

    The sources are compiled from a folder of their own, never from one that others can write to. Raises KernelError.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        for done, (variant, number) in enumerate(pairs):
            progress("compile", done, len(pairs))
            yield row(variant, number, folder)
        progress("compile", len(pairs), len(pairs))


def row(variant: Variant, number: int, folder: Path) -> Row:
    """One row, from the emitted file in ``folder``."""
    figures = statistics(compile_variant(variant, folder / f"{variant.family}.py", number))
    verdicts: tuple[roofline.Verdict, ...] = ()
    if variant.decodes and figures.blocks and figures.integer is not None and figures.issued is not None:
        verdicts = tuple(
            roofline.verdict(gpu, bits=variant.bits, integer=figures.integer, issued=figures.issued)
            for gpu in roofline.gpus(number)
        )
    return Row(variant, number, figures, verdicts)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
