"""Codes, their bytes and rounded activations by CPU kernels: every bit is that of the reference."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant import bulk, ops, packing, qtensor, scales
from fxquant.codegen import cpu, cpu_codes, cpu_library
from fxquant.errors import FormatError
from fxquant.formats import FloatFormat, parse_format
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.scheme import parse_spec

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler here"
    ),
]
SETS = [one.name for one in cpu_library.instruction_sets()]
FLOATS = [
    "e2m1", "e3m0", "e1m2", "e2m2", "e3m1", "e3m2", "e2m3", "e4m3", "e5m2", "e3m4", "e4m3none", "e5m2none", "e4m3fnuz",
    "e5m2fnuz", "e2m1ieee", "e3m2b7", "e2m1b-3", "e4m3b40", "e2m5", "e1m6", "e6m1", "e4m0", "e5m0", "e7m0", "e1m1",
]  # fmt: skip
INTEGERS = [f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, the signs of zeros too; one NaN is like another."""
    zeros = torch.equal(a.signbit() & (a == 0), b.signbit() & (b == 0))
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) and zeros


def reference(x: Tensor, given: scales.Scales, spec: str) -> Tensor:
    return scales.encode(x, given.scale, given.zero_point, given.tensor_scale, spec)


# --- ranges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("wide", [1, 7, 16, 32, 64, 100, 1000])
def test_ranges(wide: int, isa: str) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (20, 333), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-42, -1e-42, 1.0])
    picked = torch.randint(0, len(special), (9, 333), generator=torch.Generator().manual_seed(1))
    for given in (normal(20, 333), x.view(torch.float32), special[picked], special[picked % 4], -normal(4, 400).abs()):
        for x in (given, given.to(torch.float16), given.to(torch.bfloat16)):
            low, high = cpu_codes.ranges_of(cpu_library.library(isa), x, min(wide, x.shape[1]))
            want = scales.block_extremes(x, 1, min(wide, x.shape[1]))
            torch.testing.assert_close((low, high), want, rtol=0, atol=0, equal_nan=True)


# --- codes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", [*FLOATS, *INTEGERS])
def test_all_values_ties_and_specials(format: str, isa: str) -> None:
    """Every value of the grid, every middle, what is beside these, zeros, Inf and NaN, and any bits."""
    kernels, spec = cpu_library.library(isa), parse_spec(f"{format}/tensor")
    any_bits = torch.randint(-(2**31), 2**31 - 1, (1, 5000), generator=torch.Generator().manual_seed(0))
    for x in (cpu_codes.trial(spec.format), any_bits.to(torch.int32).view(torch.float32)):
        for scale, zero in ((1.0, 0), (0.37, 3), (1e-30, 1)):
            zeros = torch.full((1, 1), zero, dtype=torch.uint8) if spec.has_zero_point else None
            given = scales.Scales(torch.full((1, 1), scale), zeros)
            codes = cpu_codes.codes_of(kernels, x, given, spec)
            assert codes is not None
            assert torch.equal(codes, reference(x, given, str(spec)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("spec", [
    "e3m2/channel", "e3m2/tensor", "e2m3/group64", "e2m1/group16:e4m3", "e2m1/group32:e8m0", "int8/group32:e8m0",
    "e2m1/group24:m1", "e3m2/group32:m2", "e4m3/group7", "int4/group20", "uint4/group64", "uint8/channel",
    "uint3/group5", "e3m2/block16x32", "uint4/block4x10", "int6/group1", "e4m3/channel:fp16", "uint4/group64:bf16",
    "int8/group16:e4m3", "e3m0/group100", "e5m2fnuz/group64:e5m3",
])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 300), (130, 129), (40, 64)])
def test_scales_of_every_granularity(spec: str, shape: tuple[int, int], isa: str) -> None:
    x = normal(*shape)
    q = quantize_tensor(x, spec)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for given in (x.to(dtype), x.to(dtype).T.contiguous().T):
            codes = cpu_codes.codes_of(cpu_library.library(isa), given, q.scales, q.spec)
            assert codes is not None
            assert torch.equal(codes, reference(given, q.scales, spec))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group16:e4m3", "uint4/group20", "int8/tensor", "e4m3/group64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (7, 1024), (5, 3100)])
