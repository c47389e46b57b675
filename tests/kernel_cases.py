"""Cases for the weight-only kernels: operands, guarded, and the result in float64.

On integer data (``Case.exact``) every sum is a multiple of a step and below 2^24 steps, so float32 holds it whatever
the order of summation: the result must be equal, not close. On random data ``bound`` says how far it may be off.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant.codegen.triton_source import Source, gemm
from fxquant.decodings import Decoding, decoding
from fxquant.formats import parse_format
from fxquant.grids import FloatFormat, IntFormat
from fxquant.packing import pack

GUARD = 24
"""Elements around every tensor."""
ACTIVATIONS = {
    "none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


X = {"": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""What x is -> its dtype."""


@dataclass(frozen=True)
class Case:
    """One call of ``gemm`` (and ``reduce`` where ``splits`` > 1)."""

    format: str
    M: int
    N: int
    K: int
    x: str = ""
    """The byte float that x is, and w becomes; else x is float16."""
    group: int = 0
    fit: bool = False
    """Whether blocks are chosen for K."""
    splits: int = 1
    swap: bool = False
    zero: bool = False
    row_scale: bool = False
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    rank: int = 0
    out: torch.dtype = torch.float32
    exact: bool = True
    asm: bool = False
    BM: int = 16
    BN: int = 64
    gap: int = 0
    """Elements between the rows of x, residual and out."""
    seed: int = 0

    @cached_property
    def decoding(self) -> Decoding:
        least = 32 if self.x else 16  # columns that a dot takes at least: groups are filled up to them
        target = parse_format(self.x) if self.x else None
        assert target is None or isinstance(target, FloatFormat)
        group = -(-self.group // least) * least
        cols = (self.groups * group if group else self.K) if self.fit else 0
        return decoding(parse_format(self.format), target, group=group, cols=cols)

    @property
    def padded(self) -> int:
        """Columns that a group takes in w."""
        width = self.decoding.width
        return -(-self.group // width) * width

    @property
    def groups(self) -> int:
        return -(-self.K // self.group) if self.group else 1

    @property
    def even(self) -> bool:
        """Whether x is read with no mask: no column of a block is beyond K, and groups are not filled up."""
        return self.K % self.decoding.block == 0 and self.padded == self.group

    @property
    def every(self) -> int:
        """Slices after which a sum is scaled: as many as divide a group."""
        return self.decoding.every(self.padded)


@cache
def load(source: Source) -> ModuleType:
    """An emitted module, written to a file and imported."""
    path = Path(tempfile.mkdtemp()) / f"{source.name}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels(d: Decoding) -> ModuleType:
    return load(gemm(d))


# --- guards ----------------------------------------------------------------------------------------------------------
@dataclass
class Guarded:
    """A tensor inside a longer buffer, whose other elements are NaN, or a pattern where there is no NaN."""

    view: Tensor
    buffer: Tensor = field(repr=False)

    def untouched(self) -> bool:
        """Whether no element outside the view has changed."""
        inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        fresh = torch.full_like(self.buffer, _fill(self.buffer.dtype))
        return torch.equal(_raw(self.buffer)[~inside], _raw(fresh)[~inside])


def guarded(x: Tensor, gap: int = 0) -> Guarded:
    """``x``, its rows ``gap`` elements apart, with GUARD elements before and after; 16-byte aligned like ``x``."""
    rows, cols = (math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else (1, 1)
    if gap:
        assert x.dim() == 2
        shape, strides = x.shape, (cols + gap, 1)
    else:
        shape, strides = x.shape, x.stride()
    buffer = torch.full((2 * GUARD + rows * (cols + gap),), _fill(x.dtype), dtype=x.dtype)
    view = buffer.as_strided(shape, strides, GUARD)
    view.copy_(x)
    return Guarded(view, buffer)


def _fill(dtype: torch.dtype) -> Any:
    return float("nan") if dtype.is_floating_point else 0x55


def _raw(x: Tensor) -> Tensor:
    """The bits, for NaN is not equal to itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


# --- operands --------------------------------------------------------------------------------------------------------
@dataclass
class Operands:
    """What a kernel gets, all guarded, and in float64 what it computes with: ``weight`` [N, K] is dequantized."""

    x: Guarded
    w: Guarded
    scale: Guarded
    zero: Guarded
    row_scale: Guarded
    bias: Guarded
    residual: Guarded
    thin: Guarded
    wide: Guarded
    out: Guarded
    partial: Guarded
    weight: Tensor
    blocks: int

    @property
    def inputs(self) -> list[Guarded]:
        names = ("x", "w", "scale", "zero", "row_scale", "bias", "residual", "thin", "wide")
        return [getattr(self, name) for name in names]


def operands(case: Case) -> Operands:
    """Random operands: small integers and powers of two where the case is exact, else normally distributed."""
    rng = torch.Generator().manual_seed(case.seed)
    d, M, N, K = case.decoding, case.M, case.N, case.K

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(-high, high + 1, shape, generator=rng).float()

    def numbers(*shape: int, high: int = 4) -> Tensor:
        return integers(high, *shape) if case.exact else torch.randn(*shape, generator=rng)

    def factors(*shape: int) -> Tensor:
        return 2.0 ** integers(1, *shape) if case.exact else torch.rand(*shape, generator=rng) + 0.5

    codes, values = _codes(case, rng)
    scale = factors(case.groups, N)
    zero = torch.randint(0, 2**d.format.bits, (case.groups, N), generator=rng).float() if case.zero else None
    of = torch.arange(K) // (case.group or K)
    shifted = values - zero.double()[of].T if zero is not None else values
    packed = pack(d.codes(_filled(case, codes)), d.layout)
    packed = packed if case.x else packed.view(torch.int32)
    unused = torch.zeros(1)
    thin = torch.bfloat16 if case.out == torch.bfloat16 else torch.float16
    return Operands(
        x=guarded(numbers(M, K).to(X[case.x]), case.gap),
        w=guarded(packed),
        scale=guarded(scale * 2.0**d.log2),
        zero=guarded((zero * 2.0**-d.log2).half() if zero is not None else unused),
        row_scale=guarded(factors(M) if case.row_scale else unused),
        bias=guarded(numbers(N).to(case.out) if case.bias else unused),
        residual=guarded(numbers(M, N).to(case.out), case.gap) if case.residual else guarded(unused),
        thin=guarded(numbers(M, case.rank, high=2).to(thin) if case.rank else unused),
        wide=guarded(numbers(N, case.rank, high=2).to(thin) if case.rank else unused),
        out=guarded(torch.full((M, N), 7.0, dtype=case.out), case.gap),
        partial=guarded(torch.full((case.splits, M, N), 7.0)),
        weight=shifted * scale.double()[of].T,
        blocks=packed.shape[1] // (len(d.words) * d.run),
    )


STEP, MOST = 2.0**-4, 28.0
"""Weights of exact cases are multiples of STEP, at most MOST (integers: all there are)."""


def _codes(case: Case, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and their values, float64."""
    d = case.decoding
    table = d.format.table()
    good = [c for c in range(2**d.format.bits) if c not in d.left_out]
    if case.exact and not isinstance(d.format, IntFormat):
        good = [c for c in good if float(table[c]) % STEP == 0 and abs(float(table[c])) <= MOST]
    codes = torch.tensor(good, dtype=torch.uint8)[torch.randint(0, len(good), (case.N, case.K), generator=rng)]
    return codes, table[codes.long()]


def _filled(case: Case, codes: Tensor) -> Tensor:
    """``[N, groups * padded]``: every group filled up, with a code that is not 0, since x is 0 there."""
    if not case.group:
        return codes
    whole = torch.full((case.N, case.groups, case.padded), 1, dtype=torch.uint8)
    for g in range(case.groups):
        part = codes[:, g * case.group : (g + 1) * case.group]
        whole[:, g, : part.shape[1]] = part
    return whole.reshape(case.N, -1)


# --- results ---------------------------------------------------------------------------------------------------------
def wanted(case: Case, o: Operands) -> Tensor:
    """``activation(x W^T * row_scale + thin wide^T + bias) + residual`` in float64, not rounded."""
    y = o.x.view.double() @ o.weight.T
    if case.row_scale:
        y = y * o.row_scale.view.double()[:, None]
    if case.rank:
        y = y + o.thin.view.double() @ o.wide.view.double().T
    if case.bias:
        y = y + o.bias.view.double()
    y = ACTIVATIONS[case.activation](y)
    return y + o.residual.view.double() if case.residual else y


def steps(case: Case, o: Operands) -> float:
    """The largest sum there can be, in units of the smallest step: below 2^24, float32 has it exactly."""
    smallest = STEP if not isinstance(case.decoding.format, IntFormat) else 1.0
    smallest *= 0.5 * (0.5 if case.row_scale else 1.0)  # factors are 1/2, 1 and 2
    most = (o.x.view.double().abs() @ o.weight.abs().T).max() + case.rank * 4
    return float((most * 2 + 8) / smallest)


UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a step of a number in [1, 2)."""
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
SLOPE = {"none": 1.0, "relu": 1.0, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}
"""The steepest slope of an activation (rounded up): by how much it widens an error."""


def bound(case: Case, o: Operands) -> Tensor:
    """How far each number may be from ``wanted``.

    A sum of n terms in float32, in any order: n u sum|terms| (Higham, Accuracy and Stability, section 4.2), with the
    scale, row scale, bias and residual a few more roundings. Then the slope of the activation and its own error, 16 u
    of its argument; last, rounding to the dtype of the result.
    """
    u = UNIT[torch.float32]
    terms = o.x.view.double().abs() @ o.weight.abs().T
    if case.row_scale:
        terms = terms * o.row_scale.view.double()[:, None]
    if case.rank:
        terms = terms + o.thin.view.double().abs() @ o.wide.view.double().abs().T
    if case.bias:
        terms = terms + o.bias.view.double().abs()
    count = case.K + case.rank + case.groups + case.splits + 8
    error = SLOPE[case.activation] * count * u * terms
    if case.activation not in ("none", "relu"):
        error = error + 16 * u * terms
    result = wanted(case, o).abs()
    if case.residual:
        error = error + u * (result + o.residual.view.double().abs())
    return error + UNIT[case.out] * (result + error) + TINY[case.out]


def launch(case: Case, o: Operands) -> None:
    """Run ``gemm`` and, where it is split, ``reduce``; the result is in ``o.out``."""
    d, module = case.decoding, kernels(case.decoding)
    grid = (-(-case.N // case.BN), -(-case.M // case.BM), case.splits)
    to = o.out.view if case.splits == 1 else o.partial.view
    more = [t.view for t in (o.row_scale, o.bias, o.residual, o.thin, o.wide)]
    strides = o.residual.view.stride(0), o.out.view.stride(0)
    finish: dict[str, Any] = {
        "ROW_SCALE": case.row_scale, "BIAS": case.bias, "ACTIVATION": case.activation, "RESIDUAL": case.residual,
        "RANK": case.rank, "BM": case.BM, "BN": case.BN, "SPLITS": case.splits,
    }  # fmt: skip
    module.gemm[grid](
        o.x.view, o.w.view, o.scale.view, o.zero.view, *more, to,
        case.M, case.N, case.K, o.blocks, o.x.view.stride(0), *strides,
        RUN=d.run, EVERY=case.every, GROUP=case.group, PADDED=case.padded,
        EVEN=case.even, SWAP=case.swap, ZERO=case.zero, USE_ASM=case.asm,
        **finish,
    )  # fmt: skip
    if case.splits > 1:
        module.reduce[grid[:2]](to, *more, o.out.view, case.M, case.N, *strides, **finish)
