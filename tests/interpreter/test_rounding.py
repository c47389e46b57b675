"""Rounded activations: rows agree with the reference bit for bit, and products of codes with those of its values."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.codegen import launch
from fxquant.codegen.gemm import Epilogue, run_round
from fxquant.codegen.prepack import Declined, KernelWeight, Operands
from fxquant.codegen.rounding import InputRounding, RoundedProduct, plan
from fxquant.ops import fake_quantize, fake_quantize_dynamic
from fxquant.scheme import parse_spec

AMPERE, HOPPER = launch.Device("Ampere", sms=4, arch=80), launch.Device("Hopper", sms=4, arch=90)


def operands(spec: str, shape: tuple[int, int] = (40, 300)) -> Operands:
    q = fxquant.quantize_tensor(torch.randn(*shape), spec)
    return Operands(q.packed, q.stored_scale, q.zero_point, spec, q.shape, q.tensor_scale)


def planned(weight: Operands, rounding: InputRounding, arch: int) -> RoundedProduct:
    found = plan(weight, rounding, arch=arch)
    assert isinstance(found, RoundedProduct), found
    return found


def rows(M: int, K: int) -> torch.Tensor:
    """Numbers of many sizes, ties between codes, zeros, subnormals of the grid, and a row of zeros."""
    x = torch.randn(M, K) * torch.exp2(torch.randint(-12, 4, (M, K)).float())
    x[0] = torch.arange(K).float() / 16 - K // 32
    x[1] = 0
    x[2, ::2] = 0
    return x


@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.float32), (90, torch.float16), (90, torch.bfloat16)])
@pytest.mark.parametrize("spec", ["e4m3/token", "e5m2/token", "e2m1/token", "e3m2/token", "int8/token", "e3m4/token"])
def test_token_rows_are_those_of_the_reference(spec: str, arch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = rows(4, 300).to(dtype)
    found = planned(operands("e2m1/channel"), InputRounding(spec), arch)
    assert (found.x is None) == (arch == 80 or spec in ("int8/token", "e3m4/token"))
    codes, scale = run_round(x, parse_spec(spec).format, None, found)
    want = fake_quantize_dynamic(x.float(), spec)
    assert torch.equal(codes.float() * scale[:, None], want)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("spec", ["e2m1/tensor", "e4m3/tensor"])
def test_exponents_a_channel_go_into_the_codes(spec: str, moved: bool, shifted: bool, arch: int) -> None:
    torch.manual_seed(0)
    K = 300
    x, scale = rows(5, K) * 40, torch.tensor([[0.37]])
    bias = torch.randint(-3, 4, (K,)).to(torch.int8)
    weight = operands("e3m2/channel")
    if moved:
        weight = Operands(**{**vars(weight), "exponent_bias": torch.randint(-2, 3, (K,)).to(torch.int8)})
    found = planned(weight, InputRounding(spec, scale, bias, shifted), arch)
    assert (found.x is None) == (arch == 80 or (spec == "e4m3/tensor" and not (shifted and not moved)))
    codes, row_scale = run_round(x, parse_spec(spec).format, scale, found)
    want = fake_quantize(x, scale, None, spec, None, bias, shifted)
    if weight.exponent_bias is not None:
        want = want * torch.exp2(-weight.exponent_bias.float())
    assert torch.equal(codes.float() * row_scale[:, None], want)


def test_powers_of_two_that_leave_the_window_are_moved_into_the_scale() -> None:
    weight = operands("e2m1/channel")
    for low, high, arch, x in (
        (10, 20, 90, "e4m3"), (-30, -16, 90, "e4m3"), (0, 20, 90, "e5m2"), (0, 30, 90, None), (0, 36, 80, None),
    ):  # fmt: skip
        bias = torch.zeros(300, dtype=torch.int8)
        bias[0], bias[1:] = -high, -low
        rounding = InputRounding("e2m1/tensor", torch.ones(1, 1), bias)
        found = planned(weight, rounding, arch)
        assert (None if found.x is None else str(found.x)) == x
        data = torch.randn(3, 300) * torch.exp2(-bias.float())
        codes, row_scale = run_round(data, parse_spec("e2m1").format, rounding.scale, found)
        want = fake_quantize(data, torch.ones(1, 1), None, "e2m1/tensor", None, bias)
        assert torch.equal(codes.float() * row_scale[:, None], want)
    bias[0] = -37
    declined = plan(weight, InputRounding("e2m1/tensor", torch.ones(1, 1), bias), arch=90)
    assert isinstance(declined, Declined)
    assert "beyond float16" in declined.reason


def test_rows_with_nan_or_inf_become_nan() -> None:
    x = torch.ones(4, 300).half()
    x[0, 5], x[1, 299], x[2, 0] = torch.nan, torch.inf, -torch.inf
    found = planned(operands("e2m1/channel"), InputRounding("e4m3/token"), 90)
    codes, scale = run_round(x, parse_spec("e4m3").format, None, found)
    value = codes.float() * scale[:, None]
    assert bool(value[:3].isnan().all())
    assert torch.equal(value[3], fake_quantize_dynamic(x[3:].float(), "e4m3/token")[0])


@pytest.mark.parametrize("gpu", [AMPERE, HOPPER])
@pytest.mark.parametrize(
    ("spec", "input_spec"),
    [
        ("e3m2/channel", "e4m3/token"), ("e2m1/group64:m2", "e4m3/token"), ("e2m1/group48", "e5m2/token"),
        ("int8/channel", "int8/token"), ("uint4/group64", "e4m3/token"),
    ],
)  # fmt: skip
def test_the_product_is_that_of_the_rounded_values(spec: str, input_spec: str, gpu: launch.Device) -> None:
    torch.manual_seed(0)
    weight, rounding = operands(spec), InputRounding(input_spec)
    x = torch.randn(2, 3, 300).half()
    kernel = launch.plan(weight, rounding, arch=gpu.arch)
    assert isinstance(kernel, RoundedProduct)
    got = launch.linear(x.float(), kernel, gpu, Epilogue(), rounding, use_asm=False)
    w = fxquant.ops.dequantize_packed(
        weight.packed, weight.scale, weight.zero_point, spec, weight.shape, weight.tensor_scale
    ).double()
    value = fake_quantize_dynamic(x.float(), input_spec).double()
    bound = (value.abs() @ w.abs().T) * 310 * 2.0**-24
    assert bool(((got.double() - value @ w.T).abs() <= bound).all())


@pytest.mark.parametrize(
    ("dtype", "M"), [(torch.float16, 3), (torch.bfloat16, 3), (torch.float32, 3), (torch.bfloat16, 260)]
)
def test_everything_around_a_linear_at_once(dtype: torch.dtype, M: int) -> None:
    torch.manual_seed(0)
    weight = operands("e2m1/group64", (48, 128))
    x, thin, wide = torch.randn(M, 128).to(dtype), torch.randn(M, 5).to(dtype), torch.randn(48, 5).to(dtype)
    bias, residual = torch.randn(48).to(dtype), torch.randn(M, 48).to(dtype)
    rounding = InputRounding("e4m3/token")
    kernel = launch.plan(weight, rounding, arch=90)
    assert isinstance(kernel, RoundedProduct)
    epilogue = Epilogue(bias, "gelu", residual, thin, wide)
    launch.check_around(x, weight, epilogue, rounding)
    got = launch.linear(x, kernel, HOPPER, epilogue, rounding, use_asm=False)
    arguments = (weight.packed, weight.scale, None, bias.double(), weight.spec, list(weight.shape))
    want = fxquant.ops.linear_wq_fused(
        fake_quantize_dynamic(x.float(), "e4m3/token").double(), *arguments, thin=thin.double(), wide=wide.double(),
        activation="gelu", residual=residual.double(),
    )  # fmt: skip
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    tolerance = 4 * eps * want.abs().max()
    assert bool(((got.double() - want).abs() <= tolerance).all())


def test_kernels_exist_for_the_weights_of_every_recipe_with_rounded_inputs() -> None:
    for spec in ("e2m1/channel", "e2m1/group128", "e2m1/group128:m1", "e4m3/channel", "e3m2/channel", "int8/channel"):
        assert isinstance(planned(operands(spec), InputRounding("e4m3/token"), 90).weight, KernelWeight)
