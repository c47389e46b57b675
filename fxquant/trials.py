"""Trials: what the outputs of a float program become when the weights of one layer change, layer after layer.

The float program is walked once. Where a layer's weight is first read, all values that what follows needs are at hand,
so a trial computes only the rest of the graph: half of it on average, never what comes before the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibrate import Batch, Calibration, batches_of
from fxquant.errors import CalibrationError, InputError
from fxquant.graph import TensorType, info
from fxquant.layers import Layer, find_layers, ties
from fxquant.ops import operators as ops
from fxquant.program import Program, Progress, quiet
from fxquant.rewrite import fetch
from fxquant.scheme import QuantSpec
from fxquant.signature import output_names

_CHUNK = 256  # positions whose log-probabilities exist at the same time


@dataclass(frozen=True)
class Unit:
    """A weight and all layers that use it: they change together. ``weight`` is the first layer's, as it is stored."""

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def weight(self) -> Tensor:
        return self.layers[0].weight

    @property
    def matrix(self) -> Tensor:
        """The weight as the layers see it, ``[..., out, in]``."""
        return self.weight.transpose(-1, -2) if self.layers[0].transposed else self.weight

    def stored(self, matrix: Tensor) -> Tensor:
        """``matrix [..., out, in]`` laid out as the weight is stored."""
        return matrix.transpose(-1, -2) if self.layers[0].transposed else matrix


