"""diff and explain: the trace as text."""

from __future__ import annotations

import difflib
import random
import time

import pytest
import torch
from tiny_models import Tied, mlp

import fxquant
from fxquant.errors import ConfigError, FxquantError
from fxquant.program import Program
from fxquant.rewrite import tensors
from fxquant.show.advice import advice
from fxquant.show.compare import compare
from fxquant.show.html import report
from fxquant.show.text import describe_spec, diff, explain

RULES = {"rules": [{"match": "up", "keep": True}, {"match": "*", "weight": "e3m2/channel"}]}


@pytest.fixture(scope="module")
def program() -> Program:
    return fxquant.compile(Tied(), {"tokens": torch.randint(0, 50, (2, 5))}, config=RULES).program


# --- compare ----------------------------------------------------------------------------------------------------------
def rebuilt(lines: list[tuple[str, str]], side: str) -> list[str]:
    return [text for kind, text in lines if kind in (" ", side)]


def test_compare_rebuilds_both_texts() -> None:
    """Without moves, context and removed lines are the old text, context and added lines the new one."""
    draw = random.Random(0)
    for _ in range(200):
        old = [f"%n{i}" for i in range(draw.randrange(12))]
        new = [f"{line}'" if draw.random() < 0.2 else line for line in old if draw.random() < 0.8]
        new.insert(draw.randrange(len(new) + 1), "%extra")
        found = compare(old, new, context=99)
        assert rebuilt(list(found.lines), "-") == old
        assert rebuilt(list(found.lines), "+") == new
        assert found.moved == 0


def test_compare_finds_no_more_changes_than_difflib() -> None:
    old = [f"%n{i} = f(%n{i - 1})" for i in range(300)]
    new = [line.replace("f(", "g(") if i % 7 == 0 else line for i, line in enumerate(old)]
    found = compare(old, new)
    want = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    assert found.added == found.removed == sum(line[0] == "+" for line in want) == 43


def test_a_line_that_only_moved_is_counted_and_not_shown() -> None:
    found = compare(["%a", "%b", "%c", "%d"], ["%d", "%a", "%b", "%c"])
    assert found.lines == ()
    assert (found.added, found.removed, found.moved) == (0, 0, 1)
    assert compare(["%a"], ["%a"]).headline == "the graph did not change"


def test_unchanged_runs_are_counted() -> None:
    old = [f"%n{i}" for i in range(100)]
    found = compare(old, [*old[:50], "%new", *old[50:]], context=1)
    assert found.lines == (("@", "49"), (" ", "%n49"), ("+", "%new"), (" ", "%n50"), ("@", "49"))


def test_compare_is_fast_on_a_large_graph() -> None:
    old = [f"%node_{i} : float32[batch, 64] = aten.add(%node_{i - 1}, 1)" for i in range(50_000)]
    new = [line.replace("add", "mul") if i % 3 == 0 else line for i, line in enumerate(reversed(old))]
    begin = time.perf_counter()
    compare(old, new)
    assert time.perf_counter() - begin < 5


# --- diff -------------------------------------------------------------------------------------------------------------
def test_diff_names_each_pass_and_what_it_did(program: Program) -> None:
    heads = [line for line in diff(program).splitlines() if line.startswith("# ")]
    assert [h.split(":")[0][2:] for h in heads] == ["normalize", "insert_qdq", "remove_dead", "lower", "remove_dead#2"]
    assert " s, 1 rewrite, 3 declines, error " in heads[1]


def test_diff_of_one_pass_and_between_two(program: Program) -> None:
    lowered = diff(program, "lower")
    assert "\n-%linear_1" in lowered
    assert "fxquant.linear_wq(" in lowered
    whole = diff(program, "normalize", "remove_dead#2")
    assert whole.startswith("# from normalize to remove_dead#2: ")
    assert "fxquant.dequantize(" not in whole  # came and went in between
    assert diff(program, None, "lower").startswith("# from capture to lower")


def test_diff_of_an_unknown_pass(program: Program) -> None:
    with pytest.raises(ConfigError, match=r"no pass 'lowr' .*did you mean 'lower'.*it has capture, normalize"):
        diff(program, "lowr")


# --- explain ----------------------------------------------------------------------------------------------------------
def test_explain_a_quantized_layer(program: Program) -> None:
    text = explain(program, "down")
    assert "format  e3m2/channel: 6-bit float, values up to 28, one float32 scale per output channel" in text
    assert "3.8 KiB -> 816 B (4.71x smaller), scales included" in text
    assert "rewrote: quantize_weight e3m2/channel" in text
    assert text.index("  insert_qdq") < text.index("  lower")
    before, after = (text.index(word) for word in ("aten.linear(%relu, %down_weight, None)", "fxquant.linear_wq("))
    assert before < after


def test_explain_says_why_a_layer_stayed_in_float(program: Program) -> None:
    assert "declined: quantize_weight, since rule 'up' keeps it in float" in explain(program, "up")
    assert "why     its weight is tied to 'embed'" in explain(program, "head")
    assert "tied    shares its weight with embed" in explain(program, "head")


