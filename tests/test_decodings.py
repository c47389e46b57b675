"""Decodings: the value equation for every code, which codes are left out, blocks that fit, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from decode_cases import DECODINGS, IDS, TARGETS

from fxquant.decodings import KERNEL_FORMATS, SMALLEST_SLICE, WASTE, Decoding, decodes, decoding
from fxquant.errors import FormatError
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat, IntFormat
from fxquant.packing import pack, unpack

E4M3, E5M2 = (target for target in TARGETS if target)
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def target_values(d: Decoding) -> torch.Tensor:
    """What torch reads from the pattern of each recoded code, float64."""
    lane = 8 if d.target or len(d.layout.lanes) == 4 else 16
    patterns = torch.tensor([sum((code >> i & 1) << at for i, at in enumerate(d.layout.places)) for code in d.recode])
    if d.target is not None:
        return patterns.to(torch.uint8).view(TORCH[d.target]).double()
    return (patterns << 16 - lane).to(torch.int32).to(torch.uint16).view(torch.float16).double()


@pytest.mark.parametrize("d", DECODINGS, ids=IDS)
def test_the_value_of_every_code(d: Decoding) -> None:
    """value(code) = target(pattern) * 2^log2, for all codes that are not left out, and for no others."""
    holds = target_values(d) * math.ldexp(1.0, d.log2) == d.format.table()
    taken = torch.ones(2**d.format.bits, dtype=torch.bool)
    taken[list(d.left_out)] = False
    assert bool(holds[taken].all())


@pytest.mark.parametrize("d", DECODINGS, ids=IDS)
def test_what_is_left_out(d: Decoding) -> None:
    """NaN and infinity, and the most negative integer; nothing else."""
    table = d.format.table()
    want = (~table.isfinite()).nonzero().flatten().tolist()
    if isinstance(d.format, IntFormat) and d.format.signed:
        want = [int(table.argmin())]
    assert list(d.left_out) == want


@pytest.mark.parametrize("d", DECODINGS, ids=IDS)
def test_recoding_loses_nothing(d: Decoding) -> None:
    taken = [c for c in range(2**d.format.bits) if c not in d.left_out]
    assert len({d.recode[c] for c in taken}) == len(taken)
    codes = torch.tensor(taken, dtype=torch.uint8)
    assert d.codes(codes).tolist() == [d.recode[c] for c in taken]


@pytest.mark.parametrize("d", DECODINGS, ids=IDS)
def test_packed_codes_come_back(d: Decoding) -> None:
    shape = (5, 2 * d.block + 3)
    codes = torch.randint(0, 2**d.format.bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, d.layout), d.layout, shape), codes)
    assert d.layout.packed_shape((1, d.block))[1] * 8 == d.block * d.format.bits


def test_a_code_without_a_value_is_refused() -> None:
    d = decoding(parse_format("int4"))
    with pytest.raises(FormatError, match="kernels do not take code 0x8 of int4"):
        d.codes(torch.tensor([[1, 8]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("nf4", None, "a table of values; only floats and integers are decoded by shifts"),
        ("e6m1", None, "more exponent bits than float16"),
        ("e5m1", None, "code 0x3e of e5m1, 65536, is not a float16 shifted"),
        ("e2m1b1.5", None, "an exponent bias of 1.5; a shift of bits takes a whole one"),
        ("e4m3", E5M2, "e4m3 has more mantissa bits than e5m2, 2"),
        ("e5m2", E4M3, "e5m2 has more exponent bits than e4m3"),
        ("int8", E4M3, "code 0x11 of int8, 17, is not a e4m3 shifted"),
        ("uint4", E5M2, "code 0x9 of uint4, 9, is not a e5m2 shifted"),
    ],
)
def test_formats_with_no_decoding(name: str, target: FloatFormat | None, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        decoding(parse_format(name), target)
    found = decodes(parse_format(name), target)
    assert found is not None
    assert why in found


def test_kernel_formats_decode_to_float16() -> None:
    assert [decodes(f) for f in KERNEL_FORMATS] == [None] * len(KERNEL_FORMATS)


@pytest.mark.parametrize("name", ["e3m2", "e2m1", "e2m2", "int8"])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 80, 96, 128, 256])
def test_slices_fit_groups(name: str, group: int) -> None:
    """Whole slices make a group, as wide as they can be: a multiple of the 16 columns that a dot takes."""
    d = decoding(parse_format(name), group=group)
    assert group % d.width == 0
    assert d.width % 16 == 0
    wider = 2 * d.width
    assert group % wider or wider > decoding(parse_format(name)).width


@pytest.mark.parametrize("name", ["e3m2", "e2m1", "e2m2", "int8"])
@pytest.mark.parametrize("cols", [16, 64, 100, 576, 1536, 4096])
def test_blocks_fit_columns(name: str, cols: int) -> None:
    """A row is at most a sixteenth longer than in the smallest blocks; the usual ones are kept where those fit."""
    usual, d = decoding(parse_format(name)), decoding(parse_format(name), cols=cols)
    smallest = usual.block // usual.run * SMALLEST_SLICE[True]
    assert -(-cols // d.block) * d.block <= -(-cols // smallest) * smallest * (1 + WASTE)
    if cols % usual.block == 0:
        assert d is usual
