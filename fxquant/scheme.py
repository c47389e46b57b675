"""What to quantize to: a format, a granularity and a scale format, written ``format/granularity[:scale]``.

``"e3m2/channel"`` is FP6 with one fp32 scale a row, ``"e2m1/group64"`` FP4 with a scale for every 64 weights of a row,
``"int4/group128:fp16"`` stores the scales in fp16. The text is the spec: it parses to a ``QuantSpec`` and prints back
the same, so it can stand in a config, in an fx graph and in a saved file.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import cache

import torch

from fxquant.errors import FormatError, near
from fxquant.formats import Format, IntFormat, parse_format


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"

    def groups(self, cols: int) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale an output channel: a row of the weight's matrix view."""

    def __str__(self) -> str:
        return "channel"

    def groups(self, cols: int) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for every ``size`` consecutive weights of a row; the last group of a row may be shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"group size {self.size} is not positive; expected group<N> with N >= 1")

    def __str__(self) -> str:
        return f"group{self.size}"

    def groups(self, cols: int) -> int:
        return -(-cols // self.size)


Granularity = PerTensor | PerChannel | PerGroup

SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A format, a granularity and the dtype that scales are stored in: the meaning of every code, and of its scale.

    ``real = format.decode(code) * scale`` for float and signed integer formats,
    ``real = (code - zero_point) * scale`` for unsigned integer formats.
    """

    format: Format
    granularity: Granularity
    scale: str = "fp32"

    def __post_init__(self) -> None:
        if self.scale not in SCALE_DTYPES:
            raise FormatError(
                f"unknown scale format {self.scale!r}{near(self.scale, SCALE_DTYPES)}; expected one of "
                f"{', '.join(SCALE_DTYPES)}"
            )

    def __str__(self) -> str:
        suffix = "" if self.scale == "fp32" else f":{self.scale}"
        return f"{self.format}/{self.granularity}{suffix}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale]

    @property
    def has_zero_point(self) -> bool:
        return isinstance(self.format, IntFormat) and not self.format.signed

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of ``scale`` (and ``zero_point``) for a matrix of ``[rows, cols]`` codes."""
        return (1 if isinstance(self.granularity, PerTensor) else rows, self.granularity.groups(cols))

    def group_size(self, cols: int) -> int:
        """How many consecutive weights of a row share a scale."""
        return min(self.granularity.size, cols) if isinstance(self.granularity, PerGroup) else cols


def parse_granularity(text: str) -> Granularity:
    """``tensor``, ``channel`` or ``group<N>``."""
    name = text.strip().lower()
    if name == "tensor":
        return PerTensor()
    if name == "channel":
        return PerChannel()
    if match := re.fullmatch(r"group(\d{1,9})", name):
        return PerGroup(int(match[1]))
    raise FormatError(
        f"unknown granularity {text!r}{near(name, ['tensor', 'channel', 'group64', 'group128'])}; "
        f"expected tensor, channel or group<N>"
    )


@cache
def parse_spec(text: str) -> QuantSpec:
    """The spec written ``format/granularity[:scale]``; the granularity defaults to ``channel``."""
    head, _, scale = text.strip().partition(":")
    name, _, granularity = head.partition("/")
    return QuantSpec(parse_format(name), parse_granularity(granularity or "channel"), scale.lower() or "fp32")


LAYER_TYPES = ("linear", "conv", "matmul", "embedding")
"""Kinds of layer a rule can apply to; ``matmul`` is a product with a batch of weights, such as experts."""


@dataclass(frozen=True, slots=True)
class LayerRule:
    """One row of a config: which layers, and what becomes of them. Rules are ordered, the first match wins.

    ``match`` is a glob over layer paths in which ``*`` crosses dots. Embeddings, and weights tied to one, are
    quantized only by a rule that gives their exact path or lists ``embedding`` among its ``types``.
    """

    match: str
    weight: QuantSpec | None = None
    keep: bool = False
    types: tuple[str, ...] | None = None

    def matches(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.match)

    def takes(self, path: str, kind: str) -> bool:
        """Whether this rule applies to the layer ``path`` of type ``kind``."""
        if not self.matches(path):
            return False
        if self.types is not None:
            return kind in self.types
        return kind != "embedding" or self.match == path
