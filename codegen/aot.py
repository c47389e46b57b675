"""Compile a Triton kernel ahead of time, for an architecture that need not be here: no GPU, no driver."""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fxquant.codegen.variants import FP_FUSION, Variant, arch
from fxquant.errors import KernelError


@dataclass(frozen=True, slots=True, repr=False)
class Compiled:
    """What triton made of a variant: machine code and PTX, bytes of shared memory of a block, and its warps."""

    variant: Variant
    arch: int
    cubin: bytes
    ptx: str
    shared: int
    warps: int
    triton: str

    def __repr__(self) -> str:
        return f"Compiled({self.variant.name}, sm_{self.arch}, {len(self.cubin)} bytes)"


def compile_variant(variant: Variant, source: Path, arch_number: int) -> Compiled:
    """Compile the variant's function of the emitted file ``source`` for sm_<arch_number>.

    The file is imported, so it runs: give one that this process wrote. Takes 1 to 5 seconds, and next to none where
    triton's cache has it. The same source, arguments and triton give the same machine code.

    Raises ArchError for an unknown architecture, KernelError where triton is not installed or interprets kernels in
    this process, where the variant is not meant for the architecture or does not fit the function, and where the
    compiler refuses it.
    """
    number = arch(arch_number).number
    if number not in variant.archs:
        raise KernelError(
            f"{variant.name} is not meant for sm_{number}{f': {variant.needs}' if variant.needs else ''}; "
            f"expected one of {', '.join(f'sm_{n}' for n in variant.archs)}"
        )
    triton = import_compiler()
    function = _function(variant, source)
    try:
        made = _compile(triton, function, variant, number)
    except Exception as error:  # triton's, MLIR's, LLVM's and ptxas' failures have no common base
        raise KernelError(
            f"{variant.name} does not compile for sm_{number}: {_reason(error)} ({source.name})"
        ) from error
    return Compiled(
        variant, number, made.asm["cubin"], made.asm["ptx"], made.metadata.shared, made.metadata.num_warps,
        triton.__version__,
    )  # fmt: skip


def import_compiler() -> ModuleType:
    """The package triton, able to compile. Raises KernelError where it is missing or interprets."""
    try:
        import triton
        import triton.compiler
    except ImportError as error:
        raise KernelError(
            f"kernels are compiled by triton, which is not installed ({error}); it exists for Linux: pip install triton"
        ) from None
    # What triton's own functions are was settled when it was imported: taking the variable away is not enough.
    if triton.knobs.runtime.interpret or not isinstance(triton.language.zeros, triton.runtime.jit.JITFunction):
        raise KernelError(
            "triton interprets kernels in this process, which TRITON_INTERPRET says, and cannot compile them too; "
            "start another process without TRITON_INTERPRET"
        )
    package: ModuleType = triton
    return package


def load_source(path: Path) -> ModuleType:
    """Import an emitted file under a name that its content gives, so that a changed file is another module."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KernelError(f"cannot read the kernels in {path}: {error}") from error
    name = f"fxquant_kernels_{hashlib.sha256(content).hexdigest()[:16]}"
    if (known := sys.modules.get(name)) is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    linecache.checkcache(str(path))  # triton reads the text of functions through it
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise KernelError(f"the kernels in {path} cannot be imported: {_reason(error)}") from error
        raise
    return module


def _function(variant: Variant, source: Path) -> Any:
    """The variant's function, checked against what the variant says of its arguments."""
    function: Any = getattr(load_source(source), variant.function, None)
    if not hasattr(function, "arg_names"):
        raise KernelError(f"{source.name} has no triton function {variant.function!r}, which {variant.name} needs")
    given, taken = [*variant.signature, *variant.constants], list(function.arg_names)
    if sorted(given) != sorted(taken):
        odd = sorted(set(given) ^ set(taken)) or sorted({n for n in given if given.count(n) > 1})
        raise KernelError(
            f"{variant.name} does not fit {variant.function}{tuple(taken)}: {', '.join(map(repr, odd))} is not given "
            f"exactly once"
        )
    if unknown := sorted(variant.aligned - set(variant.signature)):
        raise KernelError(f"{variant.name} calls {unknown[0]!r} aligned, which is no run-time argument of it")
    return function


def _compile(triton: Any, function: Any, variant: Variant, number: int) -> Any:
    signature = {n: variant.signature.get(n, "constexpr") for n in function.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if n in variant.aligned
    }  # what triton finds out at a launch from the values
    source = triton.compiler.ASTSource(function, signature, dict(variant.constants), attrs)
    target = triton.backends.compiler.GPUTarget("cuda", number, 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": FP_FUSION}
    return triton.compile(source, target=target, options=options)


def _reason(error: BaseException) -> str:
    """One line of an error that may hold a listing: the innermost cause's, and of that the line that tells most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no reason given")
    return f"{type(error).__name__}: {told[:300]}"
