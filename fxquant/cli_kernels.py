"""The command that writes kernels and shows what they will do on GPUs. ``cli`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.cli_options import Json, note, print_json

if TYPE_CHECKING:
    from fxquant.kernels import Row, Skipped

_COLUMNS = (
    "kernel", "kind", "registers", "spills", "shared", "tensor core", "128-bit", "logic", "issued", "occupancy",
)  # fmt: skip


def kernels(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="A compiled model's folder, or one to write to; without it, no files."),
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(metavar="SM", help="An architecture, such as sm_90, the default; give several.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A weight format, such as e3m2; give several. Default: the model's, or all."),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Show the kernels of this CPU instead, for torch and onnxruntime.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the Triton kernels, compile them ahead of time, and show what each does a weight. No GPU is needed.

    Given a compiled model, writes kernels for its formats to OUT/kernels; given a new or empty folder, or one of
    earlier kernels, writes them there. The files are for reading and shipping: fxquant itself never runs them.

    logic and issued are instructions a weight in the K loop; 128-bit counts the loads of 16 bytes a thread among all
    loads; under a GPU's name stand what bounds the kernel at M <= 16 and the shares of ALU and issue slots it needs.

    Examples:

        fxquant kernels

        fxquant kernels out --arch sm_80 --arch sm_90 --format e3m2

        fxquant kernels smollm2-fp6 --json

        fxquant kernels --cpu
    """
    if cpu:
        _print_cpu(as_json)
        return
    from fxquant import kernels as making
    from fxquant import store
    from fxquant.codegen.variants import parse_arch
    from fxquant.show.console import progress_bars

    archs = list(dict.fromkeys(parse_arch(text) for text in arch or ["sm_90"]))
    catalogue = making.catalogue()
    names = making.check_formats(format, catalogue.formats) if format else list(catalogue.formats)
    place = out
    if out is not None and making.is_model(out):
        place = out / store.KERNELS
        if not format:
            names, others = making.formats_of(out, catalogue.formats)
            if others:
                note(f"no kernel reads {', '.join(others)}: those layers are decoded to float and multiplied there")
    variants = catalogue.variants(names)
    files = making.sources(variants, catalogue)
    if place is not None:
        making.write(place, files)
    pairs, skipped = making.split(variants, archs)
    with progress_bars() as progress:
        rows = list(making.measure(pairs, files, progress=progress))
    for line in _reasons(skipped):
        note(line)
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    for number in archs:
        _print(number, [row for row in rows if row.arch == number])
    if place is not None:
        typer.echo(f"\nwrote {', '.join(files)} to {place}")


def _print_cpu(as_json: bool) -> None:
    """What the kernels of this machine are."""
    from fxquant.codegen.ort_library import report

    found = report()
    if as_json:
        print_json(found)
        return
    for name, text in found.items():
        typer.echo(f"{name:<20}{text}")


def _reasons(skipped: list[Skipped]) -> list[str]:
    """One line for each architecture and reason."""
    found: dict[tuple[int, str], list[str]] = {}
    for one in skipped:
        found.setdefault((one.arch, one.needs), []).append(one.name)
    return [
        f"not for sm_{number}: {', '.join(names)}{f' ({why})' if why else ''}" for (number, why), names in found.items()
    ]


def _print(number: int, rows: list[Row]) -> None:
    """The table of one architecture."""
    from fxquant.codegen import roofline
    from fxquant.show.console import print_table
    from fxquant.show.units import size

    gpus = [gpu.name for gpu in roofline.gpus(number)]
    cells = []
    for row in rows:
        f = row.figures
        verdicts = {q.gpu: f"{q.bound} {q.alu:.0%} {q.issue:.0%}" for q in row.verdicts}
        mark = "" if f.loop else "*"
        cells.append((
            row.variant.name, row.variant.kind, str(f.registers), str(f.spills), size(f.shared), f.mma or "",
            f"{f.copies128}/{f.copies}", *(("" if x is None else f"{x:.2f}{mark}") for x in (f.logic, f.issued)),
            f"{f.occupancy:.0%} ({f.blocks})" if f.blocks else "does not fit", *(verdicts.get(gpu, "") for gpu in gpus),
        ))  # fmt: skip
    typer.echo(f"\nsm_{number}")
    print_table((*_COLUMNS, *gpus), cells, right=_COLUMNS[2:5] + _COLUMNS[6:10])
    if not all(row.figures.loop or row.figures.issued is None for row in rows):
        typer.echo("* counts of the whole kernel: its K loop is split between warps, or there is none")
