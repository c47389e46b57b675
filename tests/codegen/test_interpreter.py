"""Starts the tests that run kernels in Triton's interpreter, which need a process of their own (``tests/interpreter``).

Run some of them by hand: ``TRITON_INTERPRET=1 python -m pytest tests/interpreter -k splits``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(marks: str) -> None:
    """The tests with these marks; what they print is shown where one fails."""
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-m", marks, "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)
    assert " passed" in done.stdout  # none collected would be an exit status too, but this says it


def test_kernels_in_the_interpreter() -> None:
    run("not slow and not gpu")


@pytest.mark.slow
def test_kernels_in_the_interpreter_at_length() -> None:
    run("slow and not gpu")
