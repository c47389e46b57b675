"""The report in Chromium: what is drawn, what clicks, keys and searches do; nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.capture import capture
from fxquant.compiled import CompiledModel
from fxquant.program import Program, Step
from fxquant.show.html import report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fxquant[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None and not os.environ.get("FXQUANT_NEEDS_CHROMIUM"):  # .ci/run sets it
    pytest.skip("needs Chromium, such as Debian's package chromium", allow_module_level=True)


@dataclass
class Opened:
    """A page with what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        return [t.strip() for t in self.page.locator(selector).all_inner_texts()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, hash: str = "", **options: Any) -> Opened:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
    found = Opened(page)
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda request: found.asked.append(request.url))
    page.goto(f"file://{path}{hash}")
    return found


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    rules = [
        {"match": "lm_head", "keep": True},
        {"match": "*.down_proj", "weight": "e2m1/group16", "activation": "e4m3/token"},
        {"match": "*", "weight": "e3m2/channel"},
    ]
    tokens = torch.randint(0, 64, (2, 6))
    return fxquant.compile(LlamaForCausalLM(config).eval(), {"input_ids": tokens}, {"rules": rules})


@pytest.fixture(scope="module")
def path(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "r.html"
    compiled.report(path, title="three blocks")
    return path


@pytest.fixture
def at(browser: Any, path: Path) -> Iterator[Any]:
    """Opens the page at a hash; afterwards it has said nothing and asked for nothing but itself."""
    found: list[Opened] = []

    def go(hash: str = "", **options: Any) -> Opened:
        found.append(opened(browser, path, hash, **options))
        return found[-1]

    yield go
    for one in found:
        assert one.said == []
        assert one.asked == [f"file://{path}"] or one.asked[0].startswith(f"file://{path}#")
        assert len(one.asked) == 1
        one.page.close()


def test_tabs_show_one_part_each(at: Any) -> None:
    found = at()
    for link, part in (("Model", "model"), ("Passes", "passes"), ("Trade-offs", "tradeoff"), ("Overview", "overview")):
        found.page.get_by_role("link", name=link, exact=True).click()
        sync_api.expect(found.page.locator(f"#{part}")).to_be_visible()
        assert found.page.locator(".part:visible").count() == 1
    for key, part in (("2", "model"), ("3", "passes"), ("4", "tradeoff"), ("1", "overview")):
        found.page.keyboard.press(key)
        sync_api.expect(found.page.locator(f"#{part}")).to_be_visible()


def test_a_click_on_a_layer_shows_its_numbers_and_its_story(at: Any, compiled: CompiledModel) -> None:
    found = at("#model")
    found.page.locator("#search").fill("layers.1 down_proj linear")
    sync_api.expect(found.page.locator("#found")).to_have_text("1 match")
    found.page.locator("#tree .row.hit").click()
    text = found.page.locator("#detail").inner_text()
    assert text.startswith("model.layers.1.mlp.down_proj")
    for words in ("e2m1/group16", "4-bit float", "e4m3/token", "Weight on the grid", "Scales", "insert_qdq", "lower"):
        assert words in text
    error = next(q.error for q in compiled.summary().layers if q.name == "model.layers.1.mlp.down_proj")
    assert f"{100 * error:.2f} %" in text
    assert found.page.locator("#detail figure .hist").count() > 20
    assert found.page.locator("#graph .box.chosen").count() == 1
    assert found.page.url.endswith("#model/model.layers.1.mlp.down_proj")


def test_the_histogram_has_a_tick_for_each_value_of_the_grid(at: Any) -> None:
    found = at("#model/model.layers.1.mlp.down_proj")
    ticks = found.page.locator("#detail figure .ticks").first.get_attribute("d")
    assert ticks.count("M") == 15  # E2M1: seven magnitudes of each sign, and zero


def test_a_layer_in_float_says_why(at: Any) -> None:
    found = at("#model/lm_head")
    assert "rule 'lm_head' keeps it in float" in found.page.locator("#detail dl").inner_text()


def test_modules_fold_and_unfold(at: Any) -> None:
    found = at("#model")
    found.page.get_by_role("button", name="Fold all").click()
    folded = found.page.locator("#graph .box").count()
    found.page.locator('#graph [data-path="model"]').dblclick()
    inside = found.page.locator("#graph .box").count()
    assert inside > folded
    assert found.page.locator("#graph .box.open").count() == 1
    found.page.locator("#graph .box.open > .title").click()
    assert found.page.locator("#graph .box").count() == folded


def test_the_tree_is_for_the_keyboard(at: Any) -> None:
    found = at("#model")
    focused = "document.activeElement.querySelector('.label').textContent"
    found.page.locator('#tree [role="treeitem"]').first.focus()
    for _ in range(20):
        if found.page.evaluate(focused) == "model":
            break
        found.page.keyboard.press("ArrowDown")
    else:
        pytest.fail("the module model was not reached")
    for key, want in (("ArrowLeft", "false"), ("ArrowRight", "true")):
        found.page.keyboard.press(key)
        assert found.page.evaluate("document.activeElement.getAttribute('aria-expanded')") == want
    found.page.keyboard.press("ArrowRight")
    assert found.page.evaluate(focused) == "embed_tokens"
    found.page.keyboard.press("Enter")
    assert found.page.locator("#detail h3").inner_text() == "model.embed_tokens"


def test_slash_searches_and_enter_goes_from_match_to_match(at: Any) -> None:
    found = at()
    found.page.keyboard.press("/")
    found.page.keyboard.type("e2m1")
    sync_api.expect(found.page.locator("#found")).to_have_text("3 matches")
    names = []
    for _ in range(3):
        found.page.keyboard.press("Enter")
        names.append(found.page.locator("#detail h3").inner_text())
    assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]


