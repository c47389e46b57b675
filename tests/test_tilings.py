"""Tilings: for any places, every bit of every word is one bit of one code, and comes out where it was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bitops import cost, trace
from fxquant.decodings import decoding
from fxquant.errors import FormatError
from fxquant.formats import parse_format
from fxquant.layouts import Layout, Stream, reference_unpack
from fxquant.packing import pack, unpack
from fxquant.tilings import Tiling, tile


@st.composite
def places(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Some bits of a lane of 8 or 16, up to six of them; the search is slow with more."""
    lane = draw(st.sampled_from([8, 16]))
    found = draw(st.lists(st.integers(0, lane - 1), min_size=1, max_size=6, unique=True))
    return tuple(found), lane


@settings(max_examples=40, deadline=None)
@given(where=places(), wrap=st.booleans())
def test_every_bit_is_one_bit_of_one_code(where: tuple[tuple[int, ...], int], wrap: bool) -> None:
    at, lane = where
    tiling = tile(at, lane, wrap=wrap)
    bits = 32 if wrap else lane  # without wrapping, words of one lane
    words, decode = tiling.decode(bits)
    seen = []
    for expr in decode:
        for i, bit in enumerate(trace(expr)):
            assert (bit is not None) == (i % lane in at)
            seen += [bit] if bit else []
    assert len(set(seen)) == len(seen)
    assert set(seen) == {(w.name, i) for w in words for i in range(bits)}


@settings(max_examples=40, deadline=None)
@given(where=places(), wrap=st.booleans(), seed=st.integers(0, 9))
def test_layouts_of_tilings_pack(where: tuple[tuple[int, ...], int], wrap: bool, seed: int) -> None:
    """The derived packer, whatever it folds, writes what the expressions read."""
    at, lane = where
    bits = 32 if wrap else lane
    words, decode = tile(at, lane, wrap=wrap).decode(bits)
    cols = f"g{len(decode)} r4 j{bits // lane}"
    layout = Layout(
        f"tiling_{at}_{lane}_{wrap}", len(at), decode, (Stream(words, "w r"),), cols=cols, slots="g j",
        units="r", lanes=tuple(range(0, bits, lane)), field=at,
    )  # fmt: skip
    shape = (3, 2 * layout.tile[1] - 1)
    codes = torch.randint(0, 2 ** len(at), shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, layout)
    assert (reference_unpack(packed.numpy(), layout, shape) == codes.numpy()).all()
    assert torch.equal(unpack(packed, layout, shape), codes)


def operations(tiling: Tiling) -> int:
    """Masks and merges, and different shifts."""
    pieces = [piece for group in tiling.groups for piece in group]
    return len(pieces) + len({(piece.word, piece.by) for piece in pieces if piece.by})


def test_the_picture_of_the_module() -> None:
    """FP6 as the high byte of a float16: of four groups in three words three lie in place, one in the gaps."""
    tiling = tile((0, 1, 2, 3, 4, 7), 8)
    assert (tiling.words, len(tiling.groups)) == (3, 4)
    assert [[(piece.by, piece.mask) for piece in group] for group in tiling.groups[:3]] == [[(0, 0b10011111)]] * 3
    assert {piece.mask for piece in tiling.groups[3]} == {0b10000001, 0b00011000, 0b00000110}


@pytest.mark.parametrize(
    ("name", "count"),
    {"e3m2": 9, "e2m3": 23, "e2m2": 19, "e3m1": 22, "e2m1": 5, "e3m0": 5, "int4": 7, "int8": 3, "e5m2": 1}.items(),
)
def test_formats_take_few_operations(name: str, count: int) -> None:
    layout = decoding(parse_format(name)).layout
    assert operations(tile(layout.places, 32 // len(layout.lanes))) <= count


def test_pieces_are_few() -> None:
    """Where one rotation tiles the word, a group is one mask; all bits of a lane are not even that."""
    for at, lane, masks in (((0, 1, 2, 3), 8, 2), ((8, 9, 10, 15), 16, 4), (tuple(range(8)), 8, 0)):
        _, decode = tile(at, lane).decode(32)
        assert cost(*decode).get("and", 0) == masks
        assert "or" not in cost(*decode)


def test_without_wrapping_lanes_stay_apart() -> None:
    for group in tile((0, 1, 2, 3, 4, 7), 8, wrap=False).decode(8)[1]:
        assert "rotl" not in cost(group)


@pytest.mark.parametrize(("at", "lane"), [((), 8), ((8,), 8), ((-1, 2), 8), ((1, 1), 8), ((16,), 16)])
def test_places_outside_the_lane(at: tuple[int, ...], lane: int) -> None:
    with pytest.raises(FormatError, match=f"are not different bits of a lane of {lane}"):
        tile(at, lane)
