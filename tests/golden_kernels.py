"""The golden figures of every kernel, ``golden/kernels.json``: what a compile is compared with.

``python tests/golden_kernels.py`` compiles the catalogue and prints what differs, ``--write`` writes the file anew.
Machine code depends on triton, so the file names its version; with another one only absolute bars hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fxquant import kernels

FILE = Path(__file__).parent / "golden" / "kernels.json"
ARCHS = (80, 90, 100, 120)
TOLERANCE = 0.03
EXACT = ("kind", "spills", "stack_bytes", "mma", "copies", "copies_128", "shared_stores", "loop")
NEAR = ("registers", "shared_bytes", "logic_per_weight", "integer_per_weight", "issued_per_weight")

Row = dict[str, Any]


def measured(archs: Sequence[int] = ARCHS, formats: Sequence[str] | None = None, *names: str) -> list[Row]:
    """The rows of the catalogue's variants, or of those with ``names``."""
    catalogue = kernels.catalogue()
    variants = [v for v in catalogue.variants(formats or catalogue.formats) if not names or v.name in names]
    pairs, _ = kernels.split(variants, archs)
    return [row.to_dict() for row in kernels.measure(pairs, kernels.sources(variants, catalogue), progress=_told)]


def _told(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total} ", end="", file=sys.stderr)


def read() -> tuple[str, dict[tuple[str, str], Row]]:
    """The version of triton, and the rows by name and architecture."""
    golden = json.loads(FILE.read_text())
    return golden["triton"], {(row["name"], row["arch"]): row for row in golden["rows"]}


def differences(golden: dict[tuple[str, str], Row], rows: Iterable[Row]) -> list[str]:
    """Where rows are not as in the file; a row that it does not have is one too."""
    found = []
    for row in rows:
        name = f"{row['name']} {row['arch']}"
        if (want := golden.get((row["name"], row["arch"]))) is None:
            found.append(f"{name} is new")
            continue
        for key in (*EXACT, *NEAR):
            a, b = want[key], row[key]
            if a != b and (key in EXACT or a is None or b is None or abs(b - a) > TOLERANCE * a):
                found.append(f"{name}: {key} was {a}, is {b}")
    return found


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    write = parser.parse_args().write
    rows = measured()
    if write:
        keys = ("name", "arch", *EXACT, *NEAR)
        lines = ",\n".join(json.dumps({k: row[k] for k in keys}) for row in rows)
        FILE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
        print(f"wrote {FILE}: {len(rows)} rows")
        return 0
    version, golden = read()
    found = differences(golden, rows)
    missing = sorted(set(golden) - {(row["name"], row["arch"]) for row in rows})
    found += [f"{name} {arch} is gone" for name, arch in missing]
    print(
        "\n".join([f"golden: triton {version}; installed: {triton.__version__}", *found, f"{len(found)} differences"])
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