def test_boxes_lie_inside_their_module_and_beside_each_other(at: Any) -> None:
    found = at("#model/model.layers.1.self_attn.q_proj")
    wrong = found.page.evaluate("""() => {
        const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
        const apart = (a, b) => before(a, b) || before(b, a);
        const sides = (a, b) => [a.left - b.left, a.top - b.top, b.right - a.right, b.bottom - a.bottom];
        const inside = (a, b) => sides(a, b).every((d) => d >= -1);
        const frame = (box) => box.querySelector(':scope > rect').getBoundingClientRect();
        const wrong = [];
        for (const box of document.querySelectorAll('#graph .box.open')) {
            const inner = Array.from(box.querySelectorAll(':scope > .box')).map(frame);
            inner.forEach((a, i) => {
                if (!inside(a, frame(box))) wrong.push('outside');
                inner.slice(i + 1).forEach((b) => { if (!apart(a, b)) wrong.push('over another'); });
            });
        }
        return wrong;
    }""")
    assert wrong == []
    assert found.page.locator("#graph .box.open").count() >= 4


def test_every_edge_of_the_graph_is_drawn_once(at: Any, compiled: CompiledModel) -> None:
    """All modules unfolded, an edge between operators is a line between their boxes, or from a port to its box."""
    found = at("#model")
    for _ in range(6):
        folded = found.page.locator("#graph [data-path] > .unfold").count()
        if not folded:
            break
        for _ in range(folded):
            found.page.locator("#graph [data-path] > .unfold").first.dispatch_event("click")
    nodes = [n for n in compiled.program.gm.graph.nodes if n.op != "get_attr"]
    assert found.page.locator("#graph [data-node]").count() == len(nodes)
    edges = sum(i.op != "get_attr" for n in nodes for i in set(n.all_input_nodes))
    assert found.page.locator("#graph .edge").count() >= edges * 0.9  # a port stands for all that read it in a module


def test_the_graph_zooms_and_moves(at: Any) -> None:
    found = at("#model")
    world = found.page.locator("#world")
    before = world.get_attribute("transform")
    found.page.get_by_role("button", name="Zoom in").click()
    zoomed = world.get_attribute("transform")
    assert zoomed != before
    found.page.locator("#graph").focus()
    found.page.keyboard.press("ArrowDown")
    assert world.get_attribute("transform") != zoomed
    found.page.get_by_role("button", name="Fit").click()
    assert world.get_attribute("transform") == before


def test_colours_follow_the_format_or_the_error(at: Any) -> None:
    found = at("#model/model.layers.0.mlp.down_proj")
    stripe = found.page.locator("#graph .box.chosen > .stripe")
    by_format = stripe.evaluate("e => getComputedStyle(e).fill")
    assert found.texts("#legend .swatch")[:3] == ["e3m2/channel", "e2m1/group16", "float"]
    found.page.locator("#colour").select_option(label="weight error")
    assert stripe.evaluate("e => getComputedStyle(e).fill") != by_format
    assert "%" in found.page.locator("#legend").inner_text()


def test_layers_as_a_table_can_be_sorted(at: Any) -> None:
    found = at("#model")
    found.page.get_by_role("button", name="Layers", exact=True).click()
    found.page.locator("#layers").get_by_role("button", name="Weight error").click()
    errors = [t for t in found.texts("#layers tbody tr td:nth-child(5)") if t.endswith("%")]
    values = [float(t.removesuffix(" %")) for t in errors]
    assert len(values) == 21
    assert values == sorted(values, reverse=True)
    found.page.locator("#layers tbody tr").first.click()
    assert "down_proj" in found.page.locator("#detail h3").inner_text()


