"""What decides, without a GPU, whether a kernel runs and on what; interpreter/test_launch.py runs them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fxquant
from fxquant.codegen import launch
from fxquant.codegen.prepack import Declined, KernelWeight, Operands, prepare
from fxquant.errors import InputError


def operands(spec: str = "e3m2/channel", shape: tuple[int, int] = (24, 300)) -> Operands:
    q = fxquant.quantize_tensor(torch.randn(*shape), spec)
    return Operands(q.packed, q.stored_scale, q.zero_point, spec, q.shape, q.tensor_scale)


def test_the_pipeline_registers_a_kernel_for_cuda() -> None:
    import fxquant.pipeline  # noqa: F401

    assert torch._C._dispatch_has_kernel_for_dispatch_key("fxquant::linear_wq", "CUDA")


def test_a_weight_is_prepared_once_and_again_when_it_changes() -> None:
    weight = operands()
    first = prepare(weight)
    assert prepare(Operands(*weight.tensors[:3], weight.spec, weight.shape)) is first
    weight.scale.mul_(2)
    second = prepare(weight)
    assert isinstance(first, KernelWeight)
    assert isinstance(second, KernelWeight)
    assert torch.equal(second.scale, first.scale * 2)
    weight.packed.zero_()
    third = prepare(weight)
    assert isinstance(third, KernelWeight)
    assert not bool(third.words.any())
    other = Operands(weight.packed, weight.scale.clone() * 4, None, weight.spec, weight.shape)
    fourth = prepare(other)
    assert isinstance(fourth, KernelWeight)
    assert torch.equal(fourth.scale, second.scale * 4)


def test_what_was_prepared_goes_with_its_weight() -> None:
    weight = operands()
    kernel = prepare(weight)
    assert isinstance(kernel, KernelWeight)
    alive = weakref.ref(kernel)
    del weight, kernel
    gc.collect()
    assert alive() is None


def test_a_weight_made_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = operands()
    assert prepare(weight) is prepare(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(24, 7, dtype=torch.uint8)}, r"packed is .*\[24, 7\].* wants torch.uint8 \[24, 2"),
        ({"packed": torch.zeros(24, 228)}, "packed is torch.float32"),
        ({"scale": torch.ones(3, 1)}, r"scale is torch.float32 \(3, 1\)"),
        ({"scale": -torch.ones(24, 1)}, "not a positive finite"),
        ({"zero_point": torch.zeros(24, 1, dtype=torch.uint8)}, "takes no zero point"),
    ],
)
def test_a_weight_that_does_not_fit_is_an_error(change: dict[str, torch.Tensor], message: str) -> None:
    weight = operands()
    with pytest.raises(InputError, match=message):
        prepare(Operands(**{**vars(weight), **change}))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 299), None, r"x has shape \[2, 299\]; expected \[..., 300\]"),
        (torch.tensor(1.0), None, r"x has shape \[\]"),
        (torch.zeros(2, 300, dtype=torch.int32), None, "x is torch.int32; expected float16"),
        (torch.zeros(2, 300, device="meta"), None, "packed is on cpu, x is on meta"),
        (torch.zeros(2, 300), torch.zeros(23), r"bias is torch.float32 \[23\]; expected torch.float32 \[24\]"),
        (torch.zeros(2, 300), torch.zeros(24).half(), r"bias is torch.float16 \[24\]"),
        (torch.zeros(2, 300), torch.zeros(24, device="meta"), "bias is on meta, x is on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        launch.check_arguments(x, operands(), bias)


def test_what_has_no_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    old = launch.Device("Turing", sms=40, arch=75)
    assert launch.no_kernels(old) == "Turing is sm_75, and kernels need sm_80"
    weight, gpu = operands(), launch.Device("Hopper", sms=132, arch=90)
    assert launch.no_kernels(gpu) is None
    monkeypatch.setattr(launch, "device", lambda index: gpu)
    assert isinstance(launch.kernel_for(torch.zeros(1, 300).half(), weight), KernelWeight)
    declined = launch.kernel_for(torch.zeros(1, 300), weight)
    assert isinstance(declined, Declined)
    assert "float32" in declined.reason


def test_the_reference_runs_in_the_place_of_a_kernel_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device("Turing", sms=40, arch=75))
    weight, x = operands("e2m3/channel"), torch.randn(2, 3, 300).half()
    arguments = (x, weight.packed, weight.scale, None, None, weight.spec, list(weight.shape))
    launch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="e2m3/channel linear .* sm_75, .* decoded by torch at every call") as caught:
        got = [launch.linear_wq(*arguments) for _ in range(3)]
    assert len(caught) == 1
    assert torch.equal(got[2], fxquant.ops.linear_wq(*arguments))
