"""What notebooks show: valid HTML without a script, names escaped."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from tiny_models import mlp

import fxquant
from fxquant.show import notebook

VOID = {"br", "hr", "img", "meta"}


class Checked(HTMLParser):
    """Every tag is closed in order; no script, no link to elsewhere, no colour that suits only light or dark."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "p", "strong", "pre", "table", "tr", "th", "td"}
        for name, value in attrs:
            assert name == "style"
            assert "url" not in str(value)
            assert "#" not in str(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def compiled() -> fxquant.CompiledModel:
    torch.manual_seed(0)
    return fxquant.compile(mlp(), (torch.randn(2, 20),))


def test_a_compiled_model_shows_its_summary(compiled: fxquant.CompiledModel) -> None:
    shown = "".join(Checked(compiled._repr_html_()).text)
    summary = compiled.summary()
    for line in str(summary).splitlines():
        for cell in line.split("  "):
            assert cell.strip() in shown
    assert compiled._repr_html_() == summary._repr_html_()


def test_a_comparison_shows_outputs_and_layers() -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    found = fxquant.compile(model, (torch.randn(2, 20),)).compare(model)
    shown = "".join(Checked(found._repr_html_()).text)
    assert "local SQNR" in shown
    assert "e3m2/channel" in shown


def test_names_are_escaped() -> None:
    html = notebook.page("<b>", notebook.lines("a < b", "<script>"), notebook.table([("<i>", "n"), ("x&y", "1")]))
    assert "".join(Checked(html).text) == "<b>a < b\n<script><i>nx&y1"
