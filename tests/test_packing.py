"""Packing round-trips, takes exactly the bytes it says, and lays bits as the pictures of the layouts show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.bitops import word
from fxquant.decodings import decoding
from fxquant.errors import FormatError
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat
from fxquant.layouts import LAYOUTS, Block, Layout, Stream, reference_unpack
from fxquant.packing import pack, packed_shape, planar, unpack

PLAIN = [name for name, row in LAYOUTS.items() if isinstance(row, Layout)]
BLOCKS = [name for name, row in LAYOUTS.items() if isinstance(row, Block)]
SHAPES = st.tuples(st.integers(0, 70), st.one_of(st.integers(0, 70), st.integers(120, 300)))


def random_codes(bits: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def row_of(name: str) -> Layout:
    row = LAYOUTS[name]
    assert isinstance(row, Layout)
    return row


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(PLAIN), shape=SHAPES, seed=st.integers(0, 9))
def test_unpack_inverts_pack(name: str, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(row_of(name).bits, shape, seed)
    packed = pack(codes, name)
    assert tuple(packed.shape) == packed_shape(shape, name)
    assert torch.equal(unpack(packed, name, shape), codes)
    if row_of(name).tile[0] == 1:
        assert torch.equal(unpack(packed, row_of(name), shape[1]), codes)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(BLOCKS), shape=SHAPES, seed=st.integers(0, 9))
def test_blocks_keep_codes_and_scales(name: str, shape: tuple[int, int], seed: int) -> None:
    block = LAYOUTS[name]
    assert isinstance(block, Block)
    codes = random_codes(block.codes.bits, shape, seed)
    scales = random_codes(8, (shape[0], block.groups(shape[1])), seed + 1)
    packed = pack(codes, name, scales=scales)
    assert tuple(packed.shape) == packed_shape(shape, name)
    again = unpack(packed, block, shape[1])
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(PLAIN), shape=SHAPES, seed=st.integers(0, 9))
def test_the_derived_packer_inverts_the_decode_expressions(name: str, shape: tuple[int, int], seed: int) -> None:
    """The numpy reference, which evaluates the expressions themselves, reads what the torch packer wrote."""
    codes = random_codes(row_of(name).bits, shape, seed)
    assert np.array_equal(reference_unpack(pack(codes, name).numpy(), row_of(name), shape), codes.numpy())


@pytest.mark.parametrize("name", PLAIN)
def test_all_codes_in_all_slots(name: str) -> None:
    """Tile after tile, so that each slot holds each code once, all others of the tile being other codes."""
    layout = row_of(name)
    high, wide = layout.tile
    slots = torch.arange(high * wide).reshape(high, 1, wide)
    codes = ((slots + torch.arange(2**layout.bits).reshape(1, -1, 1)) % 2**layout.bits).to(torch.uint8)
    codes = codes.reshape(high, -1)
    packed = pack(codes, layout)
    assert np.array_equal(reference_unpack(packed.numpy(), layout, tuple(codes.shape)), codes.numpy())
    assert torch.equal(unpack(packed, layout, (codes.shape[0], codes.shape[1])), codes)


@pytest.mark.parametrize("name", [*PLAIN, *BLOCKS])
def test_whole_tiles_take_exactly_their_bits(name: str) -> None:
    row = LAYOUTS[name]
    rows, cols = packed_shape((128, 768), name)
    if isinstance(row, Block):
        assert rows * cols == 128 * 768 * row.codes.bits // 8 + 128 * row.groups(768)
    else:
        assert rows * cols == 128 * 768 * row.bits // 8


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), shape=SHAPES)
def test_ragged_rows_are_filled_to_bytes_or_to_tiles(bits: int, shape: tuple[int, int]) -> None:
    rows, cols = shape
    assert packed_shape(shape, f"bits{bits}") == (rows, -(-cols * bits // 8))
    planes = [width for width in (1, 2, 4, 8) if bits & width]
    assert packed_shape(shape, planar(bits)) == (rows, sum(-(-cols * width // 8) for width in planes))
    assert packed_shape(shape, "split42") == (rows, -(-cols // 256) * 192)
    assert packed_shape(shape, "split42r8") == (rows, -(-cols // 128) * 96)
    assert packed_shape(shape, "tc") == (-(-rows // 64) * 64, -(-cols // 64) * 48)
    assert packed_shape(shape, "nvfp4") == (rows, -(-cols // 16) * 9)


@pytest.mark.parametrize("name", [*PLAIN, *BLOCKS])
def test_padding_is_zero(name: str) -> None:
    """The packed bytes of ragged codes are those of the codes with zero columns and rows after them."""
    row = LAYOUTS[name]
    codes = random_codes(row.codes.bits if isinstance(row, Block) else row.bits, (3, 71))
    wide = torch.nn.functional.pad(codes, (0, 512 - 71, 0, 61))
    if isinstance(row, Block):
        scales = random_codes(8, (3, row.groups(71)))
        extra = torch.nn.functional.pad(scales, (0, row.groups(512) - row.groups(71), 0, 61))
        assert torch.equal(
            pack(codes, name, scales=scales), pack(wide, name, scales=extra)[:3, : packed_shape((3, 71), name)[1]]
        )
        return
    ragged, full = pack(codes, name), pack(wide, name)
    assert torch.equal(unpack(full, row, (64, 512))[:3, :71], codes)
    assert int(np.unpackbits(ragged.numpy()).sum()) == int(np.unpackbits(full.numpy()).sum())


# --- planar: the bytes of saved models -------------------------------------------------------------------------------
@pytest.mark.parametrize("cols", [11, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_planar_bits_lie_where_the_definition_says(bits: int, cols: int) -> None:
    """Against bytes assembled bit by bit: plane after plane, low planes first, low columns in low bits."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, cols)
    stream: list[int] = []
    low = 0
    for width in [w for w in (4, 2, 1, 8) if bits & w]:
        plane = [code >> (low + b) & 1 for code in codes for b in range(width)]
        stream += as_bytes(plane)
        low += width
    packed = pack(torch.tensor(codes, dtype=torch.uint8).reshape(1, -1), planar(bits))
    assert packed[0].tolist() == stream


