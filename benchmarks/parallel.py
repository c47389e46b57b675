"""Format search with one worker and with two, one thread each: seconds of the pass, best and median of several runs.

Both take turns in one process, so that what else the machine does meets both alike. Workers are started, and have
loaded everything, before the clock runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

import fxquant
from fxquant import engines
from fxquant.tasks import Executor, Task

CONFIG = {
    "rules": [{"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}],
    "passes": [{"search_formats": {}}],
}


def model(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval()


def warm(executor: Executor) -> None:
    """Every worker has run a task, so that it has loaded torch and this package."""
    for pending in [executor.submit(Task(f"warm/{i}", time.sleep, (1.0,))) for i in range(executor.workers)]:
        pending.result()
    x = torch.randn(8, 8)
    for pending in [executor.submit(Task(f"warm/{i}", torch.linalg.eigh, (x @ x.t(),))) for i in range(4)]:
        pending.result()


def searched(net: nn.Module, data: Sequence[torch.Tensor], engine: str, workers: int) -> tuple[float, bytes]:
    """Seconds of the pass, and the bytes of all codes and scales."""
    with engines.executor(engine, workers=workers) as executor:
        if engine != "in-process":
            warm(executor)
        compiled = fxquant.compile(net, (data[0],), CONFIG, calibration=data, executor=executor)
    step = next(step for step in compiled.program.trace if step.name == "search_formats")
    tensors = compiled.program.gm.state_dict()
    return step.seconds, b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["ray", "processes"], choices=engines.ENGINES[1:])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    net = model(asked.layers, asked.width)
    data = [torch.randn(256, asked.width) for _ in range(8)]
    print(f"format search of {asked.layers} linears of {asked.width}x{asked.width}, {asked.runs} runs")
    alone, bits = searched(net, data, "in-process", 1)
    print(f"in-process              {alone:6.1f} s, {alone / asked.layers:.2f} s a task")
    for engine in asked.engines:
        seconds: dict[int, list[float]] = {1: [], asked.workers: []}
        for _ in range(asked.runs):
            for workers, told in seconds.items():
                took, found = searched(net, data, engine, workers)
                assert found == bits, f"{engine} with {workers} workers gives other bits"
                told.append(took)
        for workers, told in seconds.items():
            median = statistics.median(told)
            print(f"{engine:10} {workers:2} workers   best {min(told):6.1f} s  median {median:6.1f} s")
        one, many = seconds.values()
        medians = statistics.median(one) / statistics.median(many)
        print(f"{engine:10} ratio        best {min(one) / min(many):6.2f}    median {medians:6.2f}")


if __name__ == "__main__":
    main()
