"""What of each architecture compiles, saves and runs in ONNX, measured: the rows of docs/architectures.md.

``python tests/architectures.py NAME...`` measures rows of architecture_rows.py and prints what it found; without names
all of them, each in a process of its own; ``--write`` writes the document anew.

A compiled model is compared with its own module in float, in which every weight that was quantized was replaced by
``dequantize(quantize(W))``; with what ``fxquant.load`` gives; and with onnxruntime on the exported file. All three on
the example and on up to three further sets of sizes, where they are free.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from architecture_rows import ROWS, Architecture, build
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import fxquant
from fxquant.codegen import cpu
from fxquant.codegen.onnx_check import check_onnx, compared
from fxquant.draw import made_up
from fxquant.eager import evaluating, run_model
from fxquant.examples import example_inputs
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import aten
from fxquant.sizes import run_program

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
FIRST = "W6A16-E3M2"
BY_TURNS = (
    "W4A16-RTN", "MXFP4", "W8A16-FP8", "W4A16-INT", "MXFP6", "W8A16-INT", "NVFP4", "W6A16-E2M3", "W4A16-NF4", "MXFP8",
)  # fmt: skip
"""Recipes of weights alone: the second one of each row."""
TORCH_BOUND = 1e-5
"""How far a row of an output may be from the module with dequantized weights, relative to its norm."""
VISIBLE = 1e-4
"""How much quantization changes an output at least: outputs that do not depend on the weights would show nothing."""
SECONDS = 600


@dataclass(frozen=True)
class Measured:
    """What was found for one row and one recipe. Errors are the largest of a row of any output at any size.

    ``change``: of the example's outputs by quantization; ``torch_error``: to the module with dequantized weights;
    ``onnx_error``: of onnxruntime to torch, ``onnx_ok`` if all of them are within the bounds of ``check_onnx``.
    ``stage`` is the last one reached, ``reason`` the error there.
    """

    name: str
    recipe: str
    stage: str = "compile"
    reason: str = ""
    quantized: int = 0
    layers: int = 0
    sizes: str = ""
    runs: int = 0
    change: float = 0.0
    torch_error: float = float("inf")
    loaded_equal: bool = False
    onnx_error: float = float("inf")
    onnx_ok: bool = False

    @property
    def ok(self) -> bool:
        matches = self.torch_error <= TORCH_BOUND and self.loaded_equal and self.onnx_ok
        return self.stage == "done" and self.change > VISIBLE and matches


def second_recipe(architecture: Architecture) -> str:
    return BY_TURNS[ROWS.index(architecture) % len(BY_TURNS)]


def measure(architecture: Architecture, recipe: str, folder: Path) -> Measured:
    """Compile, compare, save, load, export and run one row. An error of fxquant's own becomes the reason."""
    folder.mkdir()
    model = build(architecture)
    inputs = architecture.inputs() if architecture.inputs is not None else example_inputs(model)
    found = Measured(architecture.name, recipe)
    try:
        compiled = fxquant.compile(model, inputs, recipe)
        summary, calls = compiled.summary(), [inputs, *(call for _, call in made_up(compiled.program))]
        found = replace(found, stage="save", quantized=len(summary.quantized), layers=len(summary.layers))
        found = replace(found, sizes=sizes(compiled), runs=len(calls))
        found = replace(found, change=error(compiled, model, inputs))
        reference = quantized(model, compiled)
        found = replace(found, torch_error=max(error(compiled, reference, call) for call in calls))
        compiled.save(folder / "saved")
        loaded = fxquant.load(folder / "saved")
        found = replace(found, loaded_equal=all(same(compiled, loaded, call) for call in calls), stage="onnx")
        compiled.export_onnx(path := folder / "model.onnx")
        rows = [*check_onnx(compiled.program, path, inputs=[inputs]).rows, *check_onnx(compiled.program, path).rows]
        worst = max(row.relative for row in rows)
        return replace(found, onnx_error=worst, onnx_ok=all(row.ok for row in rows), stage="done")
    except fxquant.FxquantError as refused:
        return replace(found, reason=f"{type(refused).__name__}: {refused}")


