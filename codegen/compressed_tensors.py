"""compressed-tensors: packed weights as the tensors and schemes of the format that vLLM serves, code by code.

A row of ``FORMATS`` says which specs it holds, what its scheme is, and its tensors::

    float, int      weight          codes, as float8_e4m3fn or int8 [rows, cols]
                    weight_scale    float32 [rows, 1]
    pack            weight_packed   int32 [rows, ceil(cols * bits / 32)]: codes + 2^(bits - 1), from the lowest bit on
                    weight_scale    float32 [rows, groups]
                    weight_zero_point  int32 [ceil(rows * bits / 32), groups], packed down the rows; UINT only
                    weight_shape    int64 [2]
    mxfp4           weight_packed   uint8 [rows, cols / 2], the even column in the low half; weight_scale uint8 (E8M0)
    nvfp4           the same with weight_scale float8_e4m3fn, and weight_global_scale float32 [1] = 1 / tensor_scale

A scale of one tensor is written once a row: servers join q, k and v into one matrix. What a row cannot hold bit for bit
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen.checkpoint import Rounding, Weight
from fxquant.errors import ExportError
from fxquant.qtensor import QuantizedTensor
from fxquant.scheme import SCALES, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

Tensors = dict[str, Tensor]
Groups = tuple[int | None, ...]
"""Group sizes that a format takes; None: one scale a row."""
_SERVED: Groups = (None, 32, 64, 128)


@dataclass(frozen=True)
class Format:
    """A row: weights of ``formats`` with scales of ``kinds`` for every one of ``groups``; ``inputs`` may be rounded so.

    ``args`` is what the scheme says of the weight, ``tensors`` writes it, ``decode`` reads that again.
    """

    name: str
    formats: tuple[str, ...]
    groups: Groups
    kinds: tuple[str, ...]
    inputs: tuple[str, ...]
    args: Mapping[str, Any]
    tensors: Callable[[QuantizedTensor], Tensors]
    decode: Callable[[Tensors, QuantizedTensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """What a config group of ``quantization_config`` says: the format, and how weights and inputs are quantized."""

    format: str
    weights: Mapping[str, Any]
    input_activations: Mapping[str, Any] | None

    def group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets, "weights": dict(self.weights), "output_activations": None, "format": self.format,
            "input_activations": None if self.input_activations is None else dict(self.input_activations),
        }  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A weight as it is written: its scheme, and its tensors by the last part of their names."""

    scheme: Scheme
    tensors: Tensors = field(repr=False)


# --- tensors of each format -------------------------------------------------------------------------------------------
def _row_scales(q: QuantizedTensor) -> Tensor:
    """What decoded codes are multiplied with, float32, at least one a row."""
    scale = q.scales.effective.float()
    return scale.expand(q.codes.shape[0], -1).contiguous()


def _float8(q: QuantizedTensor) -> Tensors:
    return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": _row_scales(q)}


def _int8(q: QuantizedTensor) -> Tensors:
    return {"weight": q.codes.view(torch.int8), "weight_scale": _row_scales(q)}


def _wide(tensors: Tensors, q: QuantizedTensor) -> Tensor:
    return tensors["weight"].float() * tensors["weight_scale"]


