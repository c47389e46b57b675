"""Configs: which layers become what, as data. A recipe's name, a dict, a YAML, TOML or JSON file, or a ``Config``.

rules:                                   # ordered, the first match wins; * crosses dots
  - {match: "*.down_proj", weight: "e3m2/channel"}
  - {match: "lm_head", keep: true}
  - {match: "*", weight: {format: e2m1, granularity: group64, scale: fp32}}
passes: [{gptq: {act_order: true}}]      # methods to run after the weights are quantized, in order
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from fxquant import files, places
from fxquant.errors import ConfigError, near
from fxquant.methods import METHODS, MethodOptions, method_options
from fxquant.recipes import ROWS
from fxquant.scheme import LayerRule, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, parse_spec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightConfig(_Strict):
    """The long form of a weight spec: ``{format: e2m1, granularity: group64, scale: fp32}``."""

    format: str = Field(
        min_length=1, description="e<E>m<M> of at most 8 bits, int2 to int8, uint2 to uint8, nf4, higgs4, lut(<values>)"
    )
    granularity: str = Field(
        "channel", min_length=1, description="what shares a scale: tensor, channel, group<N> or block<R>x<C>"
    )
    scale: str = Field(
        "fp32", min_length=1, description="how scales are stored: fp32, fp16, bf16, e8m0, e4m3, e5m3, m1, m2"
    )

    def spec(self) -> QuantSpec:
        return parse_spec(f"{self.format}/{self.granularity}:{self.scale}")


def _named_pass(value: Any) -> Any:
    """``- gptq`` means ``- gptq: {}``."""
    if isinstance(value, str):
        return {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"{str(value)[:60]!r} is no pass; expected a name, or one name with a mapping of its options")
    return {name: {} if options is None else options for name, options in value.items()}


def _check_pass(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, options in value.items():
        method_options(name, options)
    return value


PassConfig = Annotated[dict[str, dict[str, Any]], BeforeValidator(_named_pass), AfterValidator(_check_pass)]


def _form(value: Any) -> str:
    """Which form of a weight spec ``value`` is in, so that its errors are those of one form only."""
    return "long" if isinstance(value, (Mapping, WeightConfig)) else "short"


Weight = Annotated[Annotated[str, Tag("short")] | Annotated[WeightConfig, Tag("long")], Discriminator(_form)]


class RuleConfig(_Strict):
    """One rule: a glob over layer paths and what the layers it matches become."""

    match: str = Field(
        min_length=1, description="glob over layer paths; * crosses dots; the first rule that matches wins"
    )
    weight: Weight | None = Field(None, description="format/granularity[:scale], such as e3m2/channel")
    activation: str | None = Field(
        None, description="format/token, format/group<N> or format/tensor: what the inputs of the layers are rounded to"
    )
    keep: bool = Field(False, description="leave the layers in float")
    types: tuple[Literal["linear", "conv", "matmul", "embedding"], ...] | None = Field(
        None, description="only layers of these types; by default all but embeddings, unless match is an exact path"
    )

    @field_validator("weight")
    @classmethod
    def _known_weight(cls, value: str | WeightConfig | None) -> str | WeightConfig | None:
        if value is not None:
            check_weight_spec(_spec_of(value))
        return value

    @field_validator("activation")
    @classmethod
    def _known_activation(cls, value: str | None) -> str | None:
        if value is not None:
            check_activation_spec(parse_spec(value), value)
        return value

    @model_validator(mode="after")
    def _does_something(self) -> RuleConfig:
        if (self.weight is not None or self.activation is not None) == self.keep:
            raise ValueError(f"rule {self.match!r} needs a weight, an activation or keep: true, and not both")
        return self

    def rule(self) -> LayerRule:
        weight = None if self.weight is None else _spec_of(self.weight)
        activation = None if self.activation is None else parse_spec(self.activation)
        return LayerRule(self.match, weight, activation, self.keep, self.types)


class Config(_Strict):
    """A whole config. ``rules`` are ordered; ``passes`` are methods by name, each with its options.

    Raises ConfigError, a ValueError, for values that are not valid.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(error, "config")) from error

    rules: tuple[RuleConfig, ...] = Field(
        min_length=1, description="which layers become what; ordered, the first rule that matches a layer wins"
    )
    passes: tuple[
        Annotated[dict[str, dict[str, Any]], BeforeValidator(_named_pass), AfterValidator(_check_pass)], ...
    ] = Field((), description="methods to run, in order; none by default")

    @field_validator("passes")
    @classmethod
    def _ordered_passes(cls, value: tuple[dict[str, dict[str, Any]], ...]) -> tuple[dict[str, dict[str, Any]], ...]:
        names = [name for entry in value for name in entry]
        late = [i for i, name in enumerate(names) if METHODS[name].on == "codes"]
        if late and (early := [name for name in names[late[0] :] if METHODS[name].on == "float"]):
            raise ValueError(f"pass {early[0]!r} works on float weights and must come before {names[late[0]]!r}, "
                             f"which works on their codes")  # fmt: skip
        last = [i for i, name in enumerate(names) if METHODS[name].last]
        if last and (early := [name for name in names[last[0] :] if not METHODS[name].last]):
            raise ValueError(
                f"pass {names[last[0]]!r} makes up for what the others left and must come after {early[0]!r}"
            )
        return value

    def layer_rules(self) -> tuple[LayerRule, ...]:
        return tuple(rule.rule() for rule in self.rules)

    def needs_data(self) -> str | None:
        """What in this config needs calibration data, None where nothing does."""
        needy = [name for name, options in self.methods() if options.calibrated]
        static = [rule.activation for rule in self.rules if rule.activation and parse_spec(rule.activation).static]
        return needy[0] if needy else f"activation {static[0]!r}" if static else None

    def methods(self) -> tuple[tuple[str, MethodOptions], ...]:
        """The methods to run, in order, each with its options."""
        return tuple((name, method_options(name, options)) for entry in self.passes for name, options in entry.items())

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


