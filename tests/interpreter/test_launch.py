"""Launching kernels: what reaches them for every kind of weight, tile and input. Run under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fxquant
from fxquant.codegen import launch
from fxquant.codegen.gemm import Epilogue, run_dense, run_gemm, run_to_half
from fxquant.codegen.prepack import Declined, KernelWeight, Operands, prepare
from fxquant.codegen.tiles import Tiles

SMALL = Tiles(BM=16, BN=64, splits=1, swap=False, warps=4, stages=2)
SPECS = [
    "e3m2/channel", "e3m2/tensor", "e3m2/group64", "e3m2/group48", "e3m2/group20", "e2m3/group128", "e2m2/channel",
    "e3m1/group64", "e2m1/group32:e8m0", "e2m1/group16:e4m3", "e2m1/group64:m2", "e3m2/block16x64", "e3m0/channel",
    "e4m3/channel", "e5m2/group100", "int4/group128:fp16", "int8/channel", "uint4/group64", "uint8/group40",
    "int5/channel",
]  # fmt: skip


def packed(weight: torch.Tensor, spec: str) -> tuple[Operands, torch.Tensor]:
    q = fxquant.quantize_tensor(weight, spec)
    operands = Operands(q.packed, q.stored_scale, q.zero_point, spec, q.shape, q.tensor_scale)
    return operands, q.dequantize(torch.float64)


def prepared(weight: torch.Tensor, spec: str) -> tuple[KernelWeight, torch.Tensor]:
    operands, value = packed(weight, spec)
    kernel = prepare(operands)
    assert isinstance(kernel, KernelWeight), kernel
    return kernel, value


def close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, want: torch.Tensor) -> bool:
    """Within the bound of float32 sums of K terms, and one rounding to the output's dtype."""
    bound = (x.double().abs() @ w.abs().T) * (x.shape[1] + 8) * 2.0**-24
    if got.dtype != torch.float32:
        bound = bound + want.abs() * torch.finfo(got.dtype).eps + 2.0**-24
    return bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_weight_gives_the_product_of_its_values(spec: str) -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(37, 300), spec)
    x = torch.randn(3, 300).half()
    got = run_gemm(x, kernel, SMALL, dtype=torch.float32, use_asm=False)
    assert close(got, x, w, x.double() @ w.T)
    assert torch.equal(got, run_gemm(x, kernel, SMALL, dtype=torch.float32))


@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group16:e4m3", "e3m2/block16x64", "uint8/group40"])
def test_dense_is_the_weight_rounded_once(spec: str) -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(21, 300), spec)
    assert torch.equal(run_dense(kernel, torch.float32, use_asm=False), w.float())
    assert torch.equal(run_dense(kernel, torch.float16, use_asm=False), w.half())


@pytest.mark.parametrize(("splits", "swap"), [(1, True), (3, False)])
@pytest.mark.parametrize("spec", ["e3m2/channel", "uint4/group48"])
def test_splits_and_swapped_operands_are_exact_on_integers(spec: str, splits: int, swap: bool) -> None:
    torch.manual_seed(0)
    operands, _ = packed(torch.randn(37, 264), spec)
    powers = torch.exp2(torch.randint(-2, 3, operands.scale.shape).float())
    operands = dataclasses.replace(operands, scale=powers)
    kernel = prepare(operands)
    assert isinstance(kernel, KernelWeight)
    w = fxquant.ops.dequantize_packed(operands.packed, powers, operands.zero_point, spec, [37, 264])
    x = torch.randint(-4, 5, (19, 264)).half()
    chosen = dataclasses.replace(SMALL, splits=splits, swap=swap)
    got = run_gemm(x, kernel, chosen, dtype=torch.float32, use_asm=False)
    assert torch.equal(got.double(), x.double() @ w.double().T)
    again = run_gemm(x, kernel, chosen, dtype=torch.float32, use_asm=False)
    assert torch.equal(got, again)


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_epilogue_does_what_the_operators_do(activation: str, splits: int) -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(33, 512), "e3m2/channel")
    x, bias, residual = torch.randn(5, 512).half(), torch.randn(33).half(), torch.randn(5, 40).half()[:, :33]
    thin, wide = torch.randn(5, 6).half(), torch.randn(33, 6).half()
    row_scale = torch.exp2(torch.randint(-3, 4, (5,)).float())
    y = x.double() @ w.T * row_scale.double()[:, None] + thin.double() @ wide.double().T + bias.double()
    functions = {
        "none": lambda v: v, "relu": torch.relu, "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu, "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }  # fmt: skip
    want = functions[activation](y) + residual.double()
    more = Epilogue(bias, activation, residual, thin, wide)
    chosen = dataclasses.replace(SMALL, splits=splits)
    got = run_gemm(x, kernel, chosen, row_scale=row_scale, epilogue=more, dtype=torch.float32, use_asm=False)
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-3 * float(y.abs().max()) * 0.01)


def test_bfloat16_rows_become_float16_with_a_power_of_two() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 700).bfloat16() * torch.exp2(torch.arange(-60.0, 66.0, 14.0))[:, None].bfloat16()
    x[3] = 0
    x[4, :350] *= 2.0**-40
    half, power = run_to_half(x)
    assert torch.equal(torch.frexp(power).mantissa, torch.full((9,), 0.5))
    back, largest = half.double() * power.double()[:, None], x.double().abs().amax(1, keepdim=True)
    assert bool(((back - x.double()).abs() <= largest * 2.0**-39).all())
    small = x.double().abs() < largest * 2.0**-31
    assert torch.equal(back[~small], x.double()[~small])
    assert bool((half[:3].abs().amax(1) >= 2.0**14).all())


def test_bfloat16_keeps_inf_and_nan() -> None:
    x = torch.ones(3, 40).bfloat16()
    x[0, 3], x[1, 5], x[2, 6] = torch.inf, -torch.inf, torch.nan
    half, power = run_to_half(x)
    back = half.float() * power[:, None]
    assert torch.equal(back.nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))


GPU = launch.Device("a GPU", sms=4, arch=90)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3), (2, 0), (1, 1, 17)])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(40, 256), "e3m2/channel")
    x = torch.randn(*shape, 256).to(dtype)
    got = launch.linear(x, kernel, GPU, Epilogue(torch.ones(40, dtype=dtype)), use_asm=False)
    want = x.double() @ w.T + 1
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert torch.allclose(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_many_rows_go_through_the_dense_weight() -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(40, 256), "e3m2/group64")
    x = torch.randn(260, 256).half()
    got = launch.linear(x, kernel, GPU, Epilogue(), use_asm=False)
    assert torch.equal(got, torch.nn.functional.linear(x, w.half()))


def test_rows_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    kernel, w = prepared(torch.randn(40, 256), "e3m2/channel")
    wide, turned = torch.randn(4, 300).half(), torch.randn(256, 4).half().T
    for x in (wide[:, 7:263], turned, wide[:1, :256].expand(4, -1)):
        got = launch.linear(x, kernel, GPU, Epilogue(), use_asm=False)
        assert torch.allclose(got.double(), x.double() @ w.T, rtol=1e-3, atol=1e-2)


def test_a_weight_no_kernel_takes_is_declined_with_a_reason() -> None:
    for spec, reason in (
        ("nf4/group64", "table"),
        ("e3m2b2.5/channel", "whole one"),
        ("e3m2/channel1", "input channel"),
    ):
        operands, _ = packed(torch.randn(64, 64), spec)
        declined = prepare(operands)
        assert isinstance(declined, Declined)
        assert reason in declined.reason