def quantized(reference: nn.Module, compiled: fxquant.CompiledModel) -> nn.Module:
    """The module with every weight that was quantized replaced by what its codes mean."""
    for path, module in reference.named_modules():  # a weight that is computed from others is quantized as its value
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(reference.get_submodule(path), name)
    weights = dict(reference.named_parameters(remove_duplicate=False))
    originals = {name: weight.clone() for name, weight in weights.items()}
    with torch.no_grad():
        for node in compiled.program.gm.graph.nodes:
            if (quant := info(node).weight) is not None:
                W = originals[quant.weight]
                W = W.transpose(-1, -2) if quant.transposed else W
                experts = W.dim() == 3 and node.target is ops.dequantize_packed.default and not _convolves(node)
                W = quantize_tensor(W, quant.spec, channel_dims=2 if experts else 1).dequantize(W.dtype)
                weights[quant.weight].copy_(W.transpose(-1, -2) if quant.transposed else W)
    return reference


def _convolves(node: fx.Node) -> bool:
    return any(user.target in (aten.conv1d.default, aten.conv1d.padding) for user in node.users)


def error(compiled: fxquant.CompiledModel, reference: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest relative error of a row of an output, infinite where outputs or shapes differ."""
    with evaluating(reference):  # a graph has no KV cache among its outputs
        want, got = run_model(reference, (), dict(inputs)), run_program(compiled.program, (), dict(inputs))
    if len(want) != len(got):
        return float("inf")
    pairs = [(a, b) for a, b in zip(want, got, strict=True) if isinstance(a, Tensor)]
    return max(compared(a, b, "torch", "", "", 0.0).relative for a, b in pairs)


def same(compiled: fxquant.CompiledModel, loaded: fxquant.CompiledModel, inputs: Mapping[str, Tensor]) -> bool:
    """Whether two compiled models give the same in every bit."""
    a, b = (run_program(each.program, (), dict(inputs)) for each in (compiled, loaded))
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def sizes(compiled: fxquant.CompiledModel) -> str:
    """``batch, sequence <= 64``: the dimensions that may vary, with a limit that is one number; ``fixed`` if none."""
    signature = compiled.program.signature
    free = dict.fromkeys(
        d for item in signature.inputs for d in item.type.shape if isinstance(d, str) and d.isidentifier()
    )
    plain = [limit for limit in signature.limits if re.fullmatch(r"\w+ [<>]=? \d+", limit)]
    found = [next((limit for limit in plain if limit.split()[0] == d), d) for d in free]
    return ", ".join(found) + " (and conditions)" * (len(plain) < len(signature.limits)) or "fixed"


# --- the document -----------------------------------------------------------------------------------------------------
HEAD = """# Architectures

What of transformers' architectures compiles, measured by `python tests/architectures.py --write` on {date}: fxquant
{fxquant}, transformers {transformers}, torch {torch}, onnx {onnx}, onnxruntime {onnxruntime}, Python {python}. A row is
a tiny model (a few layers, random weights) and its example inputs; `make test-all` asserts the same of every row.

**{good} of {all}** compile, save, load, export to ONNX and match{rest}.

- *layers*: quantized with {first}, of all linears, convolutions, embeddings and experts; the others are embeddings,
  and weights tied to them, which stay in float unless a rule names them.
- *sizes*: dimensions that stay free in the compiled model and in the ONNX file. Everything was run on the example and
  on up to three further sets of sizes.
- *second recipe*: everything was done with it as well; errors are the larger of the two.
- *to torch*: the largest relative error of a row of any output (`||y - y'|| / ||y'||` over the last dimension) to the
  model's own forward in which each weight is `dequantize(quantize(W))`; at most {bound:.0e}. What was saved and loaded
  gives the same bits.
- *ONNX*: the same of onnxruntime to torch; at most what [`check_onnx`](onnx.md#check) allows.

"""
COLUMNS = ("architecture", "class", "layers", "sizes", "second recipe", "to torch", "ONNX")


def page(rows: Sequence[tuple[Architecture, Sequence[Measured]]]) -> str:
    """The text of docs/architectures.md."""
    good = sum(all(m.ok for m in found) for _, found in rows)
    refused = [(a, found) for a, found in rows if not all(m.ok for m in found)]
    packages = {name: version(name) for name in ("fxquant", "transformers", "torch", "onnx", "onnxruntime")}
    text = HEAD.format(
        **packages, date=datetime.now(UTC).date(), python=platform.python_version(), good=good, all=len(rows),
        rest=f"; the reasons of the other {len(refused)} are [below](#reasons)" if refused else "", first=FIRST,
        bound=TORCH_BOUND,
    )  # fmt: skip
    for family in dict.fromkeys(a.family for a, _ in rows):
        cells = [_cells(a, found) for a, found in rows if a.family == family]
        text += f"## {family.capitalize()}\n\n" + "\n".join(
            "| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *cells)
        )
        text += "\n\n"
    if refused:
        text += "## Reasons\n\n" + "\n".join(
            f"**{a.name}** (`{a.model}`):\n\n{_reasons(found)}" for a, found in refused
        )
    return text.rstrip() + "\n"


def _cells(architecture: Architecture, found: Sequence[Measured]) -> list[str]:
    first, second = found
    layers = f"{first.quantized} of {first.layers}" if first.layers else "does not compile"
    onnx = _worst(m.onnx_error for m in found) if all(m.onnx_ok for m in found) else "no"
    torch_ = _worst(m.torch_error for m in found) if first.layers else ""
    name = architecture.name + (" ([why](#reasons))" if not all(m.ok for m in found) else "")
    return [name, f"`{architecture.model}`", layers, first.sizes, second.recipe, torch_, onnx]


def _worst(errors: Iterable[float]) -> str:
    worst = max(errors)
    return f"{worst:.1e}" if worst else "0"


def _reasons(found: Sequence[Measured]) -> str:
    """The errors as they are printed, each once; paths of this machine without their folders."""
    texts = dict.fromkeys(m.reason or f"{m.recipe}: too far off" for m in found)
    short = [re.sub(r"/\S*/site-packages/", "", text) for text in texts]
    return "\n".join(f"```\n{text}\n```\n" for text in short)


# --- the command ------------------------------------------------------------------------------------------------------
def both(name: str) -> list[Measured]:
    """Both recipes of the row of that name: a row itself need not be one that another process can be given."""
    architecture = next(a for a in ROWS if a.name == name)
    with tempfile.TemporaryDirectory() as folder:
        recipes = (FIRST, second_recipe(architecture))
        return [measure(architecture, recipe, Path(folder) / recipe) for recipe in recipes]


def each(chosen: Sequence[Architecture], jobs: int) -> Iterator[list[Measured]]:
    """The same of many rows, each in a process of its own, forked from this one, ``jobs`` at a time and in order.

    What ends in another way than with a result has that as its reason.
    """
    torch.set_num_threads(1)  # so that processes can be forked
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        started = [(a, pool.apply_async(both, (a.name,))) for a in chosen]
        for a, result in started:
            try:
                yield result.get(SECONDS)
                continue
            except multiprocessing.TimeoutError:
                reason = f"takes more than {SECONDS} s"
            except Exception as other:  # of torch, onnx or transformers: what it is, is what is asked
                reason = f"{type(other).__name__}: {other}"
            yield [Measured(a.name, recipe, reason=reason) for recipe in (FIRST, second_recipe(a))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all of them if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at a time")
    given = parser.parse_args()
    if unknown := set(given.names) - {a.name for a in ROWS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(a.name for a in ROWS)}")
    if given.write and given.names:
        parser.error("--write measures all rows; leave the names out")
    cpu.available = lambda: None  # the reference operators, as in tests
    cpu.at_hand = lambda values: None
    chosen, rows = [a for a in ROWS if a.name in given.names or not given.names], []
    for a, found in zip(chosen, each(chosen, given.jobs), strict=True):
        rows.append((a, found))
        print(a.name, *("ok" if m.ok else f"{m.recipe}: {m.stage}: {m.reason or m}" for m in found), flush=True)
    if given.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
