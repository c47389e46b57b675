"""Where in a YAML or JSON text a value stands, for errors that name a line; and keys that are given twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import yaml

from fxquant.errors import ConfigError

Place = tuple[int, int]
"""Line and column, from 1."""


def tree(text: str) -> yaml.Node | None:
    """The text as nodes that know their places; JSON is read as YAML, None where that is not the same (tabs)."""
    try:
        found = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, yaml.Node) else None


def place(root: yaml.Node, location: Sequence[str | int]) -> Place:
    """The place of the value at ``location``, or of the last part of the way to it that is there.

    ``("rules", 0, "weight")``; where the last part is a key, the key's own place. Parts that no node has are passed
    over: names that pydantic puts between.
    """
    node, mark = root, root.start_mark
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value == part:
                    node, mark = value, key.start_mark
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and 0 <= part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
    return mark.line + 1, mark.column + 1


def syntax_error(error: Exception) -> tuple[str, str]:
    """Where a text cannot be read, as ``:line:column`` or nothing, and why, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f":{mark.line + 1}:{mark.column + 1}", " ".join(filter(None, (error.problem, error.context)))
    if isinstance(error, json.JSONDecodeError):
        return f":{error.lineno}:{error.colno}", error.msg
    return "", " ".join(str(error).split())


def check_keys(root: yaml.Node, where: str) -> None:
    """Raise a ConfigError for a key that one mapping has twice: YAML would take the last and say nothing."""
    for node in _mappings(root, set()):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name != "<<" and name in seen:
                line, column = key.start_mark.line + 1, key.start_mark.column + 1
                raise ConfigError(
                    f"{where}:{line}:{column}: key {name!r} is there twice, first in line {seen[name]}; the first "
                    f"would be ignored: take one of them out"
                )
            if name is not None:
                seen[name] = key.start_mark.line + 1


def _mappings(node: yaml.Node, done: set[int]) -> Iterator[yaml.MappingNode]:
    if id(node) in done:  # an alias
        return
    done.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, done)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item, done)
