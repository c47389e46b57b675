"""Kills ``fxquant compile`` at random moments, continues it, and compares: ``python tests/kills.py --kills 50``.

Each time a process is killed (SIGKILL), and the job is continued with --resume. The moment is drawn uniformly from
the time that a process takes, imports and final save included; every second one from the time after the job has its
folder, most of which goes to the tasks and the writing of their results. The output has to equal that of a process
that nobody killed in every byte of every file, and no task whose result was on the disk at the kill may run again.
What runs is told by the processes themselves: each writes a line to a log when a task begins and when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = """
rules:
  - {match: "*", weight: e2m1/channel, activation: e2m1/tensor}
passes:
  - search_formats: {rounds: 1, steps: 20}
  - gptq: {}
  - lorc: {rank: 8}
"""
TEXT = "The river had been rising since the morning, and by noon the lower fields were under water.\n" * 60


MORE: list[str] = []
"""Options that every process has."""


def child(log: str, arguments: list[str]) -> None:
    """``fxquant`` with these arguments; a line in ``log`` for each task that begins and ends."""
    from fxquant import cli, tasks

    perform, handle = tasks.perform, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def told(task: tasks.Task) -> object:
        os.write(handle, f"begin {task.name}\n".encode())
        found = perform(task)
        os.write(handle, f"end {task.name}\n".encode())
        return found

    tasks.perform = told
    sys.argv = ["fxquant", *arguments]
    cli.main()


class Forked:
    """A process that begins with all that this one has imported; otherwise as one of subprocess."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.code: int | None = None
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)
        self.pid = pid

    def wait(self, timeout: float = 1e9) -> int:
        end = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            else:
                time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


FORK: list[bool] = []


def in_fork(folder: Path, log: Path, arguments: list[str]) -> None:
    told = os.open(folder / "told.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1)
    os.dup2(told, 2)
    os.chdir(folder)
    child(str(log), arguments)


def started(folder: Path, log: Path, *more: str) -> subprocess.Popen[bytes] | Forked:
    """A process that compiles the model in ``folder`` to its ``out``."""
    arguments = ["compile", "model", "-c", "config.yaml", "--calibration", "text.txt", "-o", "out", *MORE, *more]
    if FORK:
        return Forked(lambda: in_fork(folder, log, arguments))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(log), *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with (folder / "told.txt").open("ab") as told:
        return subprocess.Popen(command, cwd=folder, stdout=told, stderr=told, env=env)


def lines(log: Path, what: str) -> list[str]:
    """The tasks that began or ended, without those that are not kept."""
    text = log.read_text() if log.exists() else ""
    names = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(what)]
    return [name for name in names if not name.startswith("insert_qdq/")]


def on_disk(folder: Path) -> set[str]:
    """The names of tasks whose results are in the job's folder, read without fxquant."""
    found = set()
    for path in (folder / "out.job" / "tasks").glob("[0-9a-f]*.safetensors"):
        content = path.read_bytes()
        found.add(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["task"])
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All but the one file that says how long it took."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    found.pop("timings.json")
    return found


def prepared(folder: Path) -> None:
    """A model, a config and a text."""
    from tiny_language import tiny_language_model, tiny_tokenizer

    tiny_language_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text(TEXT)


def begun(folder: Path, process: subprocess.Popen[bytes] | Forked) -> bool:
    """Wait until the job's folder is made; False where the process ends before."""
    while not (folder / "out.job").exists():
        try:
            process.wait(0.02)
            return False
        except subprocess.TimeoutExpired:
            continue
    return True


def killed(folder: Path, moment: float, *, after_begin: bool) -> str | None:
    """Kill a process ``moment`` seconds after its start, or after the job began; where that was, None: it had ended."""
    log = folder / "killed.log"
    log.unlink(missing_ok=True)
    process = started(folder, log)
    if after_begin and not begun(folder, process):
        return None
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        if not (folder / "out.job").exists():
            return "after the end" if (folder / "out").exists() else "before methods"
        left = [p for p in folder.glob(".out.*") if p.is_dir()]
        return "in the save" if left or (folder / "out").exists() else "in methods"
    return None


def resumed(folder: Path, want: dict[str, bytes], every: int) -> tuple[int, int]:
    """Continue; returns how many tasks were finished, and how many were solved now. AssertionError where it differs."""
    done, log = on_disk(folder), folder / "resumed.log"
    log.unlink(missing_ok=True)
    had_output = (folder / "out").exists()
    code = started(folder, log, "--resume").wait()
    assert code == 0, (folder / "told.txt").read_text()[-3000:]
    again = lines(log, "begin ")
    assert not done & set(again), f"solved again: {sorted(done & set(again))}"
    assert had_output or len(done) + len(again) == every, (len(done), len(again), every)
    assert len(set(again)) == len(again)
    got = files(folder / "out")
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    different = [name for name in got if got[name] != want[name]]
    assert not different, f"not the same bytes: {different}"
    assert not (folder / "out.job").exists()
    return len(done), len(again)


