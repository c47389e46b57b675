"""report: one page, complete, escaped, and asking the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny_models import Tied, mlp
from torch import nn

import fxquant
from fxquant.errors import SaveError
from fxquant.program import Program, Step
from fxquant.show import page
from fxquant.show.html import embedded, report
from fxquant.show.page import page_data
from fxquant.show.summary import summarize

SVG = "http://www.w3.org/2000/svg"
VOID = {"meta", "input", "rect", "br", "link", "img"}


class Balanced(HTMLParser):
    """Fails on an element that is closed twice or never; collects names, ids, links and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [str(named[k]) for k in ("href", "src") if k in named]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return parser


@pytest.fixture(scope="module")
def program() -> Program:
    rules = {"rules": [{"match": "up", "keep": True}, {"match": "*", "weight": "e3m2/channel"}]}
    return fxquant.compile(Tied(), {"tokens": torch.randint(0, 50, (2, 5))}, config=rules).program


def test_the_page_is_whole_and_self_contained(program: Program) -> None:
    page = report(program, title="Tied", config={"rules": []})
    found = parse(page)
    assert "://" not in page.replace(SVG, "")  # a name, which is not fetched
    assert "@import" not in page
    assert "url(" not in page.replace("url(#arrow)", "")  # a mark within the page
    assert all(link.startswith("#") and link[1:].split("/")[0] in found.ids for link in found.links)
    assert not {"link", "img", "iframe", "object"} & set(found.tags)
    for text in ("down", "rule &#39;up&#39; keeps it in float", "e3m2/channel", "remove_dead#2", "linear_wq"):
        assert text in page


def test_every_name_is_escaped(program: Program) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    step = Step(bad, (), (), f"%{bad} : float32[1] = {bad}  # {bad}", 0.1)
    spoiled = Program(program.gm, program.signature, [*program.trace, step])
    page = report(spoiled, title=bad, config=bad)
    assert bad not in page
    assert "onerror=alert(1)&gt;" in page
    assert "img" not in parse(page).tags


def test_a_program_without_passes_or_layers() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    from fxquant.capture import capture

    captured = capture(Nothing(), (torch.randn(2, 3),))
    parse(report(captured))
    parse(report(Program(captured.gm, captured.signature)))


def test_graphs_are_stored_once_and_come_back_whole(program: Program) -> None:
    data = page_data(program, summarize(program))
    for step, shown in zip(program.trace, data["steps"], strict=True):
        runs = shown["runs"]
        numbers = [first + k for first, count in zip(runs[::2], runs[1::2], strict=True) for k in range(count)]
        assert [data["lines"][n] for n in numbers] == step.text.splitlines()
    assert len(data["lines"]) == len(set(data["lines"]))
    assert json.loads(embedded(data)) == json.loads(json.dumps(data))


def test_of_a_long_trace_the_last_graphs_are_kept(program: Program) -> None:
    """A step changes all of its lines, so two of four fit; the layers and their numbers stay."""

    def text(op: str) -> str:
        return "\n".join(f"%node_{i} : float32[batch, 4096] = aten.{op}(%node_{i - 1}, 'e3m2')" for i in range(14_000))

    steps = [Step(f"pass_{i}", (), (), text(f"op{i}"), 1.0, 0.1) for i in range(4)]
    long = Program(program.gm, program.signature, [*program.trace, *steps])
    data = page_data(long, summarize(long))
    kept = [step["runs"] is not None for step in data["steps"]]
    assert kept == [False] * (len(kept) - 2) + [True] * 2
    assert len(report(long).encode()) < 5_000_000


def test_a_graph_beyond_all_room_is_cut(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page.BUDGET, "lines", 900)
    data = page_data(program, summarize(program))
    assert sum(map(len, data["lines"])) <= 900
    assert data["lines"][0] == program.trace[-1].text.splitlines()[0]
    assert [bool(step["runs"]) for step in data["steps"]] == [s.text == program.trace[-1].text for s in program.trace]


def test_figures_that_are_not_finite_are_no_figures(program: Program) -> None:
    spoiled = Program(program.gm, program.signature, [Step("p", (), (), "", 0.1, float("nan"))])
    assert page_data(spoiled, summarize(spoiled))["steps"][0]["error"] is None
    parse(report(spoiled))


def test_only_our_own_script_may_run(program: Program) -> None:
    page = report(program)
    code = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_figures_and_a_title_are_shown(program: Program) -> None:
    page = report(program, title="<b>", figures={"Perplexity & more": "8.5768"})
    assert "Perplexity &amp; more" in page
    assert "8.5768" in page
    assert "<title>&lt;b&gt;</title>" in page


def test_the_file_is_written_whole_or_not_at_all(program: Program, tmp_path: Path) -> None:
    page = report(program, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == page
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(SaveError, match=r"cannot write .*give a file in a folder"):
        report(program, tmp_path / "no" / "r.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError):
        report(program, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "r.html"]


def test_the_report_of_a_compiled_model(tmp_path: Path) -> None:
    compiled = fxquant.compile(mlp(), (torch.randn(2, 20),))
    compiled.save(tmp_path / "out")
    fxquant.load(tmp_path / "out").report(tmp_path / "r.html")
    parse((tmp_path / "r.html").read_text())
