"""The table of packed weights of a model: what a checkpoint says beside its tensors, so that it is loaded as it is.

    {"model.layers.0.mlp.up_proj.weight": {"spec": "e3m2/channel", "shape": [1536, 576], "error": 0.0391},
     "transformer.h.0.attn.c_attn.weight": {"spec": "e2m1/group64", "shape": [2304, 768], "transposed": true,
                                            "activation": "e4m3/token",
                                            "factors": [{"spec": ..., "shape": [2304, 8]}, {...}]},
     "model.layers.0.mlp.experts.down_proj": {"spec": "e3m2/channel", "shape": [4, 64, 32], "rows": 256},
     "lm_head.weight": {"same_as": "model.embed_tokens.weight"}}

``shape`` is that of the packed weight, output channels first; ``rows`` how many rows of codes it has, where that is not
``shape[0]``; ``error`` is ||W - W'|| / ||W||, where it is known. Tensors lie at ``<module>.weight_packed.<part>`` for
modules that are replaced as a whole, else at ``<module>.parametrizations.<name>.0.weight_packed.<part>``. A table read
from a file is not trusted: ``read_table`` checks each entry by itself, ``build`` against the model, ``check_stored``
and ``check_values`` the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxquant import packing
from fxquant.encoding import MalformedError, decode_number, decode_spec, fields, items, text, whole
from fxquant.errors import FormatError, LoadError
from fxquant.modules import PackedWeight, Quantized, QuantizedLinear, RoundedInput, is_linear, replace, weights_of
from fxquant.qtensor import check_scale
from fxquant.scheme import PerChannel, QuantSpec, parse_spec

HELD = "weight_packed"
"""The attribute that holds a packed weight, in a replaced module and in a parametrization."""
_MOST_ENTRIES = 1 << 20
_CHANGED = "the folder was changed or only half written: save the model again, or fetch all of its files anew"


Kind = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


@dataclass(frozen=True)
class Entry:
    """A packed weight without its tensors; ``activation`` is what its input is rounded to, ``factors`` are LoRC's."""

    spec: QuantSpec
    shape: tuple[int, ...]
    rows: int
    transposed: bool = False
    activation: QuantSpec | None = None
    factors: tuple[Entry, ...] = ()
    error: float | None = None

    @property
    def cols(self) -> int:
        return math.prod(self.shape) // self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, factors included."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.parts().values())

    @property
    def logical(self) -> tuple[int, ...]:
        """The shape of the parameter that it stands for."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def parts(self) -> dict[str, Kind]:
        """Its tensors below ``weight_packed``: dtype and shape of each."""
        spec, grid = self.spec, self.spec.scale_shape(self.rows, self.cols)
        stored = torch.uint8 if spec.kind.format is not None else spec.scale_dtype
        packed = packing.packed_shape((self.rows, self.cols), packing.planar(spec.format.bits))
        found: dict[str, Kind] = {"packed": (torch.uint8, packed), "scale": (stored, grid)}
        if spec.has_zero_point:
            found["zero_point"] = (torch.uint8, grid)
        if (outer := spec.outer_shape(self.rows)) is not None:
            found["tensor_scale"] = (torch.float32, outer)
        for i, factor in enumerate(self.factors):
            found |= {f"factors.{i}.{part}": kind for part, kind in factor.parts().items()}
        return found

    def empty(self, dtype: torch.dtype) -> PackedWeight:
        """The weight with tensors that have no values, on the meta device."""
        names = ("packed", "scale", "zero_point", "tensor_scale", "exponent_bias")
        own = {k: torch.empty(v[1], dtype=v[0], device="meta") for k, v in self.parts().items() if "." not in k}
        factors = [factor.empty(dtype) for factor in self.factors]
        weight = PackedWeight(
            {k: own.get(k) for k in names}, spec=str(self.spec), shape=self.shape, dtype=dtype,
            transposed=self.transposed, factors=(factors[0], factors[1]) if factors else None,
        )  # fmt: skip
        weight.pending, weight.error = True, self.error
        return weight

    def rounding(self) -> RoundedInput | None:
        if self.activation is None:
            return None
        scale = torch.empty(1, 1, device="meta") if self.activation.static else None
        return RoundedInput(str(self.activation), scale)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"spec": str(self.spec), "shape": list(self.shape)}
        if self.rows != self.shape[0]:
            found["rows"] = self.rows
        if self.transposed:
            found["transposed"] = True
        if self.activation is not None:
            found["activation"] = str(self.activation)
        if self.factors:
            found["factors"] = [factor.to_dict() for factor in self.factors]
        if self.error is not None:
            found["error"] = float(f"{self.error:.4g}")
        return found


Table = dict[str, Entry | str]
"""An entry by the name of the parameter it was, or the name of another that it is the same as."""


# --- of a model -------------------------------------------------------------------------------------------------------
def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules that hold a packed weight: the parameter's name, the module, and its path below the model."""
    for where, module in model.named_modules(remove_duplicate=False):
        if not isinstance(getattr(module, HELD, None), PackedWeight):
            continue
        if isinstance(module, Quantized):
            yield f"{where}.weight", module, where
        elif ".parametrizations." in f".{where}":
            owner, _, leaf = f".{where}".rpartition(".parametrizations.")
            yield f"{owner}.{leaf.rpartition('.')[0]}".lstrip("."), module, where


