"""CPU kernels: within float32's rounding of float64 for every format, grouping and shape; the same bits for any number
of threads; the reference where there is no compiler or no kernel."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant import ops, packing
from fxquant.codegen import cpu, cpu_build, cpu_library, remember
from fxquant.codegen.ort_formats import FORMATS
from fxquant.codegen.prepack import Operands
from fxquant.errors import InputError, KernelError
from fxquant.formats import parse_format
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scheme import parse_spec

pytestmark = pytest.mark.kernels
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler here"
)
SETS = [one.name for one in cpu_library.instruction_sets()]


def weight(spec: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize_tensor(torch.randn(rows, cols, generator=generator), parse_spec(spec))


def operands(q: QuantizedTensor) -> Operands:
    packed = packing.pack(q.codes, packing.planar(q.spec.format.bits))
    return Operands(packed, q.scale, q.zero_point, str(q.spec), q.shape, q.tensor_scale)


def product(x: Tensor, q: QuantizedTensor, isa: str = "", bias: Tensor | None = None) -> Tensor:
    """By a kernel, and by nothing else."""
    packed = cpu.packed_weight(operands(q))
    assert packed is not None
    return cpu.linear(x, packed, bias, cpu_library.library(isa))


def values(q: QuantizedTensor) -> Tensor:
    """W in float64, from codes and scales."""
    codes = q.spec.format.decode(q.codes, torch.float64)
    high, wide = q.spec.block(*codes.shape)
    scale = q.scale.double() if q.tensor_scale is None else q.scale.double() * q.tensor_scale.double()

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(high, 0)[: len(codes)].repeat_interleave(wide, 1)[:, : codes.shape[1]]

    if q.zero_point is not None:
        codes = codes - spread(q.zero_point.double())
    return codes * spread(scale)


def check(x: Tensor, q: QuantizedTensor, isa: str = "") -> None:
    """|y - y64| <= 2e-6 ||y64|| over all, the bound of the exact mode."""
    want = x.double() @ values(q).T
    got = product(x, q, isa)
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], len(q.codes)))
    assert float((got.double() - want).norm()) <= 2e-6 * float(want.norm())


@needs_compiler
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", [
    *map(str, FORMATS), "e3m1", "e2m2", "e3m0", "e2m1b2.5", "int5", "int7", "uint2", "uint3", "uint6",
])  # fmt: skip
def test_every_format_and_instruction_set_multiplies_all_codes(format: str, isa: str) -> None:
    assert cpu.gives_products(cpu_library.library(isa), parse_format(format))


@needs_compiler
@pytest.mark.parametrize("spec", [
    "e3m2/channel", "e3m2/tensor", "e2m3/group64", "e2m1/group16:e4m3", "e2m1/group32:e8m0", "e2m2/group128",
    "e3m1/group256",
    "e4m3/group64", "e5m2/channel", "int4/group32", "uint4/group64", "uint8/channel", "int8/group20", "e3m2/group48",
    "e3m2/block16x32", "int3/group64", "uint2/group16", "nf4/group64", "uint7/group24", "e2m1b2.5/channel",
    "e4m3/group8", "uint4/group8", "nf4/group24",
])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 1, 33), (3, 50, 300), (7, 24, 128), (1, 97, 515), (19, 49, 130)])
@pytest.mark.parametrize("isa", SETS)
def test_products_are_those_of_float64(spec: str, shape: tuple[int, int, int], isa: str) -> None:
    M, N, K = shape
    check(torch.randn(M, K, generator=torch.Generator().manual_seed(M)), weight(spec, N, K), isa)


@needs_compiler
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "spec", ["e3m2/group64", "e2m1/group32", "int8/channel", "uint4/group64", "e2m3/group8", "int6/group64"]
)
def test_rounded_x(spec: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """||y - y64|| <= bound ||y64||: rounded to the bits that are asked for, or not at all."""
    q = weight(spec, 65, 1000)
    monkeypatch.setattr(cpu, "library", lambda: cpu_library.library(isa))
    for M in (1, 3, 6, 16, 20):
        x = torch.randn(M, 1000, generator=torch.Generator().manual_seed(M))
        want = x.double() @ values(q).T
        for bits, bound in ((8, 8e-3), (16, 1e-4), (32, 2e-6)):
            with cpu.activation_bits(bits):
                got = product(x, q, isa)
            assert float((got.double() - want).norm()) <= bound * float(want.norm())
    with pytest.raises(InputError, match="activation_bits is 4; allowed are 32, 16, 8"), cpu.activation_bits(4):
        pass


@needs_compiler
def test_rounding_x_is_what_is_asked_for() -> None:
    """Whole numbers up to 127 are exact in 8 bits where the largest of 8 columns is 127; others are not."""
    q = weight("e3m2/group64", 40, 512)
    x = torch.randint(-127, 128, (2, 512), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::8] = 127
    with cpu.activation_bits(8):
        exact, rough = product(x, q), product(x + 0.3 * torch.rand(2, 512), q)
    torch.testing.assert_close(exact.double(), x.double() @ values(q).T, rtol=1e-6, atol=1e-3)
    if "avx512" in SETS:
        assert not torch.equal(rough, product(x, q))


@needs_compiler
def test_rows_of_a_weight_equal_the_reference() -> None:
    index = torch.tensor([[3, 0, 49], [7, 7, 1]])
    for spec in ("e3m2/group64", "uint4/group32", "nf4/group64", "e4m3/tensor", "e2m1/group16:e4m3", "e3m2/block16x32"):
        given = operands(weight(spec, 50, 300))
        args = (given.packed, given.scale, given.zero_point, given.spec, list(given.shape), given.tensor_scale)
        got = ops.operators.embedding_wq(index, *args)
        torch.testing.assert_close(got, ops.embedding_wq(index, *args), rtol=1e-6, atol=0)
        half = ops.operators.embedding_wq(index, *args, dtype=torch.float16)
        assert half.dtype == torch.float16
        assert ops.operators.embedding_wq(index[:0], *args).shape == (0, 3, 300)
    with pytest.raises(IndexError):
        ops.operators.embedding_wq(index + 43, *args)


@needs_compiler
def test_exponent_biases_of_columns_multiply_x() -> None:
    given = operands(weight("e3m2/channel", 30, 200))
    exponent = torch.randint(-3, 4, (1, 200), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape), None, exponent)
    torch.testing.assert_close(ops.operators.linear_wq(x, *args), ops.linear_wq(x, *args), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 600])
def test_many_rows_of_x(M: int, isa: str) -> None:
    """Columns over several chunks, rows that do not fill the corners, more rows than are taken at a time."""
    check(torch.randn(M, 1300, generator=torch.Generator().manual_seed(M)), weight("e3m2/group64", 61, 1300), isa)


@needs_compiler
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_multiplies_alike(isa: str) -> None:
    for M in (1, 9):
        check(torch.randn(M, 700, generator=torch.Generator().manual_seed(1)), weight("e3m2/group64", 100, 700), isa)
        check(torch.randn(M, 700, generator=torch.Generator().manual_seed(1)), weight("uint4/group32", 100, 700), isa)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("M", [1, 5, 33])
def test_bits_do_not_depend_on_threads(M: int, threads: None) -> None:
    q, x = weight("e3m2/group64", 2000, 1024), torch.randn(M, 1024, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        found.append(product(x, q))
    assert all(torch.equal(found[0], other) for other in found)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, x = weight("e2m1/group64", 70, 256), torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = x.double() @ values(q).T + bias.double()
    got = product(x, q, bias=bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@needs_compiler
def test_x_is_read_where_it_is() -> None:
    """Rows with a stride, transposed x, rows shared by broadcasting; what is beside x is not read into the sum."""
    q = weight("e3m2/channel", 20, 256)
    base = torch.full((4, 400), float("nan"))
    base[:, :256] = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    check(base[:, :256], q)
    check(torch.randn(256, 3, generator=torch.Generator().manual_seed(0)).T, q)
    check(torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).expand(5, 256), q)


@needs_compiler
@pytest.mark.parametrize("M", [1, 4])
def test_not_a_number_stays_in_its_row(M: int) -> None:
    q, x = weight("e3m2/group64", 40, 300), torch.zeros(M, 300)
    x[0, 17] = float("nan")
    got = product(x, q)
    assert bool(got[0].isnan().all())
    assert bool((got[1:] == 0).all())
    x[0, 17] = float("inf")
    column = q.spec.format.decode(q.codes[:, 17])
    assert torch.equal(product(x, q)[0].isinf(), column != 0)


@needs_compiler
def test_the_operator_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = weight("e3m2/group64", 40, 300), torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    given = operands(q)
    calls = []
    real = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *args: calls.append(1) or real(*args))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape))
    got = ops.operators.linear_wq(x, *args)
    assert calls == [1]
    torch.testing.assert_close(got, ops.linear_wq(x, *args), rtol=1e-5, atol=1e-5)
    assert ops.operators.linear_wq(x[:0], *args).shape == (0, 40)


def test_inside_reference_only_no_kernel_runs() -> None:
    given = operands(weight("e3m2/channel", 8, 64))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with cpu.reference_only():
        assert torch.equal(ops.operators.linear_wq(x, *args), ops.linear_wq(x, *args))
    assert given.packed not in remember._KEPT


def test_what_no_kernel_takes_is_computed_by_the_reference() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    given = operands(weight("e3m2/channel1", 8, 64))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape))
    assert torch.equal(ops.operators.linear_wq(x, *args), ops.linear_wq(x, *args))
    given = operands(weight("e3m2/channel", 8, 64))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape))
    assert ops.operators.linear_wq(x.double(), *args).dtype == torch.float64


def test_without_a_compiler_it_says_so_once_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> cpu_library.Compiler:
        raise KernelError("no C++ compiler found")

    monkeypatch.setattr(cpu_library, "compiler", none)
    for memory in (cpu_library.library, cpu.available, cpu.works):
        memory.cache_clear()
    x, given = torch.randn(3, 64), operands(weight("e3m2/channel", 8, 64))
    args = (given.packed, given.scale, given.zero_point, None, given.spec, list(given.shape))
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
            got = ops.operators.linear_wq(x, *args)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = ops.operators.linear_wq(x, *args)
        assert torch.equal(got, ops.linear_wq(x, *args))
        assert torch.equal(got, again)
    finally:
        for memory in (cpu_library.library, cpu.available, cpu.works):
            memory.cache_clear()


def test_an_instruction_set_that_is_not_here_is_named() -> None:
    with pytest.raises(KernelError, match="this CPU has no mmx2; it has"):
        cpu_library.library("mmx2")


@needs_compiler
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cpu_build.sources() | {"gemm.h": "#error no"}
    monkeypatch.setattr(cpu_build, "sources", lambda: broken)
    with pytest.raises(KernelError, match=r"does not compile the CPU kernels: (?s:.*)error"):
        cpu_build.compiled(cpu_build.compiler(), cpu_build.PORTABLE)


@needs_compiler
def test_what_was_installed_is_taken_if_it_is_of_these_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its name says so; one that cannot be loaded, or of other sources, is not."""
    built, isa = cpu_library.library(), cpu_library.instruction_sets()[0]
    monkeypatch.setattr(cpu_build, "NATIVE", tmp_path)
    installed = tmp_path / cpu_build.file_name(isa)
    try:
        for content, path in ((b"no library", built.path), (built.path.read_bytes(), installed)):
            installed.write_bytes(content)
            cpu_library.library.cache_clear()
            assert cpu_library.library().path == path
        cpu_library.library.cache_clear()
        monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-O1"))
        assert cpu_build.file_name(isa) != installed.name
    finally:
        cpu_library.library.cache_clear()
