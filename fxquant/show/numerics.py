"""A compiled model against its float original, layer by layer: the figures, as values, text and JSON.

::

    SQNR = 10 log10(||y||^2 / ||y - y'||^2) dB        relative = ||y - y'|| / ||y||
    cosine = y y' / (||y|| ||y'||)

with y the output of a layer in the float model and y' the compiled model's. ``fxquant.comparison`` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxquant.errors import ConfigError, near
from fxquant.observations import Histogram
from fxquant.show import notebook
from fxquant.show.units import percent, plain, plural, table

Sort = Literal["local", "accumulated"]
SHOWN = 20
"""Layers in ``str``."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How far one tensor is from another: ``sqnr`` in dB (inf where they are equal), ``cosine``, ``relative`` L2."""

    sqnr: float
    cosine: float
    relative: float


@dataclass(frozen=True, slots=True)
class LayerError:
    """The output of one layer (or attention product, or what a KV cache stores) in both models.

    ``local``: the quantized layer fed what the float model's layer is fed; ``accumulated``: inside the quantized model.
    None where the outputs are not to be compared, and ``reason`` says why. ``includes`` names layers whose rounding is
    part of ``local``, since nothing between them and this one can be compared. ``nonfinite``: the share of NaN and Inf
    in the compiled model's output, which the errors leave out. ``node`` is the node in the compiled graph, ``spec`` of
    the weight (None: float), ``activation`` of the input. ``weight`` and ``input`` are histograms; of the input it is
    the float model's.
    """

    name: str
    node: str
    type: str
    spec: str | None
    activation: str | None
    local: Errors | None
    accumulated: Errors | None
    nonfinite: float = 0.0
    reason: str = ""
    includes: tuple[str, ...] = ()
    weight: Histogram | None = None
    input: Histogram | None = None

    @property
    def format(self) -> str:
        """``e4m3/channel, inputs e4m3/token``; ``float`` for a weight in float."""
        return (self.spec or "float") + (f", inputs {self.activation}" if self.activation else "")

    def sqnr(self, by: Sort) -> float:
        """The local or accumulated SQNR in dB; NaN where there is none."""
        found = self.local if by == "local" else self.accumulated
        return math.nan if found is None else found.sqnr


@dataclass(frozen=True, slots=True)
class OutputError:
    """One output of the model; ``top1`` is the share of rows of logits with the same largest entry."""

    name: str
    errors: Errors | None
    nonfinite: float = 0.0
    top1: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All layers in graph order, the outputs, and on how much data: ``samples``, ``tokens`` (None: no token ids).

    ``seed`` is that of inputs that were drawn, None where they were given.
    """

    layers: tuple[LayerError, ...]
    outputs: tuple[OutputError, ...]
    samples: int
    tokens: int | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()

    def ranked(self, by: Sort = "local") -> list[LayerError]:
        """Layers by SQNR, worst first: those with NaN or Inf, then by figure; those without a figure are left out."""
        found = [row for row in self.layers if not math.isnan(row.sqnr(by))]
        return sorted(found, key=lambda row: (row.nonfinite == 0, row.sqnr(by)))

    def layer(self, name: str) -> LayerError:
        """The layer of that name; ConfigError where there is none."""
        found = next((row for row in self.layers if row.name == name), None)
        if found is None:
            raise ConfigError(f"no layer {name!r} was compared{near(name, [row.name for row in self.layers])}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that ``json.dumps`` takes; a figure that is not finite becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, by: Sort = "local", limit: int = SHOWN, *, width: int | None = None) -> Iterator[str]:
        """The text: how much data, the outputs, then ``limit`` layers, worst first; columns go that ``width`` lacks."""
        seeded = "" if self.seed is None else f", drawn with seed {self.seed}"
        yield f"compared on {plural(self.samples, 'sample')}{_tokens(self.tokens)}{seeded}"
        yield from (f"note: {text}" for text in self.notes)
        yield ""
        yield from table(self._output_rows())
        rows = self._layer_rows(by, limit)
        if len(rows) > 1:
            yield ""
            yield f"layers by {by} SQNR, worst first ({len(rows) - 1} of {len(self.ranked(by))})"
            yield from _fitted(rows, width)
        left = [row for row in self.layers if row.reason]
        for reason in dict.fromkeys(row.reason for row in left):
            names = [row.name for row in left if row.reason == reason]
            yield ""
            yield f"not compared: {plural(len(names), 'layer')}, such as {names[0]}: {reason}"

    def _output_rows(self) -> list[tuple[str, ...]]:
        return [("output", *_HEADS, "top-1", ""), *map(_output_row, self.outputs)]

    def _layer_rows(self, by: Sort, limit: int) -> list[tuple[str, ...]]:
        head = ("rank", "layer", "format", "local SQNR", "cosine", "relative", "accumulated SQNR", "cosine", "relative")
        return [(*head, ""), *((str(i), *_layer_row(row)) for i, row in enumerate(self.ranked(by)[:limit], 1))]

    def _repr_html_(self) -> str:
        """For notebooks: the outputs, and the worst layers."""
        told = [f"on {plural(self.samples, 'sample')}{_tokens(self.tokens)}", *self.notes]
        worst = notebook.table(self._layer_rows("local", SHOWN))
        title = "fxquant comparison with the float model"
        return notebook.page(title, notebook.lines(*told), notebook.table(self._output_rows()), worst)


def _fitted(rows: Sequence[tuple[str, ...]], width: int | None) -> list[str]:
    """The table of the layers without as many columns as it takes to fit: cosines, relative errors, formats."""
    for left in ((), (4, 7), (4, 5, 7, 8), (2, 4, 5, 7, 8)):
        found = list(table([tuple(cell for i, cell in enumerate(row) if i not in left) for row in rows]))
        if width is None or max(map(len, found)) <= width:
            break
    return found


_HEADS = ("SQNR", "cosine", "relative")


def _tokens(count: int | None) -> str:
    return "" if count is None else f" ({plural(count, 'token')})"


def figures(found: Errors | None) -> tuple[str, str, str]:
    """``("28.1 dB", "0.99924", "3.92 %")``; blank where there are none, ``exact`` where nothing differs."""
    if found is None:
        return "", "", ""
    sqnr = "exact" if math.isinf(found.sqnr) and found.sqnr > 0 else f"{found.sqnr:.1f} dB"
    return sqnr, f"{found.cosine:.5f}", percent(found.relative)


def _output_row(row: OutputError) -> tuple[str, ...]:
    top = "" if row.top1 is None else percent(row.top1)
    return (row.name, *figures(row.errors), top, row.reason or _nonfinite(row.nonfinite))


def _layer_row(row: LayerError) -> tuple[str, ...]:
    shown = ", ".join(row.includes[:2]) + (f" and {len(row.includes) - 2} more" if len(row.includes) > 2 else "")
    note = _nonfinite(row.nonfinite) or (f"with {shown}" if row.includes else "")
    return (row.name, row.format, *figures(row.local), *figures(row.accumulated), note)


def _nonfinite(share: float) -> str:
    return f"{percent(share)} NaN or Inf" if share else ""