def table_of(model: nn.Module) -> Table:
    """What is packed in ``model``; a tie is an entry and the names that are the same."""
    found: Table = {}
    first: dict[int, str] = {}
    for name, module, _ in holders(model):
        weight: PackedWeight = getattr(module, HELD)
        if (known := first.setdefault(id(weight), name)) != name:
            found[name] = known
        else:
            found[name] = _entry_of(weight, getattr(module, "input_rounding", None))
    return found


def _entry_of(weight: PackedWeight, rounding: RoundedInput | None = None) -> Entry:
    factors: Any = weight.factors
    return Entry(
        parse_spec(weight.spec), tuple(weight.shape), weight.packed.shape[0], weight.transposed,
        None if rounding is None else parse_spec(rounding.spec), tuple(_entry_of(f) for f in factors), weight.error,
    )  # fmt: skip


def to_dict(table: Table) -> dict[str, Any]:
    """The table as plain data."""
    return {k: {"same_as": v} if isinstance(v, str) else v.to_dict() for k, v in table.items()}


# --- from data --------------------------------------------------------------------------------------------------------
def read_table(data: Any) -> Table:
    """The table written by ``to_dict``. LoadError, with the weight's name, for an entry that cannot be one."""
    try:
        if not isinstance(data, dict) or not 0 < len(data) <= _MOST_ENTRIES:
            raise MalformedError("the table of weights is not an object with an entry for each packed weight")
        table = {text(name, "the name of a weight"): _read(entry, name) for name, entry in data.items()}
        for name, entry in table.items():
            if isinstance(entry, str) and not isinstance(table.get(entry), Entry):
                raise MalformedError(f"weight {name!r} is the same as {entry[:100]!r}, which is no packed weight")
    except MalformedError as error:
        raise LoadError(f"quantization_config: {error}; {_CHANGED}") from None
    return table


