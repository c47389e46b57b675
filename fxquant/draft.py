"""A commented config for a model: its own layers as globs, what they weigh, and what else they could become.

Repeated blocks are one rule: numbers in paths become ``*``. A rule is written as short as it can be while it takes
exactly the layers of its group; the whole config gives every layer what the recipe gives it.
"""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import yaml

from fxquant.config import Config, Recipe
from fxquant.layers import Layer
from fxquant.outline import Choice, Outline, matrix_shape, spec_nbytes
from fxquant.rewrite import Decline
from fxquant.scheme import LayerRule, PerGroup, QuantSpec, parse_spec
from fxquant.show.units import plural, size

ALTERNATIVES = (
    "e4m3/channel", "e2m3/channel", "e2m1/group16:e4m3", "e2m1/group64", "e2m1/group64:fp16", "int4/group128",
)  # fmt: skip
"""Weight specs whose sizes the config tells."""
GROUPS = (16, 32, 64, 128, 256)
SCHEMA_LINE = "# yaml-language-server: $schema={}"


@dataclass(frozen=True)
class Group:
    """Layers that one rule takes: ``match`` is its glob, ``choice`` what the recipe makes of each of them."""

    match: str
    layers: tuple[Layer, ...]
    choice: Choice


def draft(model: Outline, recipe: Recipe, *, schema: str | None = None) -> str:
    """The recipe as YAML with a rule for every kind of layer of the model, commented.

    ``schema``: the path of the JSON Schema, relative to the file, for a line that editors read.
    """
    taken, left = _groups(model, recipe.config.layer_rules())
    whole = _yaml({"rules": recipe.config.to_dict()["rules"]}).splitlines()
    rules = ["rules:", *(f"  {line}" for line in _rules(model, taken))] if taken else whole
    lines = [
        *([SCHEMA_LINE.format(schema)] if schema else []),
        *_head(model, recipe),
        *rules,
        *_left(model, left),
        *_passes(recipe.config),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


# --- groups -----------------------------------------------------------------------------------------------------------
def _groups(model: Outline, rules: Sequence[LayerRule]) -> tuple[list[Group], list[Group]]:
    """The groups that a rule takes or keeps, in an order in which the first match is the right one, and the others."""
    choices = model.choices(rules)
    found: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in model.layers:
        choice = choices[layer.name]
        key = (_template(layer.name), layer.type, choice.reason if isinstance(choice, Decline) else choice)
        found.setdefault(key, []).append(layer)
    groups = [Group(_shortest(model, own), tuple(own), choices[own[0].name]) for own in found.values()]
    taken = [group for group in groups if isinstance(group.choice, LayerRule)]
    if _follows(model, taken, choices):
        return taken, [group for group in groups if group not in taken]
    each = [  # globs that overlap: paths are exact
        Group(glob.escape(layer.name), (layer,), group.choice) for group in taken for layer in group.layers
    ]
    return each, [group for group in groups if group not in taken]


def _template(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else glob.escape(part) for part in name.split("."))


def _shortest(model: Outline, layers: Sequence[Layer]) -> str:
    """The shortest glob of whole path parts that matches these layers and no other; else the template."""
    if len(layers) == 1:
        return glob.escape(layers[0].name)
    template = _template(layers[0].name)
    parts, own = template.split("."), {layer.name for layer in layers}
    for count in (2, 1, *range(3, len(parts))):  # the parent's name says more: *.mlp.down_proj
        if "*" in parts[:-count]:
            match = ".".join(["*", *parts[-count:]])
            if {name for name in model.by_name if fnmatch.fnmatchcase(name, match)} == own:
                return match
    return template


def _follows(model: Outline, groups: Sequence[Group], choices: dict[str, Choice]) -> bool:
    """Whether a config of these groups gives every layer what it is to get."""
    found = model.choices([rule for group in groups for rule in [_rule(group)]])
    return all(_outcome(found[name]) == _outcome(choices[name]) for name in choices)


def _rule(group: Group) -> LayerRule:
    assert isinstance(group.choice, LayerRule)
    types = (group.layers[0].type,) if _embeds(group) else None
    return LayerRule(group.match, group.choice.weight, group.choice.activation, types=types)


def _embeds(group: Group) -> bool:
    """Whether the rule has to list embeddings: a glob alone leaves them in float."""
    return group.layers[0].type == "embedding" and group.match != group.layers[0].name


def _outcome(choice: Choice) -> tuple[QuantSpec | None, QuantSpec | None]:
    return (None, None) if isinstance(choice, Decline) else (choice.weight, choice.activation)


# --- text -------------------------------------------------------------------------------------------------------------
def _head(model: Outline, recipe: Recipe) -> Iterator[str]:
    rules = recipe.config.layer_rules()
    after = model.quantized_nbytes(rules)
    yield (
        f"# {model.name} ({model.kind}): {plural(len(model.layers), 'layer')}, {size(model.nbytes)} in fp32, "
        f"{size(after)} with this config."
    )
    yield f"# Recipe {recipe.name}: {recipe.summary}."
    yield "#"
    yield "#   fxquant config check FILE MODEL        which rule takes which layers, and what they weigh"
    yield "#   fxquant compile MODEL -c FILE -o OUT"
    yield "#"
    yield "# The first rule that matches a layer wins; * crosses dots. A weight is format/granularity[:scale]; see"
    yield "# fxquant formats. activation: e4m3/token rounds the inputs too; keep: true leaves layers in float."
    if not any(rule.weight for rule in rules):
        return
    yield "# The whole model, with another spec for the weights of every rule below:"
    for text in ALTERNATIVES:
        spec = parse_spec(text)
        other = [LayerRule(r.match, spec if r.weight else None, r.activation, r.keep, r.types) for r in rules]
        yield f"#   {text:<17} {size(model.quantized_nbytes(other))}"


def _rules(model: Outline, groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        rule = _rule(group)
        yield f"# {_about(model, group)}"
        if fitting := _fitting(group):
            yield f"# {fitting}"
        yield f"- match: {json.dumps(group.match)}"
        if rule.weight is not None:
            yield f"  weight: {rule.weight}"
        if rule.activation is not None:
            yield f"  activation: {rule.activation}"
        if rule.types is not None:
            yield f"  types: [{', '.join(rule.types)}]"


def _about(model: Outline, group: Group) -> str:
    """``30 linears [192, 576], 12.7 MiB in fp32, 1.8 MiB as e2m1/group64``; the shapes are ``[out, in]``."""
    spec = group.choice.weight if isinstance(group.choice, LayerRule) else None
    first, *others = [layer.name for layer in model.group(group.layers[0])]
    if len(group.layers) == 1 and others and first != group.layers[0].name:
        return f"{_kinds(group.layers)}, the weight of {first}"
    units = model.units(group.layers)
    told = [_kinds(group.layers), f"{size(sum(layer.weight.nbytes for layer in units))} in fp32"]
    if spec is not None:
        told.append(f"{size(sum(spec_nbytes(layer, spec) for layer in units))} as {spec}")
    if others:
        told.append(f"one weight for {', '.join([first, *others])}")
    return ", ".join(told)


def _fitting(group: Group) -> str:
    """``groups that divide 576: 16, 32, 64``, where the layers have as many inputs; else nothing."""
    spec = group.choice.weight if isinstance(group.choice, LayerRule) else None
    columns = {_columns(layer) for layer in group.layers}
    if spec is None or len(columns) > 1:
        return ""
    (count,) = columns
    fitting = [str(n) for n in GROUPS if count % n == 0]
    told = f"groups that divide {count}: {', '.join(fitting)}" if fitting else f"no group of {GROUPS} divides {count}"
    cut = isinstance(spec.granularity, PerGroup) and count % spec.granularity.size
    return told + (f"; in groups of {spec.group_size(1 << 30)} the last of a row has {cut}" if cut else "")


def _columns(layer: Layer) -> int:
    return prod(matrix_shape(layer)[layer.channel_dims :])


def _kinds(layers: Sequence[Layer]) -> str:
    """``30 linears [576, 192]``: the shapes are ``[out, in]``, as torch has them."""
    shapes = list(dict.fromkeys(matrix_shape(layer) for layer in layers))
    shown = ", ".join(str(list(shape)) for shape in shapes[:3]) + (f" and {len(shapes) - 3} more" if shapes[3:] else "")
    return f"{plural(len(layers), layers[0].type)} {shown}"


def _left(model: Outline, groups: Sequence[Group]) -> Iterator[str]:
    """What no rule takes, and why, as comments; and how to quantize embeddings after all."""
    if not groups:
        return
    yield ""
    yield "# In float:"
    for group in groups:
        assert isinstance(group.choice, Decline)
        yield f"#   {group.match}  {_about(model, group)}"
        yield f"#     {group.choice.reason}"
    for group in groups:
        for layer in [layer for layer in group.layers if layer.type == "embedding"][:1]:
            spec = parse_spec("e4m3/channel")
            saved = layer.weight.nbytes - spec_nbytes(layer, spec)
            match = group.layers[0].name if len(group.layers) == 1 else f"{group.match}"
            types = "" if len(group.layers) == 1 else ", types: [embedding]"
            yield "# To quantize it too (smaller by " + size(saved * len(group.layers)) + "), add to the rules:"
            yield f"#   - {{match: {json.dumps(match)}, weight: {spec}{types}}}"


def _passes(config: Config) -> Iterator[str]:
    if config.passes:
        yield ""
        data = f"; {config.needs_data()} needs calibration data: --calibration TEXT" if config.needs_data() else ""
        yield f"# Methods, in this order{data}."
        yield from _yaml({"passes": config.to_dict()["passes"]}).splitlines()


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML to copy, its source and notes as comments."""
    note = [f"note: {recipe.note}"] if recipe.note else []
    head = [f"{recipe.name}: {recipe.summary}", f"source: {recipe.source}", *note]
    return "".join(f"# {line}\n" for line in head) + _yaml(recipe.config.to_dict())


class _Indented(yaml.SafeDumper):
    """Items of lists stand further in than their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _yaml(value: dict[str, Any]) -> str:
    return str(yaml.dump(value, Dumper=_Indented, sort_keys=False))
