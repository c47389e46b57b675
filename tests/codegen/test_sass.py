"""Reading machine code: instructions, loops and counts, on listings and on a real compile."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_kernels import DOUBLE, E5M2_GEMM, GEMM

from fxquant.codegen import sass
from fxquant.codegen.aot import Compiled, compile_variant
from fxquant.codegen.sass import Instruction, count, k_loop, parse, statistics
from fxquant.errors import KernelError

LISTING = (Path(__file__).parent.parent / "golden" / "e5m2_decode_sm80.sass").read_text()
USAGE = " Function gemm:\n  REG:50 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
MADE = Compiled(GEMM, 80, b"", "", 8192, 4, "")


def listing(*lines: str, section: str = ".text.k") -> str:
    """A listing as nvdisasm prints it, of lines such as ``HMMA.16816.F32 R0, R1, R2, R0`` and labels ``.L_x_0:``."""
    at = iter(range(0, 1 << 20, 16))
    code = [line if line.endswith(":") else f"        /*{next(at):04x}*/                   {line} ;" for line in lines]
    return "\n".join([f'\t.section\t{section},"ax",@progbits', *code, ""])


def names(code: list[Instruction] | None) -> list[str] | None:
    return None if code is None else [i.name for i in code]


def test_every_line_of_code_is_read() -> None:
    lines = [line for line in LISTING.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/", line)]
    code = parse(LISTING)
    assert len(code) == len(lines)
    assert {i.section for i in code} == {".text.gemm"}
    branch = next(i for i in code if i.target == ".L_x_1")
    assert (branch.opcode, branch.predicated) == ("BRA", True)
    assert [i.labels for i in code if i.labels] == [(".L_x_1",), (".L_x_0",), (".L_x_2",), (".L_x_3",)]


def test_counts_of_a_listing_are_those_of_its_text() -> None:
    """The K loop is what stands between the label .L_x_1 and the branch to it."""
    text = LISTING[LISTING.index("\n.L_x_1:") : LISTING.index("BRA `(.L_x_1)")]
    per = 32 * 4 / (32 * 64)

    def found(pattern: str) -> int:
        return len(re.findall(rf"\*/ +(?:@\S+ )?(?:{pattern})[. ;]", text))

    figures = count(LISTING, USAGE, MADE)
    assert (figures.registers, figures.spills, figures.stack, figures.shared) == (50, 0, 0, 8192)
    assert figures.loop
    assert figures.instructions == found(r"[A-Z]\w*") + 1  # and the branch
    assert figures.issued == figures.instructions * per
    assert figures.logic == found("LOP3|SHF|PRMT|SEL|SGXT|BMSK") * per == 22 * per
    assert figures.integer == found("LOP3|SHF|PRMT|SEL|SGXT|BMSK|IMAD|IADD3|LEA|MOV") * per
    assert (figures.half, figures.i2f) == (0, 0)
    assert (figures.mma, figures.mmas) == ("HMMA", 4)
    assert (figures.copies, figures.copies128, figures.tma) == (2, 2, 0)
    assert (figures.sts, figures.bars) == (0, 2)
    assert (figures.blocks, figures.occupancy) == (9, 36 / 64)


def test_spills_are_found_anywhere() -> None:
    code = listing("STL [R1], R0", "LDL.LU R0, [R1+0x4]", "@P0 LDL R1, [R1]", "EXIT")
    figures = count(code, "REG:255 STACK:16", MADE)
    assert (figures.spills, figures.stack, figures.loop, figures.mma) == (3, 16, False, None)
    assert count(code, "REG:255 STACK:16", replace(MADE, variant=DOUBLE)).issued is None


def test_a_constant_is_no_product_of_halves() -> None:
    text = LISTING.replace("LDGDEPBAR ;", "HFMA2.MMA R4, -RZ, RZ, 0, 1.7881393432617188e-07 ;")
    assert count(text, USAGE, MADE).half == 0
    assert count(text.replace("-RZ, RZ", "R5, R6"), USAGE, MADE).half == 2 * 32 * 4 / (32 * 64)


def test_stores_of_weights_in_the_loop_are_seen() -> None:
    text = LISTING.replace("LDGDEPBAR ;", "STS.128 [R3], R8 ;")
    assert count(text, USAGE, MADE).sts == 2


@pytest.mark.parametrize("opcode", ["HMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "IMMA"])
def test_every_tensor_core_opcode_makes_a_k_loop(opcode: str) -> None:
    code = listing(".L_x_0:", "LDG.E.128 R4, [R2]", f"{opcode}.X R0, R4, R8, R0", "@P0 BRA `(.L_x_0)", "EXIT")
    assert names(k_loop(parse(code))) == ["LDG", opcode, "BRA"]


def test_the_innermost_loop_with_a_tensor_core_instruction_is_taken() -> None:
    code = listing(
        ".L_x_0:", "LDG.E R1, [R2]",
        ".L_x_1:", "LDG.E R3, [R2]", "HMMA.16816.F32 R4, R4, R8, R4", "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "LDG.E R5, [R2]", "@P1 BRA `(.L_x_2)",
        "@P2 BRA `(.L_x_0)", "EXIT", ".L_x_3:", "BRA `(.L_x_3)",
    )  # fmt: skip
    assert names(k_loop(parse(code))) == ["LDG", "HMMA", "BRA"]


def test_a_wait_out_of_line_neither_cuts_the_loop_nor_counts() -> None:
    """On sm_100 the slow way of a wait stands after EXIT and jumps back into the middle of the K loop."""
    code = listing(
        ".L_x_0:", "LDG.E R1, [R2]", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R38", "@!P1 BRA `(.L_x_2)",
        ".L_x_1:", "BRA.U UP0, `(.L_x_4)", "UTCHMMA tmem[UR29], gdesc[UR22]",
        ".L_x_4:", "LOP3.LUT R1, R1, R2, RZ, 0xc0, !PT", "@P6 BRA `(.L_x_0)", "EXIT",
        ".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R38", "@!P1 BRA `(.L_x_2)", "BRA `(.L_x_1)",
    )  # fmt: skip
    assert names(k_loop(parse(code))) == ["LDG", "SYNCS", "BRA", "BRA", "UTCHMMA", "LOP3", "BRA"]


def test_a_wait_in_line_counts() -> None:
    code = listing(
        ".L_x_0:", "LDG.E R1, [R2]",
        ".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R38", "@!P1 BRA `(.L_x_1)",
        "UTCHMMA tmem[UR29], gdesc[UR22]", "@P6 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert names(k_loop(parse(code))) == ["LDG", "SYNCS", "BRA", "UTCHMMA", "BRA"]


def test_a_loop_that_reads_nothing_is_a_part_of_one() -> None:
    """Groups of warps with a task each: one multiplies what another copied. Then the whole kernel is counted."""
    code = listing(
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "@P1 BRA `(.L_x_0)", "EXIT",
        ".L_x_1:", "SYNCS.PHASECHK R1", "UTCHMMA tmem[UR29]", "@P1 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert k_loop(parse(code)) is None
    figures = count(code, "REG:8 STACK:0", MADE)
    assert (figures.loop, figures.mma, figures.copies128, figures.instructions) == (False, "UTCHMMA", 1, 8)


def test_diverging_threads_stay_in_the_loop() -> None:
    code = listing(
        ".L_x_0:", "LDG.E R1, [R2]", "BSSY B0, `(.L_x_2)", "@P0 BRA `(.L_x_1)", "LOP3.LUT R1, R1, R2, RZ, 0xc0, !PT",
        "BSYNC B0",
        ".L_x_2:", "HMMA.16816.F32 R4, R4, R8, R4", "@P1 BRA `(.L_x_0)", "EXIT",
        ".L_x_1:", "PRMT R1, R1, 0x1, R2", "BSYNC B0", "EXIT",
    )  # fmt: skip
    assert names(k_loop(parse(code))) == [
        "LDG", "BSSY", "BRA", "LOP3", "BSYNC", "HMMA", "BRA", "PRMT", "BSYNC",
    ]  # fmt: skip


def test_other_sections_are_not_run_into() -> None:
    one = listing("LDG.E R1, [R2]", "HMMA.16816.F32 R4, R4, R8, R4", section=".text.a")
    two = listing(".L_x_0:", "HMMA.16816.F32 R4, R4, R8, R4", "@P0 BRA `(.L_x_0)", "EXIT", section=".text.b")
    assert k_loop(parse(one + two)) is None


def test_a_listing_of_something_else_is_refused() -> None:
    with pytest.raises(KernelError, match="disassembly of e5m2_decode for sm_80 cannot be read"):
        count("nothing", USAGE, MADE)
    with pytest.raises(KernelError, match="cannot be read"):
        count(LISTING, "nothing", MADE)


def test_a_missing_or_failing_tool_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(KernelError, match="nvdisasm failed: "):
        sass.disassemble(b"no cubin")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"nvdasm is not in .* nor on the path; install triton"):
        sass.tool("nvdasm")


@pytest.mark.parametrize("number", [80, 90, 100, 120])
def test_a_real_kernel(tmp_path: Path, number: int) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "e5m2.py"
    path.write_text(E5M2_GEMM)
    figures = statistics(compile_variant(GEMM, path, number))
    assert (figures.loop, figures.mma, figures.spills, figures.stack) == (True, "HMMA", 0, 0)
    # 16 x 32 x 64 products, 16 x 8 x 16 in an HMMA, 4 warps; 16 x 64 x 2 bytes of x and 32 x 64 of w in 2 copies
    assert (figures.mmas, figures.copies, figures.copies128, figures.sts) == (4, 2, 2, 0)
    assert figures.issued is not None
    assert 4 < figures.issued < 8
    plain = statistics(compile_variant(replace(GEMM, aligned=frozenset(("x", "w", "out"))), path, number))
    assert plain.copies128 == 0
