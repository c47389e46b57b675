"""Commands about configs: their schema, one for a model, a check of one; and recipes. ``cli`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.cli_options import Json, Overwrite, check_file, note, print_json
from fxquant.errors import SaveError

if TYPE_CHECKING:
    from fxquant.config import Config, Recipe
    from fxquant.outline import Outline

config = typer.Typer(help="Configs: a JSON Schema for editors, a config for a model, a check of one.")

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder (safetensors) or a GGUF file.")]


@config.callback(invoke_without_command=True)
def config_(
    context: typer.Context,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of config files.")] = False,
) -> None:
    """Configs: a JSON Schema for editors, a config for a model, a check of one.

    Examples:

        fxquant config --schema > config.schema.json

        fxquant config init ./SmolLM2-135M -o smollm2.yaml

        fxquant config check smollm2.yaml ./SmolLM2-135M
    """
    from fxquant.config_schema import schema_text

    if schema and context.invoked_subcommand is None:
        typer.echo(schema_text(), nl=False)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@config.command()
def init(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The YAML file to write; else it is printed.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe it starts from; see fxquant recipes.")] = "W6A16-E3M2",
    with_schema: Annotated[
        bool, typer.Option("--with-schema", help="Write config.schema.json beside FILE, for completion in editors.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a config for MODEL, with its own layers: what each group weighs, what stays in float and why.

    No weights are read. Compiled as it is, it gives what the recipe gives.

    Examples:

        fxquant config init ./SmolLM2-135M --recipe W4A16-GPTQ -o smollm2.yaml --with-schema
    """
    from fxquant.config_schema import NAME, schema_text
    from fxquant.draft import draft
    from fxquant.outline import outline
    from fxquant.show.console import progress_bars
    from fxquant.show.html import write_page

    chosen = _recipe(recipe)
    schema = None if out is None or not with_schema else out.with_name(NAME)
    if with_schema and out is None:
        raise typer.BadParameter("--with-schema writes beside a file; give one with -o FILE")
    if out is not None:
        _check_place(out, schema, schema_text(), overwrite)
    with progress_bars() as progress:
        text = draft(outline(model, progress=progress), chosen, schema=None if schema is None else schema.name)
    if out is None:
        typer.echo(text, nl=False)
        return
    if schema is not None:
        write_page(schema, schema_text())
    write_page(out, text)
    typer.echo(f"wrote {out}; next: fxquant config check {out} {model}, or fxquant compile {model} -c {out} -o OUT")


def _check_place(out: Path, schema: Path | None, text: str, overwrite: bool) -> None:
    """Raise an error for a file that is no YAML, or for one that is there and is not to be replaced."""
    if out.suffix.lower() not in (".yaml", ".yml"):
        name = out.with_suffix(".yaml").name
        raise typer.BadParameter(f"{out} is no .yaml or .yml file, which comments need; name it {name}")
    check_file(out, overwrite)
    if schema is not None and schema.exists() and not overwrite and schema.read_bytes() != text.encode():
        raise SaveError(f"{schema} exists already and is another; give --overwrite to replace it")


def _recipe(name: str) -> Recipe:
    from fxquant.config import RECIPES, unknown_recipe

    found = {key.lower(): recipe for key, recipe in RECIPES.items()}.get(name.lower())
    if found is None:
        raise unknown_recipe(name)
    return found


