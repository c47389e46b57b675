"""fxquant config and fxquant recipes: drafts that give what their recipe gives, and checks that tell the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import figures, run
from tiny_models import Tied, tiny_decoder
from torch import nn

import fxquant
from fxquant import draft, hf
from fxquant.config import RECIPES, Recipe, load_config
from fxquant.config_schema import schema_text
from fxquant.errors import ConfigError, FormatError
from fxquant.outline import Outline, _outline, outline
from fxquant.qtensor import packed_nbytes, quantize_tensor
from fxquant.rewrite import fetch, get_attrs
from fxquant.sensitivity import float_program

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}


def llama(**more: Any) -> nn.Module:
    return tiny_decoder("Llama", **more)


MODELS = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": lambda: llama(),
    "gpt2": lambda: tiny_decoder("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "experts": lambda: tiny_decoder("Mixtral", num_local_experts=4),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=64, **SMALL)).eval(),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)).eval(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(found[name])
    return found


def same(a: fxquant.CompiledModel, b: fxquant.CompiledModel) -> None:
    """The same graph on the same bytes."""
    assert a.program.trace[-1].text == b.program.trace[-1].text
    for node in get_attrs(a.program.gm.graph):
        left, right = (fetch(m.program.gm, str(node.target)) for m in (a, b))
        assert torch.equal(left, right)
    assert a.summary().bytes_after == b.summary().bytes_after


FAST = ("tied", "gpt2")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_draft_gives_what_the_recipe_gives(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = "W8A8-FP8" if name in ("untied", "bert") else "W4A16-RTN"
    run("config", "init", folders[name], "--recipe", recipe, "-o", tmp_path / "c.yaml")
    loaded = hf.load_model(folders[name])
    drafted = fxquant.compile(loaded.model, loaded.example_inputs, tmp_path / "c.yaml")
    same(fxquant.compile(loaded.model, loaded.example_inputs, recipe), drafted)
    assert load_config(tmp_path / "c.yaml").passes == load_config(recipe).passes
    told = figures("config", "check", tmp_path / "c.yaml", folders[name])
    summary = drafted.summary()
    assert (told["bytes_before"], told["bytes_after"]) == (summary.bytes_before, summary.bytes_after)
    assert sorted(n for row in told["rules"] for n in row["layers"]) == sorted(q.name for q in summary.quantized)
    assert sorted(row["layer"] for row in told["in_float"]) == sorted(q.name for q in summary.layers if q.reason)


def test_blocks_are_one_rule(folders: dict[str, Path]) -> None:
    text = run("config", "init", folders["tied"], "--recipe", "W4A16-GPTQ").stdout
    config = yaml.safe_load(text)
    assert [rule["match"] for rule in config["rules"]] == [
        "*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.v_proj", "*.self_attn.o_proj", "*.mlp.gate_proj",
        "*.mlp.up_proj", "*.mlp.down_proj",
    ]  # fmt: skip
    assert config["passes"] == [{"gptq": {"float_targets": True}}]
    assert "# 2 linears [16, 32], 4.0 KiB in fp32, 640 B as e2m1/group64" in text
    assert "groups that divide 48: 16; in groups of 64 the last of a row has 48" in text
    assert (
        "model.embed_tokens  1 embedding [64, 32], 8.0 KiB in fp32, one weight for model.embed_tokens, lm_head" in text
    )
    assert "lm_head  1 linear [64, 32], the weight of model.embed_tokens" in text
    assert "embeddings stay in float unless" in text
    assert "gptq needs calibration data" in text
    assert '{match: "model.embed_tokens", weight: e4m3/channel}' in text
    assert "yaml-language-server" not in text


def test_the_sizes_of_alternatives_are_those_of_compiled_models(folders: dict[str, Path]) -> None:
    found = outline(folders["untied"])
    loaded = hf.load_model(folders["untied"])
    for spec in draft.ALTERNATIVES[2:4]:
        config = {"rules": [{"match": "*", "weight": spec}]}
        size = found.quantized_nbytes(load_config(config).layer_rules())
        assert size == fxquant.compile(loaded.model, loaded.example_inputs, config).summary().bytes_after


def test_no_weight_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights that cannot be read do not matter."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders["tied"] / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert len(outline(folder).layers) == len(outline(folders["tied"]).layers) == 16


def _in_memory(model: nn.Module, inputs: Any) -> Outline:
    return _outline("m", type(model).__name__, float_program(model, inputs), by_name=False)


class Overlapping(nn.Module):
    """Paths of which one glob takes in another: layers.*.fc and layers.*.mlp.fc."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "mlp": nn.ModuleDict({"fc": nn.Linear(8, 8)})}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["mlp"]["fc"](layer["fc"](x))
        return x


