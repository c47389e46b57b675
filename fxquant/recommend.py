"""Recommend: a config for a goal, the least loss within a size or the least size within a loss.

Many schemes are sized and predicted (``candidates``), few are measured, in order of promise: rounded to nearest on
held-out data first, and of those the best with methods, such as GPTQ, compiled as they will be used. The loss is the
relative increase of perplexity for a causal language model, else the relative error of the output; what is recommended
was measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fxquant import pipeline
from fxquant.calibrate import Calibration
from fxquant.candidates import SPECS, Scheme, Space, space
from fxquant.config import Config
from fxquant.errors import ConfigError
from fxquant.program import Progress, quiet
from fxquant.scheme import LayerRule, QuantSpec
from fxquant.sensitivity import round_to_nearest
from fxquant.show.units import percent, plain, seconds, size, table
from fxquant.trials import Change, Trials

PREDICTED_ON = 4
"""Token windows that losses are predicted on."""
STEPS = 24
"""Sizes between the smallest and the largest for which a mixed scheme is predicted, where the goal is a loss."""


@dataclass(frozen=True)
class Measured:
    """A scheme that was tried: bytes of the whole model, and the loss on held-out data.

    ``loss`` is perplexity / the float model's - 1, or the relative error of the output; ``perplexity`` None with the
    latter. ``predicted`` is the same figure before anything was run. ``methods`` ran after rounding. ``pareto``: no
    other is both smaller and better.
    """

    name: str
    config: Config
    nbytes: int
    loss: float
    perplexity: float | None
    predicted: float
    methods: tuple[str, ...] = ()
    seconds: float = 0.0
    pareto: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        found = {key: plain(value) for key, value in self.__dict__.items() if key != "config"}
        return {**found, "methods": list(self.methods), "config": self.config.to_dict()}


@dataclass(frozen=True)
class Recommendation:
    """The scheme that meets the goal best, of all ``measured``, which are in order of size.

    ``measure`` is ``perplexity`` or ``error``; ``predicted``: how many schemes were sized and predicted.
    """

    goal: str
    best: Measured
    reason: str
    measured: tuple[Measured, ...]
    measure: str
    float_nbytes: int
    float_perplexity: float | None
    predicted: int

    @property
    def config(self) -> Config:
        return self.best.config

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return {
            "goal": self.goal, "reason": self.reason, "measure": self.measure, "best": self.best.to_dict(),
            "float_nbytes": self.float_nbytes, "float_perplexity": plain(self.float_perplexity),
            "predicted": self.predicted, "measured": [each.to_dict() for each in self.measured],
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join([*rows(self.measured, self.float_nbytes, self.float_perplexity, self.best), "", self.reason])


def rows(
    measured: Sequence[Measured], float_nbytes: int = 0, float_perplexity: float | None = None,
    best: Measured | None = None,
) -> list[str]:  # fmt: skip
    """A table of what was measured: ``*`` marks the Pareto front, ``>`` what is recommended."""
    what = "perplexity" if any(each.perplexity is not None for each in measured) else "output error"
    found = [("", "scheme", "size", "bytes", what, "change", "predicted")]
    if float_nbytes:
        value = "" if float_perplexity is None else f"{float_perplexity:.4f}"
        found.append(("", "float", size(float_nbytes), f"{float_nbytes}", value, "", ""))
    for each in measured:
        mark = ">" if each is best else "*" if each.pareto else ""
        lm = each.perplexity is not None
        value = f"{each.perplexity:.4f}" if lm else f"{each.loss:.4g}"
        change = f"{100 * each.loss:+.2f} %" if lm else ""
        told = f"{100 * each.predicted:+.2f} %" if lm else f"{each.predicted:.4g}"
        name = " + ".join([each.name, *each.methods])
        found.append((mark, name, size(each.nbytes), f"{each.nbytes}", value, change, "" if each.methods else told))
    return table(found)


def with_front(measured: Iterable[Measured]) -> tuple[Measured, ...]:
    """In order of size, those that no other is both smaller and better than marked."""
    ordered = sorted(measured, key=lambda each: (each.nbytes, each.loss))
    found, least = [], math.inf
    for each in ordered:
        found.append(replace(each, pareto=each.loss < least))
        least = min(least, each.loss)
    return tuple(found)


def recommend(
    model: nn.Module, example_inputs: Any = None, *, target_bytes: int | None = None, max_loss: float | None = None,
    data: Calibration, calibration: Calibration | None = None, candidates: Sequence[str | QuantSpec] = SPECS,
    methods: Sequence[str | dict[str, Any]] = (), tries: int = 5, finalists: int = 2,
    tell: Callable[[Measured], None] = lambda measured: None, progress: Progress = quiet,
) -> Recommendation:  # fmt: skip
    """A config for ``target_bytes``, of all of the model's tensors, or for ``max_loss``; one of the two.

    ``data``: what is measured on, token windows ``[n, length]`` of a causal language model, whose loss is the relative
    increase of perplexity (0.02 for 2 %), or batches, whose loss is the relative error of the output. ``calibration``:
    other data, for predictions and ``methods``; by default ``data``. ``tries`` schemes are measured rounded to nearest,
    up to ``finalists`` with ``methods`` (as in a config's ``passes``). ``tell`` is called with each as it is measured.

    Raises ConfigError for a goal that cannot be met, with the nearest that can; else what ``compile`` raises.
    """
    _check_goal(target_bytes, max_loss, tries)
    given = data if calibration is None else calibration
    found = space(model, example_inputs, _spread(given), candidates=candidates, progress=progress)
    _check_size(found, target_bytes)
    trials = Trials(found.program, data, progress=progress)
    job = _Job(model, example_inputs, found, trials, given, tuple(methods), tell, progress, tries, finalists)
    if target_bytes is not None:
        return _within_size(job, target_bytes)
    assert max_loss is not None
    return _within_loss(job, max_loss)


def _spread(data: Calibration) -> Calibration:
    """A few of the token windows: predictions take a backward pass each, and need less data than methods."""
    return data[:: math.ceil(len(data) / PREDICTED_ON)] if isinstance(data, Tensor) else data


def _check_goal(target_bytes: int | None, max_loss: float | None, tries: int) -> None:
    if (target_bytes is None) == (max_loss is None):
        raise ConfigError("give one goal: target_bytes, or max_loss")
    if max_loss is not None and not 0 < max_loss < math.inf:
        raise ConfigError(f"max_loss is {max_loss}; expected more than 0, such as 0.02 for 2 %")
    if tries < 1:
        raise ConfigError(f"tries is {tries}; at least one scheme has to be measured")


def _check_size(found: Space, target_bytes: int | None) -> None:
    if target_bytes is None:
        return
    if target_bytes < found.least:
        raise ConfigError(
            f"no config brings the model to {_bytes(target_bytes)}: the smallest that the candidates reach is "
            f"{_bytes(found.least)}; raise the target, or add smaller candidates"
        )
    if target_bytes >= found.float_nbytes:
        raise ConfigError(
            f"the float model takes {_bytes(found.float_nbytes)} and fits {_bytes(target_bytes)} already; nothing has "
            f"to be quantized: lower the target"
        )


def _bytes(nbytes: int) -> str:
    return f"{size(nbytes)} ({nbytes:,} bytes)"


# --- measuring --------------------------------------------------------------------------------------------------------
@dataclass
class _Job:
    """What is under way: the space, the data to measure on, and what was measured so far."""

    model: nn.Module
    example_inputs: Any
    space: Space
    trials: Trials
    calibration: Calibration
    methods: tuple[str | dict[str, Any], ...]
    tell: Callable[[Measured], None]
    progress: Progress
    tries: int
    finalists: int
    done: list[Measured] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.tries + (self.finalists if self.methods else 0)

    def loss(self, scheme: Scheme) -> float:
        """The predicted loss in the measured one's unit."""
        if self.trials.float_nll is not None:
            return math.expm1(min(scheme.predicted, 700.0))
        return scheme.predicted if self.space.logits else math.sqrt(scheme.predicted)

    def nearest(self, scheme: Scheme) -> Measured:
        """The scheme rounded to nearest."""
        begin = self._begin(scheme.name)
        rules = {
            unit: LayerRule(unit.name, weight=spec)
            for unit, spec in zip(self.space.units, scheme.choice, strict=True)
            if spec is not None
        }
        change = self.trials.all_at_once(round_to_nearest(rules)[0])
        return self._keep(scheme, change, scheme.config, scheme.nbytes, (), begin)

    def refined(self, scheme: Scheme) -> Measured:
        """The scheme with the methods, compiled."""
        begin = self._begin(f"{scheme.name} with methods")
        config = Config(rules=scheme.config.rules, passes=self.methods)
        names = tuple(name for name, _ in config.methods())
        compiled = pipeline.compile(
            self.model, self.example_inputs, config, calibration=self.calibration, progress=self.progress
        )
        change = self.trials.measured(compiled.program)
        return self._keep(scheme, change, config, compiled.summary().bytes_after, names, begin)

    def _begin(self, name: str) -> float:
        past = [each.seconds for each in self.done if bool(each.methods) == name.endswith("with methods")]
        left = (self.total - len(self.done)) * sum(past) / len(past) if past else 0.0
        about = f", about {seconds(left)} left" if left else ""
        self.progress(f"measure {name}{about}", min(len(self.done), self.total - 1), self.total)
        return time.perf_counter()

    def _keep(
        self, scheme: Scheme, change: Change, config: Config, nbytes: int, methods: tuple[str, ...], begin: float
    ) -> Measured:
        base = self.trials.float_nll
        perplexity = None if base is None or change.nll is None else _exp(base + change.nll)
        loss = change.error if change.nll is None else _exp(change.nll) - 1
        found = Measured(scheme.name, config, nbytes, loss if not math.isnan(loss) else math.inf, perplexity,
                         self.loss(scheme), methods, time.perf_counter() - begin)  # fmt: skip
        self.done.append(found)
        self.tell(found)
        return found

    def result(self, goal: str, best: Measured, reason: str, predicted: int) -> Recommendation:
        self.progress("measure", self.total, self.total)
        ordered = with_front(self.done)
        chosen = next(each for each in ordered if replace(each, pareto=False) == best)
        base = self.trials.float_nll
        return Recommendation(
            goal, chosen, reason, ordered, "error" if base is None else "perplexity", self.space.float_nbytes,
            None if base is None else _exp(base), predicted,
        )  # fmt: skip


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _figure(each: Measured) -> str:
    if each.perplexity is None:
        return f"an output error of {percent(each.loss)}"
    return f"a perplexity of {each.perplexity:.4f} ({100 * each.loss:+.2f} %)"


# --- a size -----------------------------------------------------------------------------------------------------------
def _within_size(job: _Job, target: int) -> Recommendation:
    """Of what fits, the least predicted loss first: the mixed scheme, then uniform ones; the best with methods too."""
    every = job.space.uniform()
    fitting = [scheme for scheme in every if scheme.nbytes <= target]
    order = [job.space.mixed(target), *sorted(fitting, key=lambda scheme: scheme.predicted)]
    schemes = _distinct(order)[: job.tries]
    tried = [(job.nearest(scheme), scheme) for scheme in schemes]
    if job.methods:
        for _, scheme in sorted(tried, key=lambda item: item[0].loss)[: job.finalists]:
            job.refined(scheme)
    best = min((each for each in job.done if each.nbytes <= target), key=lambda each: (each.loss, each.nbytes))
    reason = (
        f"recommended: {' + '.join([best.name, *best.methods])}, {_bytes(best.nbytes)} of {_bytes(target)}, with "
        f"{_figure(best)}, the least of {len(job.done)} measured; {len(fitting) + 1} of {len(every) + 1} schemes fit"
    )
    return job.result(f"at most {target} bytes", best, reason, len(every) + 1)


def _distinct(schemes: Iterable[Scheme]) -> list[Scheme]:
    return list({scheme.choice: scheme for scheme in reversed(list(schemes))}.values())[::-1]


# --- a loss -----------------------------------------------------------------------------------------------------------
def _within_loss(job: _Job, goal: float) -> Recommendation:
    """The smallest that meets the goal on the predicted front: bisected rounded to nearest, then with methods."""
    front, count = _front(job)
    start = next((i for i, scheme in enumerate(front) if job.loss(scheme) <= goal), len(front) - 1)
    nearest = _bisect(front, start, goal, job.nearest, job.tries)
    if job.methods and job.finalists:
        top = min((i for i, each in nearest.items() if each.loss <= goal), default=len(front) - 1)
        # methods win back more than half of the loss: look where twice of it is predicted, as measured so far
        ratio = max(_ratio(job, front, nearest), 1e-9)
        first = next((i for i, scheme in enumerate(front) if job.loss(scheme) * ratio <= 2 * goal), top)
        _bisect(front, min(first, top), goal, job.refined, job.finalists)
    meeting = [each for each in job.done if each.loss <= goal]
    if not meeting:
        near = min(job.done, key=lambda each: each.loss)
        raise ConfigError(
            f"nothing that was measured stays within {_goal(job, goal)}: the nearest is "
            f"{' + '.join([near.name, *near.methods])}, {_bytes(near.nbytes)}, with {_figure(near)}; allow more, give "
            f"larger candidates, or measure on more data"
        )
    best = min(meeting, key=lambda each: (each.nbytes, each.loss))
    reason = (
        f"recommended: {' + '.join([best.name, *best.methods])}, {_bytes(best.nbytes)}, with {_figure(best)}: the "
        f"smallest of {len(job.done)} measured that stays within {_goal(job, goal)}"
    )
    return job.result(_goal(job, goal), best, reason, count)


def _goal(job: _Job, goal: float) -> str:
    what = "of perplexity" if job.trials.float_nll is not None else "of output error"
    return f"{'+' if job.trials.float_nll is not None else ''}{100 * goal:g} % {what}"


def _front(job: _Job) -> tuple[list[Scheme], int]:
    """Schemes in order of size with falling predicted losses, and how many there were."""
    found = job.space
    largest = max(scheme.nbytes for scheme in found.uniform())
    growth = (largest / found.least) ** (1 / (STEPS - 1))
    budgets = [round(found.least * growth**i) for i in range(STEPS)]
    every = _distinct([*found.uniform(), *(found.mixed(budget) for budget in budgets)])
    front: list[Scheme] = []
    for scheme in sorted(every, key=lambda scheme: (scheme.nbytes, scheme.predicted)):
        if not front or scheme.predicted < front[-1].predicted:
            front.append(scheme)
    return front, len(every)


def _ratio(job: _Job, front: Sequence[Scheme], measured: dict[int, Measured]) -> float:
    """Measured over predicted loss, the median."""
    ratios = sorted(each.loss / max(job.loss(front[i]), 1e-12) for i, each in measured.items())
    return ratios[len(ratios) // 2]


def _bisect(
    front: Sequence[Scheme], start: int, goal: float, measure: Callable[[Scheme], Measured], tries: int
) -> dict[int, Measured]:
    """Measure at ``start``, then nearer and nearer to the border between what meets the goal and what does not."""
    found: dict[int, Measured] = {}
    low, high, at, step = -1, len(front), start, 1
    while low + 1 < high and len(found) < tries:
        found[at] = measure(front[at])
        if found[at].loss <= goal:
            high = at
        else:
            low = at
        if low >= 0 and high < len(front):  # both sides are known
            at = (low + high) // 2
        else:  # away from the start, in steps that double
            at = max(high - step, low + 1, 0) if high < len(front) else min(low + step, len(front) - 1)
            step *= 2
        at = min(max(at, low + 1), high - 1)
    return found
