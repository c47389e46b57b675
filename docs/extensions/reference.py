"""Directives that write the reference pages from the package itself.

``{fxquant-cli}``: every command of the typer app, its arguments, options and examples. ``.. fxquant-api:: functions``,
``classes``, ``data``, ``modules``: what is in ``fxquant.__all__`` of that kind, so that no list has to be kept.
Docstrings are plain text with double backticks and ``::`` blocks: characters that mean something else in
reStructuredText are escaped, indented blocks are shown as they are. ``index.md`` is given the pages it does not name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

import fxquant
from fxquant.cli import app

KINDS = ("functions", "classes", "data", "modules")


def setup(application: Sphinx) -> dict[str, bool]:
    application.add_directive("fxquant-cli", Commands)
    application.add_directive("fxquant-api", PublicNames)
    application.connect("source-read", name_other_pages)
    application.connect("autodoc-process-docstring", plain_docstring)
    application.connect("autodoc-skip-member", skip_pydantic)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def name_other_pages(application: Sphinx, page: str, content: list[str]) -> None:
    """Put the pages that index.md does not name into its navigation, where it says so: no page is left out."""
    if page == "index":
        named = {page, *content[0].split()}
        others = sorted(path.stem for path in Path(application.srcdir).glob("*.md") if path.stem not in named)
        content[0] = content[0].replace("(all other pages)", "\n".join(others))


# --- the command line -------------------------------------------------------------------------------------------------
class Commands(SphinxDirective):
    """Every command, in the order of ``fxquant --help``."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(commands_text()), allow_section_headings=True)


def commands_text() -> Iterator[str]:
    """The commands as Markdown, a line at a time."""
    for name, command in commands_of(get_command(app)):
        about, _, examples = inspect.cleandoc(command.help or "").partition("Examples:")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = [metavar(p) if p.required else f"[{metavar(p)}]" for p in arguments]
        required = [f"{p.opts[0]} {metavar(p)}" for p in options if p.required]
        yield from (f"## fxquant {name}", "", escaped(about.strip()), "")
        yield from ("```console", " ".join(["$ fxquant", name, *usage, *required, "[OPTIONS]"]), "```", "")
        yield from ("| | default | |", "|---|---|---|")
        for parameter in (*arguments, *options):
            yield f"| {spelling(parameter)} | {default(parameter)} | {cell(parameter.help or '')} |"
        shown = [line.strip() for line in examples.splitlines() if line.strip()]
        if commands := [line for line in shown if line.startswith("fxquant")]:
            yield from ("", "```console", *(f"$ {line}" for line in commands), "```")
        yield from ("", *(escaped(line) for line in shown if line not in commands))
        yield ""


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its name; those of a group, such as ``config init``, after the group if it does something."""
    for name, command in group.commands.items():
        if getattr(command, "invoke_without_command", True):  # commands have no such attribute
            yield f"{prefix}{name}", command
        yield from commands_of(command, f"{prefix}{name} ") if hasattr(command, "commands") else ()


def metavar(parameter: Any) -> str:
    """What stands for the value: ``FILE``, the choices there are, or its type."""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    if isinstance(parameter.default, Enum):
        return "|".join(str(choice.value) for choice in type(parameter.default))
    return {int: "INTEGER", float: "NUMBER"}.get(type(parameter.default), "TEXT")


def spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{metavar(parameter)}`"
    value = "" if parameter.is_flag else f" {metavar(parameter)}".replace("|", r"\|")
    return ", ".join(f"`{name}{value}`" for name in parameter.opts)


def default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return "" if value in (None, False, ()) or parameter.is_flag else f"`{value}`"


def cell(text: str) -> str:
    return escaped(" ".join(text.split())).replace("|", r"\|")


def escaped(text: str) -> str:
    """Markdown that shows ``text``: typer's markup for bold becomes Markdown's."""
    text = re.sub(r"\[/?bold\]", "**", text.replace("*", r"\*"))
    return text.replace("<", r"\<").replace("_", r"\_")


# --- the public names -------------------------------------------------------------------------------------------------
class PublicNames(SphinxDirective):
    """The public names of one kind."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(names_text(self.arguments[0])))


def public_names(kind: str) -> list[str]:
    """The names in ``fxquant.__all__`` of a kind; every one is of exactly one."""
    return [name for name in fxquant.__all__ if _kind(getattr(fxquant, name)) == kind]


def _kind(value: Any) -> str:
    if inspect.ismodule(value):
        return "modules"
    return "classes" if inspect.isclass(value) else "functions" if callable(value) else "data"


def names_text(kind: str) -> Iterator[str]:
    """reStructuredText for autodoc."""
    directive = {"functions": "autofunction", "classes": "autoclass", "data": "autodata", "modules": "automodule"}[kind]
    for name in public_names(kind):
        yield f".. {directive}:: fxquant.{name}"
        if kind in ("classes", "modules"):
            yield "   :members:"
        if kind == "modules":
            yield "   :ignore-module-all:"
        if kind == "data":
            yield "   :no-value:"
        yield ""


# --- docstrings -------------------------------------------------------------------------------------------------------
_LITERAL = re.compile(r"(``.+?``)", re.DOTALL)
_SPECIAL = re.compile(r"([*|`\\]|_\b)")


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make the lines of a docstring valid reStructuredText that shows the same text."""
    if not any(line.startswith(".. ") for line in lines):  # torch's own are reStructuredText
        lines[:] = list(_plain(lines))


def _plain(lines: list[str]) -> Iterator[str]:
    for block in _blocks(lines):
        if block[0].startswith(" "):
            yield from (".. code-block:: text", "", *(f"   {line}" for line in block), "")
            continue
        opens = block[-1].rstrip().endswith("::")
        text = "\n".join([*block[:-1], block[-1].rstrip().removesuffix(":") if opens else block[-1]])
        indents = text.startswith(("- ", "* "))  # lines of a list item go on indented, those of a paragraph do not
        parts = [part if i % 2 else _SPECIAL.sub(r"\\\1", part) for i, part in enumerate(_LITERAL.split(text))]
        yield from (line if indents else line.strip() for line in "".join(parts).splitlines())
        yield ""


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs, and indented blocks with the empty lines inside them."""
    rest = list(lines)
    while rest:
        indented = rest[0].startswith(" ")
        ends = (i for i, line in enumerate(rest) if (line[:1].strip() if indented else not line.strip()))
        end = next(ends, len(rest))
        if any(line.strip() for line in rest[:end]):
            yield rest[:end]
        del rest[: max(end, 1)]


def skip_pydantic(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what pydantic adds to a class."""
    return True if name.startswith("model_") else None
