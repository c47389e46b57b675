"""The same input, config and version give the same bytes: in another process, folder, with other hashes and threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from determinism_job import JOBS

pytest.importorskip("transformers")
pytest.importorskip("gguf")

TESTS = Path(__file__).parent


def written(folder: Path, jobs: tuple[str, ...], *, hashes: int, threads: int) -> dict[str, bytes]:
    """Every file that the jobs write below ``folder``, run in a fresh process there."""
    folder.mkdir(parents=True)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": str(hashes), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(TESTS / "determinism_job.py"), *jobs]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_threads(name: str, content: bytes) -> Any:
    """The file, but for how many threads a manifest says that torch had: 1 and 2 here."""
    if Path(name).name != "manifest.json":
        return content
    found = json.loads(content)
    assert found["origin"]["machine"].pop("threads") in (1, 2)
    return found


def check(tmp_path: Path, jobs: tuple[str, ...]) -> None:
    one = written(tmp_path / "one", jobs, hashes=1, threads=1)
    two = written(tmp_path / "another" / "folder", jobs, hashes=4711, threads=2)
    assert set(one) == set(two)
    threads = [{name: without_threads(name, content) for name, content in found.items()} for found in (one, two)]
    differ = {name for name in one if threads[0][name] != threads[1][name]}
    assert {Path(name).name for name in differ} <= {"timings.json"}, sorted(differ)
    for name, content in one.items():
        for text in (str(tmp_path), str(TESTS.parent), str(Path(sys.prefix)), str(Path.home())):
            assert text.encode() not in content, f"{name} names a folder of this machine, {text}"


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    check(tmp_path, ("search_formats", "exports"))


@pytest.mark.slow
def test_two_runs_write_the_same_bytes_with_every_method(tmp_path: Path) -> None:
    check(tmp_path, tuple(JOBS))
