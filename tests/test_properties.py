"""Properties of every format over random shapes, dtypes and strides: round trips, idempotence, order, half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.formats import COMMON, parse_format
from fxquant.packing import pack, unpack

VALUES = [name for name in COMMON if name not in ("e8m0", "ue5m3")]
SPECS = [
    "e3m2/channel", "e2m1/group16", "mxfp4", "mxfp6_e2m3", "nvfp4", "int4/group8:fp16", "uint5/tensor", "nf4/group32",
    "e4m3/block4x8", "e2m1/group16:m2", "e2m1/group16:m1", "int3/channel1", "e3m0/group7",
]  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def matrices() -> st.SearchStrategy[torch.Tensor]:
    """Random matrices of any float dtype, contiguous, transposed or sliced."""

    def build(rows: int, cols: int, seed: int, dtype: torch.dtype, view: str, size: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if view == "transposed":
            return (torch.randn(cols, rows, generator=generator) * size).to(dtype).t()
        if view == "sliced":
            return (torch.randn(rows, 2 * cols, generator=generator) * size).to(dtype)[:, ::2]
        return (torch.randn(rows, cols, generator=generator) * size).to(dtype)

    return st.builds(
        build, st.integers(1, 9), st.integers(1, 40), st.integers(0, 99), st.sampled_from(DTYPES),
        st.sampled_from(["contiguous", "transposed", "sliced"]), st.sampled_from([1e-3, 1.0, 100.0]),
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(x=matrices(), spec=st.sampled_from(SPECS))
def test_quantized_tensors_pack_and_survive(x: torch.Tensor, spec: str) -> None:
    q = fxquant.quantize_tensor(x, spec)
    q.check()
    layout = f"planar{q.spec.format.bits}"
    assert torch.equal(unpack(pack(q.codes, layout), layout, tuple(q.codes.shape)), q.codes)
    assert q.dequantize().shape == x.shape
    assert torch.equal(q.codes, fxquant.quantize_tensor(x.contiguous(), spec).codes)


@settings(max_examples=100, deadline=None)
@given(x=matrices(), name=st.sampled_from(VALUES))
def test_rounding_twice_is_rounding_once(x: torch.Tensor, name: str) -> None:
    fmt = parse_format(name)
    once = fmt.round(x.double())
    assert torch.equal(fmt.round(once), once)
    assert torch.equal(fmt.decode(fmt.encode(once), torch.float64), once)


@settings(max_examples=100, deadline=None)
@given(x=matrices(), name=st.sampled_from(VALUES))
def test_rounding_keeps_order(x: torch.Tensor, name: str) -> None:
    ordered = x.flatten().double().sort().values
    rounded = parse_format(name).round(ordered)
    assert bool((rounded[1:] >= rounded[:-1]).all())


@settings(max_examples=100, deadline=None)
@given(x=matrices(), name=st.sampled_from(VALUES))
def test_error_is_at_most_half_the_gap_around_a_value(x: torch.Tensor, name: str) -> None:
    fmt = parse_format(name)
    table = fmt.table()
    grid = table[table.isfinite() & (table.abs() <= fmt.max)].sort().values
    inside = x.flatten().double().clamp(float(grid[0]), float(grid[-1]))
    above = torch.searchsorted(grid, inside).clamp(1, len(grid) - 1)
    gap = grid[above] - grid[above - 1]
    assert bool(((fmt.round(inside) - inside).abs() <= gap / 2).all())


@pytest.mark.parametrize("name", VALUES)
def test_empty_and_zero_dimensional_tensors(name: str) -> None:
    fmt = parse_format(name)
    assert fmt.encode(torch.zeros(0, 3)).shape == (0, 3)
    assert fmt.round(torch.tensor(0.3)).shape == ()
    assert fmt.decode(fmt.encode(torch.zeros(2, 0))).shape == (2, 0)


@pytest.mark.parametrize("name", VALUES)
def test_float64_and_float32_agree_where_both_are_exact(name: str) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 4
    fmt = parse_format(name)
    assert torch.equal(fmt.encode(x), fmt.encode(x.double()))
