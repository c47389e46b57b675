"""Tokens a second of a decoder with its KV cache: packed and in float32, in torch and in onnxruntime.

    python benchmarks/decode.py --weight e3m2/channel --threads 1 --folder /tmp/decode

All four run in turn in one process, the same prompt and greedy decoding; a turn is a prompt and so many new tokens.
Printed: the best and the median turn in tokens a second, the ratio to float32 in the same runtime, and the resident
memory that a session of the packed file adds to a fresh process, beside the file's size. Files are kept in --folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fxquant
from fxquant import hf
from fxquant.demo import find_model
from fxquant.generate import Engine, OnnxEngine, Speed, TorchEngine, generate

TYPES = ["linear", "embedding"]
"""SmolLM2's output head is tied to its embedding; in float32 it would be a third of the packed model's traffic."""

_RESIDENT = """
import json, re, sys
import numpy, onnxruntime, torch
from fxquant.codegen import ort_library
from fxquant.generate import OnnxEngine, generate

def kilobytes():
    return {k: int(v) for k, v in re.findall(r"^(\\w+):\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)}

before = kilobytes()
engine = OnnxEngine(sys.argv[1], threads=1)
list(generate(engine, list(range(100, 132)), most=8))
after = kilobytes()
print(json.dumps({k: (after[k] - before[k]) * 1024 for k in ("VmRSS", "RssAnon", "RssFile")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or GGUF file; default: SmolLM2-135M")
    parser.add_argument("--weight", default="e3m2/channel")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=["linear", "embedding"])
    parser.add_argument("--passes", type=json.loads, default=[], help="such as '[\"quantize_kv_cache\"]'")
    parser.add_argument("--activation-bits", type=int, default=32, choices=[32, 16, 8], help="of the packed linears")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, required=True, help="where compiled models and ONNX files are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    rules = [{"match": "*", "weight": options.weight, "types": options.types}, {"match": "*", "keep": True}]
    packed = compiled(options, "packed", {"rules": rules, "passes": options.passes})
    plain = compiled(options, "float32", {"rules": [{"match": "*", "keep": True}]})
    models = [fxquant.load(packed), fxquant.load(plain)]
    models[0].activation_bits = options.activation_bits
    pairs = {
        "torch": tuple(TorchEngine(model) for model in models),
        "onnxruntime": tuple(OnnxEngine(f"{p}.onnx", threads=options.threads) for p in (packed, plain)),
    }
    library = "with" if hasattr(fxquant, "custom_ops_library") else "without"
    print(f"{options.weight}, x in {options.activation_bits} bits, {options.prompt} tokens of prompt and {options.new} "
          f"new ones, {options.threads} threads, onnxruntime {library} a library of native operators")  # fmt: skip
    print(f"{'':24}{'best':>8} {'median':>8} tokens/s, over float32 {'best':>6} {'median':>7}   prompt, median")
    rates = measured(options, {(name, i): e for name, pair in pairs.items() for i, e in enumerate(pair)})
    for (name, i), found in rates.items():
        steps, prompt = [s.step_rate for s in found], statistics.median(s.prompt_rate for s in found)
        base = [s.step_rate for s in rates[name, 1]]
        best, middle = max(steps), statistics.median(steps)
        ratios = f"{best / max(base):6.2f} {middle / statistics.median(base):7.2f}"
        what = f"{name} {('packed', 'float32')[i]}"
        print(f"{what:24}{best:8.1f} {middle:8.1f} {'':22} {ratios} {prompt:16.1f}")
    resident(f"{packed}.onnx")


def compiled(options: argparse.Namespace, name: str, config: dict[str, Any]) -> Path:
    """The folder of a compiled model with its KV cache, and beside it the exported file; made where it is not there."""
    folder: Path = options.folder / name
    wanted = json.dumps({"config": config, "model": str(options.model), "activation_bits": options.activation_bits})
    note = options.folder / f"{name}.json"
    if note.exists() and note.read_text() == wanted:
        return folder
    loaded = hf.load_model(options.model or find_model(), kv_cache=True)
    assert loaded.tokenizer is not None
    data = fxquant.evaluate.calibration_windows(loaded.tokenizer)
    q = fxquant.compile(loaded.model, loaded.example_inputs, config, calibration=data)
    q.save(folder, tokenizer=loaded.tokenizer, overwrite=True)
    q.export_onnx(
        f"{folder}.onnx", activation_bits=options.activation_bits, external_data=True
    )  # which onnxruntime maps, where it would copy a file's own
    note.write_text(wanted)
    return folder


def measured(options: argparse.Namespace, engines: dict[tuple[str, int], Engine]) -> dict[tuple[str, int], list[Speed]]:
    ids = [100 + 7 * i for i in range(options.prompt)]
    for engine in engines.values():  # prepares weights
        list(generate(engine, ids, most=2))
    found: dict[tuple[str, int], list[Speed]] = {key: [] for key in engines}
    for _ in range(options.turns):
        for key, engine in engines.items():
            speed = Speed()
            list(generate(engine, ids, most=options.new + 1, speed=speed))
            found[key].append(speed)
    return found


def resident(path: str) -> None:
    done = subprocess.run([sys.executable, "-c", _RESIDENT, path], capture_output=True, text=True, check=True)
    added = json.loads(done.stdout)
    size = sum(f.stat().st_size for f in (Path(path), Path(f"{path}.data")) if f.exists())
    print(f"\n{Path(path).name}: {size / 1e6:.1f} MB; a session adds {added['VmRSS'] / 1e6:.1f} MB to a fresh process "
          f"({added['RssAnon'] / 1e6:.1f} of its own, {added['RssFile'] / 1e6:.1f} of files): "
          f"{added['VmRSS'] / size:.2f} times the file")  # fmt: skip


if __name__ == "__main__":
    main()
