"""Time of x @ W^T on a GPU: packed weights against cuBLAS in float16 and torch's own INT4 kernel.

Needs a CUDA device of sm_80 or later; where there is none it says so and measures nothing. Every contender gets the
same treatment: copies of its weight, together larger than four L2 caches, are used in turn; their launches are captured
in a CUDA graph, so that Python is not in the time; a replay is timed by events. Shown are the best and the median of
the replays, microseconds a product, the bytes of weight read a second at the best, and the ratio to cuBLAS (above 1:
faster).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fxquant
from fxquant.codegen import launch
from fxquant.ops import operators as ops

SHAPES = ((4096, 4096), (12288, 4096), (4096, 11008), (28672, 8192))  # (N, K): LLaMA 7B and 70B
ROWS = (1, 4, 16, 64, 256)
SPECS = ("e3m2/channel", "e3m2/group128", "e2m1/group128", "int4/group128", "e4m3/channel")
INT4_GROUP = 128
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute the product: a function for each copy of the weight, and the bytes of a copy."""

    name: str
    dtype: torch.dtype
    copies: Sequence[Product]
    nbytes: int


def copies(nbytes: int, given: int) -> int:
    """How many copies of a weight are more than the L2 cache holds."""
    cache = torch.cuda.get_device_properties().L2_cache_size or 64 << 20
    return given or max(2, -(-4 * cache // max(nbytes, 1)))


def cublas(N: int, K: int, given: int) -> Contender:
    count = copies(2 * N * K, given)
    weights = [torch.randn(N, K, device="cuda", dtype=torch.float16) for _ in range(count)]
    return Contender("cuBLAS float16", torch.float16, [lambda x, w=w: F.linear(x, w) for w in weights], 2 * N * K)


def torch_int4(N: int, K: int, given: int) -> Contender | None:
    """``aten._weight_int4pack_mm``: bfloat16 x, groups of 128 with bfloat16 scales and zeros."""
    if K % INT4_GROUP or N % 64:
        return None
    nbytes = N * K // 2 + 4 * N * K // INT4_GROUP
    made = []
    for _ in range(copies(nbytes, given)):
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(K // INT4_GROUP, N, 2, dtype=torch.bfloat16, device="cuda")
        made.append(lambda x, p=packed, s=scales: torch.ops.aten._weight_int4pack_mm(x, p, INT4_GROUP, s))
    return Contender("torch int4 bfloat16", torch.bfloat16, made, nbytes)


def packed(spec: str, N: int, K: int, given: int) -> Contender:
    q = fxquant.quantize_tensor(torch.randn(N, K, device="cuda"), spec)
    nbytes = q.nbytes
    made: list[Product] = []
    for _ in range(copies(nbytes, given)):
        parts = [None if t is None else t.clone() for t in (q.packed, q.stored_scale, q.zero_point)]
        made.append(lambda x, parts=parts: ops.linear_wq(x, *parts, None, spec, [N, K], q.tensor_scale))
    return Contender(f"fxquant {spec}", torch.float16, made, nbytes)


def measure(contender: Contender, M: int, K: int, replays: int) -> tuple[float, float]:
    """Best and median seconds of one product."""
    x = torch.randn(M, K, device="cuda").to(contender.dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, prepares and warms up outside the capture
        for product in contender.copies:
            product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in contender.copies:
            product(x)
    seconds = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / len(contender.copies))
    return min(seconds), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--copies", type=int, default=0, help="of each weight; 0: more than four L2 caches")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_gemm.py needs a CUDA device of sm_80 or later, and there is none: nothing was measured")
    gpu = launch.device(torch.cuda.current_device())
    if reason := launch.no_kernels(gpu):
        raise SystemExit(f"gpu_gemm.py measures kernels, and none runs here: {reason}")
    import triton

    print(f"{gpu.name}, sm_{gpu.arch}, {gpu.sms} SMs; torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'N':>6} {'K':>6} {'M':>4}  {'':28} {'best us':>9} {'median':>9} {'GB/s':>7} {'ratio':>6}")
    for N, K in SHAPES:
        contenders = [cublas(N, K, options.copies), torch_int4(N, K, options.copies)]
        contenders += [packed(spec, N, K, options.copies) for spec in options.specs]
        for M in options.rows:
            reference = 0.0
            for contender in (c for c in contenders if c is not None):
                best, median = measure(contender, M, K, options.replays)
                reference = reference or best
                print(
                    f"{N:6} {K:6} {M:4}  {contender.name:28} {best * 1e6:9.2f} {median * 1e6:9.2f} "
                    f"{contender.nbytes / best / 1e9:7.0f} {reference / best:6.2f}"
                )


if __name__ == "__main__":
    main()
