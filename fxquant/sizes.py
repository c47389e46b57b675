"""Sizes of a captured program: which dimensions of the inputs may vary, and for which sizes the program holds.

A forward that branches on a size, ``y * 100 if x.shape[0] >= 4 else y``, is traced on one side. torch.export keeps the
branch as a guard on its symbols (``s77 < 4``); here it becomes a limit of the signature (``batch < 4``). Sizes 0 and 1
export takes for special and guards nothing; there the program is compared with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from fxquant.dims import evaluate, holds
from fxquant.eager import copies, difference, run_model
from fxquant.errors import CaptureError
from fxquant.graph import TensorType
from fxquant.program import Program
from fxquant.signature import Input

_UNBOUNDED = 2**62


# --- the example ------------------------------------------------------------------------------------------------------
def dynamic_dims(value: Tensor) -> tuple[int, ...]:
    """The dimensions that may vary: batch; and sequence for token ids, masks and embeddings ``[batch, seq, dim]``."""
    if value.dim() == 0:
        return ()
    tokens = value.dim() == 2 and not value.is_floating_point()
    return (0, 1) if tokens or value.dim() == 3 else (0,)


def enlarge(inputs: Any) -> Any:
    """Inputs with every dynamic dimension of size 1 repeated to 2, if all inputs that have it are of size 1 there."""
    leaves = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    single = {d for d in (0, 1) if all(v.shape[d] == 1 for v in leaves if d in dynamic_dims(v))}

    def grow(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for d in dynamic_dims(value):
            if d in single:
                value = torch.cat([value, value], dim=d)
        return value

    return pytree.tree_map(grow, inputs)


def default_dynamic_shapes(inputs: Any, static: frozenset[tuple[int, int]] = frozenset()) -> ShapesCollection:
    """Dim.AUTO for every dynamic dimension of size 2 or more: export keeps what the model allows and fixes the rest.

    ``inputs`` holds every tensor once; ``static`` names dimensions that stay fixed, as (position of the leaf, dim).
    """
    shapes = ShapesCollection()
    for i, value in enumerate(pytree.tree_leaves(inputs)):
        if isinstance(value, Tensor):
            dims = [d for d in dynamic_dims(value) if value.shape[d] > 1 and (i, d) not in static]
            if dims:
                shapes[value] = dict.fromkeys(dims, Dim.AUTO)
    return shapes


def declared_shapes(declared: Sequence[Input]) -> dict[str, dict[int, Any]]:
    """torch.export's dynamic_shapes for inputs with named dimensions: those of the same name are one."""
    known: dict[str, Any] = {}
    return {
        item.name: {d: known.setdefault(dim, Dim(dim)) for d, dim in enumerate(item.type.shape) if isinstance(dim, str)}
        for item in declared
    }


# --- names ------------------------------------------------------------------------------------------------------------
def symbol_names(
    inputs: Iterable[tuple[str, Any]], share_batch: bool, declared: Sequence[Input] = ()
) -> dict[str, str]:
    """Export's symbols (s12) to words: batch, sequence, or input_dimN where that name is taken; those ``declared``.

    ``inputs``: name and traced value of each. With ``share_batch``, first dimensions of the same example size are one
    dimension, also where export found no operator that needs it.
    """
    names: dict[str, str] = {}
    batch: int | None = None
    own = {item.name: item.type.shape for item in declared}
    for name, value in inputs:
        if not isinstance(value, Tensor):
            continue
        for d, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            if name in own:
                names[symbol] = str(own[name][d])
                continue
            hint = getattr(size.node, "hint", None)
            word = "batch" if d == 0 else "sequence" if d == 1 and d in dynamic_dims(value) else f"{name}_dim{d}"
            shared = share_batch and d == 0 and hint is not None and hint == batch
            if word in names.values() and not shared:
                word = f"{name}_dim{d}" if d else f"{name}_{word}"
            elif word == "batch":
                batch = hint
            names[symbol] = word
    return names


def in_words(expression: Any, symbols: Mapping[str, str]) -> str:
    """An expression of torch.export as text over dimension names."""
    text = re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), str(expression))
    return re.sub(r"^Mod\((\w+), (\d+)\)(?= )", r"\1 % \2", text)  # Mod(batch, 2) == 0 -> batch % 2 == 0


# --- limits -----------------------------------------------------------------------------------------------------------
class UnkeptGuardError(Exception):
    """A guard that is no comparison of sizes; ``dims``: what to fix, as (position of the leaf, dim)."""

    def __init__(self, text: str, dims: frozenset[tuple[int, int]]) -> None:
        super().__init__(text)
        self.text, self.dims = text, dims


def limits(exported: ExportedProgram, inputs: Sequence[tuple[str, Any]], symbols: Mapping[str, str]) -> tuple[str, ...]:
    """The conditions on dimension names under which the exported graph is the model: bounds, then guards.

    ``inputs``: name and traced value of each. A lower bound of 2 is export's own and no limit. Raises UnkeptGuardError.
    """
    ranges = {str(s): (int(r.lower) if r.lower > 2 else 0, r.upper) for s, r in exported.range_constraints.items()}
    found: dict[str, None] = {}
    for symbol, (lower, upper) in ranges.items():
        bounded = bool(upper < _UNBOUNDED)
        text = [f"{symbol} >= {lower}"] * (lower > 0) + [f"{symbol} <= {upper}"] * bounded
        for bound in text if any(symbol in str(s) for _, v in inputs for s in getattr(v, "shape", ())) else []:
            found[_checked(bound, {symbol}, inputs, symbols)] = None
    for guard in _guards(exported, inputs):
        if isinstance(guard, str):  # of a program that was read from a file
            found[_checked(guard, set(), inputs, symbols)] = None
        elif not _is_implied(guard, ranges):
            text_ = _comparison(guard)
            found[_checked(text_, {str(s) for s in guard.free_symbols}, inputs, symbols)] = None
    return tuple(found)


