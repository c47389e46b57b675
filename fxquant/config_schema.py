"""The JSON Schema (draft 2020-12) of config files, for editors; ``docs/config.schema.json`` is a copy of it.

It is made from what ``load_config`` checks with: fields, defaults, limits and descriptions of the pydantic models, and
the ``grammar`` of specs. What it cannot say: that a pass on float weights comes before those on codes, that a table has
a power of two of values, that a bias lies in -64..64; and it wants lower case.
"""

from __future__ import annotations

import json
from typing import Any

from fxquant import grammar
from fxquant.config import Config, RuleConfig, WeightConfig, check_activation_spec, check_weight_spec
from fxquant.methods import METHODS, MethodOptions, check_cache_spec, check_operand_spec
from fxquant.scheme import LAYER_TYPES, SCALES

NAME = "config.schema.json"
"""What ``fxquant config init --with-schema`` calls the file."""

Schema = dict[str, Any]


def config_schema() -> Schema:
    """The schema as plain data for ``json.dumps``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fxquant config",
        "description": "Which layers of a model become what, and the methods that are run.",
        "type": "object",
        "required": ["rules"],
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string", "description": "Where this schema is, for editors."},
            "rules": {**_told(Config, "rules"), "type": "array", "minItems": 1, "items": {"$ref": "#/$defs/rule"}},
            "passes": {**_told(Config, "passes"), "type": "array", "default": [], "items": {"$ref": "#/$defs/pass"}},
        },
        "examples": [
            {"rules": [{"match": "lm_head", "keep": True}, {"match": "*", "weight": "e2m1/group64"}],
             "passes": [{"gptq": {"float_targets": True}}]}
        ],
        "$defs": {"rule": _rule(), "long_weight": _long_weight(), "pass": _pass(), **_methods()},
    }  # fmt: skip


def schema_text() -> str:
    """The schema as the text of its file."""
    return json.dumps(config_schema(), indent=2) + "\n"


def _told(model: type[Config] | type[RuleConfig] | type[WeightConfig], name: str) -> Schema:
    return {"description": model.model_fields[name].description}


def _rule() -> Schema:
    weight = grammar.spec_pattern(
        grammar.WEIGHT_GRANULARITIES, check_weight_spec, unsigned=grammar.WEIGHT_GRANULARITIES
    )
    given = [{"required": [key], "properties": {key: {"not": {"type": "null"}}}} for key in ("weight", "activation")]
    return {
        "title": "rule",
        "description": RuleConfig.__doc__,
        "type": "object",
        "required": ["match"],
        "additionalProperties": False,
        "properties": {
            "match": {**_told(RuleConfig, "match"), "type": "string", "minLength": 1,
                      "examples": ["*", "*.mlp.*", "lm_head", "model.layers.0.self_attn.q_proj"]},
            "weight": {**_told(RuleConfig, "weight"), "default": None, "anyOf": [
                {"type": "string", "pattern": weight, "examples": _WEIGHTS}, {"$ref": "#/$defs/long_weight"},
                {"type": "null"}]},
            "activation": {**_told(RuleConfig, "activation"), "default": None, "anyOf": [
                {"type": "string", "pattern": _activation(), "examples": _ACTIVATIONS}, {"type": "null"}]},
            "keep": {**_told(RuleConfig, "keep"), "type": "boolean", "default": False},
            "types": {**_told(RuleConfig, "types"), "default": None, "anyOf": [
                {"type": "array", "items": {"enum": list(LAYER_TYPES)}}, {"type": "null"}]},
        },
        # a rule does something, or keeps, and not both
        "if": {"required": ["keep"], "properties": {"keep": {"const": True}}},
        "then": {"properties": {"weight": {"type": "null"}, "activation": {"type": "null"}}},
        "else": {"anyOf": given},
    }  # fmt: skip


_WEIGHTS = ["e3m2/channel", "e2m1/group64", "int4/group128:fp16", "e4m3/channel", "mxfp4", "nvfp4", "int8/channel"]
_ACTIVATIONS = ["e4m3/token", "int8/token", "e2m1/group32", "e4m3/tensor"]


def _activation() -> str:
    single = [name for name, kind in SCALES.items() if kind.outer is None]
    dynamic = ("token", grammar.GROUP)  # zero points go with scales that are found when the model runs
    return grammar.spec_pattern((*dynamic, "tensor"), check_activation_spec, scales=single, unsigned=dynamic)


def _long_weight() -> Schema:
    with_zero = {"format": {"pattern": f"^({grammar.UNSIGNED})$"}}
    return {
        "title": "weight spec, long form",
        "description": WeightConfig.__doc__,
        "type": "object",
        "required": ["format"],
        "additionalProperties": False,
        "properties": {
            "format": {**_told(WeightConfig, "format"), "type": "string", "pattern": grammar.format_pattern(),
                       "examples": ["e2m1", "e3m2", "e4m3", "int4", "uint4", "nf4"]},
            "granularity": {**_told(WeightConfig, "granularity"), "type": "string", "default": "channel",
                            "pattern": f"^({'|'.join(grammar.WEIGHT_GRANULARITIES)})$",
                            "examples": ["channel", "group64"]},
            "scale": {**_told(WeightConfig, "scale"), "type": "string", "default": "fp32",
                      "pattern": grammar.scale_pattern(), "examples": ["fp32", "fp16", "e8m0", "e4m3"]},
        },
        "if": {"properties": with_zero},  # zero points go with scales of plain floats
        "then": {"properties": {"scale": {"pattern": grammar.scale_pattern(grammar.PLAIN_SCALES)}}},
    }  # fmt: skip


# --- methods ----------------------------------------------------------------------------------------------------------
def _pass() -> Schema:
    names = [{"const": name, "description": _about(options)} for name, options in METHODS.items()]
    options = {name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}], "description": _about(options)}
               for name, options in METHODS.items()}  # fmt: skip
    return {
        "title": "pass",
        "description": "A method by its name, which takes the defaults, or by its name with its options.",
        "anyOf": [
            {"type": "string", "oneOf": names},
            {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
             "properties": options},
        ],
        "examples": ["gptq", {"gptq": {"act_order": True}}],
    }  # fmt: skip


def _methods() -> dict[str, Schema]:
    """The options of every method: pydantic's own schema of them, with the specs' grammar put in."""
    found: dict[str, Schema] = {}
    for name, options in METHODS.items():
        schema = options.model_json_schema()
        schema["title"] = name
        schema["description"] = _about(options)
        for option, told in schema["properties"].items():
            told.pop("title", None)
            told.update(_grammar(name, option))
        found[name] = schema
    return found


def _grammar(method: str, option: str) -> Schema:
    """What the options that are specs take; nothing for others."""
    if (method, option) == ("quantize_attention", "spec"):
        single = [name for name, kind in SCALES.items() if kind.outer is None]
        return {"pattern": grammar.spec_pattern(("tensor", "token"), check_operand_spec, scales=single)}
    if (method, option) in (("quantize_kv_cache", "key"), ("quantize_kv_cache", "value")):
        pattern = grammar.spec_pattern(("channel", "token"), check_cache_spec, scales=("fp32", "fp16"))
        return {"pattern": pattern}
    return {}


def _about(options: type[MethodOptions]) -> str:
    return " ".join((options.__doc__ or "").split())