def _pack(q: QuantizedTensor) -> Tensors:
    bits = q.spec.format.bits
    middle = 0 if q.zero_point is not None else 1 << (bits - 1)  # -8 .. 7 -> 0 .. 15, on two's complement
    found = {
        "weight_packed": into_words(q.codes ^ middle, bits),
        "weight_scale": _row_scales(q),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None:
        points = q.zero_point.expand(q.codes.shape[0], -1)
        found["weight_zero_point"] = into_words(points.t(), bits).t().contiguous()
    return found


def into_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[rows, cols]`` codes of 4 or 8 bits -> int32 words, each row filled up with zeros; low bits first."""
    per = 32 // bits
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % per)).reshape(rows, -1, per).to(torch.int64)
    words = (padded << (bits * torch.arange(per))).sum(-1)  # c7 c6 ... c1 c0
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _unpacked(tensors: Tensors, q: QuantizedTensor) -> Tensor:
    bits, (rows, cols) = q.spec.format.bits, q.codes.shape
    codes = _from_words(tensors["weight_packed"], bits)[:, :cols].float()
    middle: Tensor | float = float(1 << (bits - 1))
    if "weight_zero_point" in tensors:
        middle = _each(_from_words(tensors["weight_zero_point"].t(), bits).t()[:rows].float(), cols)
    return (codes - middle) * _each(tensors["weight_scale"], cols)


def _from_words(words: Tensor, bits: int) -> Tensor:
    fields = words.to(torch.int64)[..., None] >> (bits * torch.arange(32 // bits))
    return (fields & ((1 << bits) - 1)).flatten(-2)


def _each(scale: Tensor, cols: int) -> Tensor:
    return scale.repeat_interleave(cols // scale.shape[1], dim=1)


def _fp4(q: QuantizedTensor) -> Tensor:
    return q.codes[:, ::2] | q.codes[:, 1::2] << 4  # s ee m of two columns -> odd | even


def _mxfp4(q: QuantizedTensor) -> Tensors:
    return {"weight_packed": _fp4(q), "weight_scale": q.stored_scale}


def _nvfp4(q: QuantizedTensor) -> Tensors:
    assert q.tensor_scale is not None
    return {
        "weight_packed": _fp4(q),
        "weight_scale": q.stored_scale.view(torch.float8_e4m3fn),
        "weight_global_scale": (1 / q.tensor_scale).reshape(1),
    }


def _from_fp4(tensors: Tensors, q: QuantizedTensor) -> Tensor:
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    if "weight_global_scale" in tensors:
        real = scale.float() / tensors["weight_global_scale"]
    else:
        real = SCALES["e8m0"].format.decode(scale)  # type: ignore[union-attr]
    return q.spec.format.decode(codes) * _each(real, codes.shape[1])


# --- the table --------------------------------------------------------------------------------------------------------
_ANY = tuple(SCALES)
_FLOATS = ("fp32", "fp16", "bf16")
_FP8, _INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
FORMATS = (
    Format("float-quantized", ("e4m3",), (None,), _ANY, ("e4m3/token", "e4m3/tensor"), _FP8, _float8, _wide),
    Format("naive-quantized", ("e4m3",), (None,), _ANY, (), _FP8, _float8, _wide),
    Format("int-quantized", ("int8",), (None,), _ANY, ("int8/token", "int8/tensor"), _INT8, _int8, _wide),
    Format("pack-quantized", ("int4", "int8"), _SERVED, _ANY, (), {"type": "int"}, _pack, _unpacked),
    Format("pack-quantized", ("uint4", "uint8"), _SERVED, _FLOATS, (), {"type": "int", "symmetric": False}, _pack,
           _unpacked),
    Format("mxfp4-pack-quantized", ("e2m1",), (32,), ("e8m0",), (),
           {"num_bits": 4, "type": "float", "scale_dtype": "torch.uint8"}, _mxfp4, _from_fp4),
    Format("nvfp4-pack-quantized", ("e2m1",), (16,), ("e4m3",), (),
           {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}, _nvfp4,
           _from_fp4),
)  # fmt: skip
"""With inputs: all of a row's ``inputs``; a row without takes layers whose input is not rounded."""

WHAT_FITS = (
    "What fits: e4m3/channel or /tensor (inputs e4m3/token or e4m3/tensor, or not rounded), int8/channel or /tensor "
    "(inputs int8/token or int8/tensor), and without rounded inputs int4, int8, uint4 and uint8 per channel or "
    "group32, group64, group128, mxfp4, and e2m1/group16:e4m3.ceil (NVFP4 under a power of two). Recipes that fit: "
    "W8A16-FP8, W8A8-FP8, W4A16-INT, W8A16-INT, W8A8-INT, MXFP4"
)


def stored(weight: Weight) -> Stored:
    """How ``weight`` is written. ExportError, naming the layer, where no format holds it bit for bit."""
    q = weight.tensor
    if weight.embedding:
        raise ExportError(f"{weight.layer} is an embedding, which servers read in float; keep it with a rule "
                          f"{{match: {weight.layer}, keep: true}}")  # fmt: skip
    row = _row(weight)
    tensors = row.tensors(q)
    got, want = row.decode(tensors, q), q.dequantize()
    if not torch.equal(got, want):
        raise _not_exact(weight, row, int((got != want).sum()))
    return Stored(
        Scheme(row.name, _weight_args(row, q.spec), _input_args(weight.rounding)), {**tensors, **_scale(weight)}
    )


def _row(weight: Weight) -> Format:
    spec, rounding = weight.tensor.spec, weight.rounding
    said = f"{weight.layer} is {spec}" + ("" if rounding is None else f" with inputs {rounding.spec}")
    of_format = [row for row in FORMATS if str(spec.format) in row.formats]
    fits = [row for row in of_format if _group(spec) in row.groups and spec.scale in row.kinds]
    inputs = None if rounding is None else rounding.spec
    if inputs is not None and rounding is not None and rounding.scale is not None:
        inputs = replace(inputs, scale="fp32", rounding="")  # it is known, whatever it was rounded to
    found = next((row for row in fits if (str(inputs) in row.inputs if inputs else not row.inputs)), None)
    if found is None:
        raise ExportError(f"{said}, which no format of compressed-tensors that vLLM serves holds\n{WHAT_FITS}")
    size, cols = _group(spec), weight.tensor.codes.shape[1]
    if size is not None and cols % size:
        raise ExportError(f"{said}: its {cols} columns are not whole groups of {size}\n"
                          f"What to do: take a group size that divides {cols}, or channel")  # fmt: skip
    return found


def _group(spec: QuantSpec) -> int | None:
    """The group size, None for one scale a row or a tensor, 0 for what no format has."""
    if isinstance(spec.granularity, PerGroup):
        return spec.granularity.size
    plain = isinstance(spec.granularity, (PerChannel, PerTensor)) and str(spec.granularity) in ("channel", "tensor")
    return None if plain else 0


_CEIL = (
    "compile with e2m1/group16:e4m3.ceil, which is NVFP4 with a power of two above its scales: the file holds the "
    "reciprocal of that scale, and only a power of two has an exact one"
)


def _not_exact(weight: Weight, row: Format, wrong: int) -> ExportError:
    advice = _CEIL if row.name.startswith("nvfp4") else "compile with another scale format, such as fp32"
    q = weight.tensor
    return ExportError(
        f"{weight.layer} is {q.spec}, and {wrong} of its {q.codes.numel()} weights would change in their last bit as "
        f"{row.name}\nWhat to do: {advice}"
    )


def _weight_args(row: Format, spec: QuantSpec) -> dict[str, Any]:
    size = _group(spec)
    return {
        "num_bits": spec.format.bits, "symmetric": True, "strategy": "channel" if size is None else "group",
        "group_size": size, "dynamic": False, **row.args,
    }  # fmt: skip


def _input_args(rounding: Rounding | None) -> dict[str, Any] | None:
    if rounding is None:
        return None
    dynamic = isinstance(rounding.spec.granularity, PerToken)
    kind = "int" if str(rounding.spec.format) == "int8" else "float"
    return {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "token" if dynamic else "tensor",
        "group_size": None, "dynamic": dynamic,
    }  # fmt: skip


def _scale(weight: Weight) -> Tensors:
    """The scale of a static input."""
    if weight.rounding is None or weight.rounding.scale is None:
        return {}
    return {"input_scale": weight.rounding.scale.float().reshape(1).clone()}  # layers that share it have their own


# --- one global scale for layers that servers join --------------------------------------------------------------------
def share_outer_scales(weights: Iterable[Weight]) -> list[Weight]:
    """NVFP4 weights with the same scale above theirs wherever they read the same value, as q, k and v do.

    Servers join such layers and take one global scale for all. Scales that are powers of two are moved to the largest
    by shifting the block scales; no weight changes. ExportError for a weight for which that is not exact.
    """
    weights = list(weights)
    largest: dict[tuple[str, ...], Tensor] = {}
    for weight in weights:
        if (own := _outer(weight)) is not None:
            largest[weight.reads] = torch.maximum(largest.get(weight.reads, own), own)
    return [w if _outer(w) is None else _moved(w, largest[w.reads]) for w in weights]


def _outer(weight: Weight) -> Tensor | None:
    q = weight.tensor
    return q.tensor_scale if str(q.spec.format) == "e2m1" and q.spec.scale == "e4m3" else None


def _moved(weight: Weight, outer: Tensor) -> Weight:
    q, grid = weight.tensor, SCALES["e4m3"].format
    assert q.tensor_scale is not None
    assert grid is not None
    if torch.equal(outer, q.tensor_scale):
        return weight
    scale = q.scale * (q.tensor_scale / outer)
    moved = replace(q, scale=grid.round(scale), tensor_scale=outer)
    if not torch.equal(moved.dequantize(), q.dequantize()):
        power = bool((torch.frexp(q.tensor_scale).mantissa == 0.5).all())
        raise ExportError(
            f"{weight.layer} is {q.spec} and joined with other layers when it is served, under one global scale, which "
            f"its block scales cannot be moved to without an error in E4M3\n"
            f"What to do: {f'compile with mxfp4, or keep {weight.layer} in float' if power else _CEIL}"
        )
    return replace(weight, tensor=moved)
