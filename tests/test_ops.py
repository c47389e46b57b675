"""Operators: opcheck, reference against plain torch in float64, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fxquant
import fxquant.ops  # defines the operators

SPECS = ["e3m2/channel", "e2m1/group8", "int4/tensor", "uint4/group8", "e4m3/group16:fp16"]
ops = torch.ops.fxquant


def parts(weight: torch.Tensor, spec: str, **kwargs) -> tuple:
    q = fxquant.quantize_tensor(weight, spec, **kwargs)
    return (q.packed, q.scale, q.zero_point), q.dequantize(), list(q.shape)


def same_up_to_rounding(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.allclose(got.double(), want, rtol=0, atol=3e-6 * float(want.abs().max()))


@pytest.mark.parametrize("spec", SPECS)
def test_linear_equals_the_float64_product_of_the_decoded_weight(spec: str) -> None:
    weight, decoded, shape = parts(torch.randn(12, 20), spec)
    x, bias = torch.randn(3, 5, 20), torch.randn(12)
    got = ops.linear_wq(x, *weight, bias, spec, shape)
    same_up_to_rounding(got, F.linear(x.double(), decoded.double(), bias.double()))


@pytest.mark.parametrize("spec", SPECS)
def test_conv2d(spec: str) -> None:
    weight, decoded, shape = parts(torch.randn(6, 2, 3, 3), spec)
    x = torch.randn(2, 4, 9, 8)
    got = ops.conv2d_wq(x, *weight, None, spec, shape, [2, 1], [1, 0], [1, 2], 2)
    same_up_to_rounding(got, F.conv2d(x.double(), decoded.double(), None, (2, 1), (1, 0), (1, 2), 2))


@pytest.mark.parametrize("spec", SPECS)
def test_embedding_decodes_only_its_rows_and_all_of_them_right(spec: str) -> None:
    weight, decoded, shape = parts(torch.randn(30, 20), spec)
    indices = torch.randint(0, 30, (2, 7))
    assert torch.equal(ops.embedding_wq(indices, *weight, spec, shape), decoded[indices])


@pytest.mark.parametrize("spec", SPECS)
def test_packed_and_unpacked_decode_alike(spec: str) -> None:
    q = fxquant.quantize_tensor(torch.randn(3, 4, 10), spec, channel_dims=2)
    unpacked = ops.dequantize(q.codes, q.scale, q.zero_point, spec, [3, 4, 10])
    assert torch.equal(unpacked, ops.dequantize_packed(q.packed, q.scale, q.zero_point, spec, [3, 4, 10]))
    assert torch.equal(unpacked, q.dequantize())


@pytest.mark.parametrize("spec", ["e3m2/channel", "uint4/group8"])
def test_opcheck(spec: str) -> None:
    q = fxquant.quantize_tensor(torch.randn(6, 16), spec)
    packed = (q.packed, q.scale, q.zero_point)
    kernel = fxquant.quantize_tensor(torch.randn(6, 2, 3, 3), spec)
    conv = (kernel.packed, kernel.scale, kernel.zero_point)
    x = torch.randn(6, 16)
    calls = [
        (ops.quantize, (x, q.scale, q.zero_point, spec)),
        (ops.dequantize, (q.codes, q.scale, q.zero_point, spec, [6, 16])),
        (ops.dequantize_packed, (*packed, spec, [6, 16])),
        (ops.fake_quantize, (x.clone().requires_grad_(), q.scale, q.zero_point, spec)),
        (ops.linear_wq, (x[:3].clone().requires_grad_(), *packed, torch.randn(6, requires_grad=True), spec, [6, 16])),
        (ops.conv2d_wq, (torch.randn(1, 2, 5, 5, requires_grad=True), *conv, torch.randn(6), spec, [6, 2, 3, 3],
                         [1, 1], [1, 1], [1, 1], 1)),
        (ops.embedding_wq, (torch.randint(0, 6, (4,)), *packed, spec, [6, 16])),
    ]  # fmt: skip
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_gradients_equal_those_of_the_decoded_weight() -> None:
    weight, decoded, shape = parts(torch.randn(6, 2, 3, 3), "e3m2/channel")
    x, bias = torch.randn(2, 2, 7, 7, requires_grad=True), torch.randn(6, requires_grad=True)
    window = ([2, 2], [1, 1], [1, 1], 1)
    got = torch.autograd.grad(ops.conv2d_wq(x, *weight, bias, "e3m2/channel", shape, *window).square().sum(), (x, bias))
    want = torch.autograd.grad(F.conv2d(x, decoded, bias, 2, 1).square().sum(), (x, bias))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    weight, decoded, shape = parts(torch.randn(5, 8), "e2m1/group4")
    x = torch.randn(2, 3, 8, requires_grad=True)
    (got_x,) = torch.autograd.grad(ops.linear_wq(x, *weight, None, "e2m1/group4", shape).square().sum(), x)
    (want_x,) = torch.autograd.grad(F.linear(x, decoded).square().sum(), x)
    assert torch.allclose(got_x, want_x, rtol=1e-4, atol=1e-4)


def test_fake_quantize_passes_the_gradient_inside_its_range_only() -> None:
    x = torch.tensor([[0.1, -27.9, 28.0, 28.1, -40.0]], requires_grad=True)
    y = ops.fake_quantize(x, torch.ones(1, 1), None, "e3m2/channel")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [[1, 1, 1, 0, 0]]


def test_low_precision_activations_keep_their_dtype() -> None:
    weight, decoded, shape = parts(torch.randn(8, 16), "e3m2/channel")
    x = torch.randn(2, 16).bfloat16()
    got = ops.linear_wq(x, *weight, None, "e3m2/channel", shape)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, F.linear(x, decoded.bfloat16()))


def test_torch_compile_sees_one_opaque_operator() -> None:
    weight, _, shape = parts(torch.randn(8, 16), "e3m2/channel")

    def f(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_wq(x, *weight, None, "e3m2/channel", shape).relu()

    x = torch.randn(2, 16)
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))
