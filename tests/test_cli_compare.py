"""``fxquant compare`` and ``fxquant explain --model``, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_language import word_tokenizer
from typer.testing import CliRunner, Result

from fxquant import cli

WORDS = ("<unk>", "the", "a", "of", "and", "to", "in", "is")


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with one layer, random weights and a tokenizer of eight words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    folder = model.parent / "out"
    run("compile", model, "-o", folder, "-c", "W6A16-E3M2")
    return folder


def test_compare_prints_and_writes(model: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the sum of a and a is in the text " * 40)
    files = ("--html", tmp_path / "r.html", "--model-explorer", tmp_path / "m.json")
    told = run("compare", out, model, "--text", tmp_path / "text.txt", "--length", 64, "--windows", 2, "--json", *files)
    found = json.loads(told.stdout)
    assert (found["samples"], found["tokens"], found["seed"]) == (2, 128, None)
    assert len(found["layers"]) == 10
    assert found["outputs"][0]["name"] == "logits"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert {p.name for p in tmp_path.glob("m.*.json")} == {
        f"m.{name}.json" for name in ("error", "bits", "bytes", "local", "accumulated", "sqnr")
    }


def test_compare_sorts_and_limits(model: Path, out: Path) -> None:
    told = run("compare", out, model, "--sort", "accumulated", "--limit", 2, "--length", 64).stdout
    assert "compared on 1 sample (64 tokens)" in told
    assert "layers by accumulated SQNR, worst first (2 of 10)" in told


def test_explain_with_the_model(model: Path, out: Path) -> None:
    story = json.loads(run("explain", out, "lm_head", "--model", model, "--json").stdout)[0]["story"]
    assert "local" in story
    assert "rank" in story


def test_compare_refuses_two_kinds_of_data(model: Path, out: Path) -> None:
    told = run("compare", out, model, "--text", model / "config.json", "--data", model / "model.safetensors", code=2)
    assert "give one of them" in told.output