def _read(value: Any, name: str, *, factor: bool = False) -> Entry | str:
    where = f"weight {name[:200]!r}"
    if isinstance(value, dict) and "same_as" in value:
        return text(fields(value, where, ["same_as"])["same_as"], f"what {where} is the same as")
    optional = ["error"] if factor else ["rows", "transposed", "activation", "factors", "error"]
    found = fields(value, where, ["spec", "shape"], optional)
    spec = decode_spec(found["spec"], where)
    if spec.dynamic or (isinstance(spec.granularity, PerChannel) and spec.granularity.axis):
        raise MalformedError(f"{where} has the spec {spec}, which is none for weights")
    shape = tuple(whole(n, f"a size of {where}", 1, 2**40) for n in items(found["shape"], f"the shape of {where}"))
    if not 1 <= len(shape) <= 8 or math.prod(shape) >= 2**48:
        raise MalformedError(f"{where} has the shape {list(shape)[:9]}; expected one to eight sizes below 2^48 in all")
    rows = whole(found.get("rows", shape[0]), f"the rows of {where}", 1)
    if rows not in [math.prod(shape[:k]) for k in range(1, len(shape) + 1)]:
        raise MalformedError(f"{where} of shape {list(shape)} has {rows} rows; expected a product of its first sizes")
    transposed = found.get("transposed", False)
    if not isinstance(transposed, bool) or (transposed and len(shape) < 2):
        raise MalformedError(f"transposed of {where} is {str(transposed)[:60]}; expected true or false")
    factors = _factors(found["factors"], name, shape) if "factors" in found else ()
    error = decode_number(found["error"], f"the error of {where}") if "error" in found else None
    return Entry(spec, shape, rows, transposed, _activation(found, where), factors, error)