def check_weight_spec(spec: QuantSpec) -> None:
    """Raise a ValueError unless a weight can be of ``spec``."""
    if spec.dynamic or (isinstance(spec.granularity, PerChannel) and spec.granularity.axis):
        raise ValueError(f"{spec}: weights take tensor, channel, group<N> or block<R>x<C>")


def check_activation_spec(spec: QuantSpec, text: str = "") -> None:
    """Raise a ValueError unless activations can be of ``spec``, which was written ``text``."""
    text = text or str(spec)
    if not isinstance(spec.granularity, (PerToken, PerGroup, PerTensor)):
        raise ValueError(
            f"activation {text!r}: activations take {spec.format}/token or {spec.format}/group<N>, whose scales are "
            f"found when the model runs, or {spec.format}/tensor, one scale from calibration data"
        )
    if spec.kind.outer is not None:
        raise ValueError(f"activation {text!r}: scales of activations are fp32, fp16, bf16, e8m0, e5m3 or m1")
    if spec.has_zero_point and spec.static:
        raise ValueError(f"activation {text!r}: static scales are symmetric; expected int<N> or a float format")


def _spec_of(value: str | WeightConfig) -> QuantSpec:
    return parse_spec(value) if isinstance(value, str) else value.spec()


@dataclass(frozen=True)
class Recipe:
    """A config with a name, a line that says what it is, where it comes from, and how it differs from that."""

    name: str
    summary: str
    config: Config
    source: str = ""
    note: str = ""


RECIPES: dict[str, Recipe] = {
    row.name: Recipe(row.name, row.summary, Config(**row.config), row.source, row.note) for row in ROWS
}
"""Linears and convolutions are quantized; embeddings, and weights tied to one, stay in float."""

_MAX_BYTES = 1 << 17
"""128 KiB: some two thousand rules, one a line."""
_LOADERS: dict[str, Callable[[str], tuple[Any, yaml.Node | None]]] = {
    ".yaml": places.load_yaml,
    ".yml": places.load_yaml,
    ".json": lambda text: (json.loads(text), places.tree(text)),
    ".toml": lambda text: (places.load_toml(text), None),
}
"""The data of a text, and the nodes that know where in it a value stands, where it can be told."""

ConfigLike = str | Path | Mapping[str, Any] | Config


