"""CompiledModel: what ``fxquant.compile`` and ``fxquant.load`` return."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxquant import store
from fxquant.codegen import cpu, cpu_codes, launch  # noqa: F401  what operators run on a CPU and on a GPU
from fxquant.codegen.bind import bound
from fxquant.codegen.fuse import fused
from fxquant.config import Config
from fxquant.errors import ExportError, KernelError
from fxquant.program import Program, Progress, copied, quiet
from fxquant.rewrite import fetch, get_attrs
from fxquant.show import explorer, html, summary, text

if TYPE_CHECKING:
    from fxquant.codegen.onnx_builder import ActivationBits, Operators, OptimizeFor
    from fxquant.codegen.onnx_check import OnnxCheck
    from fxquant.show.numerics import Comparison


class CompiledModel:
    """A compiled model: call it as the model it was made from; save, export, inspect it.

    ``program`` is the graph and its trace, ``config`` what it was compiled with. Calls run a form of the graph made at
    the first one: on a GPU linears have taken in what surrounds them (``codegen/fuse.py``), on a CPU weights and
    constants are looked up beforehand (``codegen/bind.py``); everything else is about ``program``.

    ``activation_bits`` 16 or 8 lets packed linears on a CPU round their input to so many bits, for each row and 8
    columns, where that is faster: calls with few rows, as a decoder's steps are. 32 is float32 throughout.

    ``origin`` is what it was made from (``fxquant.origin``), as its saved model's manifest says; None if unknown.
    """

    def __init__(
        self, program: Program, config: Config, *, activation_bits: int = 32, origin: Mapping[str, Any] | None = None
    ) -> None:
        self.program = program
        self.config = config
        self.activation_bits = activation_bits
        self.origin = origin

    @cached_property
    def _runs(self) -> Program:
        return fused(self.program) if self._on_gpu() else bound(self.program)

    def _on_gpu(self) -> bool:
        return any(fetch(self.program.gm, str(node.target)).is_cuda for node in get_attrs(self.program.gm.graph))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of the model's own type; of dicts, lists and tuples after ``load``. No gradients.

        Raises InputError, naming the input, for what does not fit the signature.
        """
        with torch.no_grad(), cpu.activation_bits(self.activation_bits):
            return self._runs(*args, **kwargs)

    def to(self, device: str | torch.device) -> CompiledModel:
        """A copy of the model on another device, ``"cuda"`` for one; inputs are to be there too. This one stays."""
        return CompiledModel(
            copied(self.program, torch.device(device)), self.config, activation_bits=self.activation_bits,
            origin=self.origin,
        )  # fmt: skip

    def autotune(self, rows: Sequence[int] = (1,), *, progress: Progress = quiet) -> dict[str, Any]:
        """Time the tiles of every packed linear on the GPU that the model is on, for so many rows of input.

        The fastest are kept in the user's cache folder, and used from then on. Takes some seconds a shape, most of them
        compilation. Returns what was chosen. Raises InputError where the model is not on a GPU that runs kernels.
        """
        program = self._runs if self._on_gpu() else self.program
        return dict(launch.autotune(program.gm, rows, progress=progress))

    def save(self, directory: str | Path, *, tokenizer: Any | None = None, overwrite: bool = False) -> None:
        """Write the folder ``directory``: graph.json, model.safetensors with packed weights, and manifest.json, which
        says what the model was made from. Raises SaveError.

        A ``tokenizer`` is saved beside them, so that ``fxquant eval`` finds it. ``overwrite`` replaces a saved model.
        """
        config = self.config.to_dict()
        store.save(self.program, directory, config=config, tokenizer=tokenizer, overwrite=overwrite, origin=self.origin)

    def export_onnx(
        self, path: str | Path, *, opset: int = 21, operators: Operators = "auto", activation_bits: ActivationBits = 32,
        optimize_for: OptimizeFor = "speed", external_data: bool | None = None, check: bool = False,
        progress: Progress = quiet,
    ) -> None:  # fmt: skip
        """Write an ONNX file whose weights stay packed and which plain onnxruntime runs. Raises ExportError.

        ``operators``: ``auto`` takes MatMulNBits and GatherBlockQuantized where they are exact and fast, and nodes of
        the domain fxquant elsewhere; ``fxquant`` these alone; ``standard`` these only where there is nothing else.
        ``activation_bits``: 32, or to how many (16, 8) a kernel of a linear may round its input by itself.
        ``optimize_for``: ``speed`` has onnxruntime decode weights when it loads the file, ``memory`` keep them packed.
        ``external_data`` writes weights to ``<path>.data``, which onnxruntime maps into memory; by default above 64 MB.
        ``check`` runs the file and compares it (``check_onnx``); ExportError where it is too far off, and the file
        stays.
        """
        from fxquant.codegen.onnx_builder import Options  # loads onnx
        from fxquant.codegen.onnx_export import export_onnx
        from fxquant.codegen.onnx_metadata import CONFIG

        signature = self.program.signature
        metadata = {
            CONFIG: _json(self.config), "limits": json.dumps(signature.limits),
            "empty": json.dumps({item.name: item.empty for item in signature.inputs if item.empty}),
        }  # fmt: skip
        options = Options(operators, activation_bits, optimize_for)
        export_onnx(
            self.program, path, opset=opset, options=options, metadata=metadata, external_data=external_data,
            progress=progress,
        )  # fmt: skip
        if check and not (found := self.check_onnx(path, progress=progress)).ok:
            raise ExportError(f"{path} was written, and does not compute what the model does in torch:\n{found}")

    def check_onnx(
        self, path: str | Path, *, inputs: Sequence[Any] | None = None, progress: Progress = quiet
    ) -> OnnxCheck:
        """Run an exported file in onnxruntime and this model in torch, and compare; ``str`` of the result is a table.

        ``inputs`` are example inputs as ``compile`` takes them; by default tokens and numbers are drawn, for up to
        three sets of sizes. Where fxquant's custom-op library is there, the file is run with it too. ExportError if
        onnxruntime cannot load or run the file.
        """
        import fxquant
        from fxquant.codegen.onnx_check import check_onnx

        try:
            library = fxquant.custom_ops_library()
        except KernelError as error:
            library = None
            warnings.warn(f"checked without fxquant's custom-op library: {error}", stacklevel=2)
        return check_onnx(self.program, path, inputs=inputs, library=library, progress=progress)

    def report(
        self, path: str | Path, *, title: str = "fxquant report", comparison: Comparison | None = None,
        figures: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Write a self-contained HTML page: totals, the model as a tree and a graph, passes, every layer, trade-offs.

        ``comparison`` with the float model (``compare``) adds the error of every layer's output; ``figures`` are
        measurements to show at the top, ``{"perplexity": "8.58"}``. Raises SaveError.
        """
        config = self.config.to_dict()
        html.report(self.program, path, title=title, config=config, comparison=comparison, figures=figures)

    def model_explorer(self, path: str | Path, comparison: Comparison | None = None) -> list[Path]:
        """Write the graph, and that of every pass, as JSON that Google's Model Explorer opens, and overlays beside it:
        error, bits and bytes of each layer, and what a ``comparison`` found. Returns the files, the graphs first."""
        return explorer.write(self.program, path, comparison)

    def summary(self) -> summary.Summary:
        """Bytes before and after, layers with format and error, declines, passes; ``to_dict`` gives JSON."""
        return summary.summarize(self.program)

    def diff(self, a: str | None = None, b: str | None = None) -> str:
        """What each pass changed in the graph, as unified diffs; or the diff between two named passes."""
        return text.diff(self.program, a, b)

    def explain(self, layer: str, comparison: Comparison | None = None) -> str:
        """The story of one layer: its format and how well it is used, what every pass did to it, why it stayed in
        float if it did, and its errors in a ``comparison``."""
        return text.explain(self.program, layer, comparison)

    def compare(self, model: Any, inputs: Any = None, *, seed: int = 0, progress: Progress = quiet) -> Comparison:
        """Run this model and the float ``model`` it was compiled from side by side, and rank layers by their error.

        ``inputs``: token windows ``[n, length]``, batches, or one batch as a dict; by default they are drawn with
        ``seed``. ``str`` of the result is a table. Raises InputError where ``model`` is another one
        (``comparison.compare``).
        """
        from fxquant.comparison import compare

        return compare(self, model, inputs, seed=seed, progress=progress)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def __repr__(self) -> str:
        return f"CompiledModel({len(self.program.gm.graph.nodes)} nodes, {len(self.program.trace)} passes)"


def _json(config: Config) -> str:
    return config.model_dump_json(exclude_defaults=True)
