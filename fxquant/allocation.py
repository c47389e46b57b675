"""Allocation: a format for every layer, so that the whole loses least at a given size.

The losses of layers add up (HIGGS' linearity theorem, 2411.17525, section 3), each a square form of the error::

    loss(c) = sum_l loss_l(c_l)         loss_l(c) = sum F_l dW^2,  dW = W'_l - W_l with the choice c     (gradient)
                                        loss_l(c) = a_l ||dW||^2 / ||W_l||^2                             (noise)

A loss is the mean KL(float || quantized) in nats where the model has logits, which stands for the increase of log
perplexity, and else the squared relative error of the output. F or a_l belong to the layer and are measured once.
``noise`` is the paper's way: Gaussian noise of a known size in one layer at a time. ``gradient`` takes the diagonal of
the Fisher matrix, which a backward pass gives for all layers at once (``Trials.curvature``): far cheaper, and it knows
which weights of a layer matter. The size is a budget; ``solvers.allocate`` does the rest.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.calibrate import Calibration
from fxquant.choice import choose
from fxquant.config import Config, RuleConfig, load_config
from fxquant.errors import ConfigError, near
from fxquant.program import Program, Progress, quiet
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import Decline
from fxquant.scheme import LayerRule, QuantSpec, parse_spec
from fxquant.sensitivity import float_program, quantized_units, round_to_nearest
from fxquant.solvers.allocate import Allocation
from fxquant.solvers.allocate import allocate as solve
from fxquant.trials import Change, Trial, Trials, Unit, units_of

CANDIDATES = (
    "e2m0/group64:fp16", "nf4/group128:fp16", "e2m1/group32:e8m0", "e2m1/group64:fp16", "nf4/group64:fp16",
    "e2m1/group16:e4m3", "nf4/group32:fp16", "e2m2/group64:fp16", "e2m3/channel:fp16", "e3m2/channel:fp16",
    "e2m3/group64:fp16", "e4m3/channel:fp16",
)  # fmt: skip
"""What each layer may become by default, 3.25 to 8 bits a weight."""

Probe = Literal["gradient", "noise"]
NOISE = 0.1
"""Relative size of the noise, that of 4-bit rounding."""


@dataclass(frozen=True)
class Row:
    """What was decided for a layer of so many ``weights``: ``bits`` a weight with scales, and the predicted loss.

    ``weight_error`` is ||W' - W|| / ||W||.
    """

    name: str
    spec: str
    weights: int
    bits: float
    weight_error: float
    loss: float


@dataclass(frozen=True)
class Uniform:
    """All layers the same: bits a weight, the predicted loss, and whether the budget allows it."""

    spec: str
    bits: float
    loss: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A config within a budget. ``bits`` a weight with scales over the ``rows``, which leave out what stays in float.

    ``loss`` is predicted: nats of KL where ``measure`` is ``kl``, else a squared relative error (``error``). ``bound``
    is a loss that no choice within the budget is below; ``exact``: none is below ``loss``.
    """

    config: Config
    rows: tuple[Row, ...]
    uniform: tuple[Uniform, ...]
    measure: str
    budget: float
    bits: float
    loss: float
    bound: float
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return {**asdict(self), "config": self.config.to_dict()}


def allocate(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, *, budget: float,
    candidates: Sequence[str | QuantSpec] = CANDIDATES, calibration: Calibration,
    methods: Sequence[str | dict[str, Any]] = (), keep: Sequence[str] | None = None, probe: Probe = "gradient",
    progress: Progress = quiet,
) -> Config:  # fmt: skip
    """A config that gives every layer one of ``candidates`` within ``budget`` bits a weight: the ``config`` of
    ``fxquant.allocation.plan``, which takes the same and says what it predicts."""
    return plan(
        model, example_inputs, budget=budget, candidates=candidates, calibration=calibration, methods=methods,
        keep=keep, probe=probe, progress=progress,
    ).config  # fmt: skip


