"""Progress bars: steps share a bar, what is inside a step has its own, and nothing is left when all is done."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import fxquant
from fxquant.program import quiet
from fxquant.show import console
from fxquant.show.console import _Bars, print_layers, print_table, progress_bars


def names(bars: _Bars) -> list[str]:
    shown = [task.description for task in bars.bars.tasks]
    assert shown == [bar.what.replace("_", " ") for bar in bars.stack]
    return shown


def test_steps_share_a_bar_and_their_parts_nest() -> None:
    bars = _Bars(Progress(disable=True))
    bars("capture", 0, 0)
    assert names(bars) == ["capture"]
    bars("insert_qdq", 0, 3)
    assert names(bars) == ["insert qdq"]  # capture had no end of its own
    bars("quantize weights", 0, 50)
    bars("quantize weights", 7, 50)
    assert names(bars) == ["insert qdq", "quantize weights"]
    assert [task.completed for task in bars.bars.tasks] == [0, 7]
    bars("quantize weights", 50, 50)
    assert names(bars) == ["insert qdq"]
    bars("lower", 1, 3)
    assert names(bars) == ["lower"]
    bars("done", 3, 3)
    assert names(bars) == []


def test_a_part_that_never_ended_goes_with_the_next_step() -> None:
    bars = _Bars(Progress(disable=True))
    bars("load model", 0, 3)
    bars("read weights", 2, 9)
    bars("load tokenizer", 1, 3)
    assert names(bars) == ["load tokenizer"]


def test_no_bars_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        progress("compile", 1, 2)
    assert progress is quiet
    assert capsys.readouterr() == ("", "")


def test_names_in_tables_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer",), [("experts.[red]0[/red]",)])
    assert "experts.[red]0[/red]" in capsys.readouterr().out


def test_a_narrow_terminal_goes_without_spare_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("model.layers.0.self_attn.q_proj", "0.0123", "#" * 40)]
    for width, shown in ((60, False), (100, True)):
        monkeypatch.setattr(console, "stdout", lambda width=width: Console(width=width))
        print_table(("layer", "loss", "bar"), rows, right=("loss",), spare=("bar",))
        lines = capsys.readouterr().out.splitlines()
        assert any(rows[0][0] in line and "0.0123" in line for line in lines)
        assert any("#" in line for line in lines) == shown
        assert max(map(len, lines)) <= width


def test_layers_in_float_say_why_once(capsys: pytest.CaptureFixture[str]) -> None:
    rules = [{"match": "1", "keep": True}, {"match": "0", "keep": True}, {"match": "*", "weight": "e3m2"}]
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    compiled = fxquant.compile(model, (torch.randn(2, 16),), {"rules": rules})
    print_layers(compiled.summary())
    told = capsys.readouterr().out
    assert told.count("float (1)") + told.count("float (2)") == 2
    reasons = {layer.reason for layer in compiled.summary().layers if layer.reason}
    assert all(told.count(reason) == 1 for reason in reasons)
