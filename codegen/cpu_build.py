"""cpu_build: the C++ sources of the CPU kernels, ``native/``, and how they are compiled.

The sources know no format: what a code means is a table of numbers that a host gives, and codes lie as they do on disk.
They are compiled once for each instruction set, for torch and for onnxruntime in one library. Nothing here needs torch:
``setup.py``, which runs where there is none, loads this file too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fxquant.errors import KernelError

NATIVE = Path(__file__).parent / "native"
UNITS = ("exact", "rounded", "encode", "library", "ort")
"""What is compiled by itself; products are the first two."""
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden")
_SECONDS = 300
"""How long the compiler may take."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What the compiler is told for an instruction set, and the features of a CPU that has it."""

    name: str
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


X86 = (
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


def of_architecture() -> list[InstructionSet]:
    """Those that a library for this machine's architecture may be asked for, whatever this CPU has."""
    return [*(X86 if platform.machine() in ("x86_64", "AMD64") else ()), PORTABLE]


@cache
def sources() -> dict[str, str]:
    """Name -> text of every file that a compiler needs, headers too."""
    found = sorted(path for path in NATIVE.iterdir() if path.suffix in (".h", ".cpp"))
    return {path.name: path.read_text(encoding="utf-8") for path in found}


def origin(isa: InstructionSet) -> str:
    """All that a library is made from, but the compiler, as text."""
    return "\0".join([*(f"{name}\0{text}" for name, text in sources().items()), *FLAGS, *isa.flags])


def file_name(isa: InstructionSet) -> str:
    """What the library for an instruction set is called in an installation; of other sources it is called otherwise."""
    return f"cpu_{isa.name}_{hashlib.sha256(origin(isa).encode()).hexdigest()[:16]}.so"


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


def compiled(with_: Compiler, isa: InstructionSet) -> bytes:
    """The shared library of ``UNITS``, compiled in a temporary folder. Raises KernelError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in sources().items():
            (folder / file).write_text(text, encoding="utf-8")

        _run(with_, folder, [[*FLAGS, *isa.flags, "-c", f"{unit}.cpp", "-o", f"{unit}.o"] for unit in UNITS])
        _run(with_, folder, [["-shared", *(f"{unit}.o" for unit in UNITS), "-o", "library.so"]])
        return (folder / "library.so").read_bytes()


def _run(with_: Compiler, folder: Path, commands: list[list[str]]) -> None:
    """Run the compiler with each of these arguments at the same time. Raises KernelError."""
    started = [
        subprocess.Popen([with_.path, *some], cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for some in commands
    ]
    try:
        for process in started:
            _, told = process.communicate(timeout=_SECONDS)
            if process.returncode:
                raise KernelError(f"{with_.path} does not compile the CPU kernels: {told.strip()[:400]}")
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{with_.path} took more than {_SECONDS} s for the CPU kernels") from error
    finally:
        for process in started:
            process.kill()
            process.communicate()