def _factors(value: Any, name: str, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    both = [_read(item, f"{name}, factor {i}", factor=True) for i, item in enumerate(items(value, "the factors"))]
    shapes = [entry.shape for entry in both if isinstance(entry, Entry)]
    good = len(shapes) == len(both) == 2 and len(shape) == 2 and all(len(s) == 2 for s in shapes)
    if not good or (shapes[0][0], shapes[1][1]) != shape or shapes[0][1] != shapes[1][0]:
        raise MalformedError(f"factors of {list(map(list, shapes))} do not make weight {name!r} of {list(shape)}")
    return tuple(entry for entry in both if isinstance(entry, Entry))


def _activation(found: Mapping[str, Any], where: str) -> QuantSpec | None:
    if "activation" not in found:
        return None
    spec = decode_spec(found["activation"], f"the activation of {where}")
    if isinstance(spec.granularity, PerChannel) or spec.kind.outer is not None or (spec.static and spec.has_zero_point):
        raise MalformedError(f"the activation of {where} is {spec}, which is none for activations")
    return spec


# --- into a model -----------------------------------------------------------------------------------------------------
def build(model: nn.Module, table: Table) -> dict[str, Entry]:
    """Make ``model`` one whose weights are packed as ``table`` says, without values; ``finish`` follows.

    Returns the entries by the path of their tensors. LoadError, before any change, for a weight that the model has not
    or has in another shape.
    """
    parameters = weights_of(model)
    for name, entry in table.items():
        if name not in parameters:
            raise LoadError(f"quantization_config: {type(model).__name__} has no weight {name!r}, which is said to be "
                            f"packed; give the class that was saved, or: {_CHANGED}")  # fmt: skip
        if isinstance(entry, Entry) and (problem := _problem(model, name, tuple(parameters[name].shape), entry)):
            raise LoadError(f"quantization_config: weight {name!r} {problem}; {_CHANGED}")
    for name, entry in table.items():
        if isinstance(entry, Entry):
            original = parameters[name]
            replace(model, name, entry.empty(original.dtype), original, entry.rounding())
        else:
            replace(model, name, None, parameters[name])
    built = {where: table[name] for name, _, where in holders(model)}
    return {where: entry for where, entry in built.items() if isinstance(entry, Entry)}


def _problem(model: nn.Module, name: str, shape: tuple[int, ...], entry: Entry) -> str | None:
    """Why a weight of the model cannot be what ``entry`` says."""
    if shape != entry.logical:
        return f"is said to be {list(entry.logical)}, and {type(model).__name__} has {list(shape)} there"
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    linear = is_linear(module) and leaf == "weight"
    if entry.activation is not None and not linear:
        return f"rounds its input, and {type(module).__name__} is no linear"
    if entry.rows != entry.shape[0] and len(shape) != 3:
        return f"has {entry.rows} rows for {list(shape)}; only stacked matrices have other rows than their first size"
    if linear and entry.transposed != (type(module).__name__ == "Conv1D"):
        return f"is {'' if entry.transposed else 'not '}transposed, and {type(module).__name__} is otherwise"
    return None


def finish(model: nn.Module, table: Table) -> None:
    """Weights have their values now; the names that are the same as another get its packed weight."""
    held = {name: getattr(module, HELD) for name, module, _ in holders(model)}
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.pending = False
    for name, source in table.items():
        if not isinstance(source, str):
            continue
        owner, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(owner), held[source]
        if isinstance(module, Quantized):
            module.weight_packed = weight
            if isinstance(module, QuantizedLinear):
                module.out_features, module.in_features = weight.shape
        else:
            replace(model, name, weight, getattr(module, leaf))


# --- tensors ----------------------------------------------------------------------------------------------------------
def stored_tensors(entries: Mapping[str, Entry]) -> dict[str, Kind]:
    """Every tensor that packed weights need, by its name in the model: dtype and shape."""
    found: dict[str, Kind] = {}
    for where, entry in entries.items():
        found |= {f"{where}.{HELD}.{part}": kind for part, kind in entry.parts().items()}
        if entry.activation is not None and entry.activation.static:
            found[f"{where}.input_rounding.scale"] = (torch.float32, (1, 1))
    return found


def check_stored(want: Mapping[str, Kind], have: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """LoadError for the first tensor that is missing, is of another dtype or shape, or belongs to no entry."""
    for name, (dtype, shape) in want.items():
        if name not in have:
            raise LoadError(f"tensor {name!r} of a packed weight is missing from the checkpoint; {_CHANGED}")
        if have[name] != (dtype, shape):
            found = " ".join(str(t) for t in have[name])
            raise LoadError(f"tensor {name!r} is {found} in the checkpoint; its spec wants {dtype} {shape}; {_CHANGED}")
    if loose := [name for name in have if f".{HELD}." in name and name not in want]:
        raise LoadError(
            f"tensor {loose[0]!r} belongs to a packed weight that quantization_config does not name; {_CHANGED}"
        )


def check_values(model: nn.Module) -> None:
    """LoadError, with the weight's name, for scales or zero points that cannot be."""
    for name, module, _ in holders(model):
        weight: PackedWeight = getattr(module, HELD)
        factors: Any = weight.factors
        rounding = getattr(module, "input_rounding", None)
        try:
            for part in (weight, *factors):
                entry = _entry_of(part)
                if not part.packed.is_meta:
                    check_scale(
                        part.scale, part.zero_point, entry.spec, rows=entry.rows, cols=entry.cols,
                        tensor_scale=part.tensor_scale,
                    )  # fmt: skip
            if rounding is not None and rounding.scale is not None and not rounding.scale.is_meta:
                check_scale(rounding.scale, None, parse_spec(rounding.spec), rows=1, cols=1)
        except FormatError as error:
            raise LoadError(f"weight {name!r}: {error}; {_CHANGED}") from None


# --- back to float ----------------------------------------------------------------------------------------------------
def restore(model: nn.Module, dtype: torch.dtype) -> None:
    """Put float modules and parameters back, with the values of the packed weights, in ``dtype``; ties stay ties."""
    decoded = dict[int, nn.Parameter]()
    for name, module, _ in list(holders(model)):
        weight: PackedWeight = getattr(module, HELD)
        if id(weight) not in decoded:
            decoded[id(weight)] = nn.Parameter(weight.decode().to(dtype).contiguous(), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        if isinstance(holder, Quantized):
            model.set_submodule(owner, holder.float_module(decoded[id(weight)]))
        elif parametrize.is_parametrized(holder, leaf):
            parametrize.remove_parametrizations(holder, leaf, leave_parametrized=False)
            delattr(holder, leaf)
            holder.register_parameter(leaf, decoded[id(weight)])
