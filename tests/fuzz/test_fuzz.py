"""A short fuzz of every loader, always the same; ``make fuzz`` runs each for ten minutes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from fuzz_engine import Finding, Lines, Tally, Target, attempt, fuzz
from fuzz_mutate import Case, mutated
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run import TARGETS as NAMES
from run import Total, keep, table

from fxquant.errors import FormatError

CASES = dict.fromkeys(TARGETS, 100) | {"names": 5, "folder": 40, "packed": 15, "gguf": 25}
"""Fewer of those that take long."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_loader_takes_a_case_or_refuses_it(name: str, tmp_path: Path) -> None:
    """Hypothesis draws the mutations; of a case that is a finding it looks for a simpler one that is one too."""
    target, tally = TARGETS[name], Tally()
    made = target.seeds(tmp_path / "seeds")
    for case in made:
        assert attempt(target, case, tmp_path / "case", tally, seconds=120) is None

    @settings(
        max_examples=CASES[name],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def try_one(rng: random.Random) -> None:
        case = mutated(rng, rng.choice(made), made, target.chosen)
        found = attempt(target, case, tmp_path / "case", tally)
        assert not isinstance(found, Finding), f"{found.text}\n{differing(made, case)}"

    try_one()
    assert tally.taken < tally.cases or name == "names"  # some are damaged


def differing(made: list[Case], case: Case) -> str:
    """The files of a case that no seed has."""
    return "\n".join(f"{k}: {v[:2000]!r}" for k, v in case.items() if all(other.get(k) != v for other in made))


def test_the_loop_goes_on_from_cases_that_reach_new_lines(tmp_path: Path) -> None:
    tally = fuzz(TARGETS["grammar"], tmp_path / "work", cases=150, seed=1)
    assert not tally.findings
    assert tally.cases == 150
    assert tally.corpus > len(TARGETS["grammar"].seeds(tmp_path))
    assert tally.lines > 100


def test_the_script_knows_every_target() -> None:
    assert sorted(NAMES) == sorted(TARGETS)


def hurt(folder: Path) -> None:
    """Has every fault that is looked for."""
    fault = (folder / "a.txt").read_text()
    if fault == "refuse":
        raise FormatError("no")
    if fault == "say nothing":
        raise FormatError("")
    if fault == "break":
        raise KeyError("0")
    if fault == "leave":
        sys.exit(3)
    while fault == "hang":
        pass
    if fault == "swell":
        assert len(bytearray(b"x") * (64 << 20))


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        ("say nothing", "hurt no message"), ("break", "hurt KeyError at test_fuzz.py:"),
        ("leave", "hurt SystemExit at"), ("hang", "hurt TooSlowError at"), ("swell", "hurt memory"),
    ],
)  # fmt: skip
def test_what_a_loader_may_not_do_is_found(
    fault: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz_engine.MEMORY", 32 << 20)
    found = attempt(
        Target("hurt", lambda folder: [], hurt), {"a.txt": fault.encode()}, tmp_path, tally := Tally(), seconds=0.2
    )
    assert isinstance(found, Finding)
    assert found.key.startswith(key)
    assert tally.memory > 60 << 20 or fault != "swell"


def test_what_a_loader_may_do_is_no_finding(tmp_path: Path) -> None:
    target, tally = Target("hurt", lambda folder: [], hurt), Tally()
    assert isinstance(attempt(target, {"a.txt": b"refuse"}, tmp_path, tally), FormatError)
    assert attempt(target, {"a.txt": b"take"}, tmp_path, tally) is None
    assert (tally.cases, tally.taken) == (2, 1)


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
