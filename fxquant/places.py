"""Where in a YAML or JSON text a value stands, for errors that name a line; and keys that are given twice."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from fxquant.errors import ConfigError

Place = tuple[int, int]
"""Line and column, from 1."""
MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_DOTS = 100_000, 32, 1 << 14, 200
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")


class _Loader(yaml.SafeLoader):
    """Stops at what is nested too deep, where PyYAML would take time that grows with the square of the depth."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            at = _at(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
            raise ConfigError(f"{at}: more than {MAX_DEPTH} levels; make it simpler")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _at(mark: yaml.Mark) -> str:
    return f":{mark.line + 1}:{mark.column + 1}"


def tree(text: str) -> yaml.Node | None:
    """The text as nodes that know their places; JSON is read as YAML, None where that is not the same (tabs)."""
    try:
        found = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ConfigError):
        return None
    return found if isinstance(found, yaml.Node) else None


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The data of a YAML text and its nodes, parsed once. ConfigError, beginning with the place, for aliases that grow
    to more than a hundred thousand values, mappings or lists nested too deep, and texts too long for any key."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _check_nodes(root)
        return loader.construct_document(root), root
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Aliases are counted as often as they occur, before the data is made of the nodes."""
    waiting, seen = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        at = _at(node.start_mark)
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{at}: more than {MAX_VALUES} values come of its aliases, or {MAX_DEPTH} levels; write "
                              f"them out, without aliases inside of aliases")  # fmt: skip
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
        elif len(node.value) > MAX_TEXT:
            raise ConfigError(f"{at}: a value has {len(node.value)} characters; at most {MAX_TEXT} are read")


def load_toml(text: str) -> Any:
    """The data of a TOML text. ConfigError for keys of more dots than any has, which tomllib takes long to follow."""
    for number, line in enumerate(text.splitlines(), 1):
        if _QUOTED.sub("", line).count(".") > MAX_DOTS:
            raise ConfigError(f":{number}: more than {MAX_DOTS} dots in a line; write tables in place of dotted keys")
    return tomllib.loads(text)


def check_values(data: Any, where: str) -> None:
    """Raise a ConfigError for whole numbers beyond 64 bits, and values that are nested too deep or too many."""
    waiting, seen = [(data, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{where}: it has more than {MAX_VALUES} values, or {MAX_DEPTH} levels; make it simpler")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{where}: a number has {value.bit_length()} bits; expected at most 63")
        if isinstance(value, Mapping):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(part, depth + 1) for part in value]


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
