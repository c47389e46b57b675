"""What an exported file says about itself, and how to read it: ``fxquant inspect model.onnx``, or Netron's properties.

fxquant.version           of this package
fxquant.config            JSON of the config that the model was compiled with
fxquant.operators, fxquant.activation_bits, fxquant.optimize_for      the options of the export
fxquant.weights           JSON: the spec of every quantized weight, by its name in the model
fxquant.program_sha256    of the graph's text and the bytes of its tensors: equal for equal compiled models
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from fxquant.codegen.onnx_builder import Options
from fxquant.errors import ModelError
from fxquant.files import shown, strict_json
from fxquant.graph import info
from fxquant.onnx_claims import check_onnx
from fxquant.program import Program, text
from fxquant.rewrite import fetch, get_attrs

CONFIG = "fxquant.config"


def described(program: Program, options: Options) -> dict[str, str]:
    """The properties of a file that ``program`` is written to."""
    quants = [found for node in program.gm.graph.nodes if (found := info(node).weight) is not None]
    settings = {f"fxquant.{name}": str(value) for name, value in asdict(options).items()}
    weights = json.dumps({quant.weight: str(quant.spec) for quant in quants})
    return {**settings, "fxquant.weights": weights, "fxquant.program_sha256": digest(program)}


def digest(program: Program) -> str:
    """SHA-256 of the graph's text and of its tensors, in the order in which the graph reads them first."""
    found = hashlib.sha256(text(program.gm).encode())
    for name in dict.fromkeys(str(node.target) for node in get_attrs(program.gm.graph)):
        value = fetch(program.gm, name).detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class OnnxSummary:
    """What an ONNX file holds. ``operators`` and ``weights`` are counts by operator, and bytes by element type."""

    path: str
    bytes: int
    opset: int
    producer: str
    operators: dict[str, int]
    weights: dict[str, int]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        specs = Counter(_specs(self.metadata.get("fxquant.weights", "{}")))
        lines = [
            f"{self.path}: {self.bytes:,} bytes, opset {self.opset}, by {self.producer}",
            f"operators   {_counts(self.operators)}",
            f"weights     {', '.join(f'{kind} {nbytes:,} bytes' for kind, nbytes in self.weights.items())}",
        ]
        if specs:
            lines.append(f"quantized   {_counts(dict(specs.most_common()))}")
        shown = {k: v for k, v in self.metadata.items() if k != "fxquant.weights" and v not in ("[]", "{}")}
        wide = max(map(len, shown), default=0)
        return "\n".join([*lines, *(f"{key:<{wide}}  {value}" for key, value in shown.items())])


def _specs(text_: str) -> list[str]:
    """The specs of the weights, as the file says; none where it says something else."""
    try:
        found = strict_json(text_.encode())
    except ValueError:
        return []
    return [spec for spec in found.values() if isinstance(spec, str)] if isinstance(found, dict) else []


def summarize(path: str | Path) -> OnnxSummary:
    """Read the graph of an ONNX file, not its weights. Raises ModelError for what is none."""
    file = Path(path)
    check_onnx(file, data=False)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own errors, OSError
        raise ModelError(
            f"{file} cannot be read as an ONNX file: {error}; give one that fxquant export wrote"
        ) from error
    data = file.with_name(f"{file.name}.data")
    nbytes = sum(p.stat().st_size for p in (file, data) if p.exists())
    operators = Counter(shown(f"{n.domain}.{n.op_type}".removeprefix(".")) for n in model.graph.node)
    weights = Counter[str]()
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        weights[kind] += len(tensor.raw_data) or sum(int(e.value) for e in tensor.external_data if e.key == "length")
    opset = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
    metadata = {_text(p.key): _text(p.value) for p in model.metadata_props}
    producer = shown(f"{model.producer_name} {model.producer_version}").strip()
    return OnnxSummary(
        str(file), nbytes, opset, producer, dict(operators.most_common()), dict(weights.most_common()), metadata
    )


def _text(value: str | bytes) -> str:
    """A text of the file, which protobuf hands out as bytes where it is not UTF-8."""
    return shown(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())
