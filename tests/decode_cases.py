"""What decode proofs share: the decodings, words that hold every code in every slot, and what must come out.

A proof gets the words of units and gives the outputs of ``Decoding.outputs``, by whatever way it proves::

    codes [rows, block] --pack--> {word: [rows, run]} --proof--> outputs, each [rows, run] --columns--> numbers [rows, block]
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxquant.bitops import DTYPES, Expr, widen
from fxquant.codegen.triton_source import gemm
from fxquant.decodings import KERNEL_FORMATS, Decoding, decodes, decoding
from fxquant.formats import Format, parse_format
from fxquant.grids import FloatFormat
from fxquant.packing import pack

OTHERS = ("int2", "int3", "uint3", "int6", "e1m2", "e3m3", "e4m1", "e2m0", "e1m1", "e4m2")
FORMATS: tuple[Format, ...] = (*KERNEL_FORMATS, *(parse_format(name) for name in OTHERS))
TARGETS: tuple[FloatFormat | None, ...] = (None, FloatFormat(4, 3, 7, "fn"), FloatFormat(5, 2, 15, "ieee"))
Words = dict[str, NDArray[Any]]

CASES = [(f, target) for f in FORMATS for target in TARGETS if decodes(f, target) is None]
IDS = [f"{f}-{target or 'float16'}" for f, target in CASES]
DECODINGS = [decoding(f, target) for f, target in CASES]
HALVES = [d for d in DECODINGS if d.target is None]


def good_codes(d: Decoding) -> torch.Tensor:
    """Codes that a kernel takes."""
    return torch.tensor([c for c in range(2**d.format.bits) if c not in d.left_out], dtype=torch.uint8)


@cache
def all_codes(d: Decoding, seed: int = 0) -> torch.Tensor:
    """``[rows, block]``: each column has every code, all columns in orders of their own."""
    good = good_codes(d)
    rng = torch.Generator().manual_seed(seed)
    least = max(1, 64 // len(good))  # two codes alone would leave many pairs of slots untried
    columns = [good.repeat(least)[torch.randperm(len(good) * least, generator=rng)] for _ in range(d.block)]
    return torch.stack(columns, 1)


def packed(d: Decoding, codes: torch.Tensor) -> torch.Tensor:
    """The bytes of ``codes``."""
    return pack(d.codes(codes), d.layout)


def words_of(d: Decoding, codes: torch.Tensor) -> Words:
    """Every word of one tile a row: ``{name: [rows, run]}``, in the size of the word."""
    dtype: Any = DTYPES[d.words[0].bits]
    raw = packed(d, codes).numpy().view(dtype).reshape(len(codes), len(d.words), d.run)
    return {word.name: np.ascontiguousarray(raw[:, i]) for i, word in enumerate(d.words)}


def wide(d: Decoding, words: Mapping[str, NDArray[Any]]) -> Words:
    """Words of 32 bits: as they are, or four neighbouring ones of a byte."""
    return {name: np.ascontiguousarray(x).view(np.uint32) for name, x in words.items()}


def wide_outputs(d: Decoding) -> tuple[Expr, ...]:
    """What is decoded, on words of 32 bits."""
    return d.outputs if d.target is None else tuple(widen(expr) for expr in d.outputs)


def numbers(d: Decoding, outputs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """``[rows, block]``: what is decoded, in the order of columns."""
    if d.target is None:  # registers of two: slice s, columns 2r and 2r + 1
        slices = [np.ascontiguousarray(x).view(np.float16).astype(np.float64) for x in outputs]
    else:
        raw = [torch.from_numpy(np.array(x).view(np.uint8)) for x in outputs]
        slices = [d.target.decode(x, torch.float64).numpy() for x in raw]
    return np.concatenate(slices, -1)


def expected(d: Decoding, codes: torch.Tensor) -> NDArray[np.float64]:
    """The values of ``codes`` as they stand in a kernel, without the power of two that the scale has."""
    return (d.format.table()[codes.long()] * 2.0**-d.log2).numpy()


def shipped_asm(d: Decoding) -> tuple[str, str]:
    """The assembly and its constraints, from the text of the module that is emitted."""
    text = gemm(d).text
    found = re.search(r'^ASM = tl.constexpr\(r"""\n(.*?)\n"""\)', text, re.DOTALL | re.MULTILINE)
    constraints = re.search(r'^ +"([=hr,]+)",$', text, re.MULTILINE)
    assert found
    assert constraints
    return found[1], constraints[1]


def registers_to_words(d: Decoding, results: Sequence[Any], like: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    """Results of the assembly as words: for float16 two of 16 bits make one, the low half first."""
    whole = [np.broadcast_to(np.asarray(x, np.uint32), like.shape) for x in results]
    if d.target is None:
        return [low | high << np.uint32(16) for low, high in zip(whole[::2], whole[1::2], strict=True)]
    return whole
