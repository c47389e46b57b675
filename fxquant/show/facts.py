"""What a layer's stored weight and its place in the graph say: rows of name and text for ``explain``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxquant.graph import info
from fxquant.grids import FloatFormat, Grid
from fxquant.ops import ROUNDINGS
from fxquant.program import Program, target_name
from fxquant.show.numerics import Comparison, Errors, Sort, figures
from fxquant.show.stored import StoredWeight, stored_weight
from fxquant.show.summary import LayerSummary, weight_uses
from fxquant.show.units import percent, plural

Row = tuple[str, str]


def weight_facts(program: Program, layer: LayerSummary) -> Iterator[Row]:
    """The grid, how much of it is used, the scales and the shifts of a quantized layer; none for one in float."""
    use = next((u for u in weight_uses(program.gm) if u.layer.name == layer.node and not u.quant.part_of), None)
    if use is None:
        return
    found = stored_weight(program.gm, use)
    yield "grid", grid_text(found.spec.format)
    yield "codes", _codes(found)
    yield "scales", _scales(found)
    if (bias := found.exponent_bias) is not None:
        yield (
            "shifts",
            f"columns divided by 2^{int(bias.min())} to 2^{int(bias.max())}, which its input is multiplied by",
        )


def grid_text(format: Grid) -> str:
    """``63 values up to 28, smallest normal 0.25, smallest above 0 0.0625``."""
    table = format.table()
    count = int(table[table.isfinite()].unique().numel())
    normal = f", normal from {format.min_normal:g}" if isinstance(format, FloatFormat) else ""
    return f"{count} values up to {format.max:g}{normal}, {format.smallest:g} the smallest above 0"


def _codes(found: StoredWeight) -> str:
    used = torch.bincount(found.codes.reshape(-1), minlength=2**found.spec.format.bits)
    values = found.spec.format.table()
    top = used[values.abs() == values[values.isfinite()].abs().max()].sum()
    zeros = used[values == 0].sum()
    whole = int(used.sum())
    return (
        f"{int((used > 0).sum())} of {len(used)} used, {percent(int(top) / whole)} of weights at the largest size, "
        f"{percent(int(zeros) / whole)} zero"
    )


def _scales(found: StoredWeight) -> str:
    scales = found.scales.effective
    low, high = float(scales.min()), float(scales.max())
    spread = f", {high / low:.3g} times apart" if low > 0 and high > low else ""
    zero = "" if found.scales.zero_point is None else ", each with a zero point"
    return f"{plural(scales.numel(), 'scale')}, {low:.3g} to {high:.3g}{spread}{zero}"


def graph_facts(program: Program, layer: LayerSummary) -> Iterator[Row]:
    """What the layer reads, and what reads it."""
    nodes = {node.name: node for node in program.gm.graph.nodes}
    node = nodes[layer.node]
    reads = [n for n in node.all_input_nodes if n.op != "get_attr"]
    while reads and reads[0].target in ROUNDINGS:
        reads = [n for n in reads[0].all_input_nodes if n.op != "get_attr"]
    if reads:
        yield "reads", ", ".join(map(_named, reads[:3]))
    yield (
        "feeds",
        ", ".join(_named(user) for user in list(node.users)[:4])
        + (f" and {len(node.users) - 4} more" if len(node.users) > 4 else ""),
    )


def _named(node: fx.Node) -> str:
    """``aten.silu of model.layers.0.mlp.act_fn``; the name of an input, or ``the output``."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"input {node.name}"
    path = info(node).path
    return f"{target_name(node.target)}{f' of {path}' if path else f' (%{node.name})'}"


def comparison_facts(comparison: Comparison, layer: LayerSummary) -> Iterator[Row]:
    """The layer's error against the float model, and its rank."""
    row = next((r for r in comparison.layers if r.node == layer.node), None)
    if row is None:
        return
    if row.reason:
        yield "compared", f"not: {row.reason}"
        return
    sorts: tuple[tuple[Sort, Errors | None], ...] = (("local", row.local), ("accumulated", row.accumulated))
    for by, found in sorts:
        sqnr, cosine, relative = figures(found)
        ranked = comparison.ranked(by)
        rank = f"rank {1 + ranked.index(row)} of {len(ranked)}, 1 the worst"
        yield by, f"{sqnr}, cosine {cosine}, {relative} off the float model's output ({rank})"
    if row.includes:
        yield "includes", f"the rounding of {', '.join(row.includes)}, whose output cannot be compared alone"
