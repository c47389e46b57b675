"""Too little memory is an error that says how much, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import run
from tiny_language import save_tiny

from fxquant import checkpoints
from fxquant.errors import MemoryLimitError
from fxquant.memory import limited

LIMITED = """
import resource, torch, fxquant
from pathlib import Path
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 400_000, bias=False))  # the last has 98 MiB
fxquant.compile(model[:2], (torch.ones(1, 64),))
field = next(q for q in Path("/proc/self/status").read_text().splitlines() if q.startswith("VmSize"))
most = int(field.split()[1]) * 1024 + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    fxquant.compile(model, (torch.ones(1, 64),))
except fxquant.FxquantError as error:
    print(type(error).__name__, error)
"""


def test_a_limit_of_memory_is_told() -> None:
    result = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("MemoryLimitError there is not enough memory to compile the model: "), result.stderr
    assert "more were asked for, this process has" in result.stdout
    assert "(ulimit -v). What to do: compile with --stream" in result.stdout


def torch_fails() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def numpy_fails() -> None:
    np.empty(1 << 60, dtype=np.uint8)


def python_fails() -> None:
    bytearray(1 << 60)


def system_fails() -> None:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("fails", [torch_fails, numpy_fails, python_fails, system_fails])
def test_every_library_says_it_in_its_own_way(fails: Any) -> None:
    told = r"not enough memory to try: .*asked for, .* are free on this machine"
    with pytest.raises(MemoryLimitError, match=told), limited("try"):
        fails()
    with pytest.raises(ValueError, match="other"), limited("try"):
        raise ValueError("other")


def test_the_command_line_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    folder = save_tiny(tmp_path / "m")
    monkeypatch.setattr(checkpoints, "example_inputs", lambda model: torch_fails())
    told = run("compile", folder, "-o", tmp_path / "out", code=1).stderr
    assert "error: there is not enough memory to load the model: 1073741824.00 GiB more were asked for" in told
    assert not (tmp_path / "out.job").exists()
