"""compare_models: two compiled models side by side: sizes, formats, errors, bytes, passes, configs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant.layers import find_layers
from fxquant.program import Program
from fxquant.rewrite import tensors
from fxquant.show.summary import LayerSummary, Summary, summarize, weight_uses
from fxquant.show.units import percent, plural, size, table

SHOWN = 20
"""Layers in ``str``."""


class Config(Protocol):
    """What a model was compiled with."""

    def to_dict(self) -> dict[str, Any]: ...


class Model(Protocol):
    """A compiled model."""

    @property
    def program(self) -> Program: ...
    @property
    def config(self) -> Config: ...


@dataclass(frozen=True, slots=True)
class Side:
    """One layer in one of the models: format, method, bytes stored, error of the weight."""

    format: str
    method: str | None
    bytes: int
    error: float | None


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """A layer in both models, or in one (the other None).

    ``changed``: the share of its stored bytes (codes, scales, zero points) that differ; 0 where all are the same, None
    where they are of different formats or shapes.
    """

    name: str
    shape: tuple[int, ...]
    a: Side | None
    b: Side | None
    changed: float | None = None

    @property
    def same(self) -> bool:
        return self.a == self.b and self.changed == 0


@dataclass(frozen=True, slots=True)
class ModelDifference:
    """``reasons``: why the models are not of one architecture, empty where they are; ``names`` are for people.

    ``sizes``: of each model ``bytes``, ``bytes_before``, ``bytes_per_weight``, ``quantized`` layers, output ``error``.
    ``passes`` as labels; ``config``: the unified diff of both configs as YAML; ``tensors``: others that differ.
    """

    names: tuple[str, str]
    reasons: tuple[str, ...]
    sizes: tuple[dict[str, Any], dict[str, Any]]
    layers: tuple[LayerDifference, ...]
    passes: tuple[tuple[str, ...], tuple[str, ...]]
    config: str
    tensors: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both compute the same: layers, passes' results and other tensors; configs may differ in words."""
        return not self.reasons and not self.tensors and all(layer.same for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, limit: int = SHOWN) -> Iterator[str]:
        """The text: totals, then what differs, ``limit`` layers of it."""
        yield from self._totals()
        if self.reasons:
            yield from ("", "the models are not of one architecture:", *(f"  {reason}" for reason in self.reasons))
        yield ""
        if self.same:
            yield "both models hold the same layers, byte for byte"
        else:
            yield from self._layers(limit)
        if self.tensors:
            yield ""
            yield f"other tensors that differ: {', '.join(self.tensors[:5])}{_more(len(self.tensors) - 5)}"
        if self.passes[0] != self.passes[1]:
            yield ""
            yield from (f"passes of {n}: {', '.join(own)}" for n, own in zip(self.names, self.passes, strict=True))
        yield ""
        yield from [self.config] if self.config else ["the configs are the same"]

    def _totals(self) -> Iterator[str]:
        rows: list[tuple[str, ...]] = [("", *self.names)]
        a, b = self.sizes
        rows.append(("size", size(a["bytes"]), size(b["bytes"])))
        rows.append(("float size", size(a["bytes_before"]), size(b["bytes_before"])))
        rows.append(("bytes a weight", *(f"{s['bytes_per_weight'] or 0:.4f}" for s in self.sizes)))
        rows.append(("layers quantized", *(f"{s['quantized']} of {s['layers']}" for s in self.sizes)))
        rows.append(("output error", *("" if s["error"] is None else percent(s["error"]) for s in self.sizes)))
        yield from table(rows)

    def _layers(self, limit: int) -> Iterator[str]:
        both = [layer for layer in self.layers if layer.a is not None and layer.b is not None]
        changed = [layer for layer in both if not layer.same]
        if not changed:
            yield "the layers are the same, byte for byte" if both else "no layer is in both"
            return
        yield f"{plural(len(changed), 'layer')} of {len(both)} differ, those that changed most in error first"
        rows: list[tuple[str, ...]] = [
            ("layer", "format", "", "method", "", "size", "", "error", "", "bytes that differ")
        ]
        changed.sort(key=lambda layer: -abs(_error(layer.a) - _error(layer.b)))
        for layer in changed[:limit]:
            cells = [_pair(layer, kind) for kind in ("format", "method", "bytes", "error")]
            share = "all" if layer.changed is None else percent(layer.changed)
            rows.append((layer.name, *(cell for pair in cells for cell in pair), share))
        yield from table(rows)
        if len(changed) > limit:
            yield f"... {len(changed) - limit} more; --limit shows more, --json all"


def _error(side: Side | None) -> float:
    return side.error or 0.0 if side is not None else 0.0


def _pair(layer: LayerDifference, kind: str) -> tuple[str, str]:
    """A figure of both models; the second is left out where it is the same."""
    show = {"bytes": size, "error": percent}.get(kind, str)
    values = [getattr(side, kind) for side in (layer.a, layer.b)]
    found = ["none" if value is None else show(value) for value in values]
    return found[0], "" if found[0] == found[1] else f"-> {found[1]}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


# --- finding it -------------------------------------------------------------------------------------------------------
_INPUTS = 4
"""So many inputs are named that only one of the models has: a KV cache has two for every layer."""