def _guards(exported: ExportedProgram, inputs: Sequence[tuple[str, Any]]) -> list[Any]:
    """The guards as sympy relations; as text over input sizes where only the text is left."""
    symbolic: list[Any] = [
        s for _, v in inputs if isinstance(v, Tensor) for s in v.shape if isinstance(s, torch.SymInt)
    ]
    env = symbolic[0].node.shape_env if symbolic else None
    if env is not None and env.guards:
        simple = [env.simplify(g.expr) for g in env.guards]
        return [part for g in simple for part in sympy.And.make_args(g) if part != sympy.true]
    values = dict(inputs)

    def size(match: re.Match[str]) -> str:
        value = values.get("_".join(re.findall(r"\w+", match[1])))
        return str(value.shape[int(match[2])]) if isinstance(value, Tensor) else match[0]

    code: list[str] = getattr(exported, "_guards_code", None) or []
    text = [re.sub(r"L((?:\[[^\]]*\])+)\.size\(\)\[(\d+)\]", size, guard) for guard in code]
    return [t for t in text if t.isascii() and re.search(r"\bs\d+\b", t)]


def _comparison(guard: Any) -> str:
    if not isinstance(guard, sympy.core.relational.Relational):
        return str(guard)
    sign = {"Equality": "==", "Unequality": "!="}.get(type(guard).__name__, guard.rel_op)
    return f"{guard.lhs} {sign} {guard.rhs}"


def _is_implied(guard: Any, ranges: Mapping[str, tuple[int, Any]]) -> bool:
    """Whether a guard that is linear in one symbol follows from the bounds: it holds at both ends."""
    symbols = list(guard.free_symbols)
    if len(symbols) != 1 or not isinstance(guard, sympy.StrictLessThan | sympy.StrictGreaterThan | sympy.LessThan
                                           | sympy.GreaterThan):  # fmt: skip
        return False
    name = str(symbols[0])
    if not (guard.lhs - guard.rhs).diff(symbols[0]).is_number or name not in ranges:
        return False
    lower, upper = ranges[name]
    ends = lower, int(upper) if upper < _UNBOUNDED else _UNBOUNDED
    return all(bool(guard.subs(symbols[0], end)) for end in ends)


def _checked(text: str, used: set[str], inputs: Sequence[tuple[str, Any]], symbols: Mapping[str, str]) -> str:
    """``text`` in words, if it is a condition over the named dimensions that holds for the example."""
    used = used or set(re.findall(r"\bs\d+\b", text))
    symbolic: list[Any] = [
        s for _, v in inputs if isinstance(v, Tensor) for s in v.shape if isinstance(s, torch.SymInt)
    ]
    hints = {symbols[str(s)]: s.node.hint for s in symbolic if str(s) in symbols}
    words = in_words(text, symbols)
    try:
        if any(h is None for h in hints.values()) or holds(words, hints):
            return words
    except ValueError:
        pass
    at = {(i, d) for i, (_, v) in enumerate(inputs) if isinstance(v, Tensor) for d, s in enumerate(v.shape)
          if used & set(re.findall(r"\w+", str(s)))}  # fmt: skip
    raise UnkeptGuardError(words, frozenset(at))


# --- sizes 0 and 1 ----------------------------------------------------------------------------------------------------
def small_limits(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """``batch >= 2`` or ``>= 1`` for each dimension at whose size 1 or 0 the program is not the model."""
    signature, found = program.signature, []
    sizes = signature.sizes(signature.bind(args, kwargs))
    for name, size in sizes.items():
        for small in (1, 0):
            if small >= size:
                continue
            try:
                inputs = _resized((args, kwargs), [i.type for i in signature.inputs], {**sizes, name: small})
                excluded = not all(holds(limit, {**sizes, name: small}) for limit in signature.limits)
            except ValueError:  # a size derived from it is not a size
                break
            if excluded:
                break
            if not _agree(model, program, *inputs):
                found.append(f"{name} >= {small + 1}")
                break
    return tuple(found)


def _agree(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether both give the same, or both raise an error."""
    results: list[list[Any] | None] = []
    for run in (partial(run_model, model), partial(run_program, program)):
        try:
            results.append(run(args, kwargs))
        except Exception:
            results.append(None)
    want, got = results
    return want is got or (want is not None and got is not None and difference(got, want) is None)


def run_program(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The flat outputs of a program, called as the model is; random numbers are those of seed 0."""
    args, kwargs = copies((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return pytree.tree_leaves(program(*args, **kwargs))


def _resized(inputs: Any, types: Sequence[TensorType], sizes: Mapping[str, int]) -> Any:
    """The example with other sizes: its entries, cut off or repeated. Raises ValueError for a size below 0."""
    leaves, spec = pytree.tree_flatten(inputs)
    at = iter(types)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            for d, dim in enumerate(next(at).shape):
                size = dim if isinstance(dim, int) else evaluate(dim, sizes)
                if size != leaf.shape[d]:
                    if size < 0 or not leaf.shape[d]:
                        raise ValueError(f"no size {size}")
                    leaf = leaf.index_select(d, torch.arange(size, device=leaf.device) % leaf.shape[d])
            leaves[i] = leaf
    return pytree.tree_unflatten(leaves, spec)


def no_such_limit(error: UnkeptGuardError) -> CaptureError:
    """For a program whose sizes are the user's choice."""
    return CaptureError(
        f"the exported program holds for sizes with {error.text} only, which cannot be kept as a limit; make the "
        f"dimension static in dynamic_shapes, or leave dynamic_shapes out"
    )
