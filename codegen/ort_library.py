"""ort_library: the CPU kernels as operators of onnxruntime's.

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(fxquant.custom_ops_library())

The library is the file of ``cpu_library``, one for both hosts. Before its path is handed out, a process of its own
loads it in the onnxruntime that is installed and runs one node: what could take a program down is found out elsewhere.
What passed is remembered in the cache, for that file, that onnxruntime and CPUs such as this.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fxquant import cache as private
from fxquant import ops
from fxquant.codegen import cpu_build, cpu_library
from fxquant.codegen.onnx_functions import DOMAIN, VERSION, op_type
from fxquant.errors import CacheError, FxquantError, KernelError, ModelError
from fxquant.onnx_claims import check_onnx
from fxquant.packing import pack, planar
from fxquant.scheme import parse_spec

if TYPE_CHECKING:
    import onnxruntime

_SPEC, _ROWS, _COLS, _TOKENS = "e3m2/group64", 9, 196, 3
_SECONDS = 120
_WITHOUT = "The file runs without the library too, slower: leave out register_custom_ops_library"


def custom_ops_library() -> str:
    """The path of the operators' library, for ``SessionOptions.register_custom_ops_library``.

    Compiled at the first call, if it was not when fxquant was installed. Raises KernelError where it cannot be compiled
    or loaded, or where onnxruntime with it does not give what the reference gives; files of fxquant run without it.
    """
    try:
        path = cpu_library.library().path
        _check(path)
    except FxquantError as error:
        raise KernelError(f"onnxruntime cannot have fxquant's operators here: {error}. {_WITHOUT}") from error
    return str(path)


def onnx_session(
    path: str | Path, *, threads: int = 0, library: bool | Literal["auto"] = "auto"
) -> onnxruntime.InferenceSession:
    """An onnxruntime session of an exported file, on the CPU, with the operators' library.

    ``threads`` is ``intra_op_num_threads``, 0 for as many as there are cores. ``library``: True raises KernelError
    where there is none, ``"auto"`` warns and goes without, False goes without. Raises ModelError for a file that is not
    there, that ``onnx_claims`` refuses, or that onnxruntime cannot load.
    """
    import onnxruntime

    check_onnx(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        try:
            options.register_custom_ops_library(custom_ops_library())
        except KernelError as error:
            if library is True:
                raise
            warnings.warn(str(error), stacklevel=2)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}; give a file that fxquant "
                         f"export wrote") from error  # fmt: skip


def report() -> dict[str, str]:
    """What the kernels of this machine are: instruction sets, compiler, library, trial; reasons where there is none."""
    import onnxruntime

    found = {"instruction sets": ", ".join(one.name for one in cpu_library.instruction_sets())}
    try:
        found["compiler"] = cpu_build.compiler().version
    except FxquantError as error:
        found["compiler"] = str(error)
    try:
        found["library"] = custom_ops_library()
        found["trial"] = f"passed in onnxruntime {onnxruntime.__version__}"
    except FxquantError as error:
        found["library"] = str(error)
    return found


@cache
def _check(path: Path) -> None:
    """Try the library, unless it is known to have passed. Raises KernelError."""
    import onnxruntime

    sets = ",".join(one.name for one in cpu_library.instruction_sets())
    about = [path.read_bytes(), onnxruntime.__version__.encode(), sets.encode()]
    name = f"tried_{hashlib.sha256(b''.join(about)).hexdigest()[:16]}"
    try:
        if private.read_bytes(name) is not None:
            return
    except CacheError:
        name = ""  # a library that came with the package needs no cache
    why = trial(path)
    if why:
        raise KernelError(f"{path} failed its trial in onnxruntime {onnxruntime.__version__}: {why}")
    if name:
        private.write_bytes(name, f"onnxruntime {onnxruntime.__version__}\n".encode())


def trial(path: Path) -> str | None:
    """Why the library does not do in onnxruntime, None where one node gives exactly what the reference gives."""
    model, x, want = _example()
    command = [sys.executable, "-P", "-c", _TRIAL, str(path), str(_TOKENS), str(_COLS), *sys.path]
    try:
        done = subprocess.run(command, input=x.tobytes() + model, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it could not be tried: {error}"
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1][:400]
    if done.stdout != want.tobytes():
        return "wrong numbers"
    return None


_TRIAL = """
import sys
sys.path[:] = sys.argv[4:]
import numpy as np
import onnxruntime
library, tokens, cols = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
given = sys.stdin.buffer.read()
x = np.frombuffer(given[: 4 * tokens * cols], np.float32).reshape(tokens, cols)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(given[x.nbytes :], options, providers=["CPUExecutionProvider"])
sys.stdout.buffer.write(session.run(None, {"x": x})[0].tobytes())
"""


def _example() -> tuple[bytes, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A model of one node, x, and y: small whole numbers and scales of powers of two, so that sums are exact."""
    spec = parse_spec(_SPEC)
    codes = (torch.arange(_ROWS * _COLS) * 7 % 2**spec.format.bits).to(torch.uint8).reshape(_ROWS, _COLS)
    packed = pack(codes, planar(spec.format.bits))
    groups = -(-_COLS // spec.group_size(_COLS))
    scale = torch.tensor([2.0, 0.5, 1.0]).repeat(_ROWS * groups)[: _ROWS * groups].reshape(_ROWS, groups)
    x = (torch.arange(_TOKENS * _COLS) % 9 - 4).float().reshape(_TOKENS, _COLS)
    want = ops.linear_wq(x, packed, scale, None, None, str(spec), (_ROWS, _COLS))
    node = op_type("Linear", spec.format)
    return (
        one_node(node, x.numpy(), (packed.numpy(), scale.numpy()), cols=_COLS, group_size=64),
        x.numpy(),
        want.numpy(),
    )


def one_node(op: str, x: np.ndarray[Any, Any], weights: tuple[np.ndarray[Any, Any], ...], **attributes: Any) -> bytes:
    """A model of one node of our domain, without a function: y of x of any sizes and ``weights``."""
    import onnx
    from onnx import helper

    names = [f"weight_{i}" for i in range(len(weights))]
    node = helper.make_node(op, ["x", *names], ["y"], name=op, domain=DOMAIN, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node], "trial", [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
