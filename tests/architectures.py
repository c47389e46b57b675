"""What of each architecture compiles, saves and runs in ONNX, measured: the rows of docs/architectures.md.

``python tests/architectures.py NAME...`` measures rows of architecture_rows.py and prints what it found; without names
all of them, each in a process of its own; ``--write`` writes the document anew.

A compiled model is compared with its own module in float, in which every weight that was quantized was replaced by
``dequantize(quantize(W))``; with what ``fxquant.load`` gives; and with onnxruntime on the exported file. All three on
the example and on up to three further sets of sizes, where they are free.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from architecture_rows import ROWS, Architecture, build
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import fxquant
from fxquant.codegen import cpu
from fxquant.codegen.onnx_check import check_onnx, compared, made_up
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
SECONDS = 300


@dataclass(frozen=True)
class Measured:
    """What was found for one row and one recipe. Errors are the largest of a row of any output at any size.

    ``torch_error``: to the module with dequantized weights; ``onnx_error``: of onnxruntime to torch, ``onnx_ok`` if all
    of them are within the bounds of ``check_onnx``. ``stage`` is the last one reached, ``reason`` the error there.
    """

    name: str
    recipe: str
    stage: str = "compile"
    reason: str = ""
    quantized: int = 0
    layers: int = 0
    sizes: str = ""
    runs: int = 0
    torch_error: float = float("inf")
    loaded_equal: bool = False
    onnx_error: float = float("inf")
    onnx_ok: bool = False

    @property
    def ok(self) -> bool:
        return self.stage == "done" and self.torch_error <= TORCH_BOUND and self.loaded_equal and self.onnx_ok


def second_recipe(architecture: Architecture) -> str:
    return BY_TURNS[ROWS.index(architecture) % len(BY_TURNS)]


def measure(architecture: Architecture, recipe: str, folder: Path) -> Measured:
    """Compile, compare, save, load, export and run one row. An error of fxquant's own becomes the reason."""
    model = build(architecture)
    inputs = architecture.inputs() if architecture.inputs is not None else example_inputs(model)
    found = Measured(architecture.name, recipe)
    try:
        compiled = fxquant.compile(model, inputs, recipe)
        summary, calls = compiled.summary(), [inputs, *(call for _, call in made_up(compiled.program))]
        found = replace(found, stage="save", quantized=len(summary.quantized), layers=len(summary.layers))
        found = replace(found, sizes=sizes(compiled), runs=len(calls))
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


def quantized(model: nn.Module, compiled: fxquant.CompiledModel) -> nn.Module:
    """The module with every weight that was quantized replaced by what its codes mean."""
    reference = copy.deepcopy(model)
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
    free = dict.fromkeys(d for item in signature.inputs for d in item.type.shape if isinstance(d, str) and d.isidentifier())
    plain = [limit for limit in signature.limits if re.fullmatch(r"\w+ [<>]=? \d+", limit)]
    found = [next((limit for limit in plain if limit.split()[0] == d), d) for d in free]
    return ", ".join(found) + " (and conditions)" * (len(plain) < len(signature.limits)) or "fixed"
