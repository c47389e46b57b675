"""Packing round-trips, takes exactly the bytes it says, and lays bits as the module's picture shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import FormatError
from fxquant.packing import pack, packed_shape, unpack


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), cols=st.integers(1, 40), seed=st.integers(0, 9))
def test_unpack_inverts_pack(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert tuple(packed.shape) == packed_shape((rows, cols), bits)
    assert torch.equal(unpack(packed, bits, cols), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_a_multiple_of_8_takes_exactly_its_bits(bits: int) -> None:
    assert packed_shape((7, 576), bits) == (7, 576 * bits // 8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_lie_where_the_definition_says(bits: int) -> None:
    """Against bytes assembled bit by bit: plane after plane, low planes first, low columns in low bits."""
    cols = 11
    codes = np.random.default_rng(bits).integers(0, 2**bits, cols)
    stream: list[int] = []
    low = 0
    for width in [w for w in (4, 2, 1, 8) if bits & w]:
        plane = [code >> (low + b) & 1 for code in codes for b in range(width)]
        plane += [0] * (-len(plane) % 8)
        stream += [sum(bit << i for i, bit in enumerate(plane[at : at + 8])) for at in range(0, len(plane), 8)]
        low += width
    packed = pack(torch.tensor(codes, dtype=torch.uint8).reshape(1, -1), bits)
    assert packed[0].tolist() == stream


def test_fp6_splits_into_four_and_two_bits() -> None:
    """ZeroQuant(4+2): s e2 e1 e0 m1 m0 -> nibble e1 e0 m1 m0 and pair s e2."""
    codes = torch.tensor([[0b10_1101, 0b01_0010, 0b11_1111, 0b00_0000]], dtype=torch.uint8)
    assert pack(codes, 6)[0].tolist() == [0b0010_1101, 0b0000_1111, 0b00_11_01_10]


def test_non_contiguous_codes() -> None:
    codes = torch.randint(0, 64, (16, 12), dtype=torch.uint8).t()
    assert torch.equal(unpack(pack(codes, 6), 6, 16), codes)


def test_bad_input() -> None:
    with pytest.raises(FormatError, match="does not fit in 4 bits"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8), 4)
    with pytest.raises(FormatError, match="uint8 matrix"):
        pack(torch.zeros(3, dtype=torch.uint8), 4)
    with pytest.raises(FormatError, match="expected 1 to 8"):
        packed_shape((1, 1), 9)
    with pytest.raises(FormatError, match=r"takes uint8 \[rows, 3\]"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 6, 4)