def compare_models(a: Model, b: Model, names: tuple[str, str] = ("a", "b")) -> ModelDifference:
    """What differs between two compiled models, of different configs or of the same; nothing is run."""
    summaries = summarize(a.program), summarize(b.program)
    mine, theirs = (_by_name(s) for s in summaries)
    stored = [_stored(model.program) for model in (a, b)]
    layers = []
    for name in dict.fromkeys((*mine, *theirs)):
        one, other = mine.get(name), theirs.get(name)
        changed = None if one is None or other is None else _changed(stored[0][name], stored[1][name])
        shape = (one or other).shape  # type: ignore[union-attr]
        layers.append(LayerDifference(name, shape, _side(one), _side(other), changed))
    return ModelDifference(
        names, tuple(_reasons(a.program, b.program, mine, theirs, names)),
        (_sizes(summaries[0]), _sizes(summaries[1])), tuple(layers),
        (_passes(summaries[0]), _passes(summaries[1])), _config_diff(a, b, names),
        tuple(_others(a.program, b.program)),
    )  # fmt: skip


def _by_name(summary: Summary) -> dict[str, LayerSummary]:
    """Layers by name, and those of one name by number; what methods added (factors) is no layer of its own here."""
    found: dict[str, LayerSummary] = {}
    for layer in (q for q in summary.layers if not q.part_of):
        name, count = layer.name, 1
        while name in found:
            count += 1
            name = f"{layer.name}#{count}"
        found[name] = layer
    return found


def _side(layer: LayerSummary | None) -> Side | None:
    return None if layer is None else Side(layer.format, layer.method, layer.bytes_after, layer.error)


def _stored(program: Program) -> dict[str, list[Tensor]]:
    """The tensors that each layer's weight is stored in, by the layer's name (numbered as in ``_by_name``)."""
    held = tensors(program.gm)
    by_node: dict[str, list[Tensor]] = {}
    for use in weight_uses(program.gm):
        by_node[use.layer.name] = [held[name] for name in use.stored]
    for layer in find_layers(program.gm):
        by_node.setdefault(layer.node.name, [layer.weight])
    return {name: by_node[layer.node] for name, layer in _by_name(summarize(program)).items()}


def _changed(a: list[Tensor], b: list[Tensor]) -> float | None:
    """The share of bytes that differ; None for tensors of different kinds."""
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return None
    whole, differ = 0, 0
    for x, y in zip(a, b, strict=True):
        one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
        whole += one.numel()
        differ += int((one != other.to(one.device)).sum())
    return differ / max(whole, 1)


def _reasons(
    a: Program, b: Program, mine: Mapping[str, LayerSummary], theirs: Mapping[str, LayerSummary],
    names: tuple[str, str],
) -> Iterator[str]:  # fmt: skip
    for own, other, which in ((mine, theirs, names[0]), (theirs, mine, names[1])):
        if only := [name for name in own if name not in other]:
            yield f"{plural(len(only), 'layer')} only in {which}, such as {only[0]}"
    shaped = [n for n in mine if n in theirs and _logical(mine[n]) != _logical(theirs[n])]
    if shaped:
        first = shaped[0]
        yield (f"{plural(len(shaped), 'layer')} of another shape, such as {first}: {list(mine[first].shape)} and "
               f"{list(theirs[first].shape)}")  # fmt: skip
    inputs = [{i.name: str(i.type) for i in p.signature.inputs} for p in (a, b)]
    if inputs[0] != inputs[1]:
        for i, taken in enumerate(inputs):
            if only := [f"{name} {kind}" for name, kind in taken.items() if inputs[1 - i].get(name) != kind]:
                more = f" and {len(only) - _INPUTS} more" if len(only) > _INPUTS else ""
                yield f"{plural(len(only), 'input')} only in {names[i]}: {', '.join(only[:_INPUTS])}{more}"


def _logical(layer: LayerSummary) -> list[int]:
    """Sizes of a weight in any order: a float weight may be stored transposed."""
    return sorted(layer.shape)


def _sizes(s: Summary) -> dict[str, Any]:
    layers = [q for q in s.layers if not q.part_of]
    return {
        "bytes": s.bytes_after, "bytes_before": s.bytes_before, "bytes_per_weight": s.bytes_per_weight,
        "layers": len(layers), "quantized": sum(q.spec is not None for q in layers), "error": s.error,
    }  # fmt: skip


def _passes(s: Summary) -> tuple[str, ...]:
    return tuple(step.label for step in s.steps)


def _config_diff(a: Model, b: Model, names: tuple[str, str]) -> str:
    import yaml

    one, other = (yaml.safe_dump(m.config.to_dict(), sort_keys=False).splitlines() for m in (a, b))
    return "\n".join(difflib.unified_diff(one, other, f"config of {names[0]}", f"config of {names[1]}", lineterm=""))


def _others(a: Program, b: Program) -> Iterator[str]:
    """Tensors of no layer's weight that differ or are in one model: scaled norms, scales of inputs, compensation."""
    held = tensors(a.gm), tensors(b.gm)
    weights = {id(t) for p in (a, b) for own in _stored(p).values() for t in own}
    for name in dict.fromkeys((*held[0], *held[1])):
        found = [side[name] for side in held if name in side]
        if any(id(x) in weights for x in found):
            continue
        x, y = found[0], found[-1]
        alike = x.shape == y.shape and x.dtype == y.dtype
        if len(found) == 1 or not alike or not torch.equal(x, y.to(x.device)):
            yield name
