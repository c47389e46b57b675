"""Jobs that are stopped go on where they were, and give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import save_tiny
from torch import Tensor, nn

import fxquant
from fxquant import jobs, results, tasks

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

    def compiled(job: Path | None, name: str) -> list[bytes]:
        made = fxquant.compile(model, data()[0], config, calibration=data(), job=job)
        made.save(tmp_path / name)
        return [(tmp_path / name / file).read_bytes() for file in ("graph.json", "model.safetensors", "manifest.json")]

    monkeypatch.setattr(tasks, "perform", counted)
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


def test_every_row_of_the_table_says_its_types() -> None:
    """What a file claims to be one of them is checked field by field."""
    for row in jobs.RESULTS.values():
        assert all(hint is not Any for hint in results.declared(row).values()), row


CONFIG = "rules: [{match: '*.q_proj', weight: e2m1/channel}]\npasses: [{gptq: {}}]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_tiny(tmp_path_factory.mktemp("hf") / "tiny")
