"""Fuzz the CPU kernels and the operators of onnxruntime, built with address and undefined-behaviour sanitizers.

    python tests/native/fuzz.py --seconds 60 [--seed N] [--isa avx2]
    python tests/native/fuzz.py --compiler "zig c++ -target aarch64-linux-musl -static" --emulator qemu-aarch64-static

Half of the time goes to ``fuzz_kernels.cpp``, which calls the kernels; half to onnxruntime sessions in a process that
has the sanitizers preloaded: models of one node whose shapes, dtypes, attributes and numbers are drawn at random, many
of them wrong. A model either gives numbers or an exception; a process that dies, or a report, is a failure. For another
architecture only the kernels are tried, without sanitizers, by a cross compiler and an emulator.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--seconds", type=float, default=60)
    given.add_argument("--seed", type=int, default=None)
    given.add_argument("--isa", default="", help="an instruction set of this CPU; the best by default")
    given.add_argument("--compiler", default="", help="a cross compiler and its arguments")
    given.add_argument("--emulator", default="", help="what runs its programs")
    given.add_argument("--sessions", metavar="LIBRARY", help=argparse.SUPPRESS)  # what runs under the sanitizers
    options = given.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    if options.sessions:
        return sessions(options.sessions, options.seconds, seed)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        if options.compiler:
            return foreign(Path(name), options.compiler.split(), options.emulator.split(), options.seconds, seed)
        driver, library = build(Path(name), options.isa)
        half = options.seconds / 2
        done = subprocess.run([str(driver), str(half), str(seed)], check=False)
        if done.returncode:
            return 1
        command = [sys.executable, __file__, "--seconds", str(half), "--seed", str(seed), "--sessions", str(library)]
        environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes()), "ASAN_OPTIONS": "detect_leaks=0"}
        return int(subprocess.run(command, env=environment, check=False).returncode != 0)


def build(folder: Path, name: str) -> tuple[Path, Path]:
    """The driver and the operators' library, compiled for an instruction set; some minutes."""
    from fxquant.codegen import cpu_library

    isa = next(one for one in cpu_library.instruction_sets() if name in ("", one.name))
    return linked(folder, [cpu_library.compiler().path], [*SANITIZE, *isa.flags]), folder / "library.so"


def foreign(folder: Path, compiler: list[str], emulator: list[str], seconds: float, seed: int) -> int:
    """The kernels of another architecture."""
    driver = linked(folder, compiler, ["-O2", "-ffp-contract=fast"], library=False)
    return subprocess.run([*emulator, str(driver), str(seconds), str(seed)], check=False).returncode