def load_config(config: ConfigLike) -> Config:
    """A Config from a recipe's name, a path to a YAML, TOML or JSON file, a mapping or a Config. Raises ConfigError."""
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return _validated(config, "config")
    if not isinstance(config, (str, Path)):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a recipe name, a path, an fxquant.Config or a dict such as "
            f"{{'rules': [{{'match': '*', 'weight': 'e3m2/channel'}}]}}"
        )
    by_name = {name.lower(): recipe for name, recipe in RECIPES.items()}
    if str(config).lower() in by_name:
        return by_name[str(config).lower()].config
    path = Path(config)
    if path.suffix.lower() in _LOADERS:
        return _from_file(path)
    suffixes = ", ".join(_LOADERS)
    if path.exists():
        kind = "a folder" if path.is_dir() else "a file of another kind"
        raise ConfigError(
            f"config {str(path)!r} is {kind}; expected a recipe's name, or a path that ends in {suffixes}"
        )
    raise unknown_recipe(str(config), f", or a path that ends in {suffixes}")


def unknown_recipe(name: str, more: str = "") -> ConfigError:
    """The error for a name that no recipe has: those that are near, and where all are listed."""
    return ConfigError(
        f"unknown recipe {name!r}{near(name.upper(), RECIPES)}; expected one of the {len(RECIPES)} that the command "
        f"fxquant recipes lists{more}"
    )


def _from_file(path: Path) -> Config:
    try:
        text = files.text(path, _MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(
            f"config {str(path)!r} does not exist; give a file that is there, or a recipe's name (fxquant recipes "
            f"lists them); fxquant config init MODEL writes one for a model"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {str(path)!r}: {error}; give a file of UTF-8 text") from error
    kind = path.suffix.lower()
    try:
        data, root = _LOADERS[kind](text)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        at, why = places.syntax_error(error)
        raise ConfigError(
            f"{path}{at}: this is not valid {path.suffix[1:].upper()}: {why}; mend it: fxquant recipes NAME prints "
            f"a config that is valid"
        ) from error
    if not isinstance(data, Mapping):
        holds = "is empty" if data is None else f"holds a {type(data).__name__} and no mapping"
        raise ConfigError(
            f"config {str(path)!r} {holds}; expected the key rules: fxquant recipes NAME prints a whole one"
        )
    if root is not None:
        places.check_keys(root, str(path))
    return _validated({key: value for key, value in data.items() if key != "$schema"}, str(path), root)


def _validated(data: Mapping[str, Any], where: str, root: yaml.Node | None = None) -> Config:
    places.check_values(data, where)
    if unnamed := [key for key in data if not isinstance(key, str) or key == "self"]:
        raise ConfigError(f"{where}: unknown key {unnamed[0]!r}; expected {', '.join(Config.model_fields)}")
    try:
        return Config(**data)
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise ConfigError(_describe(error.__cause__, where, root)) from error.__cause__


def _describe(error: ValidationError, where: str, root: yaml.Node | None = None) -> str:
    """A line for each error, but for those that only follow from one inside the same value; ``root`` knows places."""
    found = error.errors()
    inner = [item["loc"] for item in found]
    first = [item for item in found if not any(loc[: len(item["loc"])] == item["loc"] != loc for loc in inner)]
    lines = []
    for item in first:
        at = "" if root is None else ":{}:{}".format(*places.place(root, item["loc"]))
        lines.append(_line(item, f"{where}{at}"))
    return "\n".join(lines)


def _line(item: Any, where: str) -> str:
    """One line for a pydantic error: where it is, what was given, what is allowed."""
    location = ".".join(str(part) for part in item["loc"] if part not in ("long", "short"))
    if item["type"] == "extra_forbidden":
        known = _keys(item["loc"])
        name = str(item["loc"][-1])
        return f"{where}: unknown key {location!r}{near(name, known)}; expected {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: the key {location} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["loc"][-1:] == ("short",):
        message = f"{str(item['input'])[:60]!r} is no spec; expected a text such as e3m2/channel, or {_LONG}"
    if item["type"] in ("tuple_type", "list_type"):
        message = f"it is {str(item['input'])[:60]!r}; expected a list"
    return f"{where}: {location or 'config'}: {message}"


_LONG = "a mapping with format, granularity and scale"


def _keys(location: tuple[Any, ...]) -> list[str]:
    if "long" in location:
        return list(WeightConfig.model_fields)
    return list(RuleConfig.model_fields if "rules" in location else Config.model_fields)
