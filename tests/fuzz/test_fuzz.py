"""A short fuzz of every loader, always the same; ``make fuzz`` runs each for ten minutes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz_engine import Lines, Target, fuzz
from fuzz_mutate import mutated
from fuzz_targets import TARGETS
from run import TARGETS as NAMES
from run import Total, keep, table

from fxquant.errors import FormatError

SEED = 20240607
CASES = dict.fromkeys(TARGETS, 100) | {"names": 5, "folder": 40, "packed": 15, "gguf": 25}
"""Fewer of those that take long."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_loader_takes_a_case_or_refuses_it(name: str, tmp_path: Path) -> None:
    tally = fuzz(TARGETS[name], tmp_path / "work", cases=CASES[name], seed=SEED, guided=False)
    assert not tally.findings, "\n\n".join(finding.text for finding in tally.findings.values())
    assert tally.taken < tally.cases or name == "names"  # some are damaged


def test_the_script_knows_every_target() -> None:
    assert sorted(NAMES) == sorted(TARGETS)


def seeds(folder: Path) -> list[dict[str, bytes]]:
    return [{"a.txt": b"0123456789"}]


def hurt(folder: Path) -> None:
    """Takes its seed, and has every fault that is looked for."""
    content = (folder / "a.txt").read_bytes()
    if len(content) < 10:
        raise FormatError("short")
    if len(content) > 10:
        raise FormatError("")
    if content[:1] != b"0":
        raise KeyError("0")
    if content[-1:] != b"9":
        while True:
            pass
    if content != b"0123456789":
        assert len(bytearray(b"x") * (1200 << 20)) > 0


def test_what_a_loader_may_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_engine.SECONDS", 0.2)
    tally = fuzz(Target("hurt", seeds, hurt), tmp_path, cases=400, seed=1)
    assert {key.partition(" at ")[0] for key in tally.findings} == {
        "hurt KeyError", "hurt TooSlowError", "hurt no message", "hurt memory",
    }  # fmt: skip
    assert tally.memory > 1 << 30
    assert tally.taken < tally.cases == 400


def test_the_same_seed_makes_the_same_cases() -> None:
    start = [{"a.json": b'{"x": [1, 2, {"y": null}]}', "b.txt": b"one two"}]
    one, two, other = random.Random(1), random.Random(1), random.Random(2)
    cases = [mutated(one, start[0], start) for _ in range(50)]
    assert cases == [mutated(two, start[0], start) for _ in range(50)]
    assert cases != [mutated(other, start[0], start) for _ in range(50)]


def test_lines_of_the_package_are_counted_once() -> None:
    from fxquant.dims import names

    lines = Lines()
    with lines:
        names("a")
    first = lines.count
    assert first > 5
    with lines:
        names("a")
    assert lines.count == first
    with lines:
        names("a + 1")
    assert lines.count > first


def test_a_finding_is_kept_with_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("run.CRASHES", tmp_path)
    total = Total("graph", cases=1234, seconds=60.0)
    keep(total, "graph KeyError at a.py:1", "Traceback", {"deep/graph.json": b"{}"})
    keep(total, "graph KeyError at a.py:1", "again", {})
    (place,) = tmp_path.iterdir()
    assert (place / "deep" / "graph.json").read_bytes() == b"{}"
    assert "Traceback" in (place / "FINDING.txt").read_text()
    assert "| graph | 1,234 |" in table([total])
    assert "found: graph KeyError" in table([total])