def linked(folder: Path, compiler: list[str], flags: list[str], *, library: bool = True) -> Path:
    """The driver, and ``library.so`` beside it; every unit is compiled once."""
    from fxquant.codegen import cpu_build

    for file, text in cpu_build.sources().items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "fuzz_kernels.cpp").write_text((HERE / "fuzz_kernels.cpp").read_text(encoding="utf-8"), encoding="utf-8")
    common = [*compiler, "-std=c++17", *flags, "-fPIC", "-fvisibility=hidden", "-pthread"]
    kernels = [unit for unit in cpu_build.UNITS if unit != "ort"]
    units = [*kernels, "fuzz_kernels", *(["ort"] if library else [])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [[*common, "-c", f"{unit}.cpp", "-o", f"{unit}.o"] for unit in units]
        list(pool.map(lambda command: subprocess.run(command, cwd=folder, check=True), compiled))
    objects = [f"{unit}.o" for unit in kernels]
    subprocess.run([*common, *objects, "fuzz_kernels.o", "-o", "fuzz_kernels"], cwd=folder, check=True)
    if library:
        subprocess.run([*common, "-shared", *objects, "ort.o", "-o", "library.so"], cwd=folder, check=True)
    return folder / "fuzz_kernels"


def runtimes() -> list[str]:
    """The sanitizers' own libraries, which must be there before anything else."""
    from fxquant.codegen import cpu_library

    compiler = cpu_library.compiler().path
    found = []
    for name in ("libasan.so", "libubsan.so"):
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found.append(said.stdout.strip())
    return found


# --- sessions ---------------------------------------------------------------------------------------------------------
def sessions(library: str, seconds: float, seed: int) -> int:
    """Random models until the time is over. What takes long to import is there before it begins."""
    import onnxruntime  # noqa: F401

    import fxquant.codegen.ort_formats  # noqa: F401

    random.seed(seed)
    numbers = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counts.update(attempt(library, numbers))
    what = ", ".join(f"{n} {how}" for how, n in sorted(counts.items()))
    print(f"{sum(counts.values())} attempts: {what}")
    return 0 if counts["ran"] else 1


def attempt(library: str, numbers: np.random.Generator) -> list[str]:
    """One model and a few runs of it, on inputs that fit or do not: ran, refused at load, refused at the run."""
    import onnxruntime

    model, feed = draw(numbers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, random.choice((1, 2, 3))
    options.enable_cpu_mem_arena = False  # a buffer of its own for every tensor, so that what is beside it is watched
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return [refused("load", error)]
    found = []
    for _ in range(12):
        given = dict(feed)
        if given and random.random() < 0.6:
            name = random.choice(list(given))
            changed = reshaped(given[name])
            given[name] = changed if changed.ndim == given[name].ndim else given[name]
        try:
            session.run(None, given)
            found.append("ran")
        except Exception as error:
            found.append(refused("run", error))
    return found


def refused(where: str, error: Exception) -> str:
    """The error names the node, whoever found it."""
    if "the.node" not in str(error):
        raise AssertionError(f"an error that does not name the node: {error}") from error
    return f"refused at {where}"


def draw(numbers: np.random.Generator) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """A model of one node and its inputs; about every second one has something wrong."""
    import onnx
    from onnx import helper

    from fxquant.codegen.ort_formats import FORMATS

    op = random.choice(
        ("Linear", "Linear", "LinearBias", "Embedding", "Dequantize", "FakeQuantizeDynamic", "FakeQuantize")
    )
    weights_only = ("uint", "nf", "higgs")
    format = random.choice([f for f in FORMATS if not (op.startswith("Fake") and str(f).startswith(weights_only))])
    inputs, attributes = parts(op, format, numbers)
    if random.random() < 0.5:
        spoil(inputs, attributes, numbers)
    constant = {n for n in inputs if n not in ("x", "indices") and random.random() < 0.6}
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in inputs.items()}
    y = kinds.get("x", onnx.TensorProto.FLOAT) if op.startswith(("Linear", "Fake")) else onnx.TensorProto.FLOAT
    name = f"{op}_{format}"
    node = helper.make_node(name, list(inputs), ["y"], name="the.node", domain="fxquant", **attributes)
    graph = helper.make_graph(
        [node], "fuzz",
        [helper.make_tensor_value_info(n, kinds[n], [None] * a.ndim) for n, a in inputs.items() if n not in constant],
        [helper.make_tensor_value_info("y", y, None)],
        [onnx.numpy_helper.from_array(inputs[n], n) for n in constant],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fxquant", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model, {n: a for n, a in inputs.items() if n not in constant}


def parts(op: str, format: Any, numbers: np.random.Generator) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Inputs and attributes that fit each other."""
    from fxquant.layouts import planes

    rows, cols, lead = (
        random.randint(1, 80),
        random.randint(1, 300),
        random.choice(((), (1,), (3,), (2, 4), (0,), (1, 0, 2))),
    )
    group = random.choice((cols, 16, 32, 64, random.randint(1, cols)))
    groups, scales = -(-cols // group), random.choice((1, rows, rows))
    width = sum(-(-cols * w // 8) for w in planes(format.bits))
    float_type = random.choice((np.float32, np.float32, np.float16))
    x = numbers.standard_normal((*lead, cols)).astype(float_type)
    if x.size and random.random() < 0.1:
        x.flat[random.randrange(x.size)] = random.choice((math.nan, math.inf, -math.inf, 6e4))
    if op == "FakeQuantizeDynamic":
        return {"x": x}, {}
    if op == "FakeQuantize":
        return {"x": x, "scale": numbers.random((1,) * random.randint(0, 2)).astype(np.float32)}, {}
    first: dict[str, np.ndarray[Any, Any]] = {"x": x}
    if op == "Embedding":
        first = {"indices": numbers.integers(-rows, rows, lead).astype(random.choice((np.int32, np.int64)))}
    weights = {
        **({} if op == "Dequantize" else first),
        "packed": numbers.integers(0, 256, (rows, width), dtype=np.uint8),
        "scale": numbers.random((scales, groups)).astype(random.choice((np.float32, np.float16))),
    }
    if str(format).startswith("uint"):
        weights["zero_point"] = numbers.integers(0, 256, (scales, groups), dtype=np.uint8)
    if op == "LinearBias":
        weights["bias"] = numbers.standard_normal(rows).astype(float_type)
    attributes: dict[str, Any] = {"cols": cols, "group_size": group}
    if op == "Dequantize":
        attributes["weight_shape"] = random.choice(([rows, cols], [rows, cols, 1], [rows * cols]))
    elif op != "Embedding" and random.random() < 0.5:
        attributes["activation_bits"] = random.choice((8, 16, 32))
    return weights, attributes


WRONG = (-1, 0, 1, 2, 7, 63, 65, 2**31, 2**40, 2**62, -(2**63), "text", 1.5, [1, 2])


def spoil(inputs: dict[str, np.ndarray[Any, Any]], attributes: dict[str, Any], numbers: np.random.Generator) -> None:
    """One or two changes that may make no sense."""
    for _ in range(random.randint(1, 2)):
        choice = random.random()
        if choice < 0.4 and attributes:
            name = random.choice([*attributes, "version", "unknown"])
            attributes[name] = random.choice(WRONG)
        elif choice < 0.5 and attributes:
            del attributes[random.choice(list(attributes))]
        elif choice < 0.55:
            del inputs[random.choice(list(inputs))]
            if not inputs:
                inputs["x"] = np.zeros((), np.float32)
        elif choice < 0.65:
            name = random.choice(list(inputs))
            inputs[name] = inputs[name].astype(random.choice((np.float64, np.int64, np.uint8, np.float16, np.float32)))
        elif choice < 0.75 and "indices" in inputs and inputs["indices"].size:
            inputs["indices"].flat[0] = random.choice((2**31 - 1, -(2**31), 10**6))
        else:
            name = random.choice(list(inputs))
            inputs[name] = reshaped(inputs[name])


def reshaped(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array cut short, flattened, repeated, with a dimension more, or without any."""
    cut = tuple(slice(0, max(0, n - random.randint(0, 2))) for n in array.shape)
    options = [
        array[cut],
        array.reshape(-1),
        np.concatenate([array, array]) if array.ndim else array,
        array[None],
        np.zeros((), array.dtype),
        array[..., :0] if array.ndim else array,
        array.reshape((1,) * 18 + array.shape),
    ]
    return np.ascontiguousarray(random.choice(options))


if __name__ == "__main__":
    sys.exit(main())
