"""Quantize and pack a 4096x4096 fp32 matrix: fxquant beside torchao's private primitives, in turn, in one process.

Then single steps by the CPU kernels, each beside a copy, to memory that is there, of half the bytes that it reads and
writes: as many bytes moved.
torchao is not a dependency: `pip install --no-deps torchao==0.18.0` first; without it only our times are printed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch

import fxquant
from fxquant import packing, scales
from fxquant.codegen import cpu, cpu_codes
from fxquant.scheme import parse_spec

SIZE = 4096
SPECS = ("e3m2/channel", "mxfp4", "nvfp4", "e2m1/group64", "int4/group64", "uint4/group64", "e4m3/channel")


def ours(spec: str) -> Callable[[torch.Tensor], object]:
    def run(x: torch.Tensor) -> object:
        q = fxquant.quantize_tensor(x, spec)
        return q.packed, q.stored_scale

    return run


def peers() -> dict[str, Callable[[torch.Tensor], object]]:
    """torchao's nearest jobs. Its FP6 leaves a byte a code and its MXFP4 packs two codes a byte."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_mx
        from torchao.quantization import quant_primitives as primitives
    except ImportError:
        return {}

    def floatx(x: torch.Tensor) -> object:
        scale = primitives._choose_qparams_affine_floatx(x, 3, 2)
        return primitives._quantize_affine_floatx(x, scale, 3, 2), scale

    return {"e3m2/channel": floatx, "mxfp4": lambda x: to_mx(x, torch.float4_e2m1fn_x2, 32)}


def seconds(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    begin = time.perf_counter()
    run(x)
    return time.perf_counter() - begin


def steps(x: torch.Tensor, spec: str) -> dict[str, tuple[Callable[[torch.Tensor], object], int]]:
    """What the kernels do for a spec, and the bytes that it reads and writes."""
    kernels, parsed = cpu.available(), parse_spec(spec)
    if kernels is None:
        return {}
    q = fxquant.quantize_tensor(x, spec)
    bits, packed = parsed.format.bits, q.packed
    token = parse_spec(f"{parsed.format}/token")
    found: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
        "ranges": (lambda x: scales.extremes(x, parsed.block(*x.shape)), x.nbytes),
        "encode": (lambda x: cpu_codes.codes_of(kernels, x, q.scales, parsed), x.nbytes + q.codes.nbytes),
        "pack": (lambda x: packing.pack(q.codes, packing.planar(bits)), q.codes.nbytes + packed.nbytes),
        "unpack": (lambda x: packing.unpack(packed, packing.planar(bits), SIZE), q.codes.nbytes + packed.nbytes),
    }
    if not parsed.has_zero_point:
        few = x[: SIZE // 4]  # results that the allocator has memory for
        found["round a token"] = (lambda x: cpu_codes.rounded(kernels, few, None, token), 2 * few.nbytes)
    return found


def print_steps(x: torch.Tensor, runs: int) -> None:
    """Best of ``runs``."""
    for spec in SPECS:
        for name, (run, nbytes) in steps(x, spec).items():
            source, target = torch.ones(nbytes // 2, dtype=torch.uint8), torch.zeros(nbytes // 2, dtype=torch.uint8)
            own, copies = list[float](), list[float]()
            for _ in range(runs):
                own.append(seconds(run, x))
                copies.append(seconds(target.copy_, source))
            best, copy = min(own), min(copies)
            print(
                f"{spec:14} {name:14} best {best * 1e3:6.2f} ms  {nbytes / best / 1e9:5.1f} GB/s   "
                f"copy {copy * 1e3:6.2f} ms  ratio {best / copy:4.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    cpu.available()  # compiled where they are not yet
    others = peers()
    for spec in SPECS:
        ours(spec)(x)
        mine, theirs = list[float](), list[float]()
        for _ in range(arguments.runs):
            mine.append(seconds(ours(spec), x))
            if spec in others:
                theirs.append(seconds(others[spec], x))
        line = f"{spec:14} best {min(mine) * 1e3:7.1f} ms  median {statistics.median(mine) * 1e3:7.1f} ms"
        if theirs:
            line += f"   torchao best {min(theirs) * 1e3:7.1f} ms  median {statistics.median(theirs) * 1e3:7.1f} ms"
            medians = statistics.median(theirs) / statistics.median(mine)
            line += f"   ratio {min(theirs) / min(mine):5.1f} (medians {medians:.1f})"
        print(line, flush=True)
    print_steps(x, arguments.runs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process {before / 1024:.0f} MiB; the matrix is {x.nbytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