def test_changes_stand_side_by_side(at: Any, compiled: CompiledModel) -> None:
    found = at("#passes/2")
    label = compiled.summary().steps[2].label
    assert found.texts(".sides.head > div") == [compiled.summary().steps[1].label, label]
    found.page.locator("#lines").fill("layers.1.mlp.down_proj")
    text = found.page.locator("#diff").inner_text()
    assert "layers.0" not in text
    assert found.page.locator("#diff ins").count() > 0
    before, after = (program_lines(compiled.program, i) for i in (1, 2))
    shown = {" ".join(text.split()) for text in found.texts("#diff ins")}
    assert shown <= after - before
    found.page.locator("#diff ins").first.click()
    assert found.page.locator("#model").is_visible()
    assert found.page.locator("#detail").inner_text() != ""


def program_lines(program: Program, step: int) -> set[str]:
    return {" ".join(line.split()) for line in program.trace[step].text.splitlines()}


def test_every_pass_of_the_timeline_can_be_looked_at(at: Any, compiled: CompiledModel) -> None:
    found = at("#passes")
    count = len(compiled.program.trace)
    assert found.page.locator("#timeline li").count() == count
    for i in range(count):
        found.page.locator("#timeline button").nth(i).click()
        assert found.page.locator("#timeline [aria-current=step] b").inner_text() == compiled.summary().steps[i].label


def test_the_graph_after_a_pass_marks_what_it_changed(at: Any, compiled: CompiledModel) -> None:
    found = at("#model")
    found.page.locator("#step").select_option(label="insert_qdq")
    found.page.locator("#search").fill("layers.1 down_proj dequantize")
    found.page.keyboard.press("Enter")
    found.page.wait_for_selector("#detail h3")
    found.page.locator("#tree .row.hit").first.click()
    assert found.page.locator("#graph .box.added").count() > 0


def test_tradeoffs_hold_every_candidate_and_this_model(at: Any, compiled: CompiledModel) -> None:
    found = at("#tradeoff")
    observed = compiled.program.observations
    assert observed is not None
    rows = found.texts("#tradeoff tbody th")
    assert sorted(rows) == sorted([c.spec for c in observed.totals()] + ["this model"])
    assert found.page.locator("#tradeoff .point").count() == len(rows)


def test_dark_and_light_differ(at: Any) -> None:
    colours = {
        scheme: at("", color_scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert colours["light"] != colours["dark"]


def test_screenshots_are_not_blank(at: Any) -> None:
    for hash in ("", "#model", "#passes", "#tradeoff"):
        assert len(at(hash).page.screenshot()) > 15_000


def test_a_comparison_colours_and_ranks(browser: Any, compiled: CompiledModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    comparison = compiled.compare(LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 64, (2, 6))})
    compiled.report(tmp_path / "r.html", comparison=comparison)
    found = opened(browser, tmp_path / "r.html", "#model/model.layers.1.mlp.down_proj")
    text = found.page.locator("#detail dl").inner_text()
    row = comparison.layer("model.layers.1.mlp.down_proj")
    assert row.local is not None
    assert f"{100 * row.local.relative:.2f} %" in text
    assert f"SQNR {row.local.sqnr:.1f} dB" in text
    found.page.locator("#colour").select_option(label="output error, in the model (compared)")
    assert found.said == []
    found.page.close()


def test_names_that_are_markup_are_shown_and_not_run(browser: Any, compiled: CompiledModel, tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
    step = Step(
        bad, (), (), f"%{bad} : float32[1] = {bad}  # {bad}\n%b : float32[1] = aten.relu(%{bad})  # x.{bad}", 0.1
    )
    spoiled = Program(compiled.program.gm, compiled.program.signature, [*compiled.program.trace, step])
    report(spoiled, tmp_path / "r.html", title=bad)
    found = opened(browser, tmp_path / "r.html")
    found.page.on("dialog", lambda dialog: found.said.append(dialog.message))
    for part in ("model", "passes", "tradeoff"):
        found.page.evaluate(f"location.hash = '{part}'")
        found.page.wait_for_timeout(50)
    assert found.said == []
    assert found.page.locator("img").count() == 0
    assert len(found.asked) == 1
    found.page.close()


def test_a_program_without_passes_or_layers(browser: Any, tmp_path: Path) -> None:
    captured = capture(torch.nn.ReLU(), (torch.randn(2, 3),))
    for i, program in enumerate((captured, Program(captured.gm, captured.signature))):
        report(program, tmp_path / f"{i}.html")
        found = opened(browser, tmp_path / f"{i}.html")
        for part in ("model", "passes", "tradeoff", "overview"):
            found.page.evaluate(f"location.hash = '{part}'")
            found.page.wait_for_timeout(30)
        assert found.said == []
        found.page.close()
