"""Engines: the same bits from each, whatever the number of workers, and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_tasks
import pytest
import torch
from checkpoint_models import llama
from torch import Tensor, nn
from typer.testing import CliRunner

import fxquant
from fxquant import checkpoints, engines, stream
from fxquant.cli import app
from fxquant.errors import InputError, TaskError, WeightError
from fxquant.tasks import IN_PROCESS, Executor, Pending, Task

G = torch.Generator().manual_seed(0)
DATA = [torch.randn(48, 64, generator=G) for _ in range(9)]
SPEC = "e2m1/group16"


class Residual(nn.Module):
    """Linears of which two share an input, and more after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.out = nn.Linear(64, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.sigmoid(self.gate(x)) * self.up(x)))


def model() -> nn.Module:
    torch.manual_seed(1)
    return Residual().eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"weight": SPEC, "passes": [{"gptq": {"float_targets": True}}, {"lorc": {"rank": 4}}]},
    "gptq, all layers at once": {"weight": SPEC, "passes": [{"gptq": {"sequential": False}}]},
    "search": {"weight": "e2m1/channel", "activation": "e2m1/tensor", "passes": [{"search_formats": {"rounds": 2}}]},
    "lorc": {"weight": SPEC, "passes": [{"lorc": {"rank": 4, "weighting": "none"}}]},
    "lorc in rounds": {"weight": SPEC, "passes": [{"lorc": {"rank": 4, "rounds": 1}}]},
    "zq_local": {"weight": SPEC, "passes": [{"zq_local": {"iterations": 4, "sequential": False}}]},
    "gwq": {"weight": SPEC, "passes": [{"gwq": {}}]},
    "pb_llm": {"weight": "lut(-1,1)/group16", "passes": [{"pb_llm": {"criterion": "hessian"}}]},
}


def bits(name: str, executor: Executor) -> dict[str, Any]:
    """Every tensor that is saved, as bytes, and every line of the trace."""
    given = dict(CONFIGS[name])
    config = {"passes": given.pop("passes"), "rules": [{"match": "*", **given}]}
    compiled = fxquant.compile(model(), (DATA[0],), config, calibration=DATA, executor=executor)
    found: dict[str, Any] = {
        key: value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        for key, value in compiled.program.gm.state_dict().items()
    }
    found["trace"] = [(step.name, step.rewrites, step.declines, step.text) for step in compiled.program.trace]
    assert len(found) > 5
    return found


def check_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    assert [key for key in want if key != "trace" and got[key] != want[key]] == []
    for ours, theirs in zip(got["trace"], want["trace"], strict=True):
        assert ours == theirs


class Watched:
    """Runs tasks here and checks that none writes to its arguments; ``names`` are those of the tasks."""

    workers = 1

    def __init__(self) -> None:
        self.names: list[str] = []

    def submit(self, task: Task) -> Pending:
        self.names.append(task.name)
        before = engines._packed(task.args, task.name)
        held = engines._unpacked(before)
        done = IN_PROCESS.submit(task)
        after = engines._unpacked(engines._packed(task.args, task.name))
        assert equal(held, after), task.name
        return done


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return equal(vars(a), vars(b)) if hasattr(a, "__dict__") else bool(a == b)