def test_what_rounding_loses(spec: str, shape: tuple[int, int], isa: str) -> None:
    """Bit for bit what the reference finds, and that is what float64 finds, to its last bits."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = normal(*shape).to(dtype)
        q = quantize_tensor(x, spec)
        args = q.codes, q.scale, q.zero_point, q.tensor_scale, str(q.spec)
        want = qtensor.row_squares(x, *args)
        for given in (x, x.T.contiguous().T):
            got = cpu_codes.squares_of(cpu_library.library(isa), given, q.codes, q.scales, q.spec)
            assert got is not None
            assert torch.equal(got, want)
        lost = (q.dequantize() - x.float()).double().square().sum(1)
        exact = torch.stack([lost, x.double().square().sum(1)], dim=1)
        torch.testing.assert_close(want, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("format", [*FLOATS, *INTEGERS])
def test_every_format_is_measured_by_the_kernels(format: str) -> None:
    assert cpu_codes.measures(parse_spec(f"{format}/tensor").format)


def test_a_large_tensor_takes_the_kernel_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.available()
    calls = []
    real = cpu_codes.codes_of
    monkeypatch.setattr(cpu_codes, "codes_of", lambda *args: calls.append(1) or real(*args))
    x = normal(1200, 500)
    for spec in ("e3m2/channel", "uint4/group64", "nvfp4", "mxfp6", "int8/channel1", "e4m3/token"):
        calls.clear()
        native = quantize_tensor(x, spec)
        assert calls
        with cpu.reference_only():
            assert_same(native, quantize_tensor(x, spec))


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.packed, b.packed)


@pytest.mark.parametrize("spec", ["nf4/group64", "higgs4/channel", "e2m1b2.5/channel", "lut(-1.0000000001,0,1,2)"])
def test_what_no_kernel_encodes_is_left_to_the_reference(spec: str) -> None:
    parsed = parse_spec(spec)
    assert cpu.available() is not None
    assert not cpu_codes.encodes(parsed.format)
    x = normal(300, 512)
    with cpu.reference_only():
        want = quantize_tensor(x, parsed)
    assert_same(quantize_tensor(x, parsed), want)


def test_float64_is_left_to_the_reference() -> None:
    x = normal(300, 512).double() * (1 + 1e-9)
    with cpu.reference_only():
        want = quantize_tensor(x, "e3m2/channel")
    assert_same(quantize_tensor(x, "e3m2/channel"), want)


# --- bytes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_both_ways(bits: int, isa: str) -> None:
    kernels = cpu_library.library(isa)
    for rows, cols in ((1, 1), (3, 7), (2, 63), (5, 64), (4, 65), (3, 200), (2, 1031), (257, 256)):
        codes = torch.randint(0, 2**bits, (rows, cols + 9), generator=torch.Generator().manual_seed(cols))
        wide = codes.to(torch.uint8)
        for given in (wide[:, 4 : cols + 4], wide[:, :cols].contiguous(), wide.T.contiguous().T[:, :cols]):
            packed, fits = cpu_codes.packed_codes(kernels, given, bits)
            assert fits
            assert torch.equal(packed, packing.pack_planar(given, bits))
            assert torch.equal(cpu_codes.unpacked_codes(kernels, packed, bits, cols), given)
            beside = torch.full((rows, packed.shape[1] + 5), 255, dtype=torch.uint8)
            beside[:, 3:-2] = packed
            assert torch.equal(cpu_codes.unpacked_codes(kernels, beside[:, 3:-2], bits, cols), given)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_the_same_error(bits: int) -> None:
    cpu.available()
    for at in (0, 299, 300 * 400 - 1):
        codes = torch.zeros(300, 400, dtype=torch.uint8)
        codes.view(-1)[at] = 2**bits
        with pytest.raises(FormatError, match=f"code {2**bits} does not fit in {bits} bits"):
            packing.pack(codes, packing.planar(bits))


def test_large_matrices_of_codes_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.available()
    calls: list[Any] = []
    for name in ("packed_codes", "unpacked_codes"):
        real = getattr(cpu_codes, name)
        monkeypatch.setattr(cpu_codes, name, lambda *args, real=real: calls.append(1) or real(*args))
    codes = torch.randint(0, 64, (300, 500), dtype=torch.uint8)
    cpu_codes.packs(6)
    calls.clear()
    packed = packing.pack(codes, "planar6")
    assert torch.equal(packing.unpack(packed, packing.planar(6), (300, 500)), codes)
    assert calls == [1, 1]
    other = packing.pack(codes, "split42")  # no planes: the layout's own expressions
    assert torch.equal(packing.unpack(other, "split42", (300, 500)), codes)
    assert calls == [1, 1]


# --- activations ------------------------------------------------------------------------------------------------------
SIGNED = [*FLOATS, *(name for name in INTEGERS if not name.startswith("u"))]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", SIGNED)
def test_activations(format: str, isa: str) -> None:
    kernels = cpu_library.library(isa)
    grid = cpu_codes.trial(parse_format(format))
    finite = grid[grid.isfinite() & (grid.abs() < 1e38)].reshape(1, -1)
    for x in (finite, finite * 0.37, normal(40, 150), normal(3, 2100), normal(3, 70) * 1e-39, torch.zeros(2, 5)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            given = x.to(dtype)
            if not bool(given.isfinite().all()):
                continue
            for spec in ("token", "group32", "group7"):
                y = cpu_codes.rounded(kernels, given, None, parse_spec(f"{format}/{spec}"))
                assert y is not None
                assert same_bits(y, ops.fake_quantize_dynamic(given, f"{format}/{spec}")), (dtype, spec)
            scale = torch.tensor([[0.083]])
            y = cpu_codes.rounded(kernels, given, scale, parse_spec(f"{format}/tensor"))
            assert y is not None
            assert same_bits(y, ops.fake_quantize(given, scale, None, f"{format}/tensor")), dtype


@pytest.mark.parametrize("format", ["e2m1", "e4m3", "e5m2", "e4m3fnuz", "int8", "e3m0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite(format: str, bad: float, dtype: torch.dtype) -> None:
    kernels = cpu.available()
    assert kernels is not None
    x = normal(4, 200).to(dtype)
    x[2, 150] = bad
    assert cpu_codes.rounded(kernels, x, None, parse_spec(f"{format}/token")) is None
    got = ops.operators.fake_quantize_dynamic(x, f"{format}/token")
    assert same_bits(got, ops.fake_quantize_dynamic(x, f"{format}/token"))
    scale = torch.tensor([[0.01]])
    got = ops.operators.fake_quantize(x, scale, None, f"{format}/tensor")
    assert same_bits(got, ops.fake_quantize(x, scale, None, f"{format}/tensor"))


def test_gradients_pass_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.available()
    calls = []
    real = cpu_codes.rounded
    monkeypatch.setattr(cpu_codes, "rounded", lambda *args: calls.append(1) or real(*args))
    scale, grads = torch.tensor([[0.2]]), []
    for reference in (False, True):
        x = normal(5, 40).requires_grad_()
        dynamic = ops.operators.fake_quantize_dynamic
        static = ops.operators.fake_quantize
        if reference:
            with cpu.reference_only():
                y = dynamic(x, "e4m3/token") + static(x, scale, None, "e2m1/tensor")
        else:
            y = dynamic(x, "e4m3/token") + static(x, scale, None, "e2m1/tensor")
            assert len(calls) >= 2
        (y * torch.arange(40.0)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert not bool((grads[0] == torch.arange(40.0) * 2).all())  # what the static scale clips has half the gradient


def test_scales_of_a_weight_in_training() -> None:
    """Groups of a weight, and what no kernel rounds: zero points, coded scales, exponent biases."""
    kernels, w = cpu.available(), normal(33, 100)
    assert kernels is not None
    for text in ("e3m2/group32", "int4/channel", "uint4/group32", "mxfp4", "nvfp4", "e3m2/block4x8", "nf4/group20"):
        q = quantize_tensor(w, text)
        args = (q.scale, q.zero_point, str(q.spec), q.tensor_scale)
        assert same_bits(ops.operators.fake_quantize(w, *args), ops.fake_quantize(w, *args))
        taken = q.zero_point is None and cpu_codes.rounded(kernels, w, q.scale, q.spec) is not None
        assert taken == (text in ("e3m2/group32", "int4/channel", "e3m2/block4x8"))
    bias = torch.randint(-2, 3, (100,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for shifted in (False, True):
        got = ops.operators.fake_quantize_dynamic(w, "e4m3/token", bias, shifted)
        assert torch.equal(got, ops.fake_quantize_dynamic(w, "e4m3/token", bias, shifted))


def test_shapes_of_activations() -> None:
    cpu.available()
    for x in (normal(40), torch.tensor(3.3), normal(2, 3, 4, 50), normal(6, 50).T, normal(0, 5), normal(4, 1, 9)[::2]):
        got = ops.operators.fake_quantize_dynamic(x, "e4m3/token")
        assert same_bits(got, ops.fake_quantize_dynamic(x, "e4m3/token"))
        assert got.shape == x.shape


# --- where there are no kernels ---------------------------------------------------------------------------------------
def test_no_compiler_is_started_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> cpu_library.Library:
        raise AssertionError("compiled")

    x = normal(400, 400)
    want = quantize_tensor(x, "e3m2/channel")
    monkeypatch.setattr(cpu, "library", never)
    monkeypatch.setattr(cpu_library, "made", lambda: False)
    cpu.available.cache_clear()
    try:
        assert cpu.at_hand(10**9) is None
        assert_same(quantize_tensor(x, "e3m2/channel"), want)
        ops.operators.fake_quantize_dynamic(x, "e4m3/token")
        assert not cpu.available.cache_info().currsize
        monkeypatch.setattr(cpu_library, "made", lambda: True)
        assert cpu.at_hand(bulk.LARGE - 1) is None
    finally:
        cpu.available.cache_clear()


def test_what_is_in_the_cache_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_library.library() is not None
    cpu_library.made.cache_clear()
    cpu.available.cache_clear()
    assert cpu_library.made()
    assert cpu.at_hand(bulk.LARGE) is not None
    assert cpu.at_hand(1) is not None  # it is loaded now
    with cpu.reference_only():
        assert cpu.at_hand(bulk.LARGE) is None


def test_without_a_compiler_nothing_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for memory in (cpu_library.made, cpu_library.compiler):
        memory.cache_clear()
    try:
        assert not cpu_library.made()
    finally:
        for memory in (cpu_library.made, cpu_library.compiler):
            memory.cache_clear()


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torch.zeros(1, 1, dtype=torch.uint8)
    monkeypatch.setattr(cpu_codes, "codes_of", lambda *args: wrong)
    monkeypatch.setattr(cpu_codes, "packed_codes", lambda *args: (wrong, True))
    monkeypatch.setattr(cpu_codes, "rounded", lambda *args: torch.zeros(1))
    assert not cpu_codes.encodes.__wrapped__(parse_format("e3m2"))
    assert not cpu_codes.packs.__wrapped__(6)
    assert not cpu_codes.rounds.__wrapped__(parse_format("e3m2"))


def test_shapes_are_known_without_data() -> None:
    with torch._subclasses.FakeTensorMode():
        codes = scales.quantize(torch.empty(300, 400), scales.Scales(torch.empty(300, 1)), parse_spec("e3m2/channel"))
        assert (codes.shape, codes.dtype) == ((300, 400), torch.uint8)
        packed = packing._PACK(codes, 6)
        assert packed.shape == packing.packed_shape((300, 400), "planar6")
        assert packing.unpack(packed, packing.planar(6), 400).shape == (300, 400)


def test_formats_whose_highest_code_is_not_all_ones() -> None:
    """E4M0's magnitudes are all finite, E5M2's are not; the kernels need to know the highest."""
    for name in ("e4m0", "e2m1ieee"):
        format, found = parse_format(name), cpu_codes.encoding(parse_format(name))
        assert isinstance(format, FloatFormat)
        assert found is not None
        assert format.table()[found.most] == format.max
