"""Fuzz every loader, each in processes of its own, two at a time, and print what came of it as a table.

    python tests/fuzz/run.py [TARGET ...] [--seconds 600] [--jobs 2] [--seed N] [--json FILE]

A process that dies or hangs is a finding too, and another one goes on. Cases that were findings are kept in
tests/fuzz/crashes, a folder each, with what went wrong in its file FINDING.txt. Exits with 1 where there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CRASHES = HERE / "crashes"
HANGS = 300.0
"""Seconds without a word from a process, after which it hangs: a case may take 5, on a busy machine more."""
STARTS = 300.0
"""Seconds more until it says its first."""
TARGETS = ("config", "grammar", "graph", "weights", "names", "folder", "packed", "gguf", "onnx", "data", "journal")


@dataclass
class Total:
    """What the processes of a target did together."""

    name: str
    cases: int = 0
    taken: int = 0
    lines: int = 0
    memory: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    given.add_argument("--seconds", type=float, default=600, help="for each target")
    given.add_argument("--jobs", type=int, default=2, help="targets at a time")
    given.add_argument("--seed", type=int, default=None)
    given.add_argument("--json", type=Path, default=None, help="write the table there too")
    options = given.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        given.error(f"unknown target {unknown[0]!r}; expected {', '.join(TARGETS)}")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    names = options.targets or TARGETS
    print(f"seed {seed}, {options.seconds:g} s for each of {len(names)} targets", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        totals = list(pool.map(lambda name: watch(name, options.seconds, seed), names))
    print(table(totals))
    if options.json is not None:
        options.json.write_text(json.dumps([vars(total) for total in totals], indent=1) + "\n")
    return int(any(total.findings for total in totals))


def watch(name: str, seconds: float, seed: int) -> Total:
    """Fuzz one target for so long, in one process, or in more where one ends early."""
    total, begin, told = Total(name), time.monotonic(), 0.0
    while (left := seconds - (time.monotonic() - begin)) > 1:
        before = total.cases
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
            process = start(name, folder, left, seed)
            seed += 1
            last = [time.monotonic() + STARTS]
            watcher = threading.Thread(target=stop_if_silent, args=(process, last), daemon=True)
            watcher.start()
            found: dict[str, Any] = {}
            assert process.stdout is not None
            for line in process.stdout:
                last[0], said = time.monotonic(), json.loads(line)
                if "finding" in said:
                    keep(total, said["finding"], said["text"], {k: bytes.fromhex(v) for k, v in said["case"].items()})
                    continue
                found = said
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    print(f"{name:<9} {time.monotonic() - begin:5.0f} s {before + found['cases']:>8} cases "
                          f"{len(total.findings)} findings", flush=True)  # fmt: skip
            add(total, found)
            code = process.wait()
            if code:
                errors = Path(folder, "errors").read_text(errors="replace")[-4000:]
                kind = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                case = Path(folder, "work", "case")
                content = {str(f.relative_to(case)): f.read_bytes() for f in sorted(case.rglob("*")) if f.is_file()}
                keep(total, f"{name} process {kind}" if found else f"{name} does not start", errors, content)
                if not found:
                    break
    total.seconds = time.monotonic() - begin
    return total


def start(name: str, folder: str, seconds: float, seed: int) -> subprocess.Popen[str]:
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fuzz_engine.py"), name, str(Path(folder, "work")), str(seconds), str(seed)]
    with Path(folder, "errors").open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def stop_if_silent(process: subprocess.Popen[str], last: list[float]) -> None:
    """SIGABRT to a process that says nothing for long: it writes where it is, and ends."""
    while process.poll() is None:
        time.sleep(1)
        if time.monotonic() - last[0] > HANGS:
            process.send_signal(signal.SIGABRT)
            return


def add(total: Total, found: dict[str, Any]) -> None:
    total.cases += found.get("cases", 0)
    total.taken += found.get("taken", 0)
    total.lines = max(total.lines, found.get("lines", 0))
    total.memory = max(total.memory, found.get("memory", 0))
    total.slowest = max(total.slowest, found.get("slowest", 0.0))


def keep(total: Total, key: str, text: str, case: dict[str, bytes]) -> None:
    """Print a finding that is new, and write its case to ``crashes``."""
    if key in total.findings:
        return
    total.findings.append(key)
    place = CRASHES / re.sub(r"[^A-Za-z0-9.]+", "-", key)
    shutil.rmtree(place, ignore_errors=True)
    for name, content in case.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    place.mkdir(parents=True, exist_ok=True)
    (place / "FINDING.txt").write_text(f"{key}\n\n{text}\n")
    print(f"{total.name:<9} FOUND {key}: {place}", flush=True)


def table(totals: list[Total]) -> str:
    """As docs/fuzzing.md shows it."""
    head = ("target", "cases", "taken", "lines", "findings", "memory", "slowest", "time")
    rows = [
        (t.name, f"{t.cases:,}", f"{t.taken:,}", str(t.lines), str(len(t.findings)), f"{t.memory / 2**20:.0f} MiB",
         f"{t.slowest:.2f} s", f"{t.seconds:.0f} s")
        for t in totals
    ]  # fmt: skip
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join([*lines, *(f"found: {key}" for t in totals for key in t.findings)])


if __name__ == "__main__":
    sys.exit(main())