def plan(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, *, budget: float,
    candidates: Sequence[str | QuantSpec] = CANDIDATES, calibration: Calibration,
    methods: Sequence[str | dict[str, Any]] = (), keep: Sequence[str] | None = None, probe: Probe = "gradient",
    noise: float = NOISE, seed: int = 0, progress: Progress = quiet,
) -> Plan:  # fmt: skip
    """Choose one of ``candidates`` for every layer so that the predicted loss is least within ``budget``.

    ``budget``: bits a weight, scales and zero points included, over the layers that are quantized. Embeddings, weights
    tied to one and output heads (a weight of an embedding's shape) stay in float and are not in it; ``keep``, globs
    over layer paths, says in place of the heads what stays. ``calibration``: token windows of a causal language model,
    or batches. ``methods`` go into the config's ``passes``, such as ``["gptq"]``: the prediction is for rounding to
    nearest.

    Raises ConfigError where the budget is below the smallest candidates, for a candidate that is no weight spec, for
    globs that leave nothing; else what ``compile`` raises.
    """
    specs = specs_of(candidates)
    program = float_program(model, example_inputs)
    units = _quantized(program, keep)
    trials = Trials(program, calibration, progress=progress)
    cost = _by_noise(trials, units, noise, seed, progress) if probe == "noise" else gradient_cost(trials, units, seed)
    losses, errors, sizes = tried(units, specs, cost, progress)
    weights = [unit.weight.numel() for unit in units]
    total = sum(weights)
    _check_budget(budget, specs, sizes, total)
    found = solve(losses, sizes, int(budget * total / 8))
    rows = tuple(
        Row(u.name, str(specs[c]), n, 8 * s[c] / n, math.sqrt(e[c]), a[c])
        for u, n, c, s, e, a in zip(units, weights, found.choice, sizes, errors, losses, strict=True)
    )
    uniform = tuple(
        Uniform(str(spec), bits, sum(row[c] for row in losses), bits <= budget)
        for c, spec in enumerate(specs)
        for bits in [8 * sum(row[c] for row in sizes) / total]
    )
    return _plan(_config(program, units, rows, methods), rows, uniform, trials, budget, found, total)


def check(
    model: nn.Module | ExportedProgram, example_inputs: Any, config: Config, data: Calibration, *,
    progress: Progress = quiet,
) -> Change:  # fmt: skip
    """What the config does to the outputs on ``data``, weights rounded to nearest: to hold against ``Plan.loss``."""
    program = float_program(model, example_inputs)
    trials = Trials(program, data, progress=progress)
    return trials.all_at_once(round_to_nearest(quantized_units(program, config.layer_rules()))[0])


def _plan(
    config: Config, rows: tuple[Row, ...], uniform: tuple[Uniform, ...], trials: Trials, budget: float,
    found: Allocation, total: int,
) -> Plan:  # fmt: skip
    measure = "kl" if trials.logits else "error"
    return Plan(config, rows, uniform, measure, budget, 8 * found.size / total, found.loss, found.bound, found.exact)


# --- what there is to choose ------------------------------------------------------------------------------------------
def specs_of(candidates: Sequence[str | QuantSpec]) -> list[QuantSpec]:
    """The candidates as specs, each once; ConfigError for one that no rule takes as a weight."""
    if not candidates:
        raise ConfigError("no candidates; give weight specs to choose from, such as e2m1/group64:fp16")
    for each in candidates:
        load_config({"rules": [{"match": "*", "weight": str(each)}]})
    return list(dict.fromkeys(parse_spec(str(each)) for each in candidates))


def _quantized(program: Program, keep: Sequence[str] | None) -> list[Unit]:
    """The units to quantize: without embeddings and what is tied to one, and without heads or what ``keep`` matches."""
    units = units_of(program)
    tables = {tuple(u.weight.shape) for u in units if any(layer.type == "embedding" for layer in u.layers)}
    globs = [LayerRule(match, keep=True) for match in keep or ()]
    for rule in globs:
        if not any(rule.matches(layer.name) for unit in units for layer in unit.layers):
            names = [layer.name for unit in units for layer in unit.layers]
            raise ConfigError(
                f"keep {rule.match!r} matches no layer{near(rule.match, names)}; give a layer's path, such as "
                f"{names[0]}, or a glob in which * crosses dots"
            )
    rules = [*globs, LayerRule("*", weight=parse_spec("e2m1"))]
    found = [
        unit
        for unit in units
        if not isinstance(choose(unit.layers[0], rules, unit.layers), Decline)
        and (keep is not None or tuple(unit.matrix.shape) not in tables)
    ]
    if not found:
        raise ConfigError("nothing is left to quantize: every layer is an embedding, a head, or kept in float")
    return found


