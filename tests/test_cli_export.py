"""``fxquant export --format``: checkpoints from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_models import llama
from typer.testing import CliRunner, Result

from fxquant import cli

pytest.importorskip("compressed_tensors")


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and what was compiled from it to MXFP4, which both formats hold."""
    place = tmp_path_factory.mktemp("cli")
    llama(place / "model")
    run("compile", place / "model", "-c", "MXFP4", "-o", place / "out")
    return place / "model", place / "out"


def test_a_folder_for_vllm(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = folders
    args = ("export", out, "--format", "compressed-tensors", "--model", model, "-o", tmp_path / "ct")
    result = run(*args, "--check")
    assert "13 of 13 weights read back bit for bit" in result.stdout
    assert json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]["format"].startswith("mxfp4")
    assert "exists already" in run(*args, code=1).output
    assert json.loads(run(*args, "--overwrite", "--json").stdout)["format"] == "compressed-tensors"


def test_a_gguf_file_by_its_suffix(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = folders
    result = run("export", out, "--model", model, "-o", tmp_path / "model.gguf", "--check", "--json")
    figures = json.loads(result.stdout)
    assert (figures["format"], figures["check"]["ok"]) == ("gguf", True)
    assert "note: " in result.stderr  # no tokenizer
    assert "no tokenizer" in result.stderr


def test_errors_name_what_to_do(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = folders
    said = run("export", out, "--format", "compressed-tensors", "-o", tmp_path / "ct", code=1).output
    assert "give the model that was compiled with --model MODEL" in said
    args = ("export", out, "--format", "gguf", "--model", model, "-o", tmp_path / "m.gguf")
    assert "--opset is for --format onnx" in run(*args, "--opset", 22, code=2).output
    run("compile", model, "-c", "W6A16-E3M2", "-o", tmp_path / "fp6")
    said = run("export", tmp_path / "fp6", *args[2:], code=1).output
    assert "e3m2/channel, and no block type of GGUF holds e3m2" in said
    assert "recipe MXFP4" in said
