"""cpu_library: the CPU kernels found, or compiled, and loaded.

Those that were compiled when fxquant was installed are taken if their name has the hash of the sources and flags that
are here now. Else they are compiled once, by the compiler that is here, into the cache; the name there has a hash of
the compiler too. A file of the cache is loaded only if this user alone can write to it (``fxquant.cache``), and any
file is used only if it gives what the reference gives for every format on this machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fxquant import cache as private
from fxquant.codegen import cpu_build
from fxquant.codegen.cpu_build import PORTABLE, X86, Compiler, InstructionSet, compiler
from fxquant.errors import FxquantError, KernelError

_LEAST = 1 << 19
"""Products that are worth a thread: some 30 microseconds."""


def instruction_sets() -> list[InstructionSet]:
    """Those of this CPU, the best first; the portable one is always there."""
    features = _features()
    return [one for one in X86 if features.issuperset(one.features)] + [PORTABLE]


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
        ("scale", Blocks), ("zero", ctypes.c_void_p), ("multiply", ctypes.c_int32), ("type", ctypes.c_int32),
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
    row_squares: ctypes._NamedFuncPointer
    pack: ctypes._NamedFuncPointer
    unpack: ctypes._NamedFuncPointer
    round: ctypes._NamedFuncPointer


@cache
def library(name: str = "") -> Library:
    """The kernels for an instruction set, by default the best of this CPU: those of the installation, if they were made
    from these sources, else those of the cache, compiled if they are not there.

    Raises KernelError where they cannot be compiled or loaded, CacheError where there is no safe place for them.
    """
    isa = next((one for one in instruction_sets() if name in ("", one.name)), None)
    if isa is None:
        raise KernelError(f"this CPU has no {name}; it has {', '.join(one.name for one in instruction_sets())}")
    installed = cpu_build.NATIVE / cpu_build.file_name(isa)
    if installed.exists():
        with suppress(KernelError):  # made where other system libraries are
            return _loaded(isa, installed)
    with_ = compiler()
    file = _file(isa, with_)
    path = private.folder() / file
    if private.read_bytes(file) is None:
        private.write_bytes(file, cpu_build.compiled(with_, isa))
    return _loaded(isa, path)


def _file(isa: InstructionSet, with_: Compiler) -> str:
    key = "\0".join([cpu_build.origin(isa), with_.path, with_.version])
    return f"cpu_{isa.name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


@cache
def made() -> bool:
    """Whether the library was there, in the installation or the cache, when this was first asked."""
    isa = instruction_sets()[0]
    if (cpu_build.NATIVE / cpu_build.file_name(isa)).exists():
        return True
    try:
        return private.read_bytes(_file(isa, compiler())) is not None
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
    extremes, squares = found.fxquant_extremes, found.fxquant_row_squares
    extremes.restype, extremes.argtypes = None, [pointer, count, *[size] * 4, pointer, pointer, pointer, size]
    encode.argtypes = [pointer, pointer, pointer, pointer, size]
    squares.restype, squares.argtypes = None, [pointer, pointer, pointer, pointer, pointer, size]
    pack.argtypes = unpack.argtypes = [pointer, size, size, size, count, pointer, pointer, size]
    round_.argtypes = [pointer, pointer, size]
    return Library(isa, path, linear, rows, extremes, encode, squares, pack, unpack, round_)


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
