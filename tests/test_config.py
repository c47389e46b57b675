"""Configs: every way to give one means the same; every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant import pipeline
from fxquant.config import METHODS, RECIPES, Config, load_config
from fxquant.errors import ConfigError
from fxquant.methods import GptqOptions
from fxquant.scheme import parse_spec

SHORT = {"rules": [{"match": "*", "weight": "e2m1/group64"}]}
LONG = {"rules": [{"match": "*", "weight": {"format": "e2m1", "granularity": "group64", "scale": "fp32"}}]}


def test_short_and_long_form_mean_the_same() -> None:
    assert load_config(SHORT).layer_rules() == load_config(LONG).layer_rules()
    assert load_config(SHORT).layer_rules()[0].weight == parse_spec("e2m1/group64")


def test_methods_have_their_options_and_defaults() -> None:
    ((name, options),) = load_config({**SHORT, "passes": ["gptq"]}).methods()
    assert (name, options) == ("gptq", GptqOptions())
    ((_, options),) = load_config({**SHORT, "passes": [{"gptq": {"act_order": False}}]}).methods()
    assert options.model_dump() == GptqOptions().model_dump() | {"act_order": False}
    assert set(METHODS) == set(pipeline.METHODS)


def test_files(tmp_path: Path) -> None:
    files = {
        "c.json": json.dumps(SHORT),
        "c.yaml": 'rules:\n  - {match: "*", weight: e2m1/group64}\n',
        "c.toml": '[[rules]]\nmatch = "*"\nweight = "e2m1/group64"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name) == load_config(str(tmp_path / name)) == load_config(SHORT)


def test_every_recipe_loads_by_name_in_any_case() -> None:
    for name, recipe in RECIPES.items():
        assert load_config(name.lower()) is recipe.config
        assert Config.model_validate(recipe.config.to_dict()) == recipe.config


def test_the_recipes_of_zeroquant() -> None:
    passes = {name: [method for method, _ in recipe.config.methods()] for name, recipe in RECIPES.items()}
    assert passes["W4A16-GPTQ-LoRC"] == ["gptq", "lorc"]
    for name, weight in {"W4A8-FP": "fp32", "W4A8-FP-M1": "m1", "W4A8-FP-M2": "m2", "W8A8-INT": "fp32"}.items():
        (rule,) = RECIPES[name].config.layer_rules()
        assert rule.activation is not None
        assert rule.activation.dynamic
        assert rule.weight.scale == weight
        assert passes[name] == ["gptq"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("W6A16-E3M", "unknown recipe 'W6A16-E3M' .did you mean 'W6A16-E3M2'"),
        ("nowhere.yaml", "config 'nowhere.yaml' does not exist"),
        (7, "config is a int; expected"),
        ({"rules": []}, "rules"),
        ({}, "rules"),
        ({"self": [], **SHORT}, "unknown key 'self'; expected rules, passes"),
        ({"rule": [], **SHORT}, "unknown key 'rule' .did you mean 'rules'.*expected rules, passes"),
        ({"rules": [{"match": "*", "wieght": "e3m2"}]}, "unknown key 'rules.0.wieght' .did you mean 'weight'"),
        ({"rules": [{"match": "*", "weight": {"format": "e3m2", "group": 64}}]}, "unknown key 'rules.0.weight.group'"),
        ({"rules": [{"match": "*", "weight": "e3m22/channel"}]}, "rules.0.weight: unknown format 'e3m22'"),
        ({"rules": [{"match": "*", "weight": "e3m2/row"}]}, "unknown granularity 'row'"),
        ({"rules": [{"match": "*"}]}, "needs a weight, an activation or keep: true"),
        ({"rules": [{"match": "*", "weight": "e3m2", "keep": True}]}, "needs a weight, an activation or keep: true"),
        (
            {"rules": [{"match": "*", "weight": "e3m2", "activation": "e4m3/channel"}]},
            "activations take e4m3.token or e4m3.group<N>",
        ),
        ({"rules": [{"match": "*", "weight": "e3m2/token"}]}, "weights take tensor, channel"),
        ({"rules": [{"match": "*", "weight": "e3m2", "types": ["linaer"]}]}, "linear"),
        ({"rules": [{"match": "", "weight": "e3m2"}]}, "rules.0.match"),
        ({**SHORT, "passes": ["gtpq"]}, "unknown pass 'gtpq' .did you mean 'gptq'"),
        ({**SHORT, "passes": [{"smoth": {"alpha": 0.8}}]}, "unknown pass 'smoth' .did you mean 'smooth'"),
        ({**SHORT, "passes": [{"gptq": {"act_ordr": True}}]}, "unknown option 'act_ordr' .did you mean 'act_order'"),
        (
            {**SHORT, "passes": [{"gptq": {"damp_percent": -1}}]},
            "damp_percent=-1: .*expected auto, or a number from 0 to 1",
        ),
        ({**SHORT, "passes": [{"gptq": {"act_order": "no"}}]}, "act_order='no'"),
    ],
)
def test_mistakes_are_named(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule",
    [
        {"match": "*", "weight": "e3m22"},
        {"match": "*"},
        {"match": "*", "weight": {"format": "e3m2", "group": 64}},
        {"match": "*", "weight": {"format": "e3m22"}},
        {"match": "*", "weight": 5},
    ],
)
def test_one_mistake_is_one_line(rule: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"rules": [rule, {"match": "*", "keep": True}]})
    assert len(str(caught.value).splitlines()) == 1


def test_every_mistake_has_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"rules": [{"match": "", "weight": "e3m22"}], "pass": []})
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == [
        " rules.0.match", " rules.0.weight", " unknown key 'pass' (did you mean 'passes'?); expected rules, passes",
    ]  # fmt: skip


def test_a_config_made_by_hand_raises_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"config: rules\.0\.weight: unknown format 'e9'"):
        Config(rules=[{"match": "*", "weight": "e9"}])
    with pytest.raises(ConfigError, match="unknown pass 'awq'"):
        Config(**SHORT, passes=["awq"])


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ({"format": "E2M1", "granularity": "Group64", "scale": "FP16"}, "e2m1/group64:FP16"),
        ({"format": "e2m1", "granularity": "group32", "scale": "e8m0.ceil"}, "e2m1/group32:e8m0.ceil"),
        ({"format": "fp6"}, "fp6"),
    ],
)
def test_the_long_form_reads_what_the_short_form_reads(long: dict[str, str], short: str) -> None:
    rules = [load_config({"rules": [{"match": "*", "weight": w}]}).layer_rules() for w in (long, short)]
    assert rules[0] == rules[1]


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "rules: ["), ("a.json", "{"), ("a.toml", "="), ("a.yaml", "- 1"),
                                            ("a.yaml", "!!python/object/apply:os.system ['true']")])  # fmt: skip
def test_files_that_are_no_config(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        load_config(tmp_path / name)
