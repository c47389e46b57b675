"""A model larger than the memory it may take: a checkpoint of LLaMA-7B's shapes to FP6, beside copying the same bytes.

    python benchmarks/scale.py --folder SCRATCH [--layers 32] [--runs 3]      (make scale; needs 35 GB of disk)

Writes bf16 weights drawn at random (13.5 GB for 32 layers) to SCRATCH, and measures in turn, each with the checkpoint
out of the page cache: cp of as many bytes in and out, with fsync; ``fxquant compile --stream`` as a process of its own,
from its start to its end. Prints both times, their ratio, and the most anonymous memory that the process held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from fxquant.graph import TensorType
from fxquant.weight_file import WeightFile

WRITTEN = 5_100_000_000
"""Bytes that cp writes; the first shard has about as many."""
SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}


def write_checkpoint(folder: Path, layers: int) -> None:
    """A Hugging Face folder of a Llama with random bf16 weights, in shards."""
    folder.mkdir(parents=True)
    hidden, wide, vocab = SHAPES["hidden_size"], SHAPES["intermediate_size"], 32000
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **SHAPES,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        for name in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.gate_proj.weight"] = shapes[f"model.layers.{i}.mlp.up_proj.weight"] = wide, hidden
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = hidden, wide
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    shards: list[dict[str, TensorType]] = [{}]
    for name, shape in shapes.items():
        held = sum(t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) * 2 for t in shards[-1].values())  # type: ignore[operator]
        if held + 2 * shape[0] * shape[-1] > WRITTEN:
            shards.append({})
        shards[-1][name] = TensorType(torch.bfloat16, shape)
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(1 << 26, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    index: dict[str, str] = {}
    for i, types in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(types, file)
        with WeightFile(folder / file, types) as weights:
            for name, type_ in types.items():
                if len(type_.shape) == 1:
                    weights.write(name, torch.ones(int(type_.shape[0]), dtype=torch.bfloat16))
                    continue
                rows, cols = (int(size) for size in type_.shape)
                step = max(1, len(pool) // 2 // cols)
                for start in range(0, rows, step):
                    high = min(step, rows - start)
                    at = int(torch.randint(len(pool) - high * cols, (1,), generator=generator))
                    weights.write(name, pool[at : at + high * cols].view(high, cols), start)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Have the system drop the files of a folder from its page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # not root: what posix_fadvise did has to do
        Path("/proc/sys/vm/drop_caches").write_text("1")


def copied(folder: Path, scratch: Path) -> float:
    """Seconds that cp takes to read the checkpoint and to write its first shard, fsync included."""
    shards = sorted(folder.glob("*.safetensors"))
    begin = time.perf_counter()
    subprocess.run(["cp", shards[0], scratch / "copy"], check=True)
    subprocess.run(["sync", scratch / "copy"], check=True)
    for shard in shards[1:]:
        subprocess.run(["cp", shard, "/dev/null"], check=True)
    seconds = time.perf_counter() - begin
    (scratch / "copy").unlink()
    return seconds


def compiled(folder: Path, out: Path, config: str) -> tuple[float, int, int]:
    """Seconds of ``fxquant compile --stream``, the peak of its anonymous memory, and the bytes that it wrote."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fxquant.cli", "compile", folder, "-o", out, "-c", config, "--stream", "--json"]
    begin = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], anonymous(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, told = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        sys.exit(told)
    return seconds, peak[0], sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process (RssAnon), 0 where it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a scratch folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (32 are LLaMA-7B's)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--config", default="W6A16-E3M2")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next time")
    given = parser.parse_args()
    model = given.folder / f"llama-{given.layers}"
    if not model.exists():
        print(f"writing {model} ...", file=sys.stderr)
        write_checkpoint(model, given.layers)
    size = sum(file.stat().st_size for file in model.iterdir())
    rows = []
    for i in range(given.runs):
        forget(model)
        copying = copied(model, given.folder)
        forget(model)
        seconds, peak, written = compiled(model, given.folder / "out", given.config)
        rows.append((copying, seconds, peak))
        print(f"run {i + 1}: cp {copying:.1f} s, fxquant {seconds:.1f} s ({copying / seconds:.0%} of its speed), "
              f"RssAnon {peak / 1e9:.2f} GB at most", flush=True)  # fmt: skip
    ratios = [copying / seconds for copying, seconds, _ in rows]
    print(f"{given.layers} layers, {size / 1e9:.2f} GB read, {written / 1e9:.2f} GB written by fxquant; "
          f"speed of cp: best {max(ratios):.0%}, median {statistics.median(ratios):.0%}; "
          f"RssAnon {max(peak for *_, peak in rows) / 1e9:.2f} GB")  # fmt: skip
    shutil.rmtree(given.folder / "out", ignore_errors=True)
    if not given.keep:
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
