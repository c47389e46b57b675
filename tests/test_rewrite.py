"""The rewrite engine: matching, declines with their reason, names and provenance kept."""

from __future__ import annotations

import pytest
import torch
from tiny_models import mlp
from torch import fx

from fxquant.capture import capture
from fxquant.graph import info
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Program, Stage, run, text
from fxquant.rewrite import (
    Call,
    Decline,
    Match,
    Rule,
    Var,
    apply_rules,
    aten,
    attach,
    fetch,
    free_name,
    identity,
    match_node,
)
from fxquant.verify import verify


def program() -> Program:
    return run(capture(mlp().eval(), (torch.randn(2, 20),)), [Stage(NORMALIZE)], check=verify)


LINEAR = Call(aten.linear.default, Var("x"), Var("w"), Var("b"))


def test_a_rule_fires_and_keeps_name_type_and_path() -> None:
    p = program()
    before = {n.name: info(n) for n in p.gm.graph.nodes}

    def double(match: Match) -> fx.Node | Decline:
        return match.call(aten.mul.Tensor, match.call(aten.linear.default, match["x"], match["w"], match["b"]), 2.0)

    log = apply_rules(p.gm, [Rule(LINEAR, double)])
    p.gm.recompile()
    assert [r.rule for r in log.rewrites] == ["double", "double"]
    assert [r.layer for r in log.rewrites] == ["0", "2"]
    for node in p.gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        assert info(node) == before[node.name]
    assert "linear : float32[batch, 32] = aten.mul" in text(p.gm)


def test_a_decline_keeps_the_node_and_its_reason() -> None:
    p = program()
    x = torch.randn(3, 20)
    before = p(x)

    def only_small(match: Match) -> fx.Node | Decline:
        return Decline(f"out_features {fetch(p.gm, match['w'].target).shape[0]} is not 7")

    log = apply_rules(p.gm, [Rule(LINEAR, only_small)])
    assert [d.reason for d in log.declines] == ["out_features 32 is not 7", "out_features 6 is not 7"]
    assert torch.equal(p(x), before)


def test_the_first_rule_that_fires_wins() -> None:
    p = program()

    def skip(match: Match) -> fx.Node | Decline:
        return Decline("no")

    def relu(match: Match) -> fx.Node | Decline:
        return match.call(aten.relu.default, match["x"])

    def never(match: Match) -> fx.Node | Decline:
        raise AssertionError("a later rule ran")

    pattern = Call(aten.gelu.default, Var("x"))
    log = apply_rules(p.gm, [Rule(pattern, skip), Rule(pattern, relu), Rule(pattern, never)])
    assert (len(log.declines), len(log.rewrites)) == (1, 1)


def test_a_variable_used_twice_must_be_the_same_node() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    same = graph.call_function(aten.add.Tensor, (a, a))
    other = graph.call_function(aten.add.Tensor, (a, b))
    graph.output((same, other))
    gm = fx.GraphModule({}, graph)
    pattern = Call(aten.add.Tensor, Var("v"), Var("v"))
    assert match_node(gm, pattern, same) is not None
    assert match_node(gm, pattern, other) is None


def test_identity_is_shared_memory_not_equal_values() -> None:
    x = torch.ones(4, 4)
    assert identity(x) == identity(x.detach())
    assert identity(x) != identity(x.clone())
    assert identity(x) != identity(x.t()[:, :3])


def test_attach_makes_the_path() -> None:
    gm = torch.nn.Module()
    attach(gm, "a.b.weight", torch.ones(2))
    assert fetch(gm, "a.b.weight").tolist() == [1, 1]
    with pytest.raises(ValueError, match="exists already"):
        attach(gm, "a.b.weight", torch.zeros(3))
    assert free_name(gm, "a.b.weight") == "a.b.weight_1"
    assert free_name(gm, "a.c") == "a.c"
