"""Folders of packed weights from the command line, their README.md, and what other commands say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.errors import LoadError, ModelError, SaveError

hf = pytest.importorskip("transformers")

from tiny_language import save_tiny, tiny_language_model, tiny_tokenizer  # noqa: E402

from fxquant.checkpoints import load_model, load_packed  # noqa: E402
from fxquant.hf import model_card, save  # noqa: E402


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", torch.bfloat16)


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    done = run("compile", source, "-c", "MXFP6", "-o", source.parent / "packed", "--format", "hf")
    assert done.exit_code == 0, done.output
    return source.parent / "packed"


# --- the command line -------------------------------------------------------------------------------------------------
def test_compile_writes_a_folder_for_from_pretrained(source: Path, packed: Path) -> None:
    names = {file.name for file in packed.iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    tensors = load_file(packed / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if ".weight_packed." not in name} == {torch.bfloat16}
    assert {t.dtype for name, t in tensors.items() if ".weight_packed." in name} == {torch.uint8}
    assert torch.equal(tensors["model.norm.weight"], load_file(source / "model.safetensors")["model.norm.weight"])
    model = hf.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    reference = fxquant.compile(load_model(source).model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, "MXFP6")
    ids = torch.tensor([[5, 40, 7, 9]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(input_ids=ids).logits, atol=1e-5)


def test_eval_and_generate_take_the_folder(source: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text to be measured on. " * 20)
    figures = {}
    for folder in (source, packed):
        done = run("eval", folder, "--text", tmp_path / "text.txt", "--length", 32, "--json")
        assert done.exit_code == 0, done.output
        figures[folder] = json.loads(done.stdout)["perplexity"]
    assert figures[packed] != figures[source]
    assert figures[packed] == pytest.approx(figures[source], rel=0.2)
    done = run("generate", packed, "To be", "-n", 6, "--json")
    assert done.exit_code == 0, done.output
    model, words = load_packed(packed)
    ids = torch.tensor([words.encode("To be")])
    want = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert json.loads(done.stdout)["tokens"] == [t for t in want.tolist() if t != 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("inspect", "PACKED"),
            "holds no graph; fxquant eval and fxquant generate take it. For everything",
        ),
        (("explain", "PACKED", "lm_head"), "holds no graph"),
        (
            ("compile", "PACKED", "-o", "NEW"),
            "quantized by fxquant already; start from the float model",
        ),
        (
            ("compile", "SOURCE", "-o", "PACKED", "--format", "hf"),
            "exists already; choose another folder, or give",
        ),
        (
            ("compile", "SOURCE", "-o", "SOURCE", "--format", "hf", "--overwrite"),
            "is no model that fxquant packed",
        ),
        (
            ("compile", "SOURCE", "-o", "NEW", "--format", "hf", "--kv-cache"),
            "do not go with --format hf",
        ),
        (("compile", "SOURCE", "-o", "NEW", "--format", "hf", "-c", "W4A16-HIGGS"), "rotate changes more of the graph"),
        (("generate", "PACKED", "a", "--activation-bits", "8"), "--activation-bits is for compiled models"),
        (("generate", "SOURCE", "a"), "is a model that is not compiled"),
    ],
)
def test_what_a_folder_is_not_for_is_said(
    source: Path, packed: Path, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    places = {"SOURCE": source, "PACKED": packed, "NEW": tmp_path / "new"}
    done = run(*[places.get(arg, arg) for arg in args])
    assert done.exit_code == 1
    assert message in done.stderr.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_overwrite_replaces_weights_and_keeps_the_readme(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compile", source, "-o", out, "--format", "hf").exit_code == 0
    (out / "README.md").write_text("my own words")
    done = run("compile", source, "-o", out, "--format", "hf", "-c", "W4A16-RTN", "--overwrite")
    assert done.exit_code == 0, done.output
    assert "README.md was there before and stays as it is" in done.stderr.replace("\n", " ")
    assert (out / "README.md").read_text() == "my own words"
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["weights"].values()
    assert {entry["spec"] for entry in entries} == {"e2m1/group64"}


def test_load_packed_says_what_is_wrong(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights that fxquant packed"):
        load_packed(source)
    (tmp_path / "cut").mkdir()
    for file in packed.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: -50 if file.suffix == ".safetensors" else None])
    with pytest.raises(LoadError, match="is not a valid safetensors file"):
        load_packed(tmp_path / "cut")


# --- the model card ---------------------------------------------------------------------------------------------------
def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_card_says_what_is_in_the_folder(tmp_path: Path) -> None:
    model, data = tiny_language_model(), torch.randint(2, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    config = {
        "rules": [
            {"match": "*.down_proj", "weight": "e3m2/channel"},
            {"match": "*", "weight": "e2m1/group16", "activation": "e4m3/token"},
        ],
        "passes": [{"gptq": {}}, {"lorc": {"rank": 2}}],
    }
    compiled = fxquant.quantize_(model, config, calibration=data)
    save(model, tmp_path / "a", tokenizer=tiny_tokenizer(), base_model="someone/tiny: a model")
    card = (tmp_path / "a" / "README.md").read_text()
    assert front(card)["base_model"] == "someone/tiny: a model"
    assert front(card)["pipeline_tag"] == "text-generation"
    assert front(card)["tags"] == ["fxquant", "quantized", "e2m1", "e3m2"]
    layers = [q for q in compiled.summary().quantized if not q.part_of]
    for spec in ("e2m1/group16", "e3m2/channel"):
        found = [q for q in layers if q.spec == spec]
        rows = [line for line in card.splitlines() if line.startswith(f"| `{spec}`")]
        assert sum(int(row.split("|")[4]) for row in rows) == len(found)
        worst = max(q.error or 0.0 for q in found)
        assert any(f"{100 * worst:.2f} %" in row for row in rows)
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == compiled.config.to_dict()
    assert "from transformers import LlamaForCausalLM" in card
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model_card(again, base_model="someone/tiny: a model") == card


def test_the_bytes_in_the_card_are_those_in_the_file(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    bytes_packed = sum(t.nbytes for name, t in tensors.items() if ".weight_packed." in name)
    card = (packed / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| quantized weights"))
    assert row.split("|")[3].strip() == f"{bytes_packed / 1024:.1f} KiB"
    row = next(line for line in card.splitlines() if line.startswith("| whole model"))
    assert row.split("|")[3].strip() == f"{sum(t.nbytes for t in tensors.values()) / 1024:.1f} KiB"
    assert "base_model" not in front(card)


def test_a_card_and_a_folder_need_packed_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no packed weights to describe; call fxquant.quantize_"):
        save(tiny_language_model(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model = tiny_language_model()
    fxquant.quantize_(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file; give a folder"):
        save(model, tmp_path / "file")
