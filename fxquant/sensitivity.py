"""Sensitivity: how much a model loses when one layer alone is quantized, layer by layer, and when all are.

Layers are ranked by KL(float || quantized) of the logits, models without logits by the relative error of their output.
For a language model the perplexity above the float model's stands beside it; on little text that figure of a single
layer is mostly noise, of either sign. All layers together get a class of ZeroQuant-V2 (2303.08302, section 4) by it:
Class-1 up to 0.1, Class-2 up to 0.5, Class-3 above. Weights are rounded to nearest: methods are not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.calibrate import Calibration
from fxquant.capture import capture
from fxquant.choice import choose
from fxquant.config import ConfigLike, load_config
from fxquant.errors import ConfigError
from fxquant.passes.normalize import NORMALIZE
from fxquant.pipeline import check_rules
from fxquant.program import Program, Progress, Stage, quiet, run
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import Decline
from fxquant.scheme import LayerRule
from fxquant.trials import Change, Trial, Trials, Unit, units_of
from fxquant.verify import verify

CLASSES = (0.1, 0.5)
"""Perplexity above the float model up to which a scheme is Class-1 and Class-2."""


@dataclass(frozen=True)
class LayerLoss:
    """What quantizing the layer ``name`` alone does. ``weight_error`` is ||W - W'|| / ||W||.

    ``loss`` is the figure of ``Sensitivity.measure``: KL in nats, or the relative error of the output. ``perplexity``
    is that above the float model's; ``kl`` and it are None where the model has no logits, or is no language model.
    """

    name: str
    spec: str
    loss: float
    error: float
    weight_error: float
    kl: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """``layers`` in graph order, each quantized alone; ``whole``: all of them together.

    ``measure`` says what a loss is: ``kl`` or ``error``.
    """

    measure: str
    layers: tuple[LayerLoss, ...]
    whole: LayerLoss
    float_perplexity: float | None = None

    @property
    def v2_class(self) -> int | None:
        """ZeroQuant-V2's class of the whole scheme, 1 to 3; None for what is no language model."""
        return None if self.whole.perplexity is None else self.level(self.whole)

    def level(self, layer: LayerLoss) -> int:
        """1 to 3: the class of the layer's own perplexity; 1 for what is no language model."""
        return 1 + sum((layer.perplexity or 0.0) > limit for limit in CLASSES)

    def ranked(self) -> list[LayerLoss]:
        """The layers, the most sensitive first."""
        return sorted(self.layers, key=lambda layer: -layer.loss)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return {**asdict(self), "class": self.v2_class}


def measure(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    config: ConfigLike = "W4A16-RTN",
    *,
    data: Calibration,
    progress: Progress = quiet,
) -> Sensitivity:
    """Quantize every layer that ``config`` takes alone, the others in float, and measure the loss on ``data``.

    ``data``: token windows ``[n, length]`` for a causal language model, else batches of inputs. Rounded activations of
    a rule count with its layers. The time is about half a forward pass of all data a layer, the memory the float
    model's outputs. Raises what ``compile`` raises, CalibrationError for data that do not fit, InputError for a model
    without a floating point output.
    """
    settings = load_config(config)
    program = float_program(model, example_inputs)
    rules = settings.layer_rules()
    taken = quantized_units(program, rules)
    trials = Trials(program, data, progress=progress)
    errors: dict[str, float] = {}

    def each(unit: Unit) -> Iterator[Trial]:
        trial, errors[unit.name] = round_to_nearest({unit: taken[unit]})
        yield trial

    layers = {}
    for unit, (change,) in trials.one_by_one(list(taken), each, progress=progress, what="layers"):
        layers[unit] = _loss(trials, unit.name, str(taken[unit].weight), change, errors[unit.name])
    progress("all layers together", 0, 0)
    trial, error = round_to_nearest(taken)
    whole = _loss(trials, "all", "", trials.all_at_once(trial), error)
    float_nll = trials.float_nll
    perplexity = None if float_nll is None else math.exp(float_nll)
    return Sensitivity(measure_of(trials), tuple(layers[unit] for unit in taken), whole, perplexity)


def round_to_nearest(taken: Mapping[Unit, LayerRule]) -> tuple[Trial, float]:
    """The trial in which these weights are quantized as their rules say, and ||W - W'|| / ||W|| over all of them."""
    weights, square, norm = dict[Unit, Tensor](), 0.0, 0.0
    for unit, rule in taken.items():
        if rule.weight is None:
            continue
        q = quantize_tensor(
            unit.matrix, rule.weight, channel_dims=unit.layers[0].channel_dims, name=unit.layers[0].target
        )
        value = q.dequantize(unit.weight.dtype)
        square += float((value - unit.matrix).float().square().sum())
        norm += float(unit.matrix.float().square().sum())
        weights[unit] = unit.stored(value)
    activations = {unit: rule.activation for unit, rule in taken.items() if rule.activation is not None}
    return Trial(weights, activations), math.sqrt(square / norm) if norm else 0.0


def measure_of(trials: Trials) -> str:
    """What a model is judged by: ``kl`` or ``error``."""
    return "kl" if trials.logits else "error"


def _loss(trials: Trials, name: str, spec: str, change: Change, weight_error: float) -> LayerLoss:
    perplexity = None
    if change.nll is not None and trials.float_nll is not None:
        base = trials.float_nll
        perplexity = math.exp(min(base + change.nll, 700.0)) - math.exp(base)
    loss = change.error if change.kl is None else change.kl
    return LayerLoss(name, spec, loss, change.error, weight_error, change.kl, perplexity)


def float_program(model: nn.Module | ExportedProgram, example_inputs: Any) -> Program:
    """The model captured and normalized, nothing quantized."""
    return normalized(capture(model, example_inputs))


def normalized(program: Program) -> Program:
    """The captured program with its layers in the spelling that rules are matched against."""
    return run(program, [Stage(NORMALIZE)], check=verify)


def quantized_units(program: Program, rules: Sequence[LayerRule]) -> dict[Unit, LayerRule]:
    """The weights that the rules quantize, or whose inputs they round, each with its rule. ConfigError where none."""
    units = units_of(program)
    check_rules(rules, [layer for unit in units for layer in unit.layers])
    found = {}
    for unit in units:
        rule = choose(unit.layers[0], rules, unit.layers)
        if not isinstance(rule, Decline):
            found[unit] = rule
    if not found:
        raise ConfigError("the config keeps every layer in float; there is nothing to measure")
    return found
