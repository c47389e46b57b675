"""``fxquant kernels``: what is written where, what is printed, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_kernels import GEMM, TinyCatalogue
from tiny_models import mlp
from typer.testing import CliRunner, Result

import fxquant
from fxquant import cli, kernels, store

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="triton interprets kernels in this process"
)
REQUIRED = {
    "name", "kind", "arch", "issued_per_weight", "logic_per_weight", "spills", "registers", "shared_bytes", "mma",
    "occupancy", "verdicts",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "catalogue", TinyCatalogue)


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["kernels", *(str(a) for a in args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def rows(*args: object) -> list[dict[str, Any]]:
    """What the command prints with --json: JSON, and nothing else."""
    found: list[dict[str, Any]] = json.loads(run(*args, "--json").stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compiled") / "mlp"
    rules = [{"match": "0", "weight": "e5m2/channel"}, {"match": "*", "weight": "nf4/channel"}]
    fxquant.compile(mlp(), (torch.randn(2, 20),), {"rules": rules}).save(folder)
    return folder


def test_rows_have_the_figures() -> None:
    found = rows("--format", "e5m2", "--arch", "sm_80", "--arch", "9.0")
    assert [(r["name"], r["arch"]) for r in found] == [
        ("e5m2_decode", "sm_80"), ("double", "sm_80"), ("e5m2_decode", "sm_90"), ("double", "sm_90"),
        ("e5m2_swap", "sm_90"),
    ]  # fmt: skip
    assert all(set(r) >= REQUIRED for r in found)
    decode, double, hopper = found[0], found[1], found[2]
    assert (decode["mma"], decode["spills"], decode["copies"], decode["copies_128"]) == ("HMMA", 0, 2, 2)
    assert 1 < decode["logic_per_weight"] < decode["issued_per_weight"] < 8
    assert set(decode["verdicts"]) == {"A100-80"}
    assert set(hopper["verdicts"]) == {"H100", "H200"}
    assert set(hopper["verdicts"]["H100"]) == {"bound", "alu", "issue"}
    assert (double["issued_per_weight"], double["mma"], double["verdicts"], double["loop"]) == (None, None, {}, False)


def test_the_table_names_what_it_counts() -> None:
    result = run("--arch", "sm_80", "--format", "e5m2")
    for word in ("sm_80", "e5m2_decode", "HMMA", "2/2", "A100-80", "quantize"):
        assert word in result.stdout
    assert "whole kernel" not in result.stdout  # nothing is counted of the one without a K loop
    assert "note: not for sm_80: e5m2_swap (wgmma)" in result.stderr
    assert "wrote" not in result.stdout


def test_a_kernel_too_large_for_an_architecture_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(GEMM, constants={"BM": 16, "BN": 64, "KB": 256}, weights=64 * 256, stages=6)
    monkeypatch.setattr(TinyCatalogue, "variants", lambda *_: [large])
    assert "does not fit" in run("--arch", "sm_120").stdout
    small, fits = rows("--arch", "sm_120", "--arch", "sm_90")
    assert (small["blocks_per_sm"], small["occupancy"], small["verdicts"]) == (0, 0.0, {})
    assert fits["blocks_per_sm"] == 1


def test_all_formats_go_to_a_new_folder_and_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"wrote e5m2.py to {out}" in run(out, "--arch", "sm_80").stdout
    assert [p.name for p in out.iterdir()] == ["e5m2.py"]
    text = (out / "e5m2.py").read_text()
    compile(text, "e5m2.py", "exec")
    (out / "e5m2.py").write_text(text + "# edited\n")
    (out / "__pycache__").mkdir()
    run(out, "--format", "fp6", "--arch", "sm_80")
    assert sorted(p.name for p in out.iterdir()) == ["__pycache__", "e3m2.py", "e5m2.py"]
    run(out, "--arch", "sm_80")
    assert (out / "e5m2.py").read_text() == text


def test_kernels_of_a_model_lie_in_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlp"
    shutil.copytree(model, out)
    result = run(out, "--arch", "sm_80")
    assert "no kernel reads nf4" in result.stderr
    assert "e3m2" not in result.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "graph.json",
        "kernels",
        "manifest.json",
        "model.safetensors",
        "timings.json",
    ]
    assert [p.name for p in (out / "kernels").iterdir()] == ["e5m2.py"]
    loaded = fxquant.load(out)
    loaded.save(out, overwrite=True)  # a saved model may be replaced with its kernels
    assert not (out / "kernels").exists()
    (out / "kernels").mkdir()
    (out / "kernels" / "notes.txt").write_text("mine")
    with pytest.raises(fxquant.FxquantError, match="kernels"):
        loaded.save(out, overwrite=True)
    assert "notes.txt" in run(out, code=1).stderr


def test_load_never_runs_what_lies_beside_a_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlp"
    shutil.copytree(model, out)
    (out / "kernels").mkdir()
    (out / "kernels" / "e5m2.py").write_text(f"{store.KERNEL_MARK}\nraise SystemExit('ran')\n")
    fxquant.load(out)
    run(out, "--arch", "sm_80")


@pytest.mark.parametrize("name", ["thesis.txt", "mine.py", "folder"])
def test_folders_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("irreplaceable")
    result = run(tmp_path, code=1)
    assert result.stdout == ""
    assert f"holds '{name}', which fxquant kernels did not write" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--arch", "sm_75"], "error: sm_75 has no 16-bit tensor core"),
        (["--arch", "hopper"], "error: unknown architecture 'hopper'; expected one of sm_80, sm_86"),
        (["--format", "e9m9"], "error: "),
        (["--format", "nf4"], "error: there is no kernel for 'nf4'; expected one of e5m2, e3m2"),
        (["no/such/place"], "the folder no/such does not exist; create it first"),
        ([__file__], "is not a folder"),
    ],
)
def test_wrong_arguments(args: list[str], says: str) -> None:
    result = run(*args, code=1)
    assert says in result.stderr
    assert result.stdout == ""


def test_a_model_without_linears_has_no_kernels(tmp_path: Path) -> None:
    out = tmp_path / "conv"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    fxquant.compile(model, (torch.randn(1, 3, 8, 8),), "W6A16-E3M2").save(out)
    assert "no quantized linear layer" in run(out, code=1).stderr
    assert run(out, "--format", "e3m2", "--arch", "sm_80").exit_code == 0


def test_without_triton_the_files_are_written_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton, which is not installed" in run(tmp_path / "out", code=1).stderr
    assert (tmp_path / "out" / "e5m2.py").is_file()
