"""Formats against their definition, a brute force that shares no code with them, and ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import FormatError
from fxquant.formats import FloatFormat, IntFormat, parse_format
from fxquant.grids import default_bias, default_specials
from fxquant.scheme import parse_spec

EVERY = [
    FloatFormat(e, m, default_bias(e), default_specials(e, m))
    for e in range(1, 8)
    for m in range(0, 8 - e)
    if e + m <= 7
]
SPECIAL = [parse_format(n) for n in ("e4m3fnuz", "e5m2fnuz", "e4m3none", "e5m2none", "e4m3ieee", "e3m4ieee", "e2m1b3")]
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
}


def every_fp16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def value_of(code: int, fmt: FloatFormat) -> float:
    """The definition in the module docstring, written out for one code."""
    sign = -1.0 if code >> (fmt.ebits + fmt.mbits) else 1.0
    exponent, mantissa = code >> fmt.mbits & (2**fmt.ebits - 1), code & (2**fmt.mbits - 1)
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - fmt.bias - fmt.mbits)
    return sign * math.ldexp(2**fmt.mbits + mantissa, exponent - fmt.bias - fmt.mbits)


@pytest.mark.parametrize("fmt", EVERY + SPECIAL, ids=str)
def test_decode_is_the_definition(fmt: FloatFormat) -> None:
    got = fmt.decode(fmt.codes(), torch.float64).tolist()
    for code, value in enumerate(got):
        if math.isfinite(value):
            assert value == value_of(code, fmt)
            assert math.copysign(1, value) == math.copysign(1, value_of(code, fmt))


def nearest_codes(x: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    """Brute force: among the finite magnitudes the closest to |x|, of two equally close the even code."""
    magnitudes = np.array([value_of(c, fmt) for c in range(2 ** (fmt.bits - 1))])
    finite = fmt.decode(fmt.codes()[: 2 ** (fmt.bits - 1)], torch.float64).isfinite().numpy()
    magnitudes = magnitudes[: int(finite.sum())]
    distance = np.abs(np.abs(x)[:, None] - magnitudes[None, :])
    best = distance.min(axis=1, keepdims=True)
    even_first = np.where(distance == best, np.arange(len(magnitudes)) % 2, 2)
    code = even_first.argmin(axis=1)
    sign = np.signbit(x).astype(np.int64) << (fmt.bits - 1)
    if fmt.specials == "fnuz":
        sign[code == 0] = 0
    return (code | sign).astype(np.uint8)


@pytest.mark.parametrize("every", [every_fp16, every_bf16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("fmt", EVERY + SPECIAL, ids=str)
def test_encode_is_nearest_ties_to_even_code(fmt: FloatFormat, every) -> None:
    x = every()
    x = x[x.isfinite()]
    got = fmt.encode(x).numpy()
    limit = fmt.max * 4  # beyond, distances lose their last bits; saturation there is tested on its own
    inside = x.double().abs() <= limit
    want = nearest_codes(x.double().numpy()[inside.numpy()], fmt)
    assert np.array_equal(got[inside.numpy()], want)
    top = fmt.encode(torch.tensor([fmt.max, -fmt.max])).tolist()
    assert set(got[(x.double() > limit).numpy()].tolist()) <= {top[0]}
    assert set(got[(x.double() < -limit).numpy()].tolist()) <= {top[1]}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_encode_equals_ml_dtypes(name: str) -> None:
    fmt = parse_format(name)
    for x in (every_fp16().float(), every_bf16().float()):
        x = x[x.isfinite()].clamp(-fmt.max, fmt.max)
        want = x.numpy().astype(ML_DTYPES[name]).view(np.uint8)
        assert np.array_equal(fmt.encode(x).numpy(), want)
        back = want.view(ML_DTYPES[name]).astype(np.float32)
        assert np.array_equal(fmt.decode(torch.from_numpy(want)).numpy(), back)


@pytest.mark.parametrize("fmt", EVERY + SPECIAL, ids=str)
def test_every_finite_code_round_trips(fmt: FloatFormat) -> None:
    values = fmt.decode(fmt.codes(), torch.float64)
    finite = values.isfinite()
    assert torch.equal(fmt.encode(values[finite]), fmt.codes()[finite])


def test_known_limits() -> None:
    known = {"e2m1": 6, "e3m0": 16, "e1m2": 3.5, "e3m2": 28, "e2m3": 7.5, "e4m3": 448, "e4m3none": 480, "e5m2": 57344,
             "e5m2none": 114688, "e3m4": 30, "int4": 7, "uint4": 15, "int8": 127}  # fmt: skip
    assert {name: parse_format(name).max for name in known} == known
    assert parse_format("e3m2").decode(parse_format("e3m2").codes()[:6]).tolist() == [
        0,
        0.0625,
        0.125,
        0.1875,
        0.25,
        0.3125,
    ]


def test_ties_of_a_format_without_mantissa_go_to_the_even_code() -> None:
    e3m0 = parse_format("e3m0")
    assert e3m0.round(torch.tensor([0.75, 3.0, 12.0])).tolist() == [0.5, 2.0, 8.0]


def test_nan_and_infinity() -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf])
    assert parse_format("e4m3").round(special)[0].isnan()
    assert parse_format("e4m3").round(special)[1:].tolist() == [448.0, -448.0]
    assert parse_format("e5m2").round(special)[1:].tolist() == [57344.0, -57344.0]
    assert parse_format("e3m2").round(special)[1:].tolist() == [28.0, -28.0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_integers(bits: int, signed: bool) -> None:
    fmt = IntFormat(bits, signed)
    low = -fmt.max if signed else 0.0
    x = torch.arange(-300, 300) / 2
    want = np.clip(np.round(x.numpy()), low, fmt.max)  # numpy rounds half to even
    assert np.array_equal(fmt.round(x).numpy(), want)
    assert int(fmt.encode(x).max()) < 2**bits


def test_names_parse_and_print_back() -> None:
    for fmt in EVERY + SPECIAL + [IntFormat(4), IntFormat(8, signed=False)]:
        assert parse_format(str(fmt)) == fmt
    assert fxquant.format("fp6") == fxquant.format("E3M2") == FloatFormat(3, 2, 3)


@pytest.mark.parametrize("name", ["e9m9", "e0m3", "float6", "int1", "int9", "", "e3m2x", "e3", "e4m4"])
def test_unknown_format_says_what_is_allowed(name: str) -> None:
    with pytest.raises(FormatError, match="expected e<E>m<M>"):
        parse_format(name)


def test_unknown_format_names_near_ones() -> None:
    with pytest.raises(FormatError, match=r"did you mean .*e3m2"):
        parse_format("e3m22")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"])
def test_every_fp32_input_equals_ml_dtypes(name: str) -> None:
    fmt, step = parse_format(name), 2**24
    for start in range(0, 2**32, step):
        bits = np.arange(start, start + step, dtype=np.uint64).astype(np.uint32)
        x = bits.view(np.float32)
        x = np.clip(x[np.isfinite(x)], -fmt.max, fmt.max)
        if not len(x):
            continue
        want = x.astype(ML_DTYPES[name]).view(np.uint8)
        assert np.array_equal(fmt.encode(torch.from_numpy(x)).numpy(), want), hex(start)


@pytest.mark.parametrize("values", ["-1,-0.123456789,0,1", "-1,-1180591620717411303424.5,0,1", "0.1234567890123,1"])
def test_a_table_is_written_as_the_values_it_has(values: str) -> None:
    spec = parse_spec(f"lut({values})/group8")
    assert parse_spec(str(spec)) == spec
