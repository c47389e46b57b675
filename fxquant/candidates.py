"""What a model could become: uniform schemes and mixed ones, each with its exact bytes and a predicted loss.

A choice gives every weight a spec or leaves it in float; ``None`` stands for float::

    nbytes(choice)    = everything that is no weight of a layer + sum_u size[u, choice_u]
    predicted(choice) = sum_u loss[u, choice_u]          (nats of KL, or a squared relative error; see ``allocation``)
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxquant.allocation import gradient_cost, specs_of, tried
from fxquant.config import Config, RuleConfig
from fxquant.errors import ConfigError
from fxquant.layers import other_uses
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.program import Program, Progress, Stage, quiet, run
from fxquant.scheme import QuantSpec, parse_spec
from fxquant.sensitivity import float_program
from fxquant.show.summary import summarize
from fxquant.solvers.allocate import allocate
from fxquant.trials import Trials, Unit, units_of
from fxquant.verify import verify

SPECS = (
    "e2m0/group64:fp16", "nf4/group128:fp16", "nf4/group64:fp16", "e2m1/group16:e4m3", "nf4/group32:fp16",
    "e2m2/group64:fp16", "e2m3/channel:fp16", "e2m3/group64:fp16", "int8/channel:fp16", "e4m3/channel:fp16",
)  # fmt: skip
"""What a weight may become, 3.25 to 8 bits; of uniform schemes, what the linears and convolutions do."""
TABLES = ("nf4/group64:fp16", "e2m3/channel:fp16", "int8/channel:fp16")
"""What embeddings, and heads of their shape, may become beside them in uniform schemes, or float."""


@dataclass(frozen=True)
class Scheme:
    """A config with the bytes of the whole model under it, known, and the loss that is predicted.

    ``choice``: the spec of every unit of the space, None for float.
    """

    name: str
    config: Config
    choice: tuple[QuantSpec | None, ...]
    nbytes: int
    predicted: float


@dataclass(frozen=True)
class Space:
    """The weights of a program, what each may become, and what that costs in bytes and in predicted loss.

    The last choice of every unit is float. ``tables[u]``: it is an embedding, or of an embedding's shape.
    ``left``: layers that stay in float in any case, since something else reads their weights too.
    """

    program: Program
    units: tuple[Unit, ...]
    tables: tuple[bool, ...]
    left: tuple[str, ...]
    specs: tuple[QuantSpec | None, ...]
    sizes: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    float_nbytes: int
    logits: bool

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of what no choice changes."""
        return self.float_nbytes - sum(unit.weight.nbytes for unit in self.units)

    @property
    def least(self) -> int:
        """Bytes of the smallest choice."""
        return self.fixed_nbytes + sum(map(min, self.sizes))

    def uniform(self) -> list[Scheme]:
        """One spec for linears and convolutions, one or float for the tables, if there are any; in order of size."""
        quantized = [spec for spec in self.specs if spec is not None]
        known = [spec for spec in quantized if spec in map(parse_spec, TABLES)]
        tables = [None, *(known or quantized)] if any(self.tables) else [None]
        body = [None] if all(self.tables) else quantized
        found = [self._uniform(spec, table) for spec in body for table in tables if spec or table]
        return sorted(found, key=lambda scheme: scheme.nbytes)

    def mixed(self, nbytes: int) -> Scheme:
        """The choice of least predicted loss of at most ``nbytes``; ConfigError where there is none."""
        found = allocate(self.losses, self.sizes, nbytes - self.fixed_nbytes)
        choice = tuple(self.specs[c] for c in found.choice)
        count = sum(unit.weight.numel() for unit in self.units)
        return self._scheme(f"mixed, {8 * found.size / count:.2f} bits a weight", choice, self._exact(choice))

    def _uniform(self, body: QuantSpec | None, table: QuantSpec | None) -> Scheme:
        choice = tuple(table if is_table else body for is_table in self.tables)
        exact = [u for u, is_table in zip(self.units, self.tables, strict=True) if is_table and table is not None]
        rules = [RuleConfig(match=_path(layer.name), weight=str(table)) for unit in exact for layer in unit.layers]
        names = [u.layers for u, is_table in zip(self.units, self.tables, strict=True) if is_table and table is None]
        heads = [layer.name for layers in names for layer in layers if all(q.type != "embedding" for q in layers)]
        rules += [RuleConfig(match=_path(name), keep=True) for name in (*heads, *self.left)]
        rules += [RuleConfig(match="*", weight=str(body))] if body is not None else []
        name = str(body) if body is not None else "linears in float"
        name += f", tables {'float' if table is None else table}" if any(self.tables) else ""
        return self._scheme(name, choice, tuple(rules))

    def _exact(self, choice: Sequence[QuantSpec | None]) -> tuple[RuleConfig, ...]:
        """A rule for every layer that is quantized, by its path; what is left stays in float."""
        rules = [
            RuleConfig(match=_path(layer.name), weight=str(spec))
            for unit, spec in zip(self.units, choice, strict=True)
            for layer in unit.layers
            if spec is not None
        ]
        return (*rules, RuleConfig(match="*", keep=True))

    def _scheme(self, name: str, choice: tuple[QuantSpec | None, ...], rules: tuple[RuleConfig, ...]) -> Scheme:
        at = [self.specs.index(spec) for spec in choice]
        nbytes = self.fixed_nbytes + sum(row[c] for row, c in zip(self.sizes, at, strict=True))
        loss = sum(row[c] for row, c in zip(self.losses, at, strict=True))
        return Scheme(name, Config(rules=rules), choice, nbytes, loss)


def _path(name: str) -> str:
    return glob.escape(name)


def space(
    model: Any, example_inputs: Any, calibration: Any, *, candidates: Sequence[str | QuantSpec] = SPECS,
    progress: Progress = quiet,
) -> Space:  # fmt: skip
    """The space of a model: every candidate's bytes, and its loss as the gradients on ``calibration`` predict it.

    Raises ConfigError for a candidate that is no weight spec and for a model without layers, else as ``compile`` does.
    """
    specs = specs_of(candidates)
    program = run(float_program(model, example_inputs), [Stage(REMOVE_DEAD)], check=verify)
    everything = units_of(program)
    shared = {layer.name for _, layer in other_uses([layer for unit in everything for layer in unit.layers])}
    units = [unit for unit in everything if not any(layer.name in shared for layer in unit.layers)]
    if not units:
        raise ConfigError("the model has no layer that can be quantized: there is nothing to recommend")
    shapes = {tuple(u.weight.shape) for u in units if any(layer.type == "embedding" for layer in u.layers)}
    trials = Trials(program, calibration, progress=progress)
    losses, _, sizes = tried(units, specs, gradient_cost(trials, units, 0), progress)
    return Space(
        program, tuple(units), tuple(tuple(unit.matrix.shape) in shapes for unit in units),
        tuple(layer.name for unit in everything if unit not in units for layer in unit.layers), (*specs, None),
        tuple((*row, unit.weight.nbytes) for row, unit in zip(sizes, units, strict=True)),
        tuple((*(_finite(loss) for loss in row), 0.0) for row in losses),
        summarize(program).bytes_before, trials.logits,
    )  # fmt: skip


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 1e30
