"""Jobs that are stopped go on where they were, and give the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from tiny_language import save_tiny
from torch import Tensor, nn

import fxquant
from fxquant import jobs, results, store, tasks
from fxquant.passes import zq_global
from fxquant.solvers.distill import distill

METHODS: dict[str, list[dict[str, Any]]] = {
    "gptq": [{"gptq": {}}],
    "gptq apart": [{"gptq": {"sequential": False}}],
    "search": [{"search_formats": {"rounds": 1, "steps": 10}}],
    "search W4A4": [{"search_formats": {"rounds": 1, "steps": 10}}],
    "search and lorc": [{"search_formats": {"rounds": 1, "steps": 10}}, {"gptq": {}}, {"lorc": {"rank": 4}}],
    "lorc in turn": [{"lorc": {"rank": 4, "rounds": 2}}],
    "zq_local": [{"zq_local": {"iterations": 8}}],
    "gwq": [{"gwq": {"samples": 2}}],
    "pb_llm": [{"pb_llm": {}}],
    "zq_global": [{"zq_global": {"iterations": 4}}],
    "zq_global twice": [{"zq_global": {"iterations": 2}}] * 2,
}


class Net(nn.Module):
    """Three linears, the first two on one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) * self.b(x))


def data() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 24, generator=generator),) for _ in range(4)]


class StoppedError(Exception):
    """Something that stops a job."""


