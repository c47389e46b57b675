"""fxquant recommend, as a user types it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_cli import figures, run
from test_cli import model as model  # a fixture
from typer.testing import CliRunner

import fxquant
from fxquant import cli, hf, recommend
from fxquant.cli_recommend import held_out, parse_size
from fxquant.evaluate import perplexity

TEXT = "the of and to in is that it for a " * 40
FEW = ("--candidate", "e2m1/group16:fp16", "--candidate", "e4m3/channel:fp16")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def options(text: Path) -> tuple[Any, ...]:
    return ("--text", text, "--windows", 2, "--length", 40, *FEW, "--tries", 2, "--finalists", 1)


def test_a_size_from_text_to_a_config_that_keeps_it(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    found = figures("recommend", model, "--target-size", "18KB", *options(text), "-o", out)
    loaded = hf.load_model(model)
    held, rest = held_out(loaded, TEXT, 2, 40)
    compiled = fxquant.compile(loaded.model, loaded.example_inputs, out, calibration=rest)
    assert compiled.summary().bytes_after == found["best"]["nbytes"] <= 18_000
    assert found["best"]["perplexity"] == pytest.approx(perplexity(compiled, held).value, rel=1e-4)
    assert out.read_text().startswith("# fxquant recommend for tiny, goal: at most 18000 bytes.")
    assert yaml.safe_load(out.read_text()) == found["best"]["config"]
    assert {tuple(each["methods"]) for each in found["measured"]} == {(), ("gptq",)}
    assert "exists already" in run("recommend", model, "--target-size", "18KB", "-o", out, code=1).stderr


def test_the_table_and_the_next_command(model: Path, text: Path) -> None:
    shown = run("recommend", model, "--max-ppl", "+50%", *options(text)[:-1], 0).stdout
    assert "float" in shown.splitlines()[1]
    assert "\n>" in shown
    assert "recommended: " in shown
    assert f"fxquant compile {model} -c config.yaml -o OUT" in shown
    assert "gptq" not in shown


def test_goals(model: Path, text: Path) -> None:
    assert "one goal" in run("recommend", model, code=2).output
    assert "one goal" in run("recommend", model, "--max-ppl", "2%", "--target-size", "1MB", code=2).output
    assert "per cent" in run("recommend", model, "--max-ppl", "2", code=2).output
    assert (
        "smallest that the candidates reach"
        in run("recommend", model, "--target-size", "1KB", *options(text), code=1).stderr
    )
    assert (
        "3 to measure on and at least one"
        in run("recommend", model, "--max-ppl", "2%", "--text", text, "--windows", 3, "--length", 128, code=1).stderr
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("90MB", 90_000_000), ("90 MiB", 90 << 20), ("1.5gb", 1_500_000_000), ("1234", 1234), ("0.5 KiB", 512)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_what_is_measured_on_is_not_calibrated_on(model: Path) -> None:
    loaded = hf.load_model(model)
    held, rest = held_out(loaded, TEXT, 3, 20)
    assert held.shape == (3, 20)
    assert len(rest) == 16
    ids = torch.tensor(loaded.tokenizer(TEXT)["input_ids"])  # type: ignore[misc]
    assert torch.equal(held.flatten(), ids[: len(ids) // 20 * 20][-60:])
    assert torch.equal(rest[0], ids[:20])


def test_a_model_without_perplexity(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    save_file({"pixel_values": torch.randn(4, 3, 16, 16)}, tmp_path / "data.safetensors")
    given = ("--data", tmp_path / "data.safetensors", *FEW, "--tries", 2)
    found = figures("recommend", tmp_path / "vit", "--max-error", 0.2, *given)
    assert found["measure"] == "error"
    assert found["best"]["loss"] <= 0.2
    assert "is no causal language model" in run("recommend", tmp_path / "vit", "--max-ppl", "2%", code=1).stderr
    assert "without perplexity" in run("recommend", tmp_path / "vit", "--max-ppl", "2%", *given, code=2).output


def test_ctrl_c_shows_what_was_measured(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recommend._Job, "refined", stop)
    args = [str(a) for a in ("recommend", model, "--target-size", "18KB", *options(text))]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 130
    assert "interrupted: 2 measured" in result.stdout
    assert "mixed" in result.stdout
