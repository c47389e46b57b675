"""Observations as JSON and back; what is read is checked like the rest of a saved model."""

from __future__ import annotations

from fxquant.encoding import Json, MalformedError, decode_number, encode_value, fields, items, text, whole
from fxquant.observations import Candidate, Histogram, LayerObservation, Observations

_BINS = 1024
_UNITS = ("value", "scale", "log2")
_PARTS = ("weight", "scale", "input")


def encode_observations(value: Observations) -> Json:
    return {"rows": value.rows, "inputs": value.inputs, "layers": [_encode_layer(layer) for layer in value]}


def _encode_layer(layer: LayerObservation) -> Json:
    found = {part: _encode_histogram(getattr(layer, part)) for part in _PARTS}
    return {
        "name": layer.name,
        **{part: value for part, value in found.items() if value is not None},
        "error": None if layer.error is None else encode_value(layer.error),
        "candidates": [[c.spec, encode_value(c.error), c.nbytes] for c in layer.candidates],
    }


def _encode_histogram(value: Histogram | None) -> Json:
    if value is None:
        return None
    return [encode_value(value.low), encode_value(value.high), list(value.counts), value.below, value.above, value.unit]


def decode_observations(value: Json) -> Observations:
    """Raises MalformedError for what ``encode_observations`` does not write."""
    found = fields(value, "the observations", ["rows", "inputs", "layers"])
    layers = tuple(_decode_layer(layer) for layer in items(found["layers"], "the observed layers"))
    return Observations(
        layers, whole(found["rows"], "the rows observed", 0), text(found["inputs"], "the observed inputs")
    )


def _decode_layer(value: Json) -> LayerObservation:
    found = fields(value, "an observed layer", ["name", "error", "candidates"], _PARTS)
    where = f"the observation of {text(found['name'], 'the name of an observed layer')!r}"
    parts = {part: _decode_histogram(found[part], where) for part in _PARTS if part in found}
    error = None if found["error"] is None else decode_number(found["error"], where)
    candidates = tuple(_decode_candidate(row, where) for row in items(found["candidates"], where))
    return LayerObservation(found["name"], error=error, candidates=candidates, **parts)


def _decode_candidate(value: Json, where: str) -> Candidate:
    if not isinstance(value, list) or len(value) != 3:
        raise MalformedError(f"a candidate of {where} is not a spec, an error and a size")
    return Candidate(text(value[0], where, 64), decode_number(value[1], where), whole(value[2], where, 0))


def _decode_histogram(value: Json, where: str) -> Histogram:
    if not isinstance(value, list) or len(value) != 6 or value[5] not in _UNITS:
        raise MalformedError(f"a histogram of {where} is not limits, counts and a unit of {', '.join(_UNITS)}")
    counts = tuple(whole(count, where, 0) for count in items(value[2], where))
    if not 0 < len(counts) <= _BINS:
        raise MalformedError(f"a histogram of {where} has {len(counts)} bins; expected 1 to {_BINS}")
    low, high = decode_number(value[0], where), decode_number(value[1], where)
    if not low < high:
        raise MalformedError(f"a histogram of {where} goes from {low} to {high}")
    return Histogram(low, high, counts, whole(value[3], where, 0), whole(value[4], where, 0), value[5])
