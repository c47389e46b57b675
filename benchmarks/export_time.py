"""Seconds of export to ONNX by the number of layers: a Llama of tiny width in 2, 8 and 32 layers, and how they grow.

The exponent e of seconds = c * nodes^e is fitted to the best of several runs; 1 is linear. With --smollm2 SmolLM2-135M
is compiled to FP6 and exported too.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
import transformers

import fxquant
from fxquant.demo import find_model
from fxquant.hf import load_model

LAYERS = (2, 8, 32)


def tiny_llama(layers: int) -> fxquant.CompiledModel:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return fxquant.compile(model, {"input_ids": torch.arange(16).reshape(2, 8)}, "W6A16-E3M2")


def seconds(model: fxquant.CompiledModel, runs: int) -> float:
    """The best of several exports, after one that is not counted."""
    best = math.inf
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs + 1):
            begin = time.perf_counter()
            model.export_onnx(Path(folder) / "model.onnx")
            best = min(best, time.perf_counter() - begin) if run else best
    return best


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    cross = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return cross / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--smollm2", action="store_true", help="export SmolLM2-135M too")
    arguments = parser.parse_args()
    sizes, times = list[int](), list[float]()
    for layers in LAYERS:
        model = tiny_llama(layers)
        sizes.append(len(model.program.gm.graph.nodes))
        times.append(seconds(model, arguments.runs))
        print(
            f"{layers:3} layers  {sizes[-1]:5} nodes  {times[-1]:6.3f} s  {times[-1] / sizes[-1] * 1e3:.3f} ms a node"
        )
    print(f"seconds ~ nodes^{exponent(sizes, times):.2f}")
    if arguments.smollm2:
        loaded = load_model(find_model())
        compiled = fxquant.compile(loaded.model, loaded.example_inputs, "W6A16-E3M2")
        print(f"SmolLM2-135M  {seconds(compiled, arguments.runs):.2f} s")


if __name__ == "__main__":
    main()
