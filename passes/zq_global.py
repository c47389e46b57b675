"""zq_global: the codes of a block trained together, so that the block's output stays the float block's (ZQ-Global).

The graph is gone through block by block (``fxquant.blocks``). A block's quantized weights become latent weights rounded
straight through (``solvers.distill``), and Adam changes them until the block, on inputs from the quantized blocks
before it and with its activations rounded as the graph says, gives what the float model's block gives. ZeroQuant-V2
(2303.08302).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.blocks import Block, Values, compute, evaluate, find_blocks, layers_on, schedule
from fxquant.calibrate import Statistics
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph import info
from fxquant.program import Pass, Program, quiet
from fxquant.qdq import float_weight, quant_of, quantized_of, quantized_weights, replace_weight
from fxquant.qtensor import QuantizedTensor
from fxquant.rewrite import Log, Rewrite, aten
from fxquant.solvers.distill import Latent, Loss, Outcome, distill, no_trained_scales, relative_error
from fxquant.tasks import computed

RULE = "zq_global"


def zq_global(program: Program, settings: Mapping[str, Any]) -> Log:
    """``settings``: ``calibration`` (batches as ``batches_of`` makes them), ``progress``, ``blocks``, ``sequential``,
    ``float_targets``, ``loss``, ``train_scales``, and options of ``solvers.distill.distill``: ``iterations``,
    ``learning_rate``, ``batch``; ``keep`` (``tasks.Keep``), by which what was found for a block is known by its name.
    """
    gm, log, batches = program.gm, Log(), settings["calibration"]
    progress = settings.get("progress", quiet)
    try:
        blocks = find_blocks(gm, settings.get("blocks", "auto"))
    except ValueError as error:
        raise ConfigError(f"pass {RULE!r}: {error}") from error
    weights = _trainable(gm, blocks, log)
    units = schedule(gm, [b for b in blocks if weights[b.name]])
    last = {node: at for at, unit in enumerate(units) for node in _reads(unit)}
    float_model, student = (Values(gm, batches, as_float=as_float) for as_float in (True, False))
    walks = [student, float_model] if settings.get("float_targets", True) else [student]
    if not settings.get("sequential", True):
        walks = [float_model]
    peak, done, total = 0, 0, sum(isinstance(unit, Block) for unit in units)
    for at, unit in enumerate(units):
        teacher = float_model if float_model in walks else Values(gm, batches, True, walks[0].values)
        rows = list(teacher.outputs(unit)) if isinstance(unit, Block) or teacher in walks else []
        if isinstance(unit, Block):
            progress(RULE, done, total)
            held = _Training(gm, unit, weights[unit.name], walks[0], rows).run(settings, log)
            peak, done = max(peak, held + sum(walk.nbytes() for walk in walks)), done + 1
        for walk in walks:
            walk.advance(unit, rows if walk is teacher else walk.outputs(unit), {n for n in last if last[n] > at})
    progress(RULE, total, total)
    log.rewrites.insert(0, Rewrite("calibrate", "", "", f"{len(batches)} batches, {peak / 2**20:.1f} MiB at most"))
    return log


def _reads(unit: Block | fx.Node) -> Sequence[fx.Node]:
    return unit.all_input_nodes if isinstance(unit, fx.Node) else unit.inputs


def _trainable(gm: fx.GraphModule, blocks: Sequence[Block], log: Log) -> dict[str, list[fx.Node]]:
    """The weights to train of every block; the others are declined."""
    home = {node: block.name for block in blocks for node in block.nodes}
    found: dict[str, list[fx.Node]] = {block.name: [] for block in blocks}
    for weight in quantized_weights(gm):
        users = layers_on(weight) or [weight]
        homes = {home.get(user) for user in users}
        reason = None
        if homes == {None}:
            reason = "it is in none of the blocks"
        elif len(homes) > 1:
            names = ", ".join(dict.fromkeys(info(user).path or user.name for user in users))
            reason = f"its weight is shared by {names}, which are not in one block"
        elif all(user.target is aten.embedding.default for user in users):
            reason = "an embedding looks rows up and sums over nothing"
        elif quantized_of(gm, weight).exponent_bias is not None:
            reason = "its columns have exponent biases; zq_global comes before fold_activation_scales"
        if reason is not None:
            log.declined(RULE, users[0], f"{reason}; its codes stay")
        else:
            found[str(home[users[0]])].append(weight)
    return found


@dataclass
class _Training:
    """One block in training, on the values of the walk ``student``. ``rows`` is what it should give: batch, output."""

    gm: fx.GraphModule
    block: Block
    weights: Sequence[fx.Node]
    student: Values
    rows: Sequence[Sequence[Any]]

    def run(self, settings: Mapping[str, Any], log: Log) -> int:
        """Train, write what was found and say so; returns the bytes it took beside the values of the walks."""
        self._check_finite()
        with torch.no_grad():
            latents = [self._latent(node, settings.get("train_scales", False), log) for node in self.weights]
        if not any(map(_is_float, self.rows[0])):
            for node in self.weights:
                log.declined(RULE, layers_on(node)[0], f"block {self.block.name} gives no floats to aim at")
            return 0
        split = Statistics(self.block.nodes[0], [row[0] for row in self.rows])
        options = {key: settings[key] for key in ("iterations", "learning_rate", "batch")}

        def train() -> tuple[Outcome, list[QuantizedTensor]]:
            loss = self._loss(settings.get("loss", "relative"))
            found = distill(latents, loss, split.train, split.held_out, **options)
            return found, [latent.quantized() for latent in latents] if found.improved else []

        found, trained = settings.get("keep", computed)(f"{RULE}/{self.block.name}", train)
        change = self._change(found, bool(split.held_out))
        for i, node in enumerate(self.weights):
            layer = layers_on(node)[0]
            if found.improved:
                replace_weight(self.gm, node, trained[i], RULE)
                log.rewrote(RULE, layer, f"{quant_of(node).spec}, {change}")
            else:
                log.declined(RULE, layer, f"nothing was better than the codes it had: {change}")
        return sum(latent.nbytes for latent in latents) + sum(
            v.nbytes for row in self.rows for v in row if isinstance(v, Tensor)
        )

    def _latent(self, node: fx.Node, train_scales: bool, log: Log) -> Latent:
        start = quantized_of(self.gm, node)
        if train_scales and (why := no_trained_scales(start)):
            log.declined(RULE, layers_on(node)[0], f"its scales stay: {why}")
            train_scales = False
        value = float_weight(self.gm, node).reshape(start.codes.shape)
        return Latent(start, value, train_scales=train_scales)

    def _loss(self, kind: str) -> Loss:
        """``loss(weights, batch)``: the block's squared error against ``rows``, the mean over its float outputs."""
        nodes, made, student = self.block.nodes, self.block.outputs, self.student
        read = student.fixed(nodes)
        known = evaluate(self.gm, [n for n in read if not _upstream(n) & set(self.weights)])
        floats = [at for at in range(len(made)) if _is_float(self.rows[0][at])]
        power = {at: _mean_square([row[at] for row in self.rows]) or 1.0 for at in floats}
        shapes = [(tuple(node.args[4]), float_weight(self.gm, node).dtype) for node in self.weights]  # type: ignore[arg-type]

        def loss(weights: Sequence[Tensor], batch: int) -> Tensor:
            given = {
                n: w.reshape(shape).to(dtype)
                for n, w, (shape, dtype) in zip(self.weights, weights, shapes, strict=True)
            }
            fixed = evaluate(self.gm, read, known | given)
            outputs = compute(nodes, made, student.given(self.block, batch), fixed)
            return torch.stack(
                [relative_error(outputs[at], self.rows[batch][at], power[at], kind) for at in floats]
            ).mean()

        return loss

    def _change(self, found: Outcome, held_out: bool) -> str:
        on = " held out" if held_out else ""
        before, after = math.sqrt(found.start), math.sqrt(found.best)
        return f"block {self.block.name}: output error {before:.2%} -> {after:.2%}{on}, iteration {found.iteration}"

    def _check_finite(self) -> None:
        for node in self.block.inputs:
            for i, value in enumerate(self.student.values[node]):
                bad = int((~value.isfinite()).sum()) if _is_float(value) else 0
                # a mask holds -inf on purpose
                if bad and bool(value.isnan().any() | (value == torch.inf).any()):
                    raise CalibrationError(
                        f"block {self.block.name!r}: its input {node.name} holds {bad} NaN or Inf among "
                        f"{value.numel()} values in calibration batch {i}; the model or its data are broken before it"
                    )


def _upstream(node: fx.Node) -> set[fx.Node]:
    """A constant and what it is computed from."""
    return {node}.union(*(_upstream(n) for n in node.all_input_nodes))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _mean_square(values: Sequence[Tensor]) -> float:
    return sum(float(v.float().square().mean()) for v in values) / len(values)


ZQ_GLOBAL = Pass("zq_global", "train the codes of each block against its float outputs (ZQ-Global)", zq_global)
