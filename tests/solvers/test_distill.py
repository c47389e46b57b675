"""Distillation: where it starts, its gradients, and that it never ends worse than it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import parse_format
from fxquant.qtensor import QuantizedTensor, quantize_tensor
from fxquant.solvers.distill import Latent, distill, mean_step, relative_error

G = torch.Generator().manual_seed(0)
W = torch.randn(6, 24, generator=G)
SPECS = [
    "e2m1/group8", "e3m2/channel", "e2m1/tensor:fp16", "int4/group8:bf16", "uint4/group8", "nf4/group8",
    "higgs4/group8", "mxfp4", "nvfp4", "e2m1/group8:m1", "e2m1/group8:m2", "e4m3/block2x8", "lut(-1,-0.25,0.5,1)",
]  # fmt: skip


def other_codes(q: QuantizedTensor) -> QuantizedTensor:
    """Codes as a solver might have chosen them: those of another matrix under the same scales."""
    moved = quantize_tensor(W + 0.3 * torch.randn(W.shape, generator=G), q.spec)
    return replace(q, codes=torch.where(torch.rand(W.shape, generator=G) < 0.5, q.codes, moved.codes))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("solved", [False, True], ids=["rtn", "other codes"])
def test_it_starts_exactly_at_the_codes_it_is_given(spec: str, solved: bool) -> None:
    q = quantize_tensor(W, spec)
    q = other_codes(q) if solved else q
    latent = Latent(q, W)
    assert torch.equal(latent.weight().detach(), q.dequantize())
    assert torch.equal(latent.quantized().dequantize(), q.dequantize())
    latent.quantized().check()
    if not solved:
        assert torch.equal(latent.base, W)  # the float weight itself is the latent of round-to-nearest


@pytest.mark.parametrize("spec", ["e2m1/group8", "int4/group8:fp16", "uint4/group8", "nf4/channel"])
def test_trained_scales_start_at_the_codes_too(spec: str) -> None:
    q = other_codes(quantize_tensor(W, spec))
    latent = Latent(q, W, train_scales=True)
    assert torch.allclose(latent.weight().detach(), q.dequantize(), atol=1e-6)
    assert torch.equal(latent.quantized().scale, q.scale)
    assert torch.equal(latent.quantized().dequantize(), q.dequantize())


def test_gradients_are_straight_through() -> None:
    """By the equations: 1 (0.16 in steps of codes) for weights inside the range, 0 where it clips them."""
    q = replace(quantize_tensor(W, "e2m1/group8"), scale=torch.full((6, 3), 0.2))  # range +-1.2: it clips some
    for train in (False, True):
        latent = Latent(q, W, train_scales=train)
        with torch.no_grad():
            latent.base.copy_(W)
        latent.weight().sum().backward()
        assert torch.allclose(latent.delta.grad, 0.2 * 12 / 15 * (W.abs() <= 1.2).float())
    ratio = (W / 0.2).clamp(-6, 6)
    code = latent.quantized().dequantize() / 0.2
    slope = torch.where(W.abs() <= 1.2, code - ratio, ratio)  # dW'/ds
    want = 0.2 * slope.reshape(6, 3, 8).sum(2)  # ds / d log s = s
    assert torch.allclose(latent.log_scale.grad, want, atol=1e-5)


def squared(batches: list[Tensor], target: Tensor):
    return lambda weights, i: (batches[i] @ (weights[0] - target).T).square().mean()


MIX = torch.randn(5, 24, generator=G)
BATCHES = [torch.randn(40, 5, generator=G) @ MIX for _ in range(8)]


@pytest.mark.parametrize("spec", SPECS)
def test_the_loss_falls_and_is_that_of_the_codes(spec: str) -> None:
    q = quantize_tensor(W, spec)
    latent, loss = Latent(q, W), squared(BATCHES, W)
    found = distill([latent], loss, range(7), [7], iterations=48, learning_rate=0.05, batch=2)
    assert found.best < 0.9 * found.start
    assert found.start == pytest.approx(float(loss([q.dequantize()], 7)))
    assert found.best == pytest.approx(float(loss([latent.quantized().dequantize()], 7)))


def test_trained_scales_repair_bad_ones() -> None:
    q = quantize_tensor(W, "e2m1/channel")
    wrong = replace(q, scale=1.3 * q.scale)
    losses = []
    for train in (False, True):
        latent = Latent(wrong, W, train_scales=train)
        distill([latent], squared(BATCHES, W), range(7), [7], iterations=64, learning_rate=0.05)
        losses.append(float(squared(BATCHES, W)([latent.quantized().dequantize()], 7)))
        assert torch.equal(latent.quantized().scale, wrong.scale) != train
    assert losses[1] < losses[0]


def test_what_gets_worse_is_put_back() -> None:
    """The batches to train on want another weight than the one that judges."""
    q = quantize_tensor(W, "e2m1/group8")
    latent = Latent(q, W)
    away, here = squared(BATCHES, -W), squared(BATCHES, q.dequantize())
    found = distill([latent], lambda w, i: here(w, i) if i == 7 else away(w, i), range(7), [7], iterations=9,
                    learning_rate=0.5)  # fmt: skip
    assert (found.start, found.best, found.improved) == (0.0, 0.0, False)
    assert torch.equal(latent.quantized().codes, q.codes)


def test_nothing_happens_in_no_iterations() -> None:
    latent = Latent(quantize_tensor(W, "e2m1/group8"), W)
    found = distill([latent], squared(BATCHES, W), range(8), [], iterations=0, learning_rate=0.1)
    assert not found.improved
    assert found.best == found.start > 0
    assert not latent.delta.any()


def test_a_loss_that_is_not_finite_ends_it() -> None:
    latent = Latent(quantize_tensor(W, "e2m1/group8"), W)
    found = distill([latent], lambda w, i: (w[0] * torch.inf).sum(), [0], [], iterations=5, learning_rate=0.1)
    assert not found.improved
    assert not latent.delta.any()


def test_it_is_the_same_every_time() -> None:
    codes = []
    for _ in range(2):
        latent = Latent(quantize_tensor(W, "e2m1/group8"), W)
        distill([latent], squared(BATCHES, W), range(7), [7], iterations=8, learning_rate=0.05)
        codes.append(latent.quantized().codes)
    assert torch.equal(*codes)


def test_scales_on_a_grid_of_their_own_are_not_trained() -> None:
    with pytest.raises(FormatError, match="stored as e8m0 are too coarse to be trained; fp32, fp16 and bf16"):
        Latent(quantize_tensor(W, "mxfp4"), W, train_scales=True)


@pytest.mark.parametrize(
    ("name", "step"), [("int4", 1), ("uint4", 1), ("nf4", 2 / 15), ("e2m1", 0.8), ("e4m3", 896 / 253)]
)
def test_the_unit_of_the_learning_rate(name: str, step: float) -> None:
    assert mean_step(parse_format(name)) == pytest.approx(step)


def test_relative_error_weighs_tokens_alike() -> None:
    target = torch.randn(2, 5, 8, generator=G)
    target[0, 0] *= 1000
    power = float(target.square().mean())
    y = 1.1 * target
    y[1, 3] = 2 * target[1, 3]
    assert float(relative_error(y, target, 1e-9)) == pytest.approx((9 * 0.01 + 1) / 10, rel=1e-4)
    assert float(relative_error(y, target, power, "mse")) == pytest.approx(0.01, rel=1e-2)
    zero = torch.zeros(2, 8)
    assert float(relative_error(zero + 1, zero, 1000.0)) == pytest.approx(1.0)
    image = torch.randn(3, 4, 5, 5, generator=G)
    assert float(relative_error(1.5 * image, image, 1e-9)) == pytest.approx(0.25, rel=1e-4)
