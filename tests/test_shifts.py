"""Bias shift equals the table; FP4 to FP8 by shift equals arithmetic inside its window and is refused outside."""

from __future__ import annotations

import pytest
import torch

from fxquant import shifts
from fxquant.errors import FormatError
from fxquant.formats import FloatFormat, parse_format
from fxquant.grids import default_bias

SMALL = [FloatFormat(e, m, default_bias(e)) for e in range(1, 6) for m in range(6 - e)]
WIDE = [torch.float16, torch.bfloat16, torch.float32]
# methods.md's figures for ZeroQuant-FP's casts: source, target -> window of exact powers
WINDOWS = {
    ("e2m1", "e4m3"): (-8, 6),
    ("e2m1", "e5m2"): (-15, 13),
    ("e3m0", "e4m3"): (-7, 4),
    ("e3m0", "e5m2"): (-14, 11),
}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_bias_shift_equals_the_table(fmt: FloatFormat, dtype: torch.dtype) -> None:
    assert shifts.fits(fmt, dtype) == (fmt.max <= torch.finfo(dtype).max)
    if not shifts.fits(fmt, dtype):
        with pytest.raises(FormatError, match=r"use format\.decode"):
            shifts.decode(fmt.codes(), fmt, dtype)
        return
    got = shifts.decode(fmt.codes(), fmt, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.double(), fmt.table())
    assert torch.equal(got.signbit(), fmt.table().signbit())


def test_only_e5m0_does_not_fit_fp16() -> None:
    assert [str(f) for f in SMALL if not shifts.fits(f, torch.float16)] == ["e5m0"]


def test_the_table_is_used_while_denormals_are_flushed() -> None:
    fmt = parse_format("e3m2")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert shifts.denormals_flushed()
        for dtype in WIDE:
            assert torch.equal(shifts.decode(fmt.codes(), fmt, dtype).double(), fmt.table())
    finally:
        torch.set_flush_denormal(False)
    assert not shifts.denormals_flushed()


@pytest.mark.parametrize(("source", "target"), WINDOWS)
def test_fp4_to_fp8_is_exact_in_its_window_and_refused_outside(source: str, target: str) -> None:
    low_format, high_format = parse_format(source), parse_format(target)
    assert isinstance(low_format, FloatFormat)
    assert isinstance(high_format, FloatFormat)
    low, high = shifts.exact_window(low_format, high_format)
    assert (low, high) == WINDOWS[source, target]
    codes = low_format.codes()
    for n in range(low, high + 1):
        got = shifts.cast(codes, n, low_format, high_format)
        assert torch.equal(high_format.decode(got, torch.float64), low_format.table() * 2.0**n)
    for n in (low - 1, high + 1):
        with pytest.raises(FormatError, match="leave the window"):
            shifts.cast(codes, n, low_format, high_format)
        clamped = shifts.cast(codes, n, low_format, high_format, outside="clamp")
        assert torch.equal(clamped, shifts.cast(codes, min(max(n, low), high), low_format, high_format))


def test_an_exponent_for_every_group() -> None:
    e2m1, e4m3 = parse_format("e2m1"), parse_format("e4m3")
    assert isinstance(e2m1, FloatFormat)
    assert isinstance(e4m3, FloatFormat)
    codes = torch.randint(0, 16, (6, 32), dtype=torch.uint8)
    n = torch.randint(-8, 7, (6, 1))
    got = shifts.cast(codes, n, e2m1, e4m3)
    assert torch.equal(e4m3.decode(got), e2m1.decode(codes) * 2.0**n)
    with pytest.raises(FormatError, match="expected integers"):
        shifts.cast(codes, n.float(), e2m1, e4m3)


def test_formats_without_a_window() -> None:
    with pytest.raises(FormatError, match="no power of two"):
        shifts.exact_window(parse_format("e2m3"), parse_format("e5m2"))  # type: ignore[arg-type]
