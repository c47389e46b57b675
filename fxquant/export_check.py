"""Reading an exported checkpoint back: its weights bit for bit, and its logits beside the compiled model's."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.checkpoints import transformers
from fxquant.codegen.checkpoint import read
from fxquant.compiled import CompiledModel
from fxquant.errors import ExportError
from fxquant.examples import example_inputs
from fxquant.program import relative_error

CLOSE, CLOSE_ROUNDED = 1e-4, 5e-2
"""Relative error of logits of the same model: sums in another order; inputs rounded by the library's own rule."""


@dataclass(frozen=True)
class CheckpointCheck:
    """What came back: how many weights there are, which differ in a bit, and the relative error of the logits."""

    weights: int
    different: tuple[str, ...]
    logits_error: float
    rounds_inputs: bool

    @property
    def ok(self) -> bool:
        return not self.different and self.logits_error <= (CLOSE_ROUNDED if self.rounds_inputs else CLOSE)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        wrong = f", {len(self.different)} not, such as {self.different[0]}" if self.different else ""
        return (
            f"{self.weights - len(self.different)} of {self.weights} weights read back bit for bit{wrong}; "
            f"logits within {self.logits_error:.1e} of the compiled model's"
        )


def check_compressed_tensors(compiled: CompiledModel, directory: str | Path) -> CheckpointCheck:
    """Load a folder with transformers and the library compressed-tensors, decompress it and compare.

    ExportError where the library is missing, or cannot load the folder.
    """
    hf = transformers()
    try:
        from compressed_tensors.compressors import ModelCompressor
    except ImportError as error:
        raise ExportError(f"checking needs the package compressed-tensors ({error}); "
                          f"run: pip install 'fxquant[compressed-tensors]'") from error  # fmt: skip
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if any(not group["weights"]["symmetric"] for group in config["config_groups"].values()):
        raise ExportError(
            "weights with zero points cannot be read back: transformers makes room for unpacked ones, and the format "
            "has them packed; leave out the check, or compile with int4 or int8"
        )
    try:
        with redirect_stderr(io.StringIO()):  # their progress bars
            model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
            ModelCompressor().decompress_model(model)
    except Exception as error:  # the libraries raise many types
        raise ExportError(f"{directory} was written, and cannot be read: {type(error).__name__}: {error}") from error
    for value in model.parameters():
        value.data = value.data.float()  # FP4 is decompressed to bfloat16, which holds it exactly
    return _compare(compiled, model)


def check_gguf(compiled: CompiledModel, path: str | Path) -> CheckpointCheck:
    """Load a GGUF file with transformers and gguf, and compare. ExportError where they cannot load it."""
    hf, path = transformers(), Path(path)
    try:
        with redirect_stderr(io.StringIO()):
            model = hf.AutoModelForCausalLM.from_pretrained(
                path.absolute().parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True,
                quantization_config=hf.GgufConfig(dequantize=True),
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"{path} was written, and cannot be read: {type(error).__name__}: {error}") from error
    return _compare(compiled, model)


def _compare(compiled: CompiledModel, model: nn.Module) -> CheckpointCheck:
    checkpoint = read(compiled.program)
    want = {name: weight.tensor.dequantize() for name, weight in checkpoint.packed.items()}
    want |= checkpoint.floats
    got = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    shared = [name for name in want if name in got]
    different = [name for name in shared if not torch.equal(got[name].to(want[name].dtype), want[name])]
    inputs = {"input_ids": example_inputs(model)["input_ids"]}
    with torch.no_grad():
        error = relative_error([compiled(**inputs)["logits"]], [model.eval()(**inputs).logits])
    assert error is not None
    rounds = any(weight.rounding is not None for weight in checkpoint.packed.values())
    return CheckpointCheck(len(shared), tuple(different), error, rounds)
