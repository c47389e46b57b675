"""Symbolic sizes: small integer expressions over named dimensions, such as ``sequence + 1`` or ``batch*sequence``.

    expr  = term (('+' | '-') term)*
    term  = atom (('*' | '//' | '%') atom)*
    atom  = integer | name | '-' atom | '(' expr ')' | ('Max' | 'Min') '(' expr (',' expr)* ')'

They come from capture and are read back from saved files, so they are parsed here and never evaluated as Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Dim = int | str
"""A size: a number, or an expression over dimension names."""

_TOKEN = re.compile(r"\s*(?:(\d{1,18})|([A-Za-z_][A-Za-z0-9_]{0,63})|(//|[-+*%(),]))")
_BINARY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}
_CALLS: dict[str, Callable[[list[int]], int]] = {"Max": max, "Min": min}
_MAX_LENGTH, _MAX_DEPTH = 512, 32


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """The value of an expression for given sizes; ValueError for bad syntax, an unknown name or a division by 0."""
    parser = _Parser(text, sizes)
    value = parser.expression(0)
    if parser.peek() != "":
        raise ValueError(f"unexpected {parser.peek()!r} in size {text!r}")
    return value


def names(text: str) -> set[str]:
    """The dimension names in a well-formed expression; ValueError for bad syntax."""
    found: set[str] = set()

    class Any1(Mapping[str, int]):
        def __getitem__(self, key: str) -> int:
            found.add(key)
            return 1

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(())

        def __len__(self) -> int:
            return 0

        def __contains__(self, key: object) -> bool:
            return True

    try:
        evaluate(text, Any1())
    except ZeroDivisionError:  # x // (a - b) with every name 1: the syntax is fine
        pass
    return found


class _Parser:
    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"size expression of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
        self.sizes, self.tokens, at = sizes, list[str](), 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"unexpected {text[at:].strip()[0]!r} in size {text!r}")
            self.tokens.append(match[0].strip())
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if (got := self.take()) != token:
            raise ValueError(f"expected {token!r}, got {got or 'the end'!r}")

    def expression(self, depth: int) -> int:
        value = self.term(depth)
        while self.peek() in ("+", "-"):
            value = _BINARY[self.take()](value, self.term(depth))
        return value

    def term(self, depth: int) -> int:
        value = self.atom(depth)
        while self.peek() in ("*", "//", "%"):
            value = _BINARY[self.take()](value, self.atom(depth))
        return value

    def atom(self, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError(f"size expression nested deeper than {_MAX_DEPTH}")
        token = self.take()
        if token.isdigit():
            return int(token)
        if token == "-":
            return -self.atom(depth + 1)
        if token == "(":
            value = self.expression(depth + 1)
            self.expect(")")
            return value
        if token in _CALLS:
            self.expect("(")
            values = [self.expression(depth + 1)]
            while self.peek() == ",":
                self.take()
                values.append(self.expression(depth + 1))
            self.expect(")")
            return _CALLS[token](values)
        if token.isidentifier():
            if token not in self.sizes:
                raise ValueError(f"unknown dimension {token!r}")
            return self.sizes[token]
        raise ValueError(f"unexpected {token or 'end'!r} in a size expression")