@config.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A config: YAML, TOML or JSON; or a recipe's name.")],
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A Hugging Face folder or a GGUF file it is for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a config, by line and column; with MODEL, which layers each rule takes.

    Examples:

        fxquant config check mine.yaml

        fxquant config check mine.yaml ./SmolLM2-135M
    """
    from fxquant.config import load_config
    from fxquant.outline import outline
    from fxquant.pipeline import check_rules
    from fxquant.show.console import progress_bars

    settings = load_config(str(file))
    if model is None:
        _print_config(file, settings, as_json)
        return
    with progress_bars() as progress:
        found = outline(model, progress=progress)
    check_rules(settings.layer_rules(), found.layers)
    _print_check(found, settings, as_json)


def _print_config(file: Path, settings: Config, as_json: bool) -> None:
    from fxquant.show.console import print_table
    from fxquant.show.units import plural

    if as_json:
        print_json({"config": settings.to_dict(), "needs_data": settings.needs_data()})
        return
    rules = settings.layer_rules()
    print_table(("rule", "weight", "activation"), [(r.match, *_becomes(r)) for r in rules])
    typer.echo(
        f"\n{file}: {plural(len(rules), 'rule')}, {_methods(settings)}. Which layers they take: give the model too"
    )


def _becomes(rule: Any) -> tuple[str, str]:
    return "float" if rule.keep else str(rule.weight or "as it is"), str(rule.activation or "")


def _methods(settings: Config) -> str:
    names = [name for name, _ in settings.methods()]
    told = f"methods {', '.join(names)}" if names else "no methods"
    return told + (f"; {needy} needs calibration data" if (needy := settings.needs_data()) else "")


def _print_check(found: Outline, settings: Config, as_json: bool) -> None:
    from fxquant.show.console import print_table
    from fxquant.show.units import plural, size

    rules = settings.layer_rules()
    rows, left = _taken(found, settings)
    after = found.quantized_nbytes(rules)
    if as_json:
        print_json({"bytes_before": found.nbytes, "bytes_after": after, "rules": rows, "in_float": left,
                    "config": settings.to_dict(), "needs_data": settings.needs_data()})  # fmt: skip
        return
    table = [
        (row["match"], *_becomes(rule), str(len(row["layers"])), size(row["bytes_before"]), size(row["bytes_after"]))
        for row, rule in zip(rows, rules, strict=True)
    ]
    columns = ("rule", "weight", "activation", "layers", "before", "after")
    print_table(columns, table, right=columns[3:])
    if left:
        typer.echo("")
        print_table(("in float", "why"), [(row["layer"], row["reason"]) for row in left])
    for row in rows:
        if not row["layers"]:
            note(f"rule {row['match']!r} takes no layer: those it matches go to rules before it, or are tied to others")
    added = [name for name, _ in settings.methods() if name in ("lorc", "gwq", "pb_llm", "fold_activation_scales")]
    more = f", without what {' and '.join(added)} may add" if added else ""
    typer.echo(
        f"\n{found.name}: {plural(len(found.layers), 'layer')}, {size(found.nbytes)} -> {size(after)} ({after:,} bytes)"
        f"{more}; {_methods(settings)}"
    )


def _taken(found: Outline, settings: Config) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """For every rule the layers that follow it, with bytes before and after; and the layers in float, with reasons."""
    from fxquant.outline import spec_nbytes
    from fxquant.rewrite import Decline

    rules = settings.layer_rules()
    choices = found.choices(rules)
    rows = []
    for rule in rules:
        own = [layer for layer in found.layers if _is(choices[layer.name], rule, found, layer.name, rules)]
        units = found.units(own)
        before = sum(layer.weight.nbytes for layer in units)
        after = before if rule.weight is None else sum(spec_nbytes(layer, rule.weight) for layer in units)
        rows.append({"match": rule.match, "weight": None if rule.weight is None else str(rule.weight),
                     "activation": None if rule.activation is None else str(rule.activation), "keep": rule.keep,
                     "layers": [layer.name for layer in own], "bytes_before": before,
                     "bytes_after": after})  # fmt: skip
    left = [{"layer": name, "reason": c.reason} for name, c in choices.items() if isinstance(c, Decline)]
    return rows, left


def _is(choice: Any, rule: Any, found: Outline, name: str, rules: Any) -> bool:
    """Whether a layer follows ``rule``, which may be to keep it."""
    from fxquant.rewrite import Decline
    from fxquant.scheme import rule_for

    if isinstance(choice, Decline):
        return bool(rule.keep and rule_for(rules, name, found.by_name[name].type) is rule)
    return choice is rule


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe to show as YAML, to copy and change.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, configs with a name for fxquant compile -c NAME; or show one as YAML with its source.

    Examples:

        fxquant recipes

        fxquant recipes W4A8-FP > mine.yaml
    """
    from fxquant.config import RECIPES
    from fxquant.draft import recipe_yaml
    from fxquant.show.console import print_table

    shown = list(RECIPES.values()) if name is None else [_recipe(name)]
    if as_json:
        plain = [
            {"name": r.name, "summary": r.summary, "source": r.source, "note": r.note, "config": r.config.to_dict()}
            for r in shown
        ]
        print_json(plain if name is None else plain[0])
    elif name is not None:
        typer.echo(recipe_yaml(shown[0]), nl=False)
    else:
        rows = [(r.name, ", ".join(str(rule.weight) for rule in r.config.rules), r.summary) for r in shown]
        print_table(("recipe", "weights", "what it is"), rows)
        typer.echo("\nfxquant recipes NAME shows one as YAML, and where it comes from")