@dataclass(frozen=True)
class Trial:
    """A change to try: new weights by unit, stored as theirs are, and units whose linears get rounded inputs."""

    weights: Mapping[Unit, Tensor]
    activations: Mapping[Unit, QuantSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What a trial did to the outputs, over all batches.

    ``error`` is ||y - y_float|| / ||y_float|| of the first floating point output; ``kl`` the mean KL(float || trial) in
    nats where it is logits; ``nll`` the mean increase of -log p(next token) in nats for a causal language model.
    """

    error: float
    kl: float | None = None
    nll: float | None = None


def units_of(program: Program) -> list[Unit]:
    """The weights of the program's layers in graph order, each with all layers that read it."""
    layers = find_layers(program.gm)
    shared, found = ties(layers), dict[str, Unit]()
    for layer in layers:
        group = tuple(shared.get(layer.name, [layer]))
        found.setdefault(group[0].name, Unit(group))
    return list(found.values())


Try = Callable[[Unit], Iterable[Trial]]


class Trials:
    """A float program on some data, ready to be tried out with changed weights.

    ``data`` as calibration takes it; token windows ``[n, length]`` of a causal language model give ``nll`` too. Kept in
    memory are the float model's outputs: n * length * vocabulary * 4 bytes for a language model.
    """

    def __init__(self, program: Program, data: Calibration, *, progress: Progress = quiet) -> None:
        self.gm = program.gm
        self.batches = batches_of(data, program.signature)
        self.nodes = list(program.gm.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.language = isinstance(data, Tensor)
        self.output, name = _output(program)
        flat: Sequence[Any] = next(n for n in reversed(self.nodes) if n.op == "output").args[0]
        self.position = [node is self.output for node in flat].index(True)
        self.logits = name == "logits" or (self.language and name != "last_hidden_state")
        self.progress = progress

    @cached_property
    def judges(self) -> list[_Judge]:
        """The float model's outputs, one batch each."""
        found = []
        for i, batch in enumerate(self.batches):
            self.progress("float model", i, len(self.batches))
            with torch.no_grad():
                output = self._finish(Trial({}), 0, batch, {})
            found.append(_Judge(self._checked(i, output), self.logits, self._tokens(i)))
        self.progress("float model", len(self.batches), len(self.batches))
        return found

    @property
    def float_nll(self) -> float | None:
        """-log p(next token) of the float model, mean in nats, for a causal language model."""
        if not self.language or not self.logits:
            return None
        return sum(j.nll for j in self.judges) / sum(j.tokens for j in self.judges)

    @cached_property
    def rows(self) -> int:
        """Rows of logits in all batches."""
        return sum(judge.rows for judge in self.judges)

    @cached_property
    def square(self) -> float:
        """||y_float||^2 over all batches; 1 for an output of zeros, whose errors are then absolute."""
        return sum(judge.square for judge in self.judges) or 1.0

    def one_by_one(
        self, units: Sequence[Unit], trials: Try, *, progress: Progress = quiet, what: str = "layers"
    ) -> Iterator[tuple[Unit, list[Change]]]:
        """For every unit, in the order in which the graph reads their weights, what each of its trials does."""
        starts: dict[fx.Node, list[Unit]] = {}
        for unit in units:
            starts.setdefault(self._start(unit), []).append(unit)
        done, values = 0, [dict[fx.Node, Any]() for _ in self.batches]
        for node in self.nodes[: self.order[self.output] + 1]:
            for unit in starts.pop(node, []):
                progress(what, done, len(units))
                yield unit, [self._try(trial, self.order[node], values) for trial in trials(unit)]
                done += 1
            if not starts:
                break
            with torch.no_grad():
                for batch, own in zip(self.batches, values, strict=True):
                    self._step(node, batch, own, {})
        progress(what, len(units), len(units))

    def all_at_once(self, trial: Trial) -> Change:
        """What the trial does, the whole graph computed."""
        return self._try(trial, 0, [{} for _ in self.batches])

    def measured(self, program: Program) -> Change:
        """What another program of the same signature, a compiled one, does to the outputs."""
        position = self.position
        with torch.no_grad():
            return self._change(
                [judge(program.gm(*batch)[position]) for judge, batch in zip(self.judges, self.batches, strict=True)]
            )

    def curvature(self, units: Sequence[Unit], *, seed: int = 0) -> dict[Unit, Tensor]:
        """F of every weight, of its shape: a small change dW of one weight alone costs sum F dW^2 in expectation.

        Logits: half the diagonal of the Fisher matrix, so that the cost is the mean KL(float || changed); one backward
        pass a batch, of sum log p(y) with each y drawn from the model's own distribution. Other outputs: the diagonal
        of J^T J / ||y||^2 with J the Jacobian, so that the cost is the squared relative error; the output times random
        signs takes the place of log p. What the gradients of single rows have in common averages out over the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        found = {unit: torch.zeros(unit.weight.shape, device=unit.weight.device) for unit in units}
        whole = 0.0
        for i, batch in enumerate(self.batches):
            self.progress("gradients", i, len(self.batches))
            leaves = {unit: unit.weight.detach().requires_grad_() for unit in units}
            for unit, leaf in leaves.items():
                leaf.register_post_accumulate_grad_hook(_squared_into(found[unit]))
            with torch.enable_grad():
                output = self._checked(i, self._finish(Trial(leaves), 0, batch, {}))
                _draw(output, self.logits, generator).backward(inputs=list(leaves.values()))
            whole += 2 * _rows(output).shape[0] if self.logits else float(output.detach().double().square().sum())
        self.progress("gradients", len(self.batches), len(self.batches))
        for value in found.values():
            value /= whole or 1.0
        return found

    def _checked(self, batch: int, output: Tensor) -> Tensor:
        """The float output, if it is finite and, for a language model, has a row a token."""
        if not bool(output.isfinite().all()):
            raise CalibrationError(f"the float model's output holds NaN or Inf in batch {batch}; the model or the data "
                                   f"are broken")  # fmt: skip
        tokens = self._tokens(batch)
        if tokens is not None and tuple(output.shape[:2]) != tuple(tokens.shape):
            raise InputError(f"the model gives {list(output.shape)} for windows {list(tokens.shape)}; token windows "
                             f"are for causal language models, give batches instead")  # fmt: skip
        return output

    def _tokens(self, batch: int) -> Tensor | None:
        return self.batches[batch][0] if self.language and self.logits else None

    def _try(self, trial: Trial, start: int, values: Sequence[Mapping[fx.Node, Any]]) -> Change:
        with torch.no_grad():
            parts = [
                judge(self._finish(trial, start, batch, dict(own)))
                for judge, batch, own in zip(self.judges, self.batches, values, strict=True)
            ]
        return self._change(parts)

    def _change(self, parts: Sequence[tuple[float, float, float]]) -> Change:
        """The change of all batches from each one's ||y - y_float||^2, sum of KL and sum of -log p."""
        squares, kl, nll = (sum(part[i] for part in parts) for i in range(3))
        tokens, before = sum(judge.tokens for judge in self.judges), sum(judge.nll for judge in self.judges)
        return Change(
            math.sqrt(squares / self.square),
            kl / self.rows if self.logits else None,
            (nll - before) / tokens if tokens else None,
        )

    def _start(self, unit: Unit) -> fx.Node:
        """The first node that reads the unit's weight."""
        users = [user for layer in unit.layers for user in layer.source.users]
        return min(users, key=self.order.__getitem__)

    def _finish(self, trial: Trial, start: int, batch: Batch, values: dict[fx.Node, Any]) -> Tensor:
        """The output of one batch, computed from the node ``start`` on."""
        new = {layer.source: weight for unit, weight in trial.weights.items() for layer in unit.layers}
        rounded = {
            layer.node: spec
            for unit, spec in trial.activations.items()
            for layer in unit.layers
            if layer.type == "linear"
        }
        values.update(new)
        for node in self.nodes[start : self.order[self.output] + 1]:
            if node not in new:
                self._step(node, batch, values, rounded)
        return values[self.output]  # type: ignore[no-any-return]

    def _step(
        self, node: fx.Node, batch: Batch, values: dict[fx.Node, Any], rounded: Mapping[fx.Node, QuantSpec]
    ) -> None:
        """Compute a node, and drop what it is the last to read."""
        if node.op == "placeholder":
            values[node] = batch[self.placeholders[node]]
        elif node.op == "get_attr":
            values[node] = fetch(self.gm, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node in rounded:
                args = (ops.fake_quantize_dynamic.default(args[0], str(rounded[node])), *args[1:])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for last in self.last_read.get(node, ()):
            values.pop(last, None)

    @cached_property
    def placeholders(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(n for n in self.nodes if n.op == "placeholder")}

    @cached_property
    def last_read(self) -> dict[fx.Node, list[fx.Node]]:
        """For every node the nodes that no later one reads."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes[: self.order[self.output] + 1]:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        found: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last.items():
            if node is not self.output:
                found.setdefault(reader, []).append(node)
        return found


@dataclass
class _Judge:
    """The float output of one batch, and how far another is from it: (squared distance, sum of KL, sum of nll)."""

    output: Tensor
    logits: bool
    tokens_of: Tensor | None
    square: float = field(init=False)
    nll: float = field(init=False)

    def __post_init__(self) -> None:
        self.square = float(self.output.double().square().sum())
        self.nll = self._nll(self.output) if self.tokens_of is not None else 0.0

    @property
    def rows(self) -> int:
        return self.output.shape[:-1].numel() if self.logits else 0

    @property
    def tokens(self) -> int:
        return 0 if self.tokens_of is None else int(self.tokens_of[:, 1:].numel())

    def __call__(self, output: Tensor) -> tuple[float, float, float]:
        square, kl = 0.0, 0.0
        want, got = _rows(self.output), _rows(output)
        for start in range(0, len(want), _CHUNK):
            part = slice(start, start + _CHUNK)
            square += float((got[part] - want[part]).float().square().sum())
            if self.logits:
                log_p, log_q = (torch.log_softmax(each[part].float(), -1) for each in (want, got))
                kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        return square, kl, self._nll(output) if self.tokens_of is not None else 0.0

    def _nll(self, output: Tensor) -> float:
        assert self.tokens_of is not None
        logits, targets = _rows(output[:, :-1]), self.tokens_of[:, 1:].reshape(-1)
        parts = zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
        return sum(float(torch.nn.functional.cross_entropy(a.float(), b, reduction="sum")) for a, b in parts)


def _rows(output: Tensor) -> Tensor:
    """``[..., classes]`` as ``[rows, classes]``."""
    return output.reshape(-1, output.shape[-1]) if output.dim() else output.reshape(1, 1)


def _squared_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds the square of a gradient to ``total`` as soon as it is there, and lets go of it."""

    def add(leaf: Tensor) -> None:
        if leaf.grad is not None:
            total.add_(leaf.grad.float().square())
            leaf.grad = None

    return add


def _draw(output: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """A random scalar of the output; see ``Trials.curvature``."""
    if not logits:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return (output * signs.to(output)).sum()
    log_p = torch.log_softmax(_rows(output).float(), -1)
    y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, y.to(log_p.device)).sum()


def _output(program: Program) -> tuple[fx.Node, str]:
    """The node and name of the output to judge: the one named logits, else the first of floating point."""
    flat: Sequence[Any] = next(n for n in reversed(program.gm.graph.nodes) if n.op == "output").args[0]
    names = dict(zip(output_names(program.signature.output), flat, strict=False))
    for name, node in sorted(names.items(), key=lambda item: item[0] != "logits"):
        found = info(node).type if isinstance(node, fx.Node) else None
        if isinstance(found, TensorType) and found.dtype.is_floating_point:
            return node, name
    raise InputError("the model has no floating point output to judge a change by")
