"""Symbolic sizes: small expressions over named dimensions, such as ``sequence + 1`` or ``(batch + 1)//2``.

    expr  = term (('+' | '-') term)*
    term  = unary (('*' | '/' | '//' | '%') unary)*
    unary = '-' unary | atom ['**' unary]
    atom  = number | name | '(' expr ')' | function '(' expr (',' expr)* ')'

with the functions that torch.export writes (``CALLS``). They come from capture and are read back from saved files, so
they are parsed here and never evaluated as Python. Integers are exact; what is a float in torch, as in
``TruncToInt(1.7*ToFloat(batch))``, is a float here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

Dim = int | str
"""A size: a number, or an expression over dimension names."""

Number = int | Fraction | float

_TOKEN = re.compile(r"\s*(?:([0-9]{1,18}(?:\.[0-9]{0,18})?)|([A-Za-z_][A-Za-z0-9_]{0,63})|(//|\*\*|[-+*/%(),]))")
_MAX_LENGTH, _MAX_DEPTH, _MAX_BITS = 512, 32, 4096


def _power(a: Number, b: Number) -> Number:
    bits = 1 if isinstance(a, float) else max(a.numerator.bit_length(), a.denominator.bit_length())
    if b != int(b) or b < 0 or int(b) * bits > _MAX_BITS:
        raise ValueError("a power in a size has an exponent that is not a small whole number")
    return a ** int(b)


_BINARY: dict[str, Callable[[Number, Number], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if isinstance(a, float) else Fraction(a) / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": _power,
}
CALLS: dict[str, tuple[int, Callable[..., Number]]] = {
    "Max": (0, lambda *values: max(values)),
    "Min": (0, lambda *values: min(values)),
    "Mod": (2, _BINARY["%"]),
    "PythonMod": (2, _BINARY["%"]),
    "FloorDiv": (2, _BINARY["//"]),
    "CleanDiv": (2, _BINARY["//"]),
    "CeilDiv": (2, lambda a, b: -(-a // b)),
    "IntTrueDiv": (2, lambda a, b: a / b),
    "FloatTrueDiv": (2, lambda a, b: a / b),
    "ModularIndexing": (3, lambda a, b, c: a // b % c),
    "PowByNatural": (2, _power),
    "ToFloat": (1, float),
    "Identity": (1, lambda a: a),
    "CeilToInt": (1, math.ceil),
    "FloorToInt": (1, math.floor),
    "TruncToInt": (1, math.trunc),
    "RoundToInt": (1, round),
}
"""Functions by name: how many arguments each takes (0: one or more), and its value."""


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """The value of an expression for given sizes.

    Raises ValueError for bad syntax, an unknown name, a division by zero or a value that is not a whole number.
    """
    try:
        value = _parse(text, sizes)
        if value == int(value):
            return int(value)
    except ZeroDivisionError:
        raise ValueError(f"size {text!r} divides by zero for {dict(sizes)}") from None
    except OverflowError:
        raise ValueError(f"size {text!r} is too large for {dict(sizes)}") from None
    raise ValueError(f"size {text!r} is not a whole number for {dict(sizes)}")


def names(text: str) -> set[str]:
    """The dimension names in a well-formed expression; ValueError for bad syntax."""
    found = _Found()
    try:
        _parse(text, found, any_value=True)
    except OverflowError:
        raise ValueError(f"size {text!r} is too large") from None
    return set(found)


_SIGNS: dict[str, Callable[[Number, Number], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether a comparison of two expressions, such as ``batch % 2 != 0``, is true for given sizes.

    Raises ValueError for bad syntax, an unknown name, a division by zero or a number that is too large.
    """
    left, sign, right = _sides(condition)
    try:
        return _SIGNS[sign](_parse(left, sizes), _parse(right, sizes))
    except ZeroDivisionError:
        raise ValueError(f"condition {condition!r} divides by zero for {dict(sizes)}") from None
    except OverflowError:
        raise ValueError(f"condition {condition!r} is too large for {dict(sizes)}") from None


def condition_names(condition: str) -> set[str]:
    """The dimension names in a well-formed comparison; ValueError for bad syntax."""
    left, _, right = _sides(condition)
    return names(left) | names(right)


def _sides(condition: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"([^=!<>]+)(==|!=|<=|>=|<|>)([^=!<>]+)", condition)
    if found is None:
        raise ValueError(f"{condition[:60]!r} is not a comparison of two sizes")
    return found[1].strip(), found[2], found[3].strip()


class _Found(dict[str, int]):
    """Sizes that know every name, and keep those that were asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        self[key] = 1
        return 1


def _parse(text: str, sizes: Mapping[str, int], *, any_value: bool = False) -> Number:
    parser = _Parser(text, sizes, any_value)
    value = parser.expression(0)
    if parser.peek() != "":
        raise ValueError(f"unexpected {parser.peek()!r} in size {text!r}")
    return value


def _tokens(text: str) -> list[str]:
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"size expression of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unexpected {text[at:].strip()[0]!r} in size {text!r}")
        tokens.append(match[0].strip())
        at = match.end()
    return tokens


class _Parser:
    """One pass over the tokens, computing as it goes. With ``any_value`` only the syntax matters: ``x // 0`` is 0."""

    def __init__(self, text: str, sizes: Mapping[str, int], any_value: bool) -> None:
        self.text, self.sizes, self.any_value = text, sizes, any_value
        self.tokens, self.at = _tokens(text), 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if (got := self.take()) != token:
            raise ValueError(f"expected {token!r} in size {self.text!r}, got {got or 'the end'!r}")

    def apply(self, function: Callable[..., Number], *values: Number) -> Number:
        try:
            return function(*values)
        except ZeroDivisionError:
            if self.any_value:
                return 0
            raise

    def expression(self, depth: int) -> Number:
        if depth > _MAX_DEPTH:
            raise ValueError(f"size expression nested deeper than {_MAX_DEPTH}")
        value = self.term(depth)
        while self.peek() in ("+", "-"):
            value = self.apply(_BINARY[self.take()], value, self.term(depth))
        return value

    def term(self, depth: int) -> Number:
        value = self.unary(depth)
        while self.peek() in ("*", "/", "//", "%"):
            value = self.apply(_BINARY[self.take()], value, self.unary(depth))
        return value

    def unary(self, depth: int) -> Number:
        if depth > _MAX_DEPTH:
            raise ValueError(f"size expression nested deeper than {_MAX_DEPTH}")
        if self.peek() == "-":
            self.take()
            return -self.unary(depth + 1)
        value = self.atom(depth)
        if self.peek() == "**":
            self.take()
            return self.apply(_power, value, self.unary(depth + 1))
        return value

    def atom(self, depth: int) -> Number:
        token = self.take()
        if token == "(":
            value = self.expression(depth + 1)
            self.expect(")")
            return value
        if token[:1].isdigit():
            return float(token) if "." in token else int(token)
        if token in CALLS and self.peek() == "(":
            return self.call(token, depth)
        if token.isidentifier():
            if token not in self.sizes:
                raise ValueError(f"unknown dimension {token!r} in size {self.text!r}")
            return self.sizes[token]
        raise ValueError(f"unexpected {token or 'end'!r} in size {self.text!r}")

    def call(self, name: str, depth: int) -> Number:
        self.expect("(")
        values = [self.expression(depth + 1)]
        while self.peek() == ",":
            self.take()
            values.append(self.expression(depth + 1))
        self.expect(")")
        arity, function = CALLS[name]
        if arity and len(values) != arity:
            raise ValueError(f"{name} in size {self.text!r} takes {arity} arguments, got {len(values)}")
        return self.apply(function, *values)
