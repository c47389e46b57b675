"""cpu_library: the CPU kernels compiled, loaded and tried. Compiled once, by the compiler that is here, into the cache.

The file's name has a hash of the source, the compiler and the flags, so that another of any of them is another file. It
is loaded only if this user alone can write to it (``fxquant.cache``), and used only if it gives what the reference
gives for every format on this machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fxquant import cache as private
from fxquant.codegen import cpu_source
from fxquant.errors import KernelError

_COMMON = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden")
_LEAST = 1 << 19
"""Products that are worth a thread: some 30 microseconds."""
_SECONDS = 300
"""How long the compiler may take."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What the compiler is told for an instruction set, and the features of a CPU that has it."""

    name: str
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


_X86 = (
    InstructionSet(
        "avx512", ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma", "f16c"),
    ),
    InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma", "f16c")),
)  # fmt: skip
PORTABLE = InstructionSet("portable")
"""Whatever the compiler takes for granted: SSE2 on x86-64, NEON on aarch64."""


def instruction_sets() -> list[InstructionSet]:
    """Those of this CPU, the best first; the portable one is always there."""
    features = _features()
    return [one for one in _X86 if features.issuperset(one.features)] + [PORTABLE]


@cache
def _features() -> frozenset[str]:
    """The names that Linux has for this CPU's features; none elsewhere, which leaves the portable kernels."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


@dataclass(frozen=True)
class Library:
    """Compiled kernels for one instruction set."""

    isa: InstructionSet
    path: Path
    linear: ctypes._NamedFuncPointer


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its path, what it says it is, and whether it makes OpenMP that torch's own threads run."""

    path: str
    version: str
    threads: bool


@cache
def compiler() -> Compiler:
    """The C++ compiler of ``$CXX``, else c++, g++ or clang++. Raises KernelError where there is none."""
    names = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise KernelError(f"no C++ compiler found (looked for {', '.join(names)}); install g++, or set CXX")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if said.returncode:
        raise KernelError(f"{path} --version failed: {said.stderr.strip()[:200]}")
    # code of GCC calls GOMP_parallel, which torch's own OpenMP has; what Clang calls it may not have
    gnu = "Free Software Foundation" in said.stdout
    return Compiler(path, said.stdout.splitlines()[0], False)


@cache
def library(name: str = "") -> Library:
    """The kernels for an instruction set, by default the best of this CPU, compiled if they are not in the cache.

    Raises KernelError where they cannot be compiled or loaded, CacheError where there is no safe place for them.
    """
    isa = next((one for one in instruction_sets() if name in ("", one.name)), None)
    if isa is None:
        raise KernelError(f"this CPU has no {name}; it has {', '.join(one.name for one in instruction_sets())}")
    with_ = compiler()
    flags = (*_COMMON, *isa.flags, *(("-fopenmp",) if with_.threads else ()), f"-DFXQ_ISA={isa.name}")
    key = "\0".join([cpu_source.origin(), with_.path, with_.version, *flags])
    file = f"cpu_{isa.name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path = private.folder() / file
    if private.read_bytes(file) is None:
        private.write_bytes(file, _compiled(with_, flags, cpu_source.library_source(threads=with_.threads)))
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the CPU kernels cannot be loaded: {error}") from error
    linear = getattr(loaded, f"fxquant_linear_{isa.name}")
    linear.restype = ctypes.c_int
    linear.argtypes = _ARGUMENTS
    return Library(isa, path, linear)


_P, _I = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [_I, _P, _P, _P, _I, _I, _I, _I, _P, _I, _I, _P, _I, _I]


def _compiled(with_: Compiler, flags: tuple[str, ...], text: str) -> bytes:
    """The shared library, compiled in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gemm.h").write_text(cpu_source.header(), encoding="utf-8")
        (folder / "library.cpp").write_text(text, encoding="utf-8")
        # compiled with OpenMP, linked without: the symbols are those of the OpenMP that torch has loaded
        for name, source in cpu_source.onnxruntime_sources().items():
            (folder / name).write_text(source, encoding="utf-8")
        units = ("library", "ort", "portable")
        steps = (
            *([with_.path, *(f for f in flags if f != "-shared"), "-c", f"{u}.cpp", "-o", f"{u}.o"] for u in units),
            [with_.path, "-shared", *(f"{u}.o" for u in units), "-o", "library.so"],
        )
        for step in steps:
            try:
                done = subprocess.run(step, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
            except subprocess.TimeoutExpired as error:
                raise KernelError(f"{with_.path} took more than {_SECONDS} s for the CPU kernels") from error
            if done.returncode:
                raise KernelError(f"{with_.path} does not compile the CPU kernels: {done.stderr.strip()[:400]}")
        return (folder / "library.so").read_bytes()


def threads(products: int) -> int:
    """Threads for so many products: as many as torch's operators take, but none that has less to do than waking it
    costs."""
    return max(1, min(torch.get_num_threads(), products // _LEAST)) if compiler().threads else 1
