"""What to quantize to: a format, a granularity and a scale format, written ``format/granularity[:scale[.rounding]]``.

``"e3m2/channel"`` is FP6 with one fp32 scale a row, ``"e2m1/group64"`` FP4 with a scale for every 64 weights of a row,
``"int4/group128:fp16"`` stores the scales in fp16, ``"e2m1/group32:e8m0"`` is MXFP4, ``"e2m1/group16:e4m3"`` NVFP4. The
text is the spec: it parses to a ``QuantSpec`` and prints back the same, so it can stand in a config, in an fx graph and
in a saved file. ``PRESETS`` names the common ones.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from fxquant.errors import FormatError, near
from fxquant.formats import Format, IntFormat, PowerFormat, parse_format
from fxquant.grids import FloatFormat

Block = tuple[int, int]
"""Rows and columns of a matrix that share a scale."""


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"

    def block(self, rows: int, cols: int) -> Block:
        return rows, cols


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for every index of dimension ``axis``; 0 is the output channel of a weight."""

    axis: int = 0

    def __str__(self) -> str:
        return f"channel{self.axis or ''}"

    def block(self, rows: int, cols: int) -> Block:
        return 1, cols


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale for every row of the last dimension, found when the tensor is quantized: for activations."""

    def __str__(self) -> str:
        return "token"

    def block(self, rows: int, cols: int) -> Block:
        return 1, cols


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for every ``size`` consecutive weights of a row; the last group of a row may be shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"group size {self.size} is not positive; expected group<N> with N >= 1")

    def __str__(self) -> str:
        return f"group{self.size}"

    def block(self, rows: int, cols: int) -> Block:
        return 1, min(self.size, cols)


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale for every ``rows`` x ``cols`` block of the matrix view; blocks at the edges may be smaller."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise FormatError(f"block {self.rows}x{self.cols} is empty; expected block<R>x<C> with R, C >= 1")

    def __str__(self) -> str:
        return f"block{self.rows}x{self.cols}"

    def block(self, rows: int, cols: int) -> Block:
        return min(self.rows, rows), min(self.cols, cols)


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


@dataclass(frozen=True, slots=True)
class ScaleKind:
    """How scales are stored, and how an ideal scale becomes a stored one.

    ``dtype`` is the dtype of ``QuantizedTensor.scale``; where ``format`` is set, its values lie on that format's grid
    and are stored as its codes, one byte each. ``outer``: a second fp32 scale above it, one a tensor or one a row.
    ``roundings`` are the ways to a power of two, the default first (``scales`` defines them); "" is none. Under e4m3 it
    is the tensor's scale that is rounded.
    """

    dtype: torch.dtype
    format: Format | None = None
    outer: Literal["tensor", "row"] | None = None
    roundings: tuple[str, ...] = ()


_POWERS = ("ceil", "floor", "round", "mse")
SCALES: dict[str, ScaleKind] = {
    "fp32": ScaleKind(torch.float32),
    "fp16": ScaleKind(torch.float16),
    "bf16": ScaleKind(torch.bfloat16),
    "e8m0": ScaleKind(torch.float32, PowerFormat(), roundings=("floor", "ceil", "round", "even", "mse")),  # OCP MX
    "e4m3": ScaleKind(torch.float32, parse_format("e4m3"), outer="tensor", roundings=("", "ceil")),  # NVFP4
    "e5m3": ScaleKind(torch.float32, parse_format("ue5m3")),
    "m1": ScaleKind(torch.float32, PowerFormat(), roundings=("mse", *_POWERS[:3])),  # ZeroQuant-FP, M1
    "m2": ScaleKind(torch.float32, PowerFormat(), outer="row", roundings=("mse", *_POWERS[:3])),  # ZeroQuant-FP, M2
}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A format, a granularity and how scales are stored: the meaning of every code, and of its scale.

    ``real = format.decode(code) * scale`` for float, codebook and signed integer formats,
    ``real = (code - zero_point) * scale`` for unsigned integer formats; where the scale kind has an outer scale,
    ``scale * tensor_scale`` takes the place of ``scale``.
    """

    format: Format
    granularity: Granularity
    scale: str = "fp32"
    rounding: str = ""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise FormatError(
                f"unknown scale format {self.scale!r}{near(self.scale, SCALES)}; expected one of {', '.join(SCALES)}"
            )
        allowed = self.kind.roundings
        if not self.rounding and allowed:
            object.__setattr__(self, "rounding", allowed[0])
        if self.rounding and self.rounding not in allowed:
            wanted = f"expected one of {', '.join(filter(None, allowed))}" if allowed else f"{self.scale} takes none"
            raise FormatError(f"unknown scale rounding {self.rounding!r}{near(self.rounding, allowed)}; {wanted}")
        if isinstance(self.format, PowerFormat) or (isinstance(self.format, FloatFormat) and not self.format.signed):
            raise FormatError(f"{self.format} is a format for scales; choose a signed format for values")
        if self.has_zero_point and self.kind.format is not None:
            raise FormatError(f"{self.format} has a zero point and takes fp32, fp16 or bf16 scales, not {self.scale}")

    def __str__(self) -> str:
        default = (self.kind.roundings or ("",))[0]
        rounding = "" if self.rounding == default else f".{self.rounding}"
        suffix = "" if self.scale == "fp32" else f":{self.scale}{rounding}"
        return f"{self.format}/{self.granularity}{suffix}"

    @property
    def kind(self) -> ScaleKind:
        return SCALES[self.scale]

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.kind.dtype

    @property
    def has_zero_point(self) -> bool:
        return isinstance(self.format, IntFormat) and not self.format.signed

    @property
    def dynamic(self) -> bool:
        """Whether scales are found when a tensor is quantized, not before."""
        return isinstance(self.granularity, PerToken)

    @property
    def static(self) -> bool:
        """Whether an activation of this spec has one scale, found on calibration data."""
        return isinstance(self.granularity, PerTensor)

    def block(self, rows: int, cols: int) -> Block:
        """How many rows and columns of a ``[rows, cols]`` matrix share a scale."""
        return self.granularity.block(rows, cols)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of ``scale`` (and ``zero_point``) for a matrix of ``[rows, cols]`` codes."""
        high, wide = self.block(rows, cols)
        return math.ceil(rows / max(high, 1)), math.ceil(cols / max(wide, 1))

    def outer_shape(self, rows: int) -> tuple[int, int] | None:
        """The shape of ``tensor_scale``, None where the scale kind has none."""
        return {"tensor": (1, 1), "row": (rows, 1)}[self.kind.outer] if self.kind.outer else None

    def group_size(self, cols: int) -> int:
        """How many consecutive weights of a row share a scale."""
        return self.block(1, cols)[1]


def parse_granularity(text: str) -> Granularity:
    """``tensor``, ``channel``, ``channel<axis>``, ``group<N>``, ``block<R>x<C>`` or ``token``."""
    name = text.strip().lower()
    if name == "tensor":
        return PerTensor()
    if name == "token":
        return PerToken()
    if match := re.fullmatch(r"channel(\d?)", name):
        return PerChannel(int(match[1] or 0))
    if match := re.fullmatch(r"group(\d{1,9})", name):
        return PerGroup(int(match[1]))
    if match := re.fullmatch(r"block(\d{1,9})x(\d{1,9})", name):
        return PerBlock(int(match[1]), int(match[2]))
    raise FormatError(
        f"unknown granularity {text!r}{near(name, ('tensor', 'channel', 'group64', 'group128', 'block128x128'))}; "
        f"expected tensor, channel, group<N>, block<R>x<C> or token"
    )


PRESETS: dict[str, str] = {
    "fp4": "e2m1/channel", "fp6": "e3m2/channel", "fp8": "e4m3/channel",
    "mxfp4": "e2m1/group32:e8m0", "mxfp6": "e3m2/group32:e8m0", "mxfp6_e3m2": "e3m2/group32:e8m0",
    "mxfp6_e2m3": "e2m3/group32:e8m0", "mxfp8": "e4m3/group32:e8m0", "mxfp8_e4m3": "e4m3/group32:e8m0",
    "mxfp8_e5m2": "e5m2/group32:e8m0", "mxint8": "int8/group32:e8m0", "nvfp4": "e2m1/group16:e4m3",
    "nf4": "nf4/group64",
}  # fmt: skip
"""Specs by name: OCP MX v1.0 (blocks of 32, E8M0), NVFP4 (blocks of 16, E4M3 under an fp32 tensor scale), NF4."""


@cache
def parse_spec(text: str) -> QuantSpec:
    """The spec written ``format/granularity[:scale[.rounding]]``, or the name of a preset.

    The granularity defaults to ``channel``. Raises FormatError.
    """
    name = text.strip().lower()
    head, _, scale = PRESETS.get(name, name).partition(":")
    format, _, granularity = head.partition("/")
    scale, _, rounding = scale.partition(".")
    return QuantSpec(parse_format(format), parse_granularity(granularity or "channel"), scale or "fp32", rounding)


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
    activation: QuantSpec | None = None
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


def rule_for(rules: Sequence[LayerRule], path: str, kind: str) -> LayerRule | None:
    """The first rule that applies to the layer ``path`` of type ``kind``."""
    return next((rule for rule in rules if rule.takes(path, kind)), None)