@pytest.mark.parametrize(
    "rules",
    [
        [{"match": "*", "weight": "e3m2"}],
        [{"match": "layers.*.mlp.fc", "weight": "e2m1"}, {"match": "*", "weight": "e3m2"}],
        [{"match": "layers.*.mlp.fc", "keep": True}, {"match": "*", "weight": "e3m2"}],
        [{"match": "layers.0.*", "weight": "e2m1"}, {"match": "*", "weight": "e3m2"}],
        [{"match": "layers.1.fc", "activation": "e4m3/token"}, {"match": "*", "weight": "e3m2"}],
        [{"match": "*", "keep": True}],
    ],
)
def test_any_rules_are_kept(rules: list[dict[str, Any]]) -> None:
    """Every layer gets from the draft what the rules give it, where globs overlap too."""
    model = _in_memory(Overlapping().eval(), (torch.randn(2, 8),))
    config = load_config({"rules": rules})
    text = draft.draft(model, Recipe("mine", "a test", config))
    drafted = model.choices(load_config(yaml.safe_load(text)).layer_rules())
    wanted = model.choices(config.layer_rules())
    assert {k: draft._outcome(v) for k, v in drafted.items()} == {k: draft._outcome(v) for k, v in wanted.items()}


def test_embeddings_that_a_recipe_takes() -> None:
    model = _in_memory(Tied().eval(), (torch.tensor([[1, 2]]),))
    config = load_config({"rules": [{"match": "*", "weight": "e3m2", "types": ["linear", "embedding"]}]})
    text = draft.draft(model, Recipe("mine", "a test", config))
    assert "one weight for embed, head" in text
    assert "# In float" not in text
    drafted = model.choices(load_config(yaml.safe_load(text)).layer_rules())
    assert all(not hasattr(choice, "reason") for choice in drafted.values())


SPECS = ["e3m2/channel", "e2m1/group64:fp16", "e2m1/group16:e4m3", "e2m1/group256:m2", "uint3/group5", "int4/block3x4",
         "e4m3/tensor", "mxfp4", "nf4", "higgs3/group7:bf16", "e2m1/group8:m1"]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SPECS), st.integers(1, 20), st.integers(1, 80))
def test_bytes_are_known_without_values(spec: str, rows: int, cols: int) -> None:
    q = quantize_tensor(torch.randn(rows, cols), spec)
    stored = [q.packed, q.stored_scale, *(t for t in (q.zero_point, q.tensor_scale) if t is not None)]
    assert packed_nbytes(q.spec, rows, cols) == q.nbytes == sum(t.nbytes for t in stored)


