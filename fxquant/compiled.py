"""CompiledModel: what ``fxquant.compile`` and ``fxquant.load`` return."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fxquant import store
from fxquant.codegen import cpu, launch  # they register what operators run on a CPU and on a GPU
from fxquant.codegen.bind import bound
from fxquant.codegen.fuse import fused
from fxquant.config import Config
from fxquant.program import Program, Progress, copied, quiet
from fxquant.rewrite import fetch, get_attrs
from fxquant.show import html, summary, text


class CompiledModel:
    """A compiled model: call it as the model it was made from; save, export, inspect it.

    ``program`` is the graph and its trace, ``config`` what it was compiled with. Calls run a form of the graph made at
    the first one: on a GPU linears have taken in what surrounds them (``codegen/fuse.py``), on a CPU weights and
    constants are looked up beforehand (``codegen/bind.py``); everything else is about ``program``.

    ``activation_bits`` 16 or 8 lets packed linears on a CPU round their input to so many bits, for each row and 8
    columns, where that is faster: calls with few rows, as a decoder's steps are. 32 is float32 throughout.
    """

    def __init__(self, program: Program, config: Config, *, activation_bits: int = 32) -> None:
        self.program = program
        self.config = config
        self.activation_bits = activation_bits

    @cached_property
    def _runs(self) -> Program:
        return fused(self.program) if self._on_gpu() else bound(self.program)

    def _on_gpu(self) -> bool:
        return any(fetch(self.program.gm, str(node.target)).is_cuda for node in get_attrs(self.program.gm.graph))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of the model's own type; of dicts, lists and tuples after ``load``. No gradients.

        Raises InputError, naming the input, for what does not fit the signature.
        """
        with torch.no_grad(), cpu.activation_bits(self.activation_bits):
            return self._runs(*args, **kwargs)

    def to(self, device: str | torch.device) -> CompiledModel:
        """A copy of the model on another device, ``"cuda"`` for one; inputs are to be there too. This one stays."""
        return CompiledModel(
            copied(self.program, torch.device(device)), self.config, activation_bits=self.activation_bits
        )

    def autotune(self, rows: Sequence[int] = (1,), *, progress: Progress = quiet) -> dict[str, Any]:
        """Time the tiles of every packed linear on the GPU that the model is on, for so many rows of input.

        The fastest are kept in the user's cache folder, and used from then on. Takes some seconds a shape, most of them
        compilation. Returns what was chosen. Raises InputError where the model is not on a GPU that runs kernels.
        """
        program = self._runs if self._on_gpu() else self.program
        return dict(launch.autotune(program.gm, rows, progress=progress))

    def save(self, directory: str | Path, *, tokenizer: Any | None = None, overwrite: bool = False) -> None:
        """Write the folder ``directory``: graph.json, and model.safetensors with packed weights. Raises SaveError.

        A ``tokenizer`` is saved beside them, so that ``fxquant eval`` finds it. ``overwrite`` replaces a saved model.
        """
        config = self.config.to_dict()
        store.save(self.program, directory, config=config, tokenizer=tokenizer, overwrite=overwrite)

    def export_onnx(self, path: str | Path, *, opset: int = 21, progress: Progress = quiet) -> None:
        """Write an ONNX file whose weights stay packed and which plain onnxruntime runs. Raises ExportError."""
        from fxquant.codegen.onnx_export import export_onnx  # loads onnx

        signature = self.program.signature
        metadata = {
            "config": _json(self.config), "limits": json.dumps(signature.limits),
            "empty": json.dumps({item.name: item.empty for item in signature.inputs if item.empty}),
        }  # fmt: skip
        export_onnx(self.program, path, opset=opset, metadata=metadata, progress=progress)

    def report(self, path: str | Path) -> None:
        """Write a self-contained HTML page: totals, passes, graph diffs, and what became of every layer."""
        html.report(self.program, path, title="fxquant report", config=self.config.to_dict())

    def summary(self) -> summary.Summary:
        """Bytes before and after, layers with format and error, declines, passes; ``to_dict`` gives JSON."""
        return summary.summarize(self.program)

    def diff(self, a: str | None = None, b: str | None = None) -> str:
        """What each pass changed in the graph, as unified diffs; or the diff between two named passes."""
        return text.diff(self.program, a, b)

    def explain(self, layer: str) -> str:
        """The story of one layer: its format, what every pass did to it, and why it stayed in float if it did."""
        return text.explain(self.program, layer)

    def __repr__(self) -> str:
        return f"CompiledModel({len(self.program.gm.graph.nodes)} nodes, {len(self.program.trace)} passes)"


def _json(config: Config) -> str:
    return config.model_dump_json(exclude_defaults=True)
