"""quantize_tensor: scales from the definition, codes from the rounded scale, errors for what it cannot take."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.errors import FormatError, WeightError
from fxquant.qtensor import QuantizedTensor
from fxquant.scheme import parse_spec

SPECS = [f"{f}/{g}" for f in ("e3m2", "e2m1", "e4m3", "int4", "uint4", "int8") for g in ("tensor", "channel", "group8")]


def reference(x: torch.Tensor, text: str) -> torch.Tensor:
    """Round-to-nearest in float64, group by group, from the grid itself."""
    spec = parse_spec(text)
    rows = x.reshape(x.shape[0], -1).double()
    size = spec.group_size(rows.shape[1])
    out = torch.empty_like(rows)
    grid = spec.format.decode(spec.format.codes(), torch.float64)
    grid = grid[grid.isfinite() & (grid.abs() <= spec.format.max)]
    for r in range(len(rows)):
        for c in range(0, rows.shape[1], size):
            block = rows[r, c : c + size]
            whole = rows if text.endswith("tensor") else block
            low, high = min(0.0, float(whole.min())), max(0.0, float(whole.max()))
            if spec.has_zero_point:
                scale = float(torch.tensor((high - low) / spec.format.max, dtype=torch.float32)) or 1.0
                offset = round(-low / scale)
            else:
                scale = float(torch.tensor(max(-low, high), dtype=torch.float32) / spec.format.max) or 1.0
                offset = 0
            q = block / scale + offset
            out[r, c : c + size] = (grid[(q[:, None] - grid[None, :]).abs().argmin(dim=1)] - offset) * scale
    return out.reshape(x.shape)


@pytest.mark.parametrize("spec", SPECS)
def test_values_are_the_nearest_on_the_scaled_grid(spec: str) -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    q = fxquant.quantize_tensor(x, spec)
    q.check()
    assert torch.allclose(q.dequantize(torch.float64), reference(x, spec), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_quantizing_again_changes_nothing(spec: str) -> None:
    once = fxquant.quantize_tensor(torch.randn(4, 24), spec).dequantize()
    twice = fxquant.quantize_tensor(once, spec).dequantize()
    assert torch.allclose(once, twice, rtol=3e-7, atol=0)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), cols=st.integers(1, 33), group=st.integers(1, 40), seed=st.integers(0, 5))
def test_error_is_at_most_half_a_step(rows: int, cols: int, group: int, seed: int) -> None:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    q = fxquant.quantize_tensor(x, f"int4/group{group}")
    assert tuple(q.scale.shape) == (rows, math.ceil(cols / group))
    step = q.scale.repeat_interleave(min(group, cols), dim=1)[:, :cols]
    assert bool(((q.dequantize() - x).abs() <= step * 0.5000001).all())


def test_576_columns_in_groups_of_128_leave_a_shorter_last_group() -> None:
    x = torch.randn(3, 576)
    q = fxquant.quantize_tensor(x, "e2m1/group128")
    assert tuple(q.scale.shape) == (3, 5)
    assert torch.equal(q.scale[:, 4], x[:, 512:].abs().amax(1) / 6)


def test_scale_is_rounded_before_codes_are_chosen() -> None:
    x = torch.randn(8, 64)
    q = fxquant.quantize_tensor(x, "e2m1/group16:fp16")
    assert q.scale.dtype == torch.float16
    wide = q.scale.float().repeat_interleave(16, dim=1)
    assert torch.equal(q.codes, q.spec.format.encode(x / wide))


def test_a_convolution_kernel_is_one_row_a_channel() -> None:
    x = torch.randn(5, 3, 3, 3)
    q = fxquant.quantize_tensor(x, "e3m2/channel")
    assert tuple(q.codes.shape) == (5, 27)
    assert tuple(q.scale.shape) == (5, 1)
    assert q.dequantize().shape == x.shape
    assert q.nbytes == 5 * (14 + 7) + 5 * 4


def test_packed_fp6_takes_six_bits() -> None:
    q = fxquant.quantize_tensor(torch.randn(64, 576), "e3m2/channel")
    assert q.packed.nbytes == 64 * 576 * 6 // 8
    assert q.nbytes == q.packed.nbytes + 64 * 4


def test_groups_of_zeros_and_tiny_values() -> None:
    zeros = fxquant.quantize_tensor(torch.zeros(2, 8), "e3m2/channel")
    assert zeros.dequantize().abs().sum() == 0
    assert zeros.scale.tolist() == [[1.0], [1.0]]
    tiny = fxquant.quantize_tensor(torch.full((1, 8), 1e-44), "e3m2/channel")
    assert bool(tiny.dequantize().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16).to(dtype)
    q = fxquant.quantize_tensor(x, "e3m2/channel")
    assert torch.allclose(q.dequantize(), fxquant.quantize_tensor(x.float(), "e3m2/channel").dequantize(), rtol=1e-5)
    assert q.dequantize(dtype).dtype == dtype


def test_non_contiguous_input() -> None:
    x = torch.randn(16, 6).t()
    assert torch.equal(
        fxquant.quantize_tensor(x, "int8/group4").codes, fxquant.quantize_tensor(x.contiguous(), "int8/group4").codes
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([[1.0, math.nan, math.inf, math.nan]]), "2 NaN and 1 Inf among 4"),
        (torch.ones(2, 2, dtype=torch.int64), "only floating point"),
        (torch.ones(2, 2, device="meta"), "meta device"),
        (torch.ones(0, 4), "at least one row"),
        (torch.ones(4, 0), "at least one row"),
        (torch.tensor(1.0), "at least one row"),
    ],
)
def test_what_cannot_be_quantized(value: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=f"^blk.weight.*{message}"):
        fxquant.quantize_tensor(value, "e3m2/channel", name="blk.weight")


def test_scale_above_its_storage_format() -> None:
    with pytest.raises(WeightError, match="above the fp16 maximum"):
        fxquant.quantize_tensor(torch.full((1, 4), 1e9), "e2m1/channel:fp16")


def test_broken_invariants_are_named() -> None:
    q = fxquant.quantize_tensor(torch.randn(2, 8), "e3m2/channel")
    cases = [
        (QuantizedTensor(q.codes | 128, q.scale, None, q.spec, q.shape), "has 6 bits"),
        (QuantizedTensor(q.codes, q.scale[:1], None, q.spec, q.shape), "wants"),
        (QuantizedTensor(q.codes, q.scale * math.nan, None, q.spec, q.shape), "positive finite"),
        (QuantizedTensor(q.codes, q.scale, q.codes[:, :1], q.spec, q.shape), "takes no zero point"),
        (QuantizedTensor(q.codes, q.scale, None, q.spec, (3, 8)), "for a tensor of"),
    ]
    for broken, message in cases:
        with pytest.raises(FormatError, match=message):
            broken.check()


@pytest.mark.parametrize(
    "text", ["e3m2/channel", "e2m1/group64", "int4/tensor", "e4m3fnuz/group128:bf16", "uint4/group32:fp16"]
)
def test_specs_print_back(text: str) -> None:
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize("text", ["e3m2/row", "e3m2/group0", "e3m2/groupx", "e3m2/channel:fp12", "e3m2/channel/x"])
def test_bad_specs(text: str) -> None:
    with pytest.raises(FormatError, match="expected"):
        parse_spec(text)