# --- files ------------------------------------------------------------------------------------------------------------
def test_init_replaces_nothing_unless_told(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    out.write_text("mine")
    assert "exists already" in run("config", "init", folders["tied"], "-o", out, code=1).stderr
    assert out.read_text() == "mine"
    run("config", "init", folders["tied"], "-o", out, "--overwrite")
    assert load_config(out)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
    assert "comments need" in run("config", "init", folders["tied"], "-o", tmp_path / "c.json", code=2).output


def test_the_schema_line_resolves(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    run("config", "init", folders["tied"], "-o", out, "--with-schema")
    line = out.read_text().splitlines()[0]
    schema = tmp_path / line.removeprefix("# yaml-language-server: $schema=")
    assert schema.read_text() == schema_text() == run("config", "--schema").stdout
    run("config", "init", folders["tied"], "-o", tmp_path / "d.yaml", "--with-schema")
    schema.write_text("{}")
    assert (
        "is another"
        in run("config", "init", folders["tied"], "-o", tmp_path / "e.yaml", "--with-schema", code=1).stderr
    )
    assert not (tmp_path / "e.yaml").exists()
    assert "beside a file" in run("config", "init", folders["tied"], "--with-schema", code=2).output


def test_drafts_fit_the_schema(folders: dict[str, Path]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    text = run("config", "init", folders["gpt2"], "--recipe", "W4A8-V2-GPTQ-LoRC").stdout
    jsonschema.validate(yaml.safe_load(text), json.loads(schema_text()))


def test_unknown_names(folders: dict[str, Path]) -> None:
    said = run("config", "init", folders["tied"], "--recipe", "W4A16-GTPQ", code=1).stderr
    assert "did you mean 'W4A16-GPTQ'" in said
    assert "does not exist" in run("config", "init", "nowhere", code=1).stderr


# --- check ------------------------------------------------------------------------------------------------------------
def test_check_names_what_is_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('rules:\n  - match: "*"\n    weight: e3m22\n')
    assert f"{file}:3:5: rules.0.weight: unknown format" in run("config", "check", file, code=1).stderr
    file.write_text('rules:\n  - {match: "*.q_prj", weight: e3m2}\n  - {match: "*", weight: e3m2}\n')
    assert "1 rule" not in run("config", "check", file).stdout
    said = run("config", "check", file, folders["tied"], code=1).stderr
    assert "rule '*.q_prj' matches no layer; the layers are model.embed_tokens" in said


def test_check_tells_which_layers_a_rule_takes(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        'rules:\n  - {match: "*.mlp.*", weight: e2m1/group16}\n  - {match: "*.down_proj", weight: e3m2}\n'
        '  - {match: "*.k_proj", keep: true}\n  - {match: "*", weight: e4m3, activation: e4m3/tensor}\npasses: [lorc]\n'
    )
    found = figures("config", "check", file, folders["untied"])
    assert [len(row["layers"]) for row in found["rules"]] == [6, 0, 2, 7]
    assert {row["layer"] for row in found["in_float"]} == {
        "model.embed_tokens", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj",
    }  # fmt: skip
    result = run("config", "check", file, folders["untied"])
    assert "rule '*.down_proj' takes no layer" in result.stderr
    assert "without what lorc may add" in result.stdout
    assert "needs calibration data" in result.stdout
    assert run("config", "check", "W4A8-FP").stdout.count("e2m1/group256") == 1


def test_recipes_are_shown_to_be_copied(tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        text = draft.recipe_yaml(recipe)
        assert load_config(yaml.safe_load(text)) == recipe.config
        assert text.startswith(f"# {name}: ")
        assert recipe.source in text
    shown = run("recipes", "w4a8-fp-m1").stdout
    assert "# source: ZeroQuant-FP" in shown
    (tmp_path / "c.yaml").write_text(shown)
    assert load_config(tmp_path / "c.yaml") == RECIPES["W4A8-FP-M1"].config
    assert figures("recipes", "MXFP4")["config"] == {"rules": [{"match": "*", "weight": "mxfp4"}]}
    assert "or 'MXFP4'?" in run("recipes", "MXFP5", code=1).stderr


def test_config_alone_says_what_there_is() -> None:
    assert "init" in run("config", code=2).output


def test_a_wrong_spec_is_a_config_error() -> None:
    with pytest.raises((ConfigError, FormatError)):
        load_config({"rules": [{"match": "*", "weight": "e9"}]})