@pytest.fixture(scope="module")
def here() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Of each config the bits in this process, and the names of its tasks."""
    found = {}
    for name in CONFIGS:
        watched = Watched()
        found[name] = bits(name, watched), watched.names
    return found


@pytest.fixture(scope="module")
def two() -> Iterator[Executor]:
    with engines.executor("processes", workers=2) as executor:
        yield executor


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_bits_of_one(name: str, two: Executor, here: dict[str, Any]) -> None:
    check_same(bits(name, two), here[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_gives_the_same_bits(workers: int, here: dict[str, Any]) -> None:
    with engines.executor("processes", workers=workers) as executor:
        for name in CONFIGS:
            check_same(bits(name, executor), here[name][0])


def test_tasks_have_names_of_their_own_and_write_to_no_argument(here: dict[str, Any]) -> None:
    for _, names in here.values():
        assert len(set(names)) == len(names) > 4
        assert "insert_qdq/down.weight" in names


def test_a_pass_that_runs_twice_has_tasks_of_its_own() -> None:
    watched = Watched()
    config = {"rules": [{"match": "*", "weight": SPEC}], "passes": [{"zq_local": {"iterations": 1}}] * 2}
    fxquant.compile(model(), (DATA[0],), config, calibration=DATA, executor=watched)
    assert {"zq_local/up.weight", "2:zq_local/up.weight"} <= set(watched.names)


def test_streamed_models_and_kept_jobs_have_workers_too(two: Executor, tmp_path: Path) -> None:
    """The same weights as in memory, in this process and without a job."""
    llama(tmp_path / "model")
    windows = torch.randint(0, 64, (8, 16), generator=G)
    config = {"rules": [{"match": "*", "weight": SPEC}], "passes": [{"gptq": {"sequential": False}}]}
    loaded, lazy = (checkpoints.load_model(tmp_path / "model", lazy=lazy) for lazy in (False, True))
    whole = fxquant.compile(loaded.model, loaded.example_inputs, config, calibration=windows)
    for _ in range(2):  # the second one finds all tasks done
        kept = stream.compile_to(
            tmp_path / "out", lazy.model, lazy.example_inputs, config, calibration=windows, executor=two,
            job=tmp_path / "job", overwrite=True,
        )  # fmt: skip
        a, b = whole.program.gm.state_dict(), kept.program.gm.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_task_finds_one_thread_and_memory_of_its_own(two: Executor) -> None:
    x = torch.randn(33, 7, generator=G)[1:].t()
    for executor in (IN_PROCESS, two):
        seen = executor.submit(Task("facts", engine_tasks.facts, (x,))).result()
        assert (seen["threads"], seen["grad"], seen["aligned"], seen["contiguous"]) == (1, False, True, True)
        assert torch.equal(seen["sum"], x.double().sum())
    assert seen["pid"] != os.getpid()


def test_values_arrive_as_they_were_sent(two: Executor) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool]
    tensors = [torch.arange(6).reshape(2, 3).to(kind) for kind in (*kinds, torch.float8_e4m3fn)]
    q = fxquant.quantize_tensor(torch.randn(4, 8, generator=G), "int4/channel")
    sent = (*tensors, torch.zeros(0, 3), torch.tensor(2.5), q, {"a": [1, None, "b"]})
    got = two.submit(Task("same", engine_tasks.same, sent)).result()
    for a, b in zip(sent[:-2], got[:-2], strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().view(-1).tolist() == b.view(-1).tolist()
    assert torch.equal(q.codes, got[-2].codes)
    assert got[-2].spec == q.spec
    assert got[-1] == sent[-1]


# --- what goes wrong --------------------------------------------------------------------------------------------------
def test_an_error_arrives_as_it_was_raised(two: Executor) -> None:
    with pytest.raises(WeightError, match=r"^layer.3 holds 1 NaN$"):
        two.submit(Task("fails", engine_tasks.fails, ("ours",))).result()
    with pytest.raises(ZeroDivisionError, match="as asked") as told:
        two.submit(Task("fails", engine_tasks.fails, ("theirs",))).result()
    assert any("engine_tasks.py" in note for note in told.value.__notes__)


def test_a_weight_with_nan_is_named_by_a_worker(two: Executor) -> None:
    broken = model()
    with torch.no_grad():
        broken.up.weight[3, 5] = torch.nan
    with pytest.raises(WeightError, match=r"up.weight holds 1 NaN"):
        fxquant.compile(broken, (DATA[0],), "W6A16-E3M2", executor=two)


def test_a_worker_that_is_killed_is_replaced(two: Executor, tmp_path: Path) -> None:
    x = torch.randn(5, generator=G)
    first = two.submit(Task("dies once", engine_tasks.dies_once, (str(tmp_path / "once"), x)))
    others = [two.submit(Task(f"same/{i}", engine_tasks.same, (i,))) for i in range(6)]
    assert torch.equal(first.result(), x * 2)
    assert [pending.result() for pending in others] == [(i,) for i in range(6)]


def test_a_task_that_always_kills_its_worker_is_named(two: Executor, tmp_path: Path) -> None:
    others = [two.submit(Task(f"same/{i}", engine_tasks.same, (i,))) for i in range(2)]
    with pytest.raises(TaskError, match=r"gptq/layer.7: its worker died 3 times .* fewer workers"):
        two.submit(Task("gptq/layer.7", engine_tasks.dies, (str(tmp_path / "log"),))).result()
    assert (tmp_path / "log").read_text() == "xxx"
    assert [pending.result() for pending in others] == [(0,), (1,)]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Ctrl-C, which goes to all of a terminal's processes, ends a job promptly; SIGKILL leaves nobody behind."""
    code = (
        "import sys, engine_tasks\n"
        "from fxquant import engines\n"
        "from fxquant.tasks import Task\n"
        "with engines.executor('processes', workers=1) as executor:\n"
        "    executor.submit(Task('waits', engine_tasks.waits, (sys.argv[1],))).result()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    jobs = {}
    for name in ("SIGINT", "SIGKILL"):
        jobs[name] = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)], env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE, start_new_session=True, text=True,
        )  # fmt: skip
    for name, job in jobs.items():
        worker = int(_waited(lambda name=name: (tmp_path / name).read_text() if (tmp_path / name).exists() else ""))
        assert Path(f"/proc/{worker}").exists()
        if name == "SIGINT":
            os.killpg(job.pid, signal.SIGINT)
        else:
            os.kill(job.pid, signal.SIGKILL)
        told = job.communicate(timeout=20)[1]
        assert job.returncode != 0
        assert told.count("Traceback") == (name == "SIGINT")  # the parent's own, none of a worker's
        _waited(lambda worker=worker: not Path(f"/proc/{worker}").exists())


def _waited(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What ``found`` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"workers": 0}, r"workers is 0; expected 1 or more"),
        ({"engine": "threads"}, r"unknown engine 'threads'; expected one of in-process, processes, ray"),
        ({"engine": "in-process", "workers": 2}, r"in-process runs one task at a time, not 2"),
        ({"engine": "processes", "address": "auto"}, r"processes takes no address"),
    ],
)
def test_nonsense_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told), engines.executor(**asked):
        pass


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fxquant\[ray\]'"), engines.executor("ray"):
        pass


@pytest.mark.parametrize(
    ("asked", "code", "told"),
    [
        (["--workers", "0"], 2, "--workers"),
        (["--engine", "threads"], 2, "--engine"),
        (["--engine", "in-process", "--workers", "2"], 1, "take the engine processes or ray"),
        (["--engine", "processes", "--ray-address", "auto"], 1, "takes no address"),
        (["--ray-address", "127.0.0.1:1"], 1, "no Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_nonsense_on_the_command_line(asked: list[str], code: int, told: str, tmp_path: Path) -> None:
    llama(tmp_path / "model")
    result = CliRunner().invoke(app, ["compile", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *asked])
    assert result.exit_code == code
    assert told in result.output


def test_the_engine_follows_from_the_number_of_workers() -> None:
    for asked in ({}, {"workers": 1}):
        with engines.executor(**asked) as executor:
            assert executor is IN_PROCESS
    with engines.executor(workers=2) as executor:
        assert executor.workers == 2
        assert executor is not IN_PROCESS