@pytest.mark.parametrize("method", METHODS)
def test_a_job_that_was_stopped_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "rules": [
            {"match": "*", "weight": "lut(-1,1)/channel" if method == "pb_llm" else "e2m1/channel"}
            | ({"activation": "e2m1/tensor"} if "W4A4" in method else {})
        ],
        "passes": METHODS[method],
    }
    model, solved = Net().eval(), list[str]()
    perform, last = tasks.perform, [10**6]

    def counted(task: tasks.Task) -> Any:
        if task.name.startswith("insert_qdq/"):
            return perform(task)
        if len(solved) == last[0]:
            raise StoppedError
        solved.append(task.name)
        return perform(task)

    def counted_training(*args: Any, **options: Any) -> Any:
        if len(solved) == last[0]:
            raise StoppedError
        solved.append(f"block {len(solved)}")
        return distill(*args, **options)

    def compiled(job: Path | None, name: str) -> list[bytes]:
        made = fxquant.compile(model, data()[0], config, calibration=data(), job=job)
        made.save(tmp_path / name)
        return [(tmp_path / name / file).read_bytes() for file in ("graph.json", "model.safetensors", "manifest.json")]

    monkeypatch.setattr(tasks, "perform", counted)
    monkeypatch.setattr(zq_global, "distill", counted_training)
    want = compiled(None, "plain")[1]
    every = len(solved)
    assert every >= 2
    solved.clear()
    for stop in range(1, every) if method == "gptq" else (every // 2,):
        last[0] = stop
        with pytest.raises(StoppedError):
            compiled(tmp_path / "job", "stopped")
    last[0] = every
    assert compiled(tmp_path / "job", "resumed")[1] == want
    assert len(solved) == len(set(solved)) == every
    if method == "gptq":
        assert compiled(tmp_path / "job", "again")[1] == want  # nothing is left to solve
        assert len(solved) == every


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param("replace:3,exchange:1", id="in a task's file and in the save", marks=pytest.mark.slow),
        pytest.param("all", id="at every step", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_a_step_of_writing_loses_nothing(moments: str) -> None:
    command = [sys.executable, Path(__file__).parent / "kills.py", "--moments", moments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all bytes the same" in result.stdout


def test_every_row_of_the_table_says_its_types() -> None:
    """What a file claims to be one of them is checked field by field."""
    for row in jobs.RESULTS.values():
        assert all(hint is not Any for hint in results.declared(row).values()), row


# --- the command line -------------------------------------------------------------------------------------------------
CONFIG = """
rules: [{match: "*.q_proj", weight: e2m1/channel}, {match: "*.down_proj", weight: e2m1/channel}]
passes: [{gptq: {}}]
"""
TEXT = "The river had been rising since the morning, and by noon the lower fields were under water.\n" * 40


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """A command that has two tasks to do."""
    pytest.importorskip("transformers")
    save_tiny(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text(TEXT)
    out = ["-o", str(tmp_path / "out")]
    return ["compile", str(tmp_path / "model"), "-c", str(tmp_path / "config.yaml"), "--calibration",
            str(tmp_path / "text.txt"), *out]  # fmt: skip


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were solved; where it ends with an exception or a signal, that comes before the next one."""
    done: list[Any] = []
    perform = tasks.perform

    def told(task: tasks.Task) -> Any:
        if task.name.startswith("insert_qdq/"):
            return perform(task)
        if done and isinstance(done[-1], BaseException):
            raise done.pop()
        if done and isinstance(done[-1], int):
            os.kill(os.getpid(), done.pop())
        done.append(task.name)
        if len(done) == 1 and STOPS:
            done.append(STOPS[0])
        return perform(task)

    monkeypatch.setattr(tasks, "perform", told)
    return done


STOPS: list[Any] = []


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, OSError(28, "No space left")], ids=["int", "term", "error"])
def stop(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What comes after the first task."""
    STOPS.append(request.param)
    yield request.param
    STOPS.clear()


def test_a_command_that_is_stopped_says_how_it_goes_on(
    stop: Any, typed: list[str], solved: list[str], tmp_path: Path
) -> None:
    result = run(*typed, code=1 if isinstance(stop, OSError) else 130)
    job = tmp_path / "out.job"
    assert f"1 finished task is kept in {job}; continue with" in result.stderr
    again = result.stderr.split("continue with\n")[1].splitlines()[0].split()
    assert again == ["fxquant", *typed, "--resume"]
    assert not (tmp_path / "out").exists()
    STOPS.clear()
    refused = run(*typed, code=1).stderr
    assert f"{job} holds an unfinished job" in refused
    assert "--resume" in refused
    assert "--restart" in refused
    first = list(solved)
    run(*again[1:])
    assert len(solved) == 2
    assert solved[:1] == first
    assert not job.exists()
    told = run(*again[1:]).stdout  # a script may try until it is done
    assert "saved to" in told
    assert len(solved) == 2
    assert store.verify(tmp_path / "out")


def test_a_changed_command_is_not_mixed(typed: list[str], solved: list[str], tmp_path: Path) -> None:
    STOPS.append(KeyboardInterrupt())
    run(*typed, code=130)
    STOPS.clear()
    (tmp_path / "config.yaml").write_text(CONFIG.replace("{gptq: {}}", "{gptq: {act_order: false}}"))
    told = run(*typed, "--resume", code=1).stderr
    assert "the unfinished job in" in told
    assert "config.passes[0].gptq.act_order: nothing then, false now" in told
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text(TEXT.replace("river", "brook"))
    told = run(*typed, "--resume", code=1).stderr
    assert "calibration.sha256" in told
    (tmp_path / "text.txt").write_text(TEXT)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert "modified.model.safetensors" in run(*typed, "--resume", code=1).stderr
    run(*typed, "--restart")
    assert len(solved) == 3
    assert not (tmp_path / "out.job").exists()


def test_another_output_is_not_taken_for_the_jobs(typed: list[str], tmp_path: Path) -> None:
    run(*typed)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("e2m1", "e3m2"))
    assert "is not what this job makes" in run(*typed, "--resume", code=1).stderr
    assert "exists already" in run(*typed, code=1).stderr
    assert "--restart" in run(*typed, "--resume", "--restart", code=2).stderr


def test_verify_reads_the_weights(typed: list[str], tmp_path: Path) -> None:
    run(*typed)
    assert "every checksum is right" in run("inspect", tmp_path / "out", "--verify").stdout
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told = run("inspect", tmp_path / "out", "--verify", code=1).stderr
    assert "model.safetensors is not the file that was saved" in told


@pytest.mark.slow
def test_workers_and_jobs_go_together(tmp_path: Path) -> None:
    """What two processes solve is kept, and is the same as what is solved here."""
    config = {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": [{"gptq": {"sequential": False}}]}
    net, weights = Net().eval(), dict[str, bytes]()
    with fxquant.executor("processes", workers=2) as workers:
        for name, more in {"here": {}, "workers": {"executor": workers, "job": tmp_path / "job"}}.items():
            fxquant.compile(net, data()[0], config, calibration=data(), **more).save(tmp_path / name)
            weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["here"] == weights["workers"]
    assert len(list((tmp_path / "job" / "tasks").iterdir())) == 2  # a and b share their input
