"""summarize: sizes add up, tied weights count once, and nothing changes when a program is lowered or loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied, mlp
from torch import nn

import fxquant
from fxquant.capture import capture
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Stage, run
from fxquant.rewrite import identity
from fxquant.scheme import LayerRule, parse_spec
from fxquant.show.summary import labelled, ratio, summarize
from fxquant.show.units import percent, seconds, size, table

TOKENS = {"tokens": torch.randint(0, 50, (2, 5))}


def float_bytes(model: nn.Module) -> int:
    every = [*model.parameters(), *model.buffers()]
    return sum({identity(t): t.nbytes for t in every if t.is_floating_point()}.values())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (mlp(), (torch.randn(2, 20),)),
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Tied(), TOKENS),
        (Conv1D(), (torch.randn(2, 3, 10),)),
        (Experts(), (torch.randn(3, 2, 8),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bytes_before_are_those_of_the_float_model(model: nn.Module, inputs: Any) -> None:
    s = fxquant.compile(model, inputs, config="W6A16-E3M2").summary()
    assert s.bytes_before == float_bytes(model)
    assert s.bytes_before - s.bytes_after == s.weight_bytes_before - s.weight_bytes_after > 0
    assert len(s.quantized) >= 1
    assert all(q.reason is None and q.error is not None for q in s.quantized)
    assert all(q.reason for q in s.layers if q.spec is None)


def test_bytes_after_are_the_bytes_on_disk(tmp_path: Path) -> None:
    compiled = fxquant.compile(mlp(), (torch.randn(2, 20),))
    compiled.save(tmp_path / "out")
    s = compiled.summary()
    overhead = (tmp_path / "out" / "model.safetensors").stat().st_size - s.bytes_after
    assert 0 < overhead < 1024  # the file's own header
    assert fxquant.load(tmp_path / "out").summary() == s


def test_qdq_form_and_lowered_form_have_the_same_figures() -> None:
    model, inputs = mlp(), (torch.randn(2, 20),)
    program = capture(model, inputs)
    rules = (LayerRule("*", parse_spec("e3m2/channel")),)
    run(program, [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules})], check=lambda gm: None)
    qdq, lowered = summarize(program), fxquant.compile(model, inputs).summary()
    assert qdq.layers == lowered.layers
    assert (qdq.bytes_before, qdq.bytes_after) == (lowered.bytes_before, lowered.bytes_after)
    assert qdq.bytes_per_weight == lowered.bytes_per_weight


def test_before_quantization_everything_is_float() -> None:
    s = summarize(capture(mlp(), (torch.randn(2, 20),)))
    assert s.bytes_before == s.bytes_after
    assert s.bytes_per_weight is None
    assert [q.reason for q in s.layers] == ["no pass has looked at this layer"] * 2
    assert "same size" in str(s)


def test_a_tied_weight_counts_once() -> None:
    rules = {"rules": [{"match": "embed", "weight": "e3m2/channel"}, {"match": "*", "weight": "e3m2/channel"}]}
    s = fxquant.compile(Tied(), TOKENS, config=rules).summary()
    embed, head = s.layers[0], s.layers[-1]
    assert (embed.name, head.name) == ("embed", "head")
    assert head.tied_to == "embed"
    assert embed.tied_to is None
    assert s.weight_bytes_after == sum(q.bytes_after for q in s.layers if not q.tied_to)
    assert s.weight_bytes_before == 4 * s.weights == 4 * (50 * 24 + 2 * 24 * 40)


def test_layers_in_float_say_why_and_count_as_they_are() -> None:
    rules = {"rules": [{"match": "0", "keep": True}, {"match": "*", "weight": "int4/group8"}]}
    s = fxquant.compile(mlp(), (torch.randn(2, 20),), config=rules).summary()
    first, second = s.layers
    assert (first.spec, first.bits, first.bytes_after) == (None, 32, first.bytes_before)
    assert first.reason == "rule '0' keeps it in float"
    assert (second.spec, second.bits, second.type, second.module) == ("int4/group8", 4, "linear", "Linear")
    assert second.bytes_after == 6 * 32 // 2 + 6 * 4 * 4  # half a byte a code, four fp32 scales a row
    assert [d.layer for d in s.declines] == ["0"]


def test_to_dict_is_json_and_has_no_nan() -> None:
    s = fxquant.compile(mlp(), (torch.full((2, 20), math.nan),)).summary()  # every output is NaN
    found = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert found["error"] is None
    assert found["layers"][0]["shape"] == [32, 20]
    assert found["steps"][0]["name"] == "capture"
    assert str(s)


def test_steps_have_labels_that_are_unique() -> None:
    program = fxquant.compile(mlp(), (torch.randn(2, 20),)).program
    labels = [label for label, _ in labelled(program.trace)]
    assert len(set(labels)) == len(labels)
    assert {"remove_dead", "remove_dead#2"} < set(labels)


def test_units() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 TiB"]
    assert [percent(x) for x in (0, 0.0392, 1e-6, math.nan)] == ["0 %", "3.92 %", "1.0e-04 %", "not finite"]
    assert [seconds(x) for x in (0.123, 12.34, 125)] == ["0.12 s", "12.3 s", "2 min 5 s"]
    assert [ratio(10, 5), ratio(5, 10), ratio(1000, 1001), ratio(0, 0)] == [
        "2.00x smaller", "2.00x larger", "same size", "same size",
    ]  # fmt: skip
    assert table([("a", "n"), ("bb", "10"), ("c", "9")]) == ["a    n", "bb  10", "c    9"]