Cost = Callable[[Unit, Tensor], float]
"""The predicted loss of an error dW ``[..., out, in]`` in one weight."""


def tried(
    units: Sequence[Unit], specs: Sequence[QuantSpec], cost: Cost, progress: Progress
) -> tuple[list[list[float]], list[list[float]], list[list[int]]]:
    """For every unit and spec the loss, ||dW||^2 / ||W||^2, and the bytes with scales."""
    losses: list[list[float]] = []
    errors: list[list[float]] = []
    sizes: list[list[int]] = []
    for i, unit in enumerate(units):
        progress("weight errors", i, len(units))
        matrix, layer = unit.matrix, unit.layers[0]
        norm = float(matrix.float().square().sum()) or 1.0
        found = []
        for spec in specs:
            q = quantize_tensor(matrix, spec, channel_dims=layer.channel_dims, name=layer.target)
            change = q.dequantize() - matrix.float()
            found.append((cost(unit, change), float(change.square().sum()) / norm, q.nbytes))
        losses.append([loss for loss, _, _ in found])
        errors.append([error for _, error, _ in found])
        sizes.append([nbytes for _, _, nbytes in found])
    progress("weight errors", len(units), len(units))
    return losses, errors, sizes


def _check_budget(budget: float, specs: Sequence[QuantSpec], sizes: Sequence[Sequence[int]], total: int) -> None:
    least = 8 * sum(min(row) for row in sizes) / total
    if not budget >= least:
        smallest = min(specs, key=lambda spec: sum(row[specs.index(spec)] for row in sizes))
        raise ConfigError(
            f"a budget of {budget:g} bits a weight is below the smallest possible, {math.ceil(least * 1e4) / 1e4:g} "
            f"({smallest}, scales included); raise it, or add smaller candidates"
        )


def _config(
    program: Program, units: Sequence[Unit], rows: Sequence[Row], methods: Sequence[str | dict[str, Any]]
) -> Config:
    """A rule for every layer by its exact path; what is left stays in float."""
    rules = [
        RuleConfig(match=glob.escape(layer.name), weight=row.spec)
        for unit, row in zip(units, rows, strict=True)
        for layer in unit.layers
    ]
    if any(unit not in units for unit in units_of(program) if unit.layers[0].type != "embedding"):
        rules.append(RuleConfig(match="*", keep=True))
    return Config(rules=tuple(rules), passes=tuple(methods))


# --- what an error costs ----------------------------------------------------------------------------------------------
def _by_noise(trials: Trials, units: Sequence[Unit], noise: float, seed: int, progress: Progress) -> Cost:
    """loss / t^2 for Gaussian noise with ||noise|| = t ||W|| in one layer at a time."""

    def each(unit: Unit) -> Iterator[Trial]:
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(unit.weight.shape, generator=generator).to(unit.weight)
        yield Trial({unit: unit.weight + random * (noise * unit.weight.norm() / random.norm())})

    coefficients = {}
    for unit, (change,) in trials.one_by_one(units, each, progress=progress, what="noise in layers"):
        loss = change.error**2 if change.kl is None else change.kl
        coefficients[unit] = max(loss, 0.0) / (noise**2 * float(unit.weight.float().square().sum()) or 1.0)
    return lambda unit, change: coefficients[unit] * float(change.square().sum())


def gradient_cost(trials: Trials, units: Sequence[Unit], seed: int) -> Cost:
    """sum F dW^2 with the curvature F of every weight."""
    curvature = trials.curvature(units, seed=seed)
    return lambda unit, change: float((curvature[unit] * unit.stored(change).square()).sum())