def cleared(folder: Path) -> None:
    for path in (*folder.glob("out*"), *folder.glob(".out*")):
        shutil.rmtree(path)


# --- kills at every step of writing -----------------------------------------------------------------------------------
STEPS = ("replace", "rename", "fsync", "exchange")


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; how it ended."""
    return Forked(work).wait()


def watched(folder: Path, log: Path, at: str = "") -> None:
    """Compile and save a small model, with a line for each task and each step of writing; killed before step ``at``."""
    from test_jobs import METHODS, Net, data

    import fxquant
    from fxquant import outputs, tasks

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    counts, perform = Counter[str](), tasks.perform

    def told(task: tasks.Task) -> object:
        os.write(handle, f"begin {task.name}\n".encode())
        return perform(task)

    def step(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            counts[name] += 1
            os.write(handle, f"step {name}:{counts[name]}\n".encode())
            if at == f"{name}:{counts[name]}":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(owner, name, counted)

    tasks.perform = told
    for name in STEPS:
        step(outputs if name == "exchange" else os, name)
    config = {"rules": [{"match": "*", "weight": "e2m1/channel"}], "passes": METHODS["search and lorc"]}
    fxquant.compile(Net().eval(), data()[0], config, calibration=data(), job=folder / "out.job").save(
        folder / "out", overwrite=True
    )


def moments(chosen: str) -> None:
    """Kill before each of the steps, continue, compare."""
    import test_jobs  # noqa: F401  what all processes need
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for output in ("none", "old"):  # the second time there is an output, which is replaced
            log = folder / f"{output}.log"
            assert forked(lambda: watched(folder, log)) == 0  # noqa: B023
            if output == "none":
                shutil.rmtree(folder / "out.job")
        want, all_steps = files(folder / "out"), [*dict.fromkeys(steps(folder / "none.log") + steps(log))]
        every = set(lines(log, "begin "))
        points = all_steps if chosen == "all" else chosen.split(",")
        for point in points:
            for old in (False, True) if chosen == "all" else (point.startswith("exchange"),):
                if not old:
                    cleared(folder)
                else:
                    shutil.rmtree(folder / "out.job", ignore_errors=True)
                first, second = folder / "first.log", folder / "second.log"
                first.unlink(missing_ok=True)
                second.unlink(missing_ok=True)
                killed = forked(lambda: watched(folder, first, point))  # noqa: B023
                if killed != -signal.SIGKILL:  # this way has no such step
                    assert killed == 0
                    continue
                done = on_disk(folder)
                if old:
                    assert files(folder / "out") == want  # at no moment is it not there
                assert forked(lambda: watched(folder, second)) == 0  # noqa: B023
                again = lines(second, "begin ")
                assert files(folder / "out") == want, point
                assert not done & set(again), (point, done & set(again))
                assert done | set(again) == every
                print(f"killed before {point}: {len(done)} kept, {len(again)} solved", flush=True)
    print(f"{len(points)} steps of writing, a kill before each: all bytes the same")


def steps(log: Path) -> list[str]:
    return lines(log, "step ")


def preload() -> None:
    """Import what every process would, and compute nothing: threads do not live on in a fork."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from fxquant import checkpoints, cli, engines, evaluate, pipeline, stream  # noqa: F401

    torch.set_num_threads(1)
    FORK.append(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="weights go to the output one after the other")
    parser.add_argument("--forked", action="store_true", help="fork instead of starting anew: quicker, less to import")
    given = parser.parse_args()
    if given.forked:
        preload()
    MORE.append("--stream" if given.stream else "--no-stream")
    draw, where, finished, solved = random.Random(given.seed), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        begin = time.perf_counter()
        process = started(folder, folder / "whole.log")
        assert begun(folder, process), (folder / "told.txt").read_text()[-3000:]
        before = time.perf_counter() - begin
        assert process.wait() == 0, (folder / "told.txt").read_text()[-3000:]
        seconds, want = time.perf_counter() - begin, files(folder / "out")
        every = len(lines(folder / "whole.log", "end "))
        print(f"{every} tasks, {len(want)} files, {seconds:.1f} s without a kill, {before:.1f} s of it before the job")
        while (count := sum(where.values())) < given.kills:
            cleared(folder)
            moment = draw.uniform(0, seconds - (before if count % 2 else 0))
            if (place := killed(folder, moment, after_begin=count % 2 == 1)) is None:
                continue
            done, now = resumed(folder, want, every)
            finished, solved = finished + done, solved + now
            where[place] += 1
            print(f"{count + 1}: killed after {moment:.2f} s, {place}: {done} kept, {now} solved", flush=True)
    print(f"{given.kills} kills ({', '.join(f'{n} {k}' for k, n in where.most_common())}), {given.kills} resumes: all "
          f"bytes the same; {finished} finished tasks, none solved again, {solved} solved after a kill")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["--moments"]:
        moments(sys.argv[2])
    else:
        main()
