"""The JSON Schema of configs against ``load_config``: what one takes the other takes, but for what is listed."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fxquant.config import RECIPES, load_config
from fxquant.config_schema import config_schema, schema_text
from fxquant.errors import ConfigError, FormatError
from fxquant.methods import METHODS
from fxquant.scheme import PRESETS, SCALES, parse_spec

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parent.parent
SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def loads(config: Any) -> bool:
    try:
        load_config(config)
    except (ConfigError, FormatError):
        return False
    return True


def valid(config: Any) -> bool:
    return bool(VALIDATOR.is_valid(config))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_published_file_is_the_schema() -> None:
    """Write it anew with: fxquant config --schema > docs/config.schema.json"""
    assert (ROOT / "docs" / "config.schema.json").read_text() == schema_text()


def keys(schema: Any) -> list[dict[str, Any]]:
    """Every schema of a key anywhere inside."""
    if isinstance(schema, dict):
        inner = [found for value in schema.values() for found in keys(value)]
        told = schema.get("properties", {}) if "additionalProperties" in schema else {}
        return [*told.values(), *inner]
    return [found for value in schema for found in keys(value)] if isinstance(schema, list) else []


def test_every_key_is_described() -> None:
    found = keys(SCHEMA)
    assert len(found) > 50
    assert all(len(key.get("description") or "") > 4 for key in found)
    assert all(row["description"] for row in SCHEMA["$defs"]["pass"]["anyOf"][0]["oneOf"])
    assert {row["const"] for row in SCHEMA["$defs"]["pass"]["anyOf"][0]["oneOf"]} == set(METHODS)


def test_defaults_are_those_of_the_options() -> None:
    for name, options in METHODS.items():
        told = {option: schema["default"] for option, schema in SCHEMA["$defs"][name]["properties"].items()}
        assert told == json.loads(options().model_dump_json())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    assert valid(RECIPES[name].config.to_dict())


def test_examples_in_the_schema_and_in_the_docs() -> None:
    examples = [{"rules": [{"match": "*", "weight": text}]} for text in _examples("weight")]
    examples += [{"rules": [{"match": "*", "activation": text}]} for text in _examples("activation")]
    examples += SCHEMA["examples"]
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for language, text in re.findall(r"```(yaml|toml)\n(.*?)```", page.read_text(), re.DOTALL):
            data = yaml.safe_load(text) if language == "yaml" else tomllib.loads(text)
            examples += [data] if isinstance(data, dict) and "rules" in data else []
    assert len(examples) > 12
    for config in examples:
        assert loads(config), config
        assert valid(config), config


def _examples(key: str) -> list[str]:
    return [text for way in SCHEMA["$defs"]["rule"]["properties"][key]["anyOf"] for text in way.get("examples", ())]


RULE = {"match": "*", "weight": "e3m2/channel"}


@pytest.mark.parametrize(
    "config",
    [
        {}, {"rules": []}, {"rules": [{"match": "*"}]}, {"rules": [{**RULE, "keep": True}]}, {"rule": [RULE]},
        {"rules": [{**RULE, "match": ""}]}, {"rules": [{**RULE, "wieght": "e3m2"}]}, {"rules": RULE},
        {"rules": [{**RULE, "types": ["linaer"]}]}, {"rules": [{"weight": "e3m2"}]},
        {"rules": [{"match": 3, "keep": True}]},
        *({"rules": [{"match": "*", "weight": w}]} for w in (
            "e3m22/channel", "e9m9", "int9", "int1/channel", "e3m2/row", "e3m2/token", "e3m2/group", "e3m2/group0",
            "e3m2/group64:fp8", "e3m2/group64:fp16.ceil", "uint4/group64:e8m0", "e3m2/channel1", "fp5", "mxfp5", "e8m0",
            "ue5m3", "lut()", "", 5, "e5m3/channel", "e8m0/channel", "e4m4/channel", "higgs9",
            {"format": "e9"}, {"granularity": "channel"}, {"format": "e3m2", "group": 64}, {"format": "mxfp4"},
            {"format": "uint4", "scale": "m1"}, {"format": "e3m2/group64"}, {"format": "e3m2", "scale": "fp12"})),
        *({"rules": [{"match": "*", "activation": a}]} for a in (
            "e4m3", "e4m3/channel", "e4m3/block2x2", "nvfp4", "fp8", "e4m3/token:m2", "e4m3/token:e4m3",
            "uint8/tensor")),
        *({"rules": [RULE], "passes": p} for p in (
            ["gtpq"], [{"gptq": {"act_ordr": True}}], [{"gptq": {"damp_percent": -1}}], [{"gptq": {"act_order": "no"}}],
            [{"gptq": {}, "lorc": {}}], [{}], [3], "gptq", [{"rotate": {"size": 48}}], [{"lorc": {"rank": 0}}],
            [{"quantize_attention": {"spec": "e4m3/channel"}}], [{"quantize_kv_cache": {"key": "int8/channel:bf16"}}],
            [{"smooth": {"alpha": 1.5}}], [{"gptq": {"clip": "max"}}], [{"gptq": [1]}])),
    ],
    ids=lambda config: json.dumps(config)[:60],
)  # fmt: skip
def test_bad_configs_are_refused_by_both(config: Any) -> None:
    assert not loads(config)
    assert not valid(config)


# --- generated --------------------------------------------------------------------------------------------------------
FLOATS = st.builds(
    lambda u, e, m, s, b: f"{u}e{e}m{m}{s}{b}",
    st.sampled_from(["", "", "", "u"]), st.integers(0, 8), st.integers(0, 7),
    st.sampled_from(["", "", "", "fn", "fnuz", "ieee", "none"]), st.sampled_from(["", "", "b3", "b-2", "b1.5"]),
)  # fmt: skip
INTEGERS = st.builds(lambda u, n: f"{u}int{n}", st.sampled_from(["", "u"]), st.integers(1, 9))
NAMED = st.sampled_from(
    ["nf4", "higgs4", "higgs9", "fp6", "fp8_e4m3", "fp5", "e5m3", "e8m0", "lut(-1,0,0.5,1)", "lut(-1e-2,1)"]
)
FORMATS = st.one_of(FLOATS, INTEGERS, NAMED)
GRANULARITIES = st.sampled_from(
    ["", "tensor", "channel", "token", "group64", "group1", "group0", "block2x3", "block0x2", "row", "group-4"]
)
SCALE = st.builds(
    lambda s, r: s + r, st.sampled_from([*SCALES, "fp8"]), st.sampled_from(["", "", ".ceil", ".even", ".mse", ".up"])
)
SPECS = st.one_of(
    st.builds(
        lambda f, g, s: f + (f"/{g}" if g else "") + (f":{s}" if s else ""), FORMATS, GRANULARITIES,
        st.one_of(st.just(""), SCALE),
    ),
    st.sampled_from([*PRESETS, "mxfp5"]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(SPECS)
def test_specs_of_weights(text: str) -> None:
    config = {"rules": [{"match": "*", "weight": text}]}
    assert valid(config) == loads(config)
    if loads(config):  # what a spec prints is canonical
        assert valid({"rules": [{"match": "*", "weight": str(parse_spec(text))}]})


@settings(max_examples=400, deadline=None)
@given(SPECS)
def test_specs_of_activations(text: str) -> None:
    config = {"rules": [{"match": "*", "activation": text}]}
    assert valid(config) == loads(config)


@settings(max_examples=300, deadline=None)
@given(FORMATS, GRANULARITIES, SCALE)
def test_the_long_form(format: str, granularity: str, scale: str) -> None:
    weight = {"format": format, "granularity": granularity, "scale": scale}
    config = {"rules": [{"match": "*", "weight": weight}]}
    assert valid(config) == loads(config)


@settings(max_examples=200, deadline=None)
@given(st.text("efmintu0123456789/groupchal:.() ,-", max_size=20))
def test_nonsense(text: str) -> None:
    """Whatever the schema takes, the parser takes."""
    config = {"rules": [{"match": "*", "weight": text}]}
    assert loads(config) or not valid(config)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.floats(-1, 3, allow_nan=False),
    st.sampled_from(["auto", "hessian", "mse", "same", "e4m3", "e4m3/token", "int8/channel", "none", "fisher", ""]),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_options_of_methods(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(METHODS)))
    option = data.draw(st.sampled_from([*METHODS[name].model_fields, "bogus"]))
    value = data.draw(VALUES)
    config = {"rules": [RULE], "passes": [{name: {option: value}}]}
    if valid(config):
        assert loads(config), config
    elif loads(config):  # only pydantic's leniency may be between them: true for 1
        taken = getattr(METHODS[name](**{option: value}), option)
        assert isinstance(value, bool), (config, taken)


def test_the_order_of_passes_is_not_in_the_schema() -> None:
    """Known: the schema cannot say it; ``load_config`` does."""
    config = {"rules": [RULE], "passes": ["gptq", "smooth"]}
    assert valid(config)
    with pytest.raises(ConfigError, match="must come before"):
        load_config(config)


def test_a_json_file_may_name_its_schema(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"$schema": "config.schema.json", "rules": [RULE]}))
    assert load_config(tmp_path / "c.json") == load_config({"rules": [RULE]})
    assert valid({"$schema": "config.schema.json", "rules": [RULE]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('rules:\n  - match: "*"\n    weight: e3m22\n', ":3:5: rules.0.weight: unknown format"),
        ('rules:\n  - match: "*"\n    wieght: e3m2\n', ":3:5: unknown key 'rules.0.wieght'"),
        ('rules:\n  - {match: "*", keep: true}\npasses:\n  - gtpq\n', ":4:5: passes.0: unknown pass 'gtpq'"),
        ('rules:\n  - match: a\n  - match: "*"\n    weight: e3m2\n', ":2:5: rules.0: rule 'a' needs"),
        ('rules:\n  - match: a\n    keep: true\n    match: b\n', ":4:5: key 'match' is there twice, first in line 2"),
        ("passes: [gptq]\n", ":1:1: rules: Field required"),
    ],
)  # fmt: skip
def test_mistakes_have_a_line_and_a_column(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(tmp_path / "c.yaml")


def test_places_in_json_and_none_in_toml(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"rules": [\n  {"match": "*", "weight": "e9"}]}')
    with pytest.raises(ConfigError, match=r"c\.json:2:18: rules\.0\.weight"):
        load_config(tmp_path / "c.json")
    (tmp_path / "tabs.json").write_text('{\n\t"rules": [\n\t{"match": "*", "weight": "e9"}]}')
    with pytest.raises(ConfigError, match=r"tabs\.json.*rules\.0\.weight"):
        load_config(tmp_path / "tabs.json")
    (tmp_path / "c.toml").write_text('[[rules]]\nmatch = "*"\nweight = "e9"\n')
    with pytest.raises(ConfigError, match=r"c\.toml: rules\.0\.weight"):
        load_config(tmp_path / "c.toml")


def test_aliases_are_followed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "rules:\n  - {match: a, weight: &w {format: e2m1}}\n  - {match: b, weight: *w}\n"
        "  - {match: c, weight: {<<: *w, scale: fp16}}\n"
    )
    assert [str(rule.weight) for rule in load_config(tmp_path / "c.yaml").layer_rules()] == [
        "e2m1/channel", "e2m1/channel", "e2m1/channel:fp16",
    ]  # fmt: skip


def test_pydantic_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"rules": [RULE], "passes": [{"gptq": {"clip": "max"}}]})
    assert not isinstance(caught.value, ValidationError)
