"""prepack: a packed weight of the graph to the words and scales that a kernel reads.

The graph holds planar bytes, which every back end can read. A kernel wants the words of its decoding's layout, scales
in float32 with the decoding's power of two in them, one row a group, and zero points in the decoded domain::

    words  int32   [N, blocks, WORDS, RUN]      scale  float32 [groups, N] = scale * tensor_scale * 2^log2
           (uint8 for products of FP8)          zero   float16 [groups, N] = zero_point * 2^-log2

Groups that do not fill whole slices are padded; x has zeros there. Prepared once for a weight, and forgotten with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import packing
from fxquant.codegen.remember import remember
from fxquant.decodings import Decoding, decoding
from fxquant.errors import FormatError, InputError
from fxquant.grids import FloatFormat
from fxquant.qtensor import check_scale, load_scale
from fxquant.scales import Scales, spread
from fxquant.scheme import PerChannel, QuantSpec, parse_spec


@dataclass(frozen=True)
class Operands:
    """The operands of a packed operator that say what its weight is (``ops.linear_wq``)."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: str
    shape: tuple[int, ...]
    tensor_scale: Tensor | None = None
    exponent_bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.packed, self.scale, self.zero_point, self.tensor_scale, self.exponent_bias

    def check(self) -> None:
        """Raise InputError, naming the argument, unless the tensors are what ``spec`` and ``shape`` want."""
        spec, (rows, cols) = parse_spec(self.spec), self.shape
        want = packing.packed_shape((rows, cols), packing.planar(spec.format.bits))
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != want:
            got = f"{self.packed.dtype} {list(self.packed.shape)}"
            raise InputError(f"packed is {got}; {self.spec} of shape {[rows, cols]} wants torch.uint8 {list(want)}")
        try:
            check_scale(self.scale, self.zero_point, spec, rows=rows, cols=cols, tensor_scale=self.tensor_scale)
        except FormatError as error:
            raise InputError(str(error)) from None


@dataclass(frozen=True)
class KernelWeight:
    """A weight as a kernel reads it; what is not a tensor here is a constant of the kernel.

    ``group`` columns share a scale and take ``padded`` columns in ``words`` (0: a row has one scale); after ``every``
    slices the sum is scaled. ``even``: no column of a block is beyond ``cols``, and groups are not padded. ``scale``
    has a row for every group that a block reaches into, zeros for those that are not there.
    """

    decoding: Decoding
    words: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: int
    cols: int
    group: int
    padded: int
    every: int
    even: bool

    @property
    def blocks(self) -> int:
        """Steps of the kernel's loop over the columns."""
        return self.words.shape[1]


@dataclass(frozen=True, slots=True)
class Declined:
    """Why no kernel takes a weight."""

    reason: str


def prepare(weight: Operands, target: FloatFormat | None = None) -> KernelWeight | Declined:
    """The weight for a kernel of float16 (``target`` None) or of that FP8, or why there is none.

    The result is kept as long as ``packed`` lives.

    Raises InputError for tensors that do not fit the spec and the shape.
    """
    what = ("kernel", target, weight.spec, weight.shape)
    return remember(lambda: _prepare(weight, target), what, *weight.tensors)


def _prepare(weight: Operands, target: FloatFormat | None) -> KernelWeight | Declined:
    spec = parse_spec(weight.spec)
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis:
        return Declined(f"{spec} has a scale for every input channel, and sums run over those")
    if weight.exponent_bias is not None:
        return Declined("its input channels have exponent biases (LLM-FP4)")
    if len(weight.shape) != 2:
        return Declined(f"a weight of shape {list(weight.shape)} is no matrix")
    weight.check()
    rows, cols = weight.shape
    wide = spec.block(rows, cols)[1]
    group = 0 if wide >= cols else wide
    try:
        made = _decoding(spec, target, group, cols)
        if target is not None and spec.has_zero_point:
            return Declined(f"{spec} has zero points, which an FP8 product cannot take off")
        codes = packing.unpack(weight.packed, packing.planar(spec.format.bits), cols)
        given = Scales(load_scale(weight.scale, spec), weight.zero_point, weight.tensor_scale)
        return _pack(made, codes, given, spec, group)
    except FormatError as error:
        return Declined(str(error))


def _decoding(spec: QuantSpec, target: FloatFormat | None, group: int, cols: int) -> Decoding:
    """Slices that divide a group, or the smallest, which a group is then filled up to."""
    if not group:
        return decoding(spec.format, target, cols=cols)
    least = 16 if target is None else 32
    padded = -(-group // least) * least
    return decoding(spec.format, target, group=padded, cols=-(-cols // group) * padded)


def _pack(d: Decoding, codes: Tensor, given: Scales, spec: QuantSpec, group: int) -> KernelWeight | Declined:
    rows, cols = codes.shape
    padded = -(-group // d.width) * d.width
    if padded != group:
        codes = _pad_groups(codes, group, padded)
    words = packing.pack(d.codes(codes), d.layout)
    words = words.view(torch.int32) if d.target is None else words
    blocks = -(-codes.shape[1] // d.block)
    reached = -(-blocks * d.block // padded) if group else 1
    scale = _by_group(given.effective.float() * 2.0**d.log2, spec, (rows, cols), reached)
    if not bool(scale.isfinite().all()):
        return Declined(f"a scale times 2^{d.log2} is beyond float32")
    zero = None
    if given.zero_point is not None:
        zero = _by_group(given.zero_point.float() * 2.0**-d.log2, spec, (rows, cols), reached).half()
    return KernelWeight(
        d, words.reshape(rows, blocks, len(d.words), d.run), scale, zero, rows, cols, group, padded,
        every=d.every(padded),
        even=cols % d.block == 0 and padded == group,
    )  # fmt: skip


def _pad_groups(codes: Tensor, group: int, padded: int) -> Tensor:
    """Each group of columns filled up with code 0 to ``padded`` columns."""
    whole = F.pad(codes, (0, -codes.shape[1] % group))
    return F.pad(whole.reshape(len(codes), -1, group), (0, padded - group)).reshape(len(codes), -1)


def _by_group(value: Tensor, spec: QuantSpec, shape: tuple[int, int], reached: int) -> Tensor:
    """Values of blocks ``[blocks of rows, groups]`` as ``[reached, rows]``, zeros after the last group."""
    high, rows = spec.block(*shape)[0], shape[0]
    value = spread(value, (high, 1), (rows, value.shape[1])).expand(rows, -1)
    return F.pad(value.T, (0, 0, 0, reached - value.shape[1])).contiguous()
