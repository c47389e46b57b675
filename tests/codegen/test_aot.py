"""Compiling with no device: what comes out, and what is refused with which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_kernels import DOUBLE, E5M2_GEMM, GEMM, HOPPER

from fxquant.codegen.aot import compile_variant, load_source
from fxquant.codegen.variants import ARCHS, Variant, arch, occupancy, parse_arch
from fxquant.errors import ArchError, KernelError

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="triton interprets kernels in this process"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "e5m2.py"
    path.write_text(E5M2_GEMM)
    return path


@pytest.mark.parametrize("number", [80, 90, 120])
def test_compiles_for_an_architecture_that_is_not_here(source: Path, number: int) -> None:
    made = compile_variant(DOUBLE, source, number)
    assert made.cubin[:4] == b"\x7fELF"
    assert f".target sm_{number}" in made.ptx
    assert (made.arch, made.warps, made.variant) == (number, DOUBLE.warps, DOUBLE)
    assert made.shared == 0


def test_aligned_arguments_are_copied_in_128_bits_and_others_are_not(source: Path) -> None:
    aligned = compile_variant(GEMM, source, 80)
    assert "cp.async.cg.shared.global" in aligned.ptx  # cg: 16 bytes and nothing else
    plain = compile_variant(replace(GEMM, aligned=frozenset(("x", "w", "out"))), source, 80)
    assert "cp.async.cg.shared.global" not in plain.ptx


def test_a_changed_file_is_compiled_anew(tmp_path: Path) -> None:
    path = tmp_path / "e5m2.py"
    path.write_text(E5M2_GEMM)
    first = compile_variant(DOUBLE, path, 80)
    assert load_source(path) is load_source(path)
    path.write_text(E5M2_GEMM.replace("2 * tl.load", "3 * tl.load"))  # as long, in the same second
    assert compile_variant(DOUBLE, path, 80).cubin != first.cubin


@pytest.mark.parametrize(
    ("variant", "number", "says"),
    [
        (GEMM, 75, r"sm_75 has no .* tensor core .*; expected one of sm_80, sm_86"),
        (GEMM, 91, "sm_91 is not known; expected one of"),
        (HOPPER, 80, "e5m2_swap is not meant for sm_80: wgmma; expected one of sm_90"),
        (replace(GEMM, function="gem"), 80, "e5m2.py has no triton function 'gem', which e5m2_decode needs"),
        (replace(GEMM, function="tl"), 80, "has no triton function 'tl'"),
        (replace(GEMM, constants={"BM": 16, "BN": 32}), 80, r"does not fit gemm\(.*'KB' is not given exactly once"),
        (replace(GEMM, constants={**GEMM.constants, "M": 5}), 80, "'M' is not given exactly once"),
        (replace(GEMM, aligned=frozenset(["y"])), 80, "calls 'y' aligned, which is no run-time argument"),
        (
            replace(GEMM, signature={**GEMM.signature, "x": "*f61"}),
            80,
            r"e5m2_decode does not compile for sm_80: .*f61",
        ),
        (replace(GEMM, constants={**GEMM.constants, "BN": 24}), 80, "does not compile for sm_80: .*power of 2"),
        (replace(DOUBLE, function="broken"), 90, "double does not compile for sm_90: .*no_such_name is not defined"),
    ],
)
def test_what_is_wrong_is_said(source: Path, variant: Variant, number: int, says: str) -> None:
    with pytest.raises((KernelError, ArchError), match=says) as caught:
        compile_variant(variant, source, number)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"cannot read the kernels in .*none.py"):
        compile_variant(GEMM, tmp_path / "none.py", 80)
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(KernelError, match=r"bad.py cannot be imported: ZeroDivisionError: division by zero"):
        compile_variant(GEMM, tmp_path / "bad.py", 80)


_COMPILE = "from fxquant.codegen.aot import import_compiler; import_compiler()"


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("import os; os.environ['TRITON_INTERPRET'] = '1'", "start another process without TRITON_INTERPRET"),
        (
            "import os; os.environ['TRITON_INTERPRET'] = '1'; import triton; del os.environ['TRITON_INTERPRET']",
            "start another process",  # triton's own functions stay interpreted
        ),
        ("import sys; sys.modules['triton'] = None", "triton, which is not installed .* it exists for Linux"),
    ],
)
def test_processes_that_cannot_compile(before: str, says: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{before}\n{_COMPILE}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(f"KernelError: .*{says}", done.stderr)


@pytest.mark.parametrize("text", ["sm_90", "SM_90", "90", "9.0", " sm_90a"])
def test_architectures_by_name(text: str) -> None:
    assert parse_arch(text) == 90


@pytest.mark.parametrize("text", ["sm_70", "hopper", "", "sm_", "٩٠", "900"])
def test_unknown_architectures(text: str) -> None:
    with pytest.raises(ArchError, match="expected one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_103, sm_120, sm_121"):
        parse_arch(text)


@pytest.mark.parametrize(
    ("number", "registers", "shared", "warps", "blocks"),
    [
        (90, 32, 0, 4, 16),  # 64 warps / 4
        (90, 64, 0, 4, 8),  # 65536 registers / (64 * 32 * 4)
        (90, 71, 61440, 4, 3),  # 228 KB / 61 KB
        (80, 71, 61440, 4, 2),  # 164 KB / 61 KB
        (90, 32, 0, 1, 32),  # 32 blocks
        (86, 32, 0, 1, 16),  # 16 blocks
        (120, 32, 99 * 1024, 4, 1),  # 99 KB and the block's own 1 KB are all there is
        (120, 32, 99 * 1024 + 1, 4, 0),
        (90, 255, 0, 16, 0),  # one block's registers are more than an SM has
    ],
)
def test_occupancy(number: int, registers: int, shared: int, warps: int, blocks: int) -> None:
    found = occupancy(arch(number), registers=registers, shared=shared, warps=warps)
    assert found == (blocks, blocks * warps / ARCHS[number].warps)
