"""Products of packed weights on a CPU, beside float32 in torch and in onnxruntime and beside MatMulNBits.

    python benchmarks/cpu_gemm.py --formats e3m2 e2m1 e4m3 --rows 1 64 --threads 2

With --ggml FILE, a libggml.so (pip install --no-deps ik-llama-cpp-python has one), its Q6_K, Q4_0 and Q8_0 take part.

All are called in turn in one process, on weights that together exceed the last cache, so that each call reads its
weight from memory. Printed: the best and the median of the runs in ms, and float32 in onnxruntime over each.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxquant import packing
from fxquant.codegen import cpu, cpu_library
from fxquant.codegen.prepack import Operands
from fxquant.qtensor import quantize_tensor
from fxquant.scheme import parse_spec

Call = Callable[[], Any]
CACHE = 80 << 20
"""Bytes that the copies of a weight take together at least."""


def ours(format: str, bits: int, group: int, w: torch.Tensor, x: torch.Tensor) -> list[Call]:
    """``bits``: what x may be rounded to."""
    q = quantize_tensor(w, parse_spec(f"{format}/group{group}"))
    size = q.codes.numel() * q.spec.format.bits // 8
    calls: list[Call] = []
    kernels = cpu_library.library()
    for _ in range(-(-CACHE // size)):
        packed = packing.pack(q.codes, packing.planar(q.spec.format.bits))
        weight = cpu.packed_weight(Operands(packed, q.scale, q.zero_point, str(q.spec), q.shape, q.tensor_scale))
        assert weight is not None

        def call(weight: cpu.PackedWeight = weight) -> torch.Tensor:
            with cpu.activation_bits(bits):
                return cpu.linear(x, weight, None, kernels)

        calls.append(call)
    return calls


def torch_float(w: torch.Tensor, x: torch.Tensor) -> list[Call]:
    copies = [w.clone() for _ in range(-(-CACHE // (4 * w.numel())))]
    return [lambda copy=copy: torch.nn.functional.linear(x, copy) for copy in copies]


def session(node: ir.Node, x: torch.Tensor, rows: int, threads: int) -> Call:
    import onnxruntime

    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", ir.TensorType(ir.DataType.FLOAT), None
    given = [v for v in node.inputs if v is not None]
    graph = ir.Graph([given[0]], node.outputs, nodes=[node], initializers=given[1:],
                     opset_imports={"": 21, "com.microsoft": 1}, name="product")  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # the threads of a session that has run would else spin on while another contender is timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    run = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: run.run(None, feed)


def _input(x: torch.Tensor) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))


def _constant(name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape))


def ort_float(w: torch.Tensor, x: torch.Tensor, threads: int) -> list[Call]:
    def one() -> Call:
        node = ir.node("MatMul", [_input(x), _constant("w", w.T.contiguous().numpy())])
        return session(node, x, len(w), threads)

    return [one() for _ in range(-(-CACHE // (4 * w.numel())))]


def ort_bits(bits: int, group: int, w: torch.Tensor, x: torch.Tensor, threads: int) -> list[Call]:
    N, K = w.shape
    rng = np.random.default_rng(0)

    def one() -> Call:
        packed = rng.integers(0, 256, (N, K // group, group * bits // 8), dtype=np.uint8)
        scale = rng.random((N, K // group), dtype=np.float32)
        node = ir.node(
            "MatMulNBits", [_input(x), _constant("w", packed), _constant("s", scale)],
            {"K": K, "N": N, "bits": bits, "block_size": group, "accuracy_level": 4}, domain="com.microsoft",
        )  # fmt: skip
        return session(node, x, N, threads)

    return [one() for _ in range(-(-CACHE // (N * K * bits // 8)))]


class Ggml:
    """Products of ggml's own types by its C library: tensors in one pool of memory, a graph of one product a copy."""

    TYPES = MappingProxyType({"Q4_0": 2, "Q8_0": 8, "Q6_K": 14})
    _POOL = 512 << 20

    def __init__(self, path: str) -> None:
        class Parameters(ctypes.Structure):
            _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        self._lib = lib = ctypes.CDLL(path)
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        for name, arguments in (
            ("ggml_init", [Parameters]), ("ggml_new_tensor_2d", [pointer, ctypes.c_int, whole, whole]),
            ("ggml_mul_mat", [pointer] * 3), ("ggml_new_graph", [pointer]), ("ggml_get_data", [pointer]),
        ):  # fmt: skip
            getattr(lib, name).restype, getattr(lib, name).argtypes = pointer, arguments
        lib.ggml_build_forward_expand.argtypes = [pointer, pointer]
        lib.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
        self._parameters = Parameters

    def __call__(self, name: str, w: torch.Tensor, x: torch.Tensor, threads: int) -> list[Call]:
        lib, kind, (N, K) = self._lib, self.TYPES[name], w.shape
        pool = lib.ggml_init(self._parameters(self._POOL, None, False))
        rows = lib.ggml_new_tensor_2d(pool, 0, K, len(x))
        ctypes.memmove(lib.ggml_get_data(rows), x.data_ptr(), x.nbytes)
        calls: list[Call] = []
        size = 0
        while len(calls) * size < CACHE:
            weight = lib.ggml_new_tensor_2d(pool, kind, K, N)
            size = lib.ggml_quantize_chunk(kind, w.data_ptr(), lib.ggml_get_data(weight), 0, N, K, None)
            graph = lib.ggml_new_graph(pool)
            lib.ggml_build_forward_expand(graph, lib.ggml_mul_mat(pool, weight, rows))
            calls.append(lambda graph=graph: lib.ggml_graph_compute_with_ctx(pool, graph, threads))
        return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["e3m2", "e2m3", "e2m2", "e2m1", "e4m3", "int4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--bits", nargs="+", type=int, default=[32, 16, 8], help="what x may be rounded to")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--ggml", metavar="FILE", help="a libggml.so")
    options = parser.parse_args()
    ggml = Ggml(options.ggml) if options.ggml else None
    w = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    print(f"{options.size} x {options.size}, groups of {options.group}, kernels for {cpu_library.library().isa.name}")
    for threads, M in itertools.product(options.threads, options.rows):
        torch.set_num_threads(threads)
        x = torch.randn(M, options.size, generator=torch.Generator().manual_seed(1))
        contenders = {
            "onnxruntime float32": ort_float(w, x, threads),
            "torch float32": torch_float(w, x),
            "MatMulNBits 4": ort_bits(4, options.group, w, x, threads),
            "MatMulNBits 8": ort_bits(8, options.group, w, x, threads),
            **({} if ggml is None else {f"ggml {name}": ggml(name, w, x, threads) for name in Ggml.TYPES}),
            **{
                f"fxquant {format}{f', x in {bits} bits' if bits < 32 else ''}": ours(format, bits, options.group, w, x)
                for format in options.formats
                for bits in options.bits
            },
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(options.runs if M < 64 else max(5, options.runs // 4)):
            for name, calls in contenders.items():
                start = time.perf_counter()
                calls[turn % len(calls)]()
                times[name].append(time.perf_counter() - start)
        base = times["onnxruntime float32"]
        print(f"\nM = {M}, {threads} threads{'':10} best ms  median ms   float32 / it, best   median")
        for name, found in times.items():
            print(
                f"{name:24} {min(found) * 1e3:14.2f} {statistics.median(found) * 1e3:10.2f} "
                f"{min(base) / min(found):14.2f} {statistics.median(base) / statistics.median(found):14.2f}"
            )


if __name__ == "__main__":
    main()
