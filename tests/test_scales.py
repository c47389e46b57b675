"""Scales: block formats against implementations rebuilt here from their definitions, M1 and M2, clipping, policies."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import FormatError, WeightError
from fxquant.formats import parse_format
from fxquant.qtensor import fake_quantize, load_scale, store_scale
from fxquant.scales import ROW_SCALES, block_reduce, choose, squared_error
from fxquant.scheme import PRESETS, SCALES, parse_spec

ELEMENTS = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
}


def hard_values(count: int) -> np.ndarray:
    """float32 ``[count / 64, 64]`` of every magnitude: ordinary, huge, tiny, subnormal, and blocks that mix them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(count).astype(np.float32).reshape(-1, 64)
    scale = np.exp2(rng.integers(-140, 120, (len(x), 1))).astype(np.float64)
    scale[: len(x) // 2] = 1
    mixed = np.exp2(rng.integers(-12, 12, x.shape))
    mixed[::3] = 1
    with np.errstate(over="ignore", under="ignore"):
        x = (x * scale * mixed).astype(np.float32)
    return np.clip(x, -3e38, 3e38)


def mx_by_definition(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX v1.0, section 6.3, in numpy and ml_dtypes: X = 2^(floor(log2 max|v|) - emax), v / X saturates."""
    dtype = ELEMENTS[name]
    top = float(ml_dtypes.finfo(dtype).max)
    emax = math.floor(math.log2(top))
    blocks = x.reshape(-1, 32).astype(np.float64)
    absmax = np.abs(blocks).max(axis=1)
    shared = np.array([math.floor(math.log2(a)) - emax if a else -127 for a in absmax.tolist()])
    shared = np.clip(shared, -127, 127)
    ratio = np.clip(blocks / np.exp2(shared.astype(np.float64))[:, None], -top, top).astype(np.float32)
    return ratio.astype(dtype).view(np.uint8), (shared + 127).astype(np.uint8)


def check_mx(name: str, count: int) -> None:
    x = hard_values(count)
    codes, scales = mx_by_definition(x, name)
    q = fxquant.quantize_tensor(torch.from_numpy(x), name)
    assert np.array_equal(q.stored_scale.numpy().reshape(-1), scales)
    assert np.array_equal(q.codes.numpy().reshape(-1, 32), codes)


def nvfp4_by_definition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Blocks of 16: E4M3 of absmax / 6 / s_t, at least 2^-6; codes of x * ((1 / s_t) / s); s_t = absmax / (448 * 6)."""
    f = np.float32
    blocks = x.reshape(-1, 16)
    ideal = np.abs(blocks).max(axis=1) / f(6)
    outer = np.abs(x).max() / f(6) / f(448)
    stored = np.clip(ideal / outer, f(2.0**-6), f(448)).astype(ml_dtypes.float8_e4m3fn)
    ratio = blocks * ((f(1) / outer) / stored.astype(f))[:, None]
    return np.clip(ratio, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8), stored.view(np.uint8), outer


def check_nvfp4(count: int) -> None:
    for low, high in ((-3, 3), (-20, 1), (0, 60)):
        rng = np.random.default_rng(high)
        x = rng.standard_normal((count // 64, 64)) * np.exp2(rng.integers(low, high, (count // 64, 1)))
        x = x.astype(np.float32)
        codes, scales, outer = nvfp4_by_definition(x)
        q = fxquant.quantize_tensor(torch.from_numpy(x), "nvfp4")
        assert q.tensor_scale is not None
        assert q.tensor_scale.item() == outer
        assert np.array_equal(q.stored_scale.numpy().reshape(-1), scales)
        assert np.array_equal(q.codes.numpy().reshape(-1, 16), codes)


@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_bit_identical_to_its_definition(name: str) -> None:
    check_mx(name, 2**18)


@pytest.mark.slow
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_on_ten_million_values(name: str) -> None:
    check_mx(name, 10 * 2**20)


def test_nvfp4_is_bit_identical_to_its_definition() -> None:
    check_nvfp4(2**18)


@pytest.mark.slow
def test_nvfp4_on_ten_million_values() -> None:
    check_nvfp4(10 * 2**20)


def test_mxint8_is_a_fixed_point_number_of_six_fraction_bits() -> None:
    x = torch.randn(4, 64)
    q = fxquant.quantize_tensor(x, "mxint8")
    for r in range(4):
        for c in range(0, 64, 32):
            block = x[r, c : c + 32].double()
            shared = 2.0 ** math.floor(math.log2(float(block.abs().max())))
            want = (block / shared * 64).round().clamp(-127, 127) / 64 * shared
            assert torch.equal(q.dequantize(torch.float64)[r, c : c + 32], want)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    x = torch.randn(8, 96)
    q = fxquant.quantize_tensor(x, name)
    q.check()
    assert str(q.spec) == str(parse_spec(str(q.spec)))
    relative = float((q.dequantize() - x).norm() / x.norm())
    assert relative < {4: 0.14, 6: 0.07, 8: 0.06}[q.spec.format.bits]


def test_nvfp4_under_a_power_of_two() -> None:
    """The tensor's scale is the next power of two, its reciprocal exact, and nothing else of NVFP4 changes."""
    for size in (1.0, 3e-5, 7e4):
        x = torch.randn(6, 64) * size
        q, plain = fxquant.quantize_tensor(x, "e2m1/group16:e4m3.ceil"), fxquant.quantize_tensor(x, "nvfp4")
        assert q.tensor_scale is not None
        assert plain.tensor_scale is not None
        outer, real = float(q.tensor_scale), float(plain.tensor_scale)
        assert math.frexp(outer)[0] == 0.5
        assert real <= outer < 2 * real
        assert torch.equal(q.scale, parse_format("e4m3").round(x.reshape(6, 4, 16).abs().amax(2) / 6 / outer))
        assert str(q.spec) == "e2m1/group16:e4m3.ceil"
    assert float(fxquant.quantize_tensor(torch.zeros(2, 16), "e2m1/group16:e4m3.ceil").tensor_scale) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["ceil", "floor", "round", "mse"])
def test_m1_scales_are_powers_of_two(rounding: str) -> None:
    x = torch.randn(6, 128)
    q = fxquant.quantize_tensor(x, f"e2m1/group32:m1.{rounding}")
    exponent = torch.log2(q.scale.double())
    ideal = torch.log2(x.reshape(6, 4, 32).abs().amax(2).double() / 6)
    assert torch.equal(exponent, exponent.round())
    if rounding != "mse":
        assert torch.equal(exponent, getattr(torch, rounding)(ideal))


@pytest.mark.parametrize("rounding", ["ceil", "floor", "round", "mse"])
def test_m2_scales_are_powers_of_two_below_the_largest_of_the_row(rounding: str) -> None:
    x = torch.randn(6, 128) * torch.logspace(-2, 2, 128)
    q = fxquant.quantize_tensor(x, f"e2m1/group32:m2.{rounding}")
    ideal = x.reshape(6, 4, 32).abs().amax(2) / 6
    assert q.tensor_scale is not None
    above = q.tensor_scale / ideal.amax(1, keepdim=True)
    assert bool(((above >= 1) & (above < 2)).all()) if rounding == "mse" else bool((above == 1).all())
    k = -torch.log2(q.scale.double())
    assert torch.equal(k, k.round())
    assert bool((k >= 0).all())
    if rounding != "mse":
        assert torch.equal(k, getattr(torch, rounding)(torch.log2(q.tensor_scale.double() / ideal.double())))


def test_m2_searches_the_real_scale_of_a_row() -> None:
    """The least over every real scale and every power of two, computed plainly, columns weighted."""
    x, weight = torch.randn(4, 32), torch.rand(32) + 0.1
    spec = parse_spec("e2m1/group8:m2")
    found = choose(x, spec, column_weight=weight)
    grid = parse_spec("e2m1/group8").format
    for i, row in enumerate(x):
        least, groups, largest = [], row.reshape(4, 8), float(row.abs().max()) / 6
        for step in ROW_SCALES:
            real, total = largest * step, 0.0
            for group, w in zip(groups, weight.reshape(4, 8), strict=True):
                tries = [real * 2.0**-k for k in range(12)]
                total += min(float(((grid.round(group / s) * s - group).square() * w).sum()) for s in tries)
            least.append(total)
        got = squared_error(x, found, spec, weight)[i].sum()
        assert float(got) == pytest.approx(min(least), rel=1e-4)


@pytest.mark.parametrize("text", ["e2m1/group16", "int4/channel", "e2m1/group16:m1", "uint4/group16"])
def test_columns_can_be_weighted(text: str) -> None:
    """Weights that say that few columns count give scales that are better for those."""
    x, weight, spec = torch.randn(32, 64), torch.tensor([100.0, 1, 1, 1] * 16), parse_spec(text)
    found, plain = choose(x, spec, clip="mse", column_weight=weight), choose(x, spec, clip="mse")
    assert float(squared_error(x, found, spec, weight).sum()) < float(squared_error(x, plain, spec, weight).sum())
    assert float(squared_error(x, found, spec).sum()) > float(squared_error(x, plain, spec).sum())


def test_a_range_that_may_be_larger_stays_within_its_storage() -> None:
    """65000 needs the largest fp16 scale there is for a format whose maximum is 1."""
    x = torch.full((1, 32), 65000.0)
    assert bool(fxquant.quantize_tensor(x, "int2/channel:fp16", clip="mse").scale.isfinite().all())


def error(x: torch.Tensor, spec: str, **kwargs: str) -> float:
    return float((fxquant.quantize_tensor(x, spec, **kwargs).dequantize() - x).square().mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["e2m1/group64:m1", "e2m1/group64:m2", "e2m1/group32:e8m0"])
def test_the_least_error_is_no_worse_than_any_fixed_rounding(spec: str) -> None:
    x = torch.randn(32, 256)
    best = error(x, f"{spec}.mse")
    assert all(best <= error(x, f"{spec}.{r}") + 1e-9 for r in ("ceil", "floor", "round"))


@pytest.mark.parametrize(
    "spec", ["e2m1/group64", "int4/channel", "uint4/group32", "e3m2/tensor", "nvfp4", "nf4", "higgs4/group64"]
)
def test_clipping_by_error_is_never_worse_than_the_absolute_maximum(spec: str) -> None:
    x = torch.distributions.StudentT(4.0).sample((16, 256))
    assert error(x, spec, clip="mse") <= error(x, spec)


def test_clipping_finds_the_best_of_its_grid_by_brute_force() -> None:
    from fxquant.scales import CLIPS

    x = torch.randn(3, 32)
    spec = parse_spec("int4/channel")
    for row in x:
        tries = [row.abs().max() * c / 7 for c in CLIPS]
        errors = [float((spec.format.round(row / s) * s - row).square().sum()) for s in tries]
        got = fxquant.quantize_tensor(row[None], spec, clip="mse")
        assert float((got.dequantize() - row).square().sum()) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("kind", [k for k, v in SCALES.items() if v.format is not None])
def test_coded_scales_survive_storage(kind: str) -> None:
    q = fxquant.quantize_tensor(torch.randn(5, 64), f"e2m1/group16:{kind}")
    assert q.stored_scale.dtype == torch.uint8
    assert torch.equal(load_scale(store_scale(q.scale, q.spec), q.spec), q.scale)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_along_any_axis(axis: int) -> None:
    x = torch.randn(4, 6, 5)
    q = fxquant.quantize_tensor(x, f"int8/channel{axis or ''}")
    others = [d for d in range(3) if d != axis]
    scale = x.abs().amax(dim=others, keepdim=True) / 127
    assert torch.allclose(q.dequantize(), (x / scale).round() * scale, atol=1e-7)


def test_blocks_in_two_dimensions_with_ragged_edges() -> None:
    x = torch.randn(10, 13)
    q = fxquant.quantize_tensor(x, "int8/block4x5")
    assert tuple(q.scale.shape) == (3, 3)
    for r in range(3):
        for c in range(3):
            assert q.scale[r, c] == x[4 * r : 4 * r + 4, 5 * c : 5 * c + 5].abs().max() / 127


@pytest.mark.parametrize("how", ["min", "max", "sum"])
@pytest.mark.parametrize("block", [(1, 5), (4, 4), (10, 13), (3, 20), (1, 1)])
def test_block_reduce(how: str, block: tuple[int, int]) -> None:
    x = torch.randn(10, 13)
    block = (min(block[0], 10), min(block[1], 13))
    got = block_reduce(x, block, how)  # type: ignore[arg-type]
    for r in range(got.shape[0]):
        for c in range(got.shape[1]):
            part = x[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            assert got[r, c].item() == pytest.approx(getattr(part, how)().item(), abs=1e-5)


def test_token_wise_rounding_and_what_happens_to_nan() -> None:
    x = torch.randn(2, 3, 16)
    x[0, 1, 2] = math.nan
    y = fake_quantize(x, parse_spec("e4m3/token"), None)
    assert y[0, 1].isnan().all()
    rest = torch.ones(2, 3, dtype=torch.bool)
    rest[0, 1] = False
    scale = x[rest].abs().amax(1, keepdim=True) / 448
    assert torch.equal(y[rest], (x[rest] / scale).to(torch.float8_e4m3fn).float() * scale)
    assert fake_quantize(torch.zeros(0, 16), parse_spec("e4m3/token"), None).shape == (0, 16)


def test_the_gaussian_grid_is_a_fixed_point_and_better_than_its_neighbours() -> None:
    from fxquant.codebooks import lloyd_max

    known = {2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152],
             4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]}  # fmt: skip
    for bits, want in known.items():  # Max (1960), table I
        assert lloyd_max(2**bits)[2 ** (bits - 1) :].tolist() == pytest.approx(want, rel=5e-4)
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)

    def distortion(grid: torch.Tensor) -> float:
        return float((weight * (x[:, None] - grid).square().amin(1)).sum() / weight.sum())

    grid = lloyd_max(8)
    best = distortion(grid)
    assert best == pytest.approx(0.03454, rel=1e-3)
    assert all(distortion(grid * f) > best for f in (0.99, 1.01))


def test_scales_that_do_not_fit() -> None:
    with pytest.raises(WeightError, match="above the fp16 maximum"):
        fxquant.quantize_tensor(torch.full((1, 4), 1e9), "e2m1/channel:fp16")
    mistakes = {
        "uint4/group32:e8m0": "takes fp32, fp16 or bf16",
        "e8m0/channel": "format for scales",
        "e2m1/group32:e8m0.up": "unknown scale rounding 'up'",
        "e2m1/group32:fp32.ceil": "takes none",
        "e2m1/group32:e9m9": "unknown scale format",
        "e2m1/block0x4": "empty",
    }
    for spec, message in mistakes.items():
        with pytest.raises(FormatError, match=message):
            parse_spec(spec)


def test_results_do_not_depend_on_flushing_denormals() -> None:
    x = torch.randn(8, 64) * 1e-3
    for name in ("e3m2/channel", "e2m1/group16", "e4m3/tensor", "nvfp4", "int4/group32"):
        want = fxquant.quantize_tensor(x, name)
        try:
            torch.set_flush_denormal(True)
            got = fxquant.quantize_tensor(x, name)
            assert torch.equal(got.codes, want.codes)
            assert torch.equal(got.dequantize(), want.dequantize())
        finally:
            torch.set_flush_denormal(False)
