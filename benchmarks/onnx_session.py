"""Memory and time of exported language models in onnxruntime: each file in a process of its own, one row a file.

    python benchmarks/onnx_session.py smollm2-fp6.onnx small.onnx [--library]

Resident memory after loading and after running, at most; seconds to load; best milliseconds of 5 runs of one token and
of 2 runs of 128. --library registers fxquant's custom-op library.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def best(session: onnxruntime.InferenceSession, ids: np.ndarray, runs: int) -> float:
    """Milliseconds of the fastest run."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        session.run(None, {"input_ids": ids})
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def measure(path: str, library: str | None, threads: int) -> None:
    before = resident()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load, after = time.perf_counter() - begin, resident()
    ids = (np.arange(128) * 37 % 1000).reshape(1, 128)
    one, many = best(session, ids[:, :1], 5), best(session, ids, 2)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mb = [f"{(b - before) / 1e6:7.0f}" for b in (after, resident(), most)]
    print(f"{Path(path).name:28} {load:6.1f} s  {' '.join(mb)} MB  {one:8.1f} ms {many:8.0f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--library", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--path", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.path or (len(given.files) == 1 and not given.library):
        measure(given.files[0], given.path or None, given.threads)
        return
    library = ""
    if given.library:
        import fxquant

        library = fxquant.custom_ops_library()
    print(f"{'file':28} {'load':>8}  loaded     ran    most          1 token  128 tokens")
    for path in given.files:
        command = [sys.executable, __file__, path, "--threads", str(given.threads)]
        subprocess.run([*command, *(["--path", library] if library else [])], check=True)


if __name__ == "__main__":
    main()
