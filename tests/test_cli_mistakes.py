"""Mistakes at the command line: each ends in one message of what was wrong and what to do, and writes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_language import save_tiny
from typer.testing import CliRunner

from fxquant import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model, what was compiled from it, one without language, and files that are none."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("mistakes")
    save_tiny(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    result = CliRunner().invoke(cli.app, ["compile", str(folder / "model"), "-o", str(folder / "out")])
    assert result.exit_code == 0
    assert "--html report.html" in result.stdout.splitlines()[-1]
    (folder / "typo.yaml").write_text("rules: [{match: '*.q_porj', weight: e3m2}, {match: '*', weight: e3m2}]")
    (folder / "syntax.yaml").write_text('rules: [{match: "*" weight: e3m2}]')
    (folder / "empty.yaml").touch()
    (folder / "noise.bin").write_bytes(b"\xff\xfe\x00")
    return folder


MISTAKES = (
    ("compile model -c W6A16-E3M3 -o x", "did you mean 'W6A16-E3M2'"),
    ("compile model -c nowhere.yaml -o x", "does not exist; give a file that is there, or a recipe's name"),
    ("compile model -c syntax.yaml -o x", "syntax.yaml:1:21: this is not valid YAML: expected ',' or '}'"),
    ("compile model -c empty.yaml -o x", "is empty; expected the key rules"),
    ("compile model -c noise.bin -o x", "is a file of another kind; expected a recipe's name, or a path that ends in"),
    ("compile model -c model -o x", "is a folder; expected a recipe's name"),
    ("compile model -c typo.yaml -o x", "matches no layer (did you mean '*.q_proj'"),
    ("compile out -o x", "compiled already (fxquant inspect shows it"),
    ("compile vit -c W4A16-GPTQ -o x", "gptq needs calibration data, which this command makes of text"),
    ("compile vit --kv-cache -o x", "compile without kv_cache (--kv-cache)"),
    ("inspect model", "is not compiled; compile it first: fxquant compile model -o OUT"),
    ("inspect out/graph.json", "lies in a compiled model; give its folder, out"),
    ("inspect out --html nowhere/report.html", "there is no folder nowhere; create it first"),
    ("inspect out --html vit", "vit is a folder; give the name of a file"),
    ("inspect nowhere.onnx", "nowhere.onnx does not exist"),
    ("generate model hello", "compile it first"),
    ("export out -o out.txt", "name it out.onnx, or say --format"),
    ("compare out vit", "it takes pixel_values, and out takes input_ids"),
    ("eval vit", "no language model; give its inputs with --data FILE"),
    ("eval out --against vit --length 16", "vit takes pixel_values"),
    ("config init model -o mine.txt", "name it mine.yaml"),
    ("allocate model --bits 4 -o nowhere/mixed.yaml", "there is no folder nowhere"),
    ("allocate model --bits 4 -o mixed.yaml --candidate e9m9", "--candidate e9m9: unknown format"),
    ("allocate model --bits 4 -o mixed.yaml --keep lm_haed --windows 1 --length 16", "did you mean 'lm_head'"),
    ("recommend model --target-size 1MB -o nowhere/mine.yaml", "there is no folder nowhere"),
    ("recommend vit --max-error 0", "--max-error 0.0: expected more than 0"),
    ("sensitivity model --svg nowhere/x.svg", "there is no folder nowhere"),
)


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_message_and_leaves_nothing(
    place: Path, line: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    result = CliRunner().invoke(cli.app, line.split(), catch_exceptions=False, env={"COLUMNS": "400"})
    assert result.exit_code in (1, 2)
    assert told in result.output
    assert sorted(place.rglob("*")) == before


def test_windows_longer_than_the_positions_say_so(place: Path) -> None:
    import transformers
    from tiny_language import CHARACTERS, tiny_tokenizer

    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(place / "gpt2")
    tiny_tokenizer().save_pretrained(place / "gpt2")
    run = CliRunner().invoke
    result = run(cli.app, ["eval", str(place / "gpt2"), "--windows", "1", "--length", "64"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "cannot be run on windows of 64 tokens" in result.output
    assert "give a smaller --length" in result.output
    assert run(cli.app, ["eval", str(place / "gpt2"), "--windows", "1", "--length", "32"]).exit_code == 0


def test_a_missing_package_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "fxquant.codegen.onnx_metadata", raising=False)
    result = CliRunner().invoke(cli.app, ["inspect", str(place / "nowhere.onnx")], catch_exceptions=False)
    assert result.exit_code == 1
    assert "this needs the Python package onnx" in result.output
    assert "pip install" in result.output
