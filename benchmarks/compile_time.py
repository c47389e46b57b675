"""Time and memory of the main job on SmolLM2-135M: compile, export, save, load. Best and median of several runs."""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fxquant
from fxquant.demo import find_model
from fxquant.hf import load_model


def timed(action: Callable[[], object], runs: int) -> tuple[float, float, object]:
    """Best and median seconds of ``runs`` calls, and the last result."""
    seconds, result = [], None
    for _ in range(runs):
        begin = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), statistics.median(seconds), result


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    loaded = load_model(find_model())
    parameters = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    before = peak_bytes()
    best, median, compiled = timed(lambda: fxquant.compile(loaded.model, loaded.example_inputs), runs)
    assert isinstance(compiled, fxquant.CompiledModel)
    passes = sum(step.seconds for step in compiled.program.trace[1:])
    print(f"compile      best {best:6.2f} s  median {median:6.2f} s, of which the passes {passes:.2f} s")
    after = peak_bytes()
    print(f"             peak memory {after / parameters:.2f}x the float model ({before / parameters:.2f}x before it)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        best, median, _ = timed(lambda: compiled.save(out, overwrite=True), runs)
        print(f"save         best {best:6.2f} s  median {median:6.2f} s")
        best, median, _ = timed(lambda: fxquant.load(out), runs)
        print(f"load         best {best:6.2f} s  median {median:6.2f} s")
        onnx = Path(folder) / "model.onnx"
        best, median, _ = timed(lambda: compiled.export_onnx(onnx), runs)
        size = sum(f.stat().st_size for f in onnx.parent.glob(f"{onnx.name}*"))
        print(f"export_onnx  best {best:6.2f} s  median {median:6.2f} s, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