def test_explain_tells_how_the_format_is_used() -> None:
    """3 of the 64 codes of E3M2: 0, and the largest value with both signs; one scale a row, four times apart."""
    layer = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[28.0, -28.0, 0.0, 0.0], [112.0, 112.0, 112.0, -112.0]]))
    told = fxquant.compile(torch.nn.Sequential(layer), (torch.randn(2, 4),), "W6A16-E3M2").explain("0")
    assert "grid    63 values up to 28, normal from 0.25, 0.0625 the smallest above 0" in told
    assert "codes   3 of 64 used, 75.00 % of weights at the largest size, 25.00 % zero" in told
    assert "scales  2 scales, 1 to 4, 4 times apart" in told
    assert "reads   input input" in told
    assert "feeds   the output" in told


def test_explain_says_what_reads_a_layer_and_what_to_do(program: Program) -> None:
    told = explain(program, "up")
    assert "reads   aten.embedding of embed" in told
    assert "feeds   aten.relu" in told
    assert told.count("to do") == 2
    assert "take keep out of that rule" in told


def test_explain_with_a_comparison() -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    compiled = fxquant.compile(model, (torch.randn(2, 20),))
    found = compiled.compare(model)
    told = compiled.explain("2", found)
    for by in ("local", "accumulated"):
        rank = [row.name for row in found.ranked(by)].index("2") + 1  # type: ignore[arg-type]
        line = next(line for line in told.splitlines() if line.strip().startswith(by))
        assert f"rank {rank} of 2" in line


REASONS = (
    "no rule matches this layer", "rule 'head' keeps it in float", "rank 9 is more than its 4x4 weight has",
    "too little data: 4 rows of input for a weight of 8 columns; it stays round-to-nearest",
    "its input cannot be scaled for free: add reads it too and would see it scaled",
    "its input has 20 channels, no multiple of 8; choose a smaller size, or leave it out",
    "its weight is shared by a, b, which have inputs of their own",
)  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_have_advice(reason: str) -> None:
    assert advice(reason)


def test_an_unknown_reason_has_no_advice() -> None:
    assert advice("the moon is full") is None


def test_a_glob_lists_the_layers_it_matches(program: Program) -> None:
    text = explain(program, "*")
    assert text.startswith("4 layers match '*'")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["embed", "up", "down", "head"]
    assert explain(program, "dow*") == explain(program, "down")


@pytest.mark.parametrize(
    ("name", "says"),
    [("donw", "did you mean 'down'"), ("zzz", "such as 'embed'"), ("", "no layer ''"), ("[", r"no layer '\['")],
)
def test_an_unknown_layer_names_near_ones(program: Program, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        explain(program, name)


def test_a_module_that_holds_layers_is_told_apart() -> None:
    program = fxquant.compile(torch.nn.Sequential(mlp()), (torch.randn(2, 20),)).program
    with pytest.raises(FxquantError, match=r"'0' is not a layer but holds 2 layers; ask for '0\.\*', or '0\.0'"):
        explain(program, "0")


def test_specs_in_words() -> None:
    assert describe_spec("e2m1/group64:fp16") == (
        "4-bit float, values up to 6, one float16 scale for every 64 weights of a row"
    )
    assert describe_spec("uint4/tensor") == (
        "4-bit integer, values up to 15, one float32 scale and zero point for the whole weight"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mxfp4", "4-bit float, values up to 6, one e8m0 scale for every 32 weights of a row"),
        ("nvfp4", "one e4m3 scale for every 16 weights of a row, under one float32 scale a tensor"),
        ("e4m3/token", "8-bit float, values up to 448, one float32 scale per token"),
        ("e2m1/group32:m2", "one e8m0 scale for every 32 weights of a row, under one float32 scale a row"),
    ],
)
def test_specs_with_stored_scales_in_words(spec: str, words: str) -> None:
    assert words in describe_spec(spec)


@pytest.mark.parametrize("recipe", ["MXFP4", "NVFP4"])
def test_explain_shows_stored_scales_of_the_layer(recipe: str) -> None:
    compiled = fxquant.compile(mlp(), (torch.randn(2, 20),), config=recipe)
    story = compiled.explain("0")
    assert "0.weight_scale_codes" in story
    assert ("0.weight_tensor_scale" in story) == (recipe == "NVFP4")
    assert compiled.summary().bytes_after == sum(t.nbytes for t in tensors(compiled.program.gm).values())


def test_rounded_inputs_are_told() -> None:
    compiled = fxquant.compile(mlp(), (torch.randn(2, 20),), config="W8A8-FP8")
    assert "inputs  rounded to e4m3/token: 8-bit float, values up to 448, one float32 scale per token" in (
        compiled.explain("0")
    )
    assert "e4m3/channel, inputs e4m3/token" in compiled.explain("*")
    assert "e4m3/channel, inputs e4m3/token" in str(compiled.summary())
    assert {q.activation for q in compiled.summary().layers} == {"e4m3/token"}
    page = report(compiled.program)
    assert page.count('"activation":"e4m3/token"') == 2
    assert "one float32 scale per token" in page
