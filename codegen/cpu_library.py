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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fxquant import cache as private
from fxquant.codegen import cpu_source
from fxquant.errors import FxquantError, KernelError

_COMMON = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden")
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
        "avx512",
        ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni", "-mavx2", "-mfma",
         "-mf16c"),
        ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512vbmi", "avx512_vnni", "avx2", "fma", "f16c"),
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


class Weight(ctypes.Structure):
    """``fxq::Weight`` of ``native/packed.h``."""

    _fields_ = (
        ("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p),
        ("values", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32), ("half_scale", ctypes.c_int32), ("one_scale_row", ctypes.c_int32),
    )  # fmt: skip


class Blocks(ctypes.Structure):
    """``fxq::Blocks`` of ``native/encode.h``."""

    _fields_ = (
        ("at", ctypes.c_void_p), ("rows", ctypes.c_int64), ("groups", ctypes.c_int64), ("high", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )  # fmt: skip


class Encoding(ctypes.Structure):
    """``fxq::Encoding`` of ``native/encode.h``."""

    _fields_ = (
        ("kind", ctypes.c_int32), ("bits", ctypes.c_int32), ("mbits", ctypes.c_int32), ("lowest", ctypes.c_int32),
        ("most", ctypes.c_int32), ("nan", ctypes.c_int32), ("no_minus", ctypes.c_int32), ("low", ctypes.c_float),
        ("max", ctypes.c_float),
    )  # fmt: skip


class Matrix(ctypes.Structure):
    """``fxq::Matrix`` of ``native/encode.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("stride", ctypes.c_int64),
        ("scale", Blocks), ("zero", ctypes.c_void_p), ("multiply", ctypes.c_int32),
    )  # fmt: skip


class Grid(ctypes.Structure):
    """``fxq::Grid`` of ``native/activations.h``."""

    _fields_ = (("mbits", ctypes.c_int32), ("lowest", ctypes.c_int32), ("max", ctypes.c_float))


class Activations(ctypes.Structure):
    """``fxq::Activations`` of ``native/encode.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
        ("scale", Blocks), ("grid", Grid), ("zero", ctypes.c_float), ("type", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True)
class Library:
    """Compiled kernels for one instruction set: ``fxquant_linear`` and the others of ``native/library.cpp``."""

    isa: InstructionSet
    path: Path
    linear: ctypes._NamedFuncPointer
    rows: ctypes._NamedFuncPointer
    extremes: ctypes._NamedFuncPointer
    encode: ctypes._NamedFuncPointer
    pack: ctypes._NamedFuncPointer
    unpack: ctypes._NamedFuncPointer
    round: ctypes._NamedFuncPointer


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its path, and what it says it is."""

    path: str
    version: str


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
    return Compiler(path, said.stdout.splitlines()[0])


@cache
def library(name: str = "") -> Library:
    """The kernels for an instruction set, by default the best of this CPU, compiled if they are not in the cache.

    Raises KernelError where they cannot be compiled or loaded, CacheError where there is no safe place for them.
    """
    isa = next((one for one in instruction_sets() if name in ("", one.name)), None)
    if isa is None:
        raise KernelError(f"this CPU has no {name}; it has {', '.join(one.name for one in instruction_sets())}")
    with_ = compiler()
    file = _file(isa, with_)
    path = private.folder() / file
    if private.read_bytes(file) is None:
        private.write_bytes(file, compiled(with_, (*_COMMON, *isa.flags), cpu_source.sources()))
    return _loaded(isa, path)


def _file(isa: InstructionSet, with_: Compiler) -> str:
    key = "\0".join([cpu_source.origin(), with_.path, with_.version, *_COMMON, *isa.flags])
    return f"cpu_{isa.name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


@cache
def in_cache() -> bool:
    """Whether ``library()`` found its file in the cache, when this was first asked, and would not compile."""
    try:
        return private.read_bytes(_file(instruction_sets()[0], compiler())) is not None
    except FxquantError:
        return False


def _loaded(isa: InstructionSet, path: Path) -> Library:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the CPU kernels cannot be loaded: {error}") from error
    pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    linear, rows = found.fxquant_linear, found.fxquant_rows
    linear.restype, rows.restype = ctypes.c_char_p, None
    linear.argtypes = [pointer, pointer, size, size, pointer, pointer, size, count, pointer, size]
    rows.argtypes = [pointer, pointer, size, pointer, pointer, size]
    encode, pack, unpack, round_ = found.fxquant_encode, found.fxquant_pack, found.fxquant_unpack, found.fxquant_round
    encode.restype, pack.restype, unpack.restype, round_.restype = None, count, None, count
    extremes = found.fxquant_extremes
    extremes.restype, extremes.argtypes = None, [pointer, *[size] * 4, pointer, pointer, pointer, size]
    encode.argtypes = [pointer, pointer, pointer, pointer, size]
    pack.argtypes = unpack.argtypes = [pointer, size, size, size, count, pointer, pointer, size]
    round_.argtypes = [pointer, pointer, size]
    return Library(isa, path, linear, rows, extremes, encode, pack, unpack, round_)


def compiled(with_: Compiler, flags: tuple[str, ...], sources: Mapping[str, str]) -> bytes:
    """The shared library of ``cpu_source.UNITS``, compiled in a temporary folder. Raises KernelError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in sources.items():
            (folder / file).write_text(text, encoding="utf-8")

        def run(*arguments: str) -> None:
            try:
                done = subprocess.run([with_.path, *arguments], cwd=folder, capture_output=True, text=True,
                                      timeout=_SECONDS, check=False)  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise KernelError(f"{with_.path} took more than {_SECONDS} s for the CPU kernels") from error
            if done.returncode:
                raise KernelError(f"{with_.path} does not compile the CPU kernels: {done.stderr.strip()[:400]}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the threads wait for compilers
            list(pool.map(lambda unit: run(*flags, "-c", f"{unit}.cpp", "-o", f"{unit}.o"), cpu_source.UNITS))
        run("-shared", *(f"{unit}.o" for unit in cpu_source.UNITS), "-o", "library.so")
        return (folder / "library.so").read_bytes()


@cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` of the OpenMP that torch has loaded, whose threads are torch's; None where it
    has another OpenMP: kernels then run in the calling thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def threads(products: int) -> int:
    """Threads for so many products: as many as torch's operators take, but none that has less to do than waking it
    costs."""
    return max(1, min(torch.get_num_threads(), products // _LEAST))
