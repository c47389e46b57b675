"""Every row of architecture_rows.py compiles, saves, loads, exports and matches, or says why it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import architectures
from architecture_rows import ROWS, Architecture

FAST = ("llama", "bert", "vit", "resnet")


def rows(*, fast: bool) -> list[object]:
    return [pytest.param(a, id=a.name) for a in ROWS if not fast or a.name in FAST]


def holds(row: Architecture, recipe: str, folder: Path) -> None:
    found = architectures.measure(row, recipe, folder / recipe)
    if row.declines:
        assert re.search(row.declines, found.reason, re.DOTALL), found
        assert "What to do:" in found.reason
        return
    assert found.reason == ""
    assert found.torch_error <= architectures.TORCH_BOUND
    assert found.loaded_equal
    assert found.onnx_ok, found
    assert found.quantized > 0
    assert found.change > architectures.VISIBLE


@pytest.mark.parametrize("row", rows(fast=True))
def test_usual_architectures(row: Architecture, tmp_path: Path) -> None:
    holds(row, architectures.FIRST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(fast=False))
def test_every_architecture(row: Architecture, tmp_path: Path) -> None:
    holds(row, architectures.FIRST, tmp_path)
    holds(row, architectures.second_recipe(row), tmp_path)


def test_at_least_nine_of_ten_match() -> None:
    assert len(ROWS) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(not row.declines for row in ROWS) * 10 >= len(ROWS) * 9


def test_the_page_is_of_these_rows() -> None:
    """docs/architectures.md has a line for every row, and says no to those that decline."""
    lines = {cells[1].strip(): cells for line in architectures.PAGE.read_text().splitlines()
             if len(cells := line.split("|")) > 5}  # fmt: skip
    for row in ROWS:
        name = row.name + (" ([why](#reasons))" if row.declines else "")
        assert name in lines, f"{name}: run python tests/architectures.py --write"
        assert f"`{row.model}`" in lines[name][2]