def as_bytes(bits: list[int]) -> list[int]:
    bits = bits + [0] * (-len(bits) % 8)
    return [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


def test_fp6_splits_into_four_and_two_bits() -> None:
    """ZeroQuant(4+2): s e2 e1 e0 m1 m0 -> nibble e1 e0 m1 m0 and pair s e2."""
    codes = torch.tensor([[0b10_1101, 0b01_0010, 0b11_1111, 0b00_0000]], dtype=torch.uint8)
    assert pack(codes, "planar6")[0].tolist() == [0b0010_1101, 0b0000_1111, 0b00_11_01_10]


# --- the other layouts, each against its definition ------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_is_a_little_endian_integer(bits: int) -> None:
    codes = random_codes(bits, (1, 23))
    number = sum(int(code) << bits * k for k, code in enumerate(codes[0]))
    assert bytes(pack(codes, f"bits{bits}")[0].tolist()) == number.to_bytes(-(-23 * bits // 8), "little")


def test_four_fp6_codes_in_three_bytes() -> None:
    """byte 0 = c1 c1 c0*6, byte 1 = c2*4 c1*4, byte 2 = c3*6 c2 c2 (amd-quark 0.10, Pack_fp6)."""
    c = [0b101101, 0b010010, 0b111010, 0b000111]
    want = [(c[1] & 3) << 6 | c[0], (c[2] & 15) << 4 | c[1] >> 2, c[3] << 2 | c[2] >> 4]
    assert pack(torch.tensor([c], dtype=torch.uint8), "bits6")[0].tolist() == want


@pytest.mark.parametrize(("name", "triples"), [("split42", 16), ("split42r8", 8)])
def test_split42_words_decode_as_a_kernel_reads_them(name: str, triples: int) -> None:
    """W4 int32 [block][2][R], W2 int32 [block][R]: pair p of row r of all triples is columns p*2R + 2r + {0, 1}."""
    rows, cols, block = 3, 512, 16 * triples
    codes = random_codes(6, (rows, cols)).numpy()
    packed = pack(torch.from_numpy(codes), name).numpy()
    w4 = packed[:, : cols // 2].copy().view("<u4").reshape(rows, cols // block, 2, triples).astype(object)
    w2 = packed[:, cols // 2 :].copy().view("<u4").reshape(rows, cols // block, triples).astype(object)
    for g in range(4):
        rotated = (w2 << 2 * g | w2 >> 32 - 2 * g) & 0xFFFFFFFF
        t = (w4[:, :, g // 2] >> 4 * (g % 2)) & 0x0F0F0F0F | rotated & 0x90909090
        for q in range(2):  # bytes 0 and 2 (q = 0), 1 and 3 are two halves of a register: float16 high bytes
            for j in range(2):
                byte = t >> 8 * (2 * j + q) & 0xFF
                code = byte >> 2 & 0x20 | byte & 0x1F
                at = (2 * g + q) * 2 * triples + j
                columns = [k * block + at + 2 * r for k in range(cols // block) for r in range(triples)]
                assert (code.reshape(rows, -1) == codes[:, columns]).all(), (g, q, j)


def prepack_fp6_llm(codes: np.ndarray) -> list[int]:
    """FP6-LLM's weight_prepacking.h, loop by loop: thread streams of segments, byte-reversed words, then interleave."""
    m, k = codes.shape
    twos: list[list[int]] = [[] for _ in range(32)]  # a thread's 2-bit segments in order
    fours: list[list[int]] = [[] for _ in range(32)]
    for i in range(m // 64):
        for j in range(k // 16):
            for part in range(4):
                for line in range(8):
                    for t in range(4):
                        r, c = 64 * i + 16 * part + line, 16 * j + 2 * t
                        for dr, dc in ((0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)):
                            code = int(codes[r + dr, c + dc])
                            twos[4 * line + t].append(code >> 4)
                            fours[4 * line + t].append(code & 15)
    order2 = (2, 6, 10, 14, 4, 8, 12, 16, 1, 5, 9, 13, 3, 7, 11, 15)
    order4 = (2, 6, 4, 8, 1, 5, 3, 7)
    return words_of(twos, 2, order2) + words_of(fours, 4, order4)


def words_of(threads: list[list[int]], width: int, order: tuple[int, ...]) -> list[int]:
    """Bytes of all words: word i of thread t at 128 i + 4 t; fields MSB first; field n of a word was field order[n]."""
    per_word = 32 // width
    out: list[int] = []
    for i in range(len(threads[0]) // per_word):
        for fields in (thread[i * per_word : (i + 1) * per_word] for thread in threads):
            per_byte = 8 // width
            raw = [0] * 4
            for n, field in enumerate(fields):  # the first segment in the high bits of byte 0, stored at offset 3
                raw[3 - n // per_byte] |= field << 8 - width * (n % per_byte + 1)
            number = int.from_bytes(bytes(raw), "little")
            old = [number >> 32 - width * (n + 1) & 2**width - 1 for n in range(per_word)]
            mixed = 0
            for n in order:
                mixed = mixed << width | old[n - 1]
            out += mixed.to_bytes(4, "little")
    return out


@pytest.mark.parametrize("shape", [(64, 64), (128, 192)])
def test_tc_is_the_order_of_fp6_llm(shape: tuple[int, int]) -> None:
    codes = random_codes(6, shape)
    assert pack(codes, "tc").reshape(-1).tolist() == prepack_fp6_llm(codes.numpy())


def test_mxfp4_is_the_block_of_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    codes, scales = random_codes(4, (5, 96)), torch.randint(110, 140, (5, 3), dtype=torch.uint8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.long()]
    want = values.reshape(5, 3, 32) * torch.exp2(scales.float() - 127).reshape(5, 3, 1)
    packed = pack(codes, "mxfp4", scales=scales).numpy().reshape(15, 17)
    assert np.array_equal(quants.MXFP4.dequantize_blocks(packed).reshape(5, 96), want.reshape(5, 96).numpy())


@pytest.mark.parametrize("name", ["mxfp6", "mxfp8", "nvfp4"])
def test_a_block_is_its_scale_then_its_codes(name: str) -> None:
    block = LAYOUTS[name]
    assert isinstance(block, Block)
    codes, scales = random_codes(block.codes.bits, (2, 2 * block.size)), random_codes(8, (2, 2))
    packed = pack(codes, name, scales=scales).reshape(4, block.nbytes)
    assert torch.equal(packed[:, 0], scales.reshape(-1))
    assert torch.equal(packed[:, 1:], pack(codes.reshape(4, -1), f"bits{block.codes.bits}"))


# --- inputs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLAIN)
def test_non_contiguous_and_misaligned(name: str) -> None:
    codes = random_codes(row_of(name).bits, (131, 67))
    for view in (codes.t(), codes[:, 3:], codes[1:, ::2], codes.reshape(-1)[1:8193].view(64, 128)):
        shape = (view.shape[0], view.shape[1])
        packed = pack(view, name)
        assert torch.equal(packed, pack(view.clone(memory_format=torch.contiguous_format), name))
        moved = torch.cat([torch.zeros(packed.shape[0], 3, dtype=torch.uint8), packed], dim=1)[:, 3:]
        assert torch.equal(unpack(moved, name, shape), view)


def test_inputs_are_not_changed_and_results_not_shared() -> None:
    codes = random_codes(8, (4, 16))
    for name in ("planar8", "bits8"):
        packed = pack(codes, name)
        again = unpack(packed, name, (4, 16))
        packed.zero_()
        assert torch.equal(again, codes)


def test_more_codes_than_one_step() -> None:
    codes = random_codes(6, (300, 16384))
    for name in ("planar6", "split42"):
        assert torch.equal(unpack(pack(codes, name), name, (300, 16384)), codes)


def check_layout(layout: Layout, rows: int = 3) -> None:
    """All codes in all slots go through pack, the reference and unpack."""
    shape = (rows, 2**layout.bits * layout.tile[1])
    codes = ((torch.arange(shape[1]) // layout.tile[1] + torch.arange(shape[1])) % 2**layout.bits).to(torch.uint8)
    codes = (codes + torch.arange(rows, dtype=torch.uint8)[:, None]) % 2**layout.bits
    packed = pack(codes, layout)
    assert np.array_equal(reference_unpack(packed.numpy(), layout, shape), codes.numpy())
    assert torch.equal(unpack(packed, layout, shape), codes)


def test_folds_keep_bits_that_would_fall_out() -> None:
    """E2M1 for E4M3: four runs at equal distances, of which a fold would shift the lowest out of the word."""
    target = parse_format("e4m3")
    assert isinstance(target, FloatFormat)
    check_layout(decoding(parse_format("e2m1"), target).layout)


def test_units_whose_last_axes_are_not_four_codes() -> None:
    """16 slots ``g8 j2``: a source is the two codes of ``j``, for eight and two do not make four."""
    words = (word("q0", 32), word("q1", 32))
    decode = tuple((w >> 4 * i) & 0x000F000F for w in words for i in range(4))
    layout = Layout(
        "g8j2", 4, decode, (Stream(words, "w r"),), cols="g8 r4 j2", slots="g j", units="r", lanes=(0, 16)
    )  # fmt: skip
    check_layout(layout)


def test_bad_input() -> None:
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(FormatError, match="code 16 does not fit in 4 bits"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8), "planar4")
    with pytest.raises(FormatError, match="does not fit in 6 bits"):
        pack(torch.full((1, 2), 64, dtype=torch.uint8), "tc")
    with pytest.raises(FormatError, match="uint8 matrix"):
        pack(torch.zeros(3, dtype=torch.uint8), "planar4")
    with pytest.raises(FormatError, match="uint8 matrix"):
        pack(torch.zeros(3, 3), "planar4")
    with pytest.raises(FormatError, match="expected 1 to 8"):
        planar(9)
    with pytest.raises(FormatError, match=r"takes uint8 \[rows, 3\]"):
        unpack(codes, "planar6", 4)
    with pytest.raises(FormatError, match=r"takes uint8 \[64, 48\]"):
        unpack(codes, "tc", (1, 4))
    with pytest.raises(FormatError, match=r"unknown layout 'split24' \(did you mean 'split42'"):
        packed_shape((1, 1), "split24")


def test_scales_go_with_blocks_only() -> None:
    codes = torch.zeros(2, 33, dtype=torch.uint8)
    with pytest.raises(FormatError, match="has no place for scales"):
        pack(codes, "planar4", scales=codes)
    for scales in (None, torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(2, 2)):
        with pytest.raises(FormatError, match=r"takes scales, uint8 \(2, 2\)"):
            pack(codes, "mxfp4", scales=scales)
