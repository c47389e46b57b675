"""Gradients of the graph against those of the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Tied, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.config import load_config
from fxquant.errors import CalibrationError
from fxquant.gradients import output_importance, task_loss
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.quantize_activations import QUANTIZE_ACTIVATIONS
from fxquant.program import Stage, run
from fxquant.verify import verify

G = torch.Generator().manual_seed(0)


def graph(model: nn.Module, example: Tensor) -> Any:
    """In QDQ form with rounded activations: the gradients must be those of the float model all the same."""
    config = load_config({"rules": [{"match": "*", "weight": "e2m1", "activation": "e2m1/token"}]})
    given = {"rules": config.layer_rules(), "calibration": []}
    program = capture(model, (example,))
    run(program, [Stage(NORMALIZE), Stage(QUANTIZE_ACTIVATIONS, given), Stage(INSERT_QDQ, given)], check=verify)
    return program.gm


def by_hand(model: nn.Module, name: str, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared gradients of a layer's output ``[tokens, channels]``."""
    kept: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(y))
    out = model(x)
    hook.remove()
    (grad,) = torch.autograd.grad(loss(out["logits"] if isinstance(out, dict) else out), kept)
    return grad.square().reshape(-1, grad.shape[-1])


@pytest.mark.parametrize("tokens", [False, True])
def test_squares_are_summed_over_channels_and_over_tokens(tokens: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Tied().eval() if tokens else mlp().eval()
    batches = [torch.randint(0, 50, (2, 7), generator=G) if tokens else torch.randn(9, 20, generator=G) for _ in "ab"]
    gm = graph(model, batches[0])
    layers = {info(n).path: n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default}
    names = ["up", "down"] if tokens else ["0", "2"]
    found = output_importance(gm, [layers[name] for name in names], [[b] for b in batches])

    def loss(y: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) if tokens else y.square().sum() / 2

    for name in names:
        squares = [by_hand(model, name, b, lambda y, b=b: loss(y, b)) for b in batches]  # type: ignore[misc]
        for got, want in zip(found[layers[name]].tokens, squares, strict=True):
            assert torch.allclose(got, want.sum(1), rtol=1e-4, atol=1e-12)
        assert torch.allclose(found[layers[name]].channels, torch.cat(squares).sum(0), rtol=1e-4, atol=1e-12)


def test_a_gradient_that_is_no_number_is_named() -> None:
    gm = graph(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(5, 4))
    layers = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    with pytest.raises(CalibrationError, match="layer '0': the gradient of its output is NaN or Inf in batch 1"):
        output_importance(gm, layers, [[torch.randn(5, 4)], [torch.full((5, 4), torch.nan)]])


def test_a_model_without_floats_has_no_loss() -> None:
    with pytest.raises(CalibrationError, match="no output of floats"):
        task_loss([torch.ones(3, dtype=torch.int64)], [torch.ones(3)])
