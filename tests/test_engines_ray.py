"""The engine ray, on real clusters of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine_tasks
import pytest
import torch
from test_engines import CONFIGS, G, bits, check_same

import fxquant
from fxquant import engines
from fxquant.errors import InputError, TaskError, WeightError
from fxquant.tasks import IN_PROCESS, Executor, Pending, Task

ray = pytest.importorskip("ray")
STORE = 100 << 20
"""Bytes of the object store of a node."""


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import ``engine_tasks``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_a_local_ray(capfd: pytest.CaptureFixture[str]) -> None:
    """Bits, threads, memory and errors, all on one Ray, since starting it is what takes time."""
    with engines.executor("ray", workers=2) as executor:
        assert executor.workers == 2
        name = "gptq, all layers at once"
        check_same(bits(name, executor), bits(name, IN_PROCESS))
        large = torch.randn(1 << 20, generator=G)  # from the object store, which is read-only
        seen = executor.submit(Task("facts", engine_tasks.facts, (large,))).result()
        assert (seen["threads"], seen["grad"], seen["aligned"]) == (1, False, True)
        with pytest.raises(WeightError, match=r"^layer.3 holds 1 NaN$"):
            executor.submit(Task("fails", engine_tasks.fails, ("ours",))).result()
    assert not ray.is_initialized()
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


@pytest.mark.slow
def test_workers_of_ray_that_die(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are replaced a number of times, and Ray prints nothing of it where figures go."""
    x = torch.randn(1 << 20, generator=G)
    with engines.executor("ray", workers=2) as executor:
        once = executor.submit(Task("dies once", engine_tasks.dies_once, (str(tmp_path / "once"), x)))
        assert torch.equal(once.result(), x * 2)
        with pytest.raises(TaskError, match=r"gptq/layer.7: its worker died 3 times"):
            executor.submit(Task("gptq/layer.7", engine_tasks.dies, (str(tmp_path / "log"),))).result()
        assert (tmp_path / "log").read_text() == "xxx"
    assert capfd.readouterr().out == ""


def test_no_cluster_there() -> None:
    with (
        pytest.raises(InputError, match=r"no Ray cluster at '127.0.0.1:1'.*ray start --head"),
        engines.executor("ray", address="127.0.0.1:1"),
    ):
        pass


@pytest.fixture
def two_nodes() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Killing:
    """Ends the second node of a cluster when tasks run on both, in the middle of a job."""

    def __init__(self, executor: Executor, cluster: object, node: object) -> None:
        self.executor, self.cluster, self.node = executor, cluster, node
        self.workers, self.seen, self.killed = executor.workers, 0, False

    def submit(self, task: Task) -> Pending:
        pending = self.executor.submit(task)
        self.seen += task.name.startswith("search_formats/")
        if self.seen == 3 and not self.killed:
            self.cluster.remove_node(self.node, allow_graceful=False)  # type: ignore[attr-defined]
            self.killed = True
        return pending


@pytest.mark.slow
def test_a_node_that_is_killed_changes_nothing(two_nodes: object) -> None:
    node = two_nodes.add_node(num_cpus=1, object_store_memory=STORE)  # type: ignore[attr-defined]
    torch.manual_seed(2)
    layers = [torch.nn.Linear(96, 96) for _ in range(10)]
    model, data = torch.nn.Sequential(*layers).eval(), [torch.randn(64, 96, generator=G) for _ in range(4)]
    rule = {"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}
    config = {"rules": [rule], "passes": [{"search_formats": {"rounds": 3}}]}
    here = fxquant.compile(model, (data[0],), config, calibration=data)
    with engines.executor("ray", address=two_nodes.address) as executor:  # type: ignore[attr-defined]
        assert executor.workers == 2
        killing = Killing(executor, two_nodes, node)
        there = fxquant.compile(model, (data[0],), config, calibration=data, executor=killing)
        assert killing.killed
        assert sum(n["Alive"] for n in ray.nodes()) == 1
    a, b = here.program.gm.state_dict(), there.program.gm.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [step.text for step in here.program.trace] == [step.text for step in there.program.trace]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ray_gives_the_bits_of_one_process(workers: int) -> None:
    with engines.executor("ray", workers=workers) as executor:
        for name in CONFIGS:
            check_same(bits(name, executor), bits(name, IN_PROCESS))
