"""Sensitivity of layers, and the allocation that follows from it, on small models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import Convolutions, Tied, mlp
from torch import Tensor, nn

import fxquant
from fxquant import allocation, evaluate, sensitivity
from fxquant.errors import ConfigError
from fxquant.qtensor import quantize_tensor
from fxquant.scheme import parse_spec

CANDIDATES = ("e2m0/group16:fp16", "e2m1/group16:fp16", "e2m3/group16:fp16", "e4m3/channel")


class Language(nn.Module):
    """Logits of the next token from the current one; the first linear matters much more than the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.much, self.little = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 40, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(self.much(x) + 0.05 * self.little(x))}


@pytest.fixture(scope="module")
def language() -> Language:
    torch.manual_seed(0)
    return Language().eval()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 40, (4, 48), generator=torch.Generator().manual_seed(1))


def test_losses_of_a_language_model(language: Language, windows: Tensor) -> None:
    found = sensitivity.measure(language, {"input_ids": windows[:2]}, "W4A16-RTN", data=windows)
    assert found.measure == "kl"
    assert [q.name for q in found.layers] == ["much", "little", "head"]
    losses = {q.name: q for q in found.layers}
    kl = {name: q.kl or 0.0 for name, q in losses.items()}
    assert kl["much"] > 20 * kl["little"] > 0
    compiled = fxquant.compile(language, {"input_ids": windows[:2]}, "W4A16-RTN")
    whole = evaluate.compare(compiled, language, windows)
    assert found.float_perplexity == pytest.approx(whole.reference.value, rel=1e-5)
    assert found.whole.perplexity == pytest.approx(whole.perplexity.value - whole.reference.value, rel=1e-2)
    assert found.whole.kl == pytest.approx(whole.kl.value, rel=1e-3)
    assert found.ranked()[0].loss == max(q.loss for q in found.layers)
    with torch.no_grad():
        weight = language.much.weight
        error = (quantize_tensor(weight, "e2m1/group64").dequantize() - weight).norm() / weight.norm()
    assert losses["much"].weight_error == pytest.approx(float(error), rel=1e-5)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("loss", "want"), [(-0.2, 1), (0.1, 1), (0.11, 2), (0.5, 2), (0.51, 3)])
def test_the_classes_of_zeroquant_v2(loss: float, want: int) -> None:
    layer = sensitivity.LayerLoss("all", "", loss, 0.0, 0.0, 0.0, loss)
    assert sensitivity.Sensitivity("kl", (), layer, 8.0).v2_class == want
    assert sensitivity.Sensitivity("error", (), replace(layer, perplexity=None)).v2_class is None


def test_other_models_are_judged_by_their_output() -> None:
    x = torch.randn(2, 3, 9, 9)
    found = sensitivity.measure(Convolutions().eval(), (x,), "W4A16-INT", data=[(x,)])
    assert found.measure == "error"
    assert all(0 < q.loss == q.error for q in found.layers)
    assert {q.name for q in found.layers} == {"stem.0", "depthwise", "line", "head"}
    everything = {"rules": [{"match": "*", "keep": True}]}
    with pytest.raises(ConfigError, match="keeps every layer in float"):
        sensitivity.measure(mlp(), (torch.randn(2, 20),), everything, data=[(torch.randn(2, 20),)])


def plan(model: nn.Module, example: object, data: object, budget: float, **options: object) -> allocation.Plan:
    return allocation.plan(
        model, example, budget=budget, candidates=CANDIDATES, calibration=data, **options  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("probe", ["gradient", "noise"])
def test_bits_go_where_they_matter(language: Language, windows: Tensor, probe: str) -> None:
    found = plan(language, {"input_ids": windows[:2]}, windows, 5.6, probe=probe)
    spec = {row.name: row for row in found.rows}
    assert set(spec) == {"much", "little"}  # the head has the embedding's shape
    assert spec["much"].bits > spec["little"].bits
    assert found.measure == "kl"
    assert found.exact
    sizes = [quantize_tensor(getattr(language, row.name).weight, row.spec).nbytes for row in found.rows]
    assert found.bits == pytest.approx(8 * sum(sizes) / 2048)
    assert found.bits <= 5.6
    assert found.loss <= min(u.loss for u in found.uniform if u.fits)
    assert found.bound <= found.loss == pytest.approx(sum(row.loss for row in found.rows))
    measured = allocation.check(language, {"input_ids": windows[:2]}, found.config, windows)
    assert measured.kl == pytest.approx(found.loss, rel=0.5)


def test_the_config_compiles_to_the_size_that_was_promised(language: Language, windows: Tensor) -> None:
    example = {"input_ids": windows[:2]}
    config = fxquant.allocate(
        language, example, budget=5.0, candidates=CANDIDATES, calibration=windows, methods=["gptq"]
    )
    assert config.to_dict()["passes"] == [{"gptq": {}}]
    compiled = fxquant.compile(language, example, config, calibration=windows)
    layers = {layer.name: layer for layer in compiled.summary().layers}
    assert layers["head"].spec is None
    assert layers["embed"].spec is None
    assert 8 * sum(layers[n].bytes_after for n in ("much", "little")) / 2048 <= 5.0


def test_tied_heads_stay_in_float_and_keep_says_what_else(language: Language, windows: Tensor) -> None:
    tokens = torch.randint(0, 50, (2, 6))
    torch.manual_seed(0)
    tied = plan(Tied(), (tokens,), [(tokens,)], 6.0)
    assert {row.name for row in tied.rows} == {"up", "down"}
    example = {"input_ids": windows[:2]}
    assert {row.name for row in plan(language, example, windows, 6.0, keep=["mu*"]).rows} == {"little", "head"}
    with pytest.raises(ConfigError, match="keep 'nothing' matches no layer"):
        plan(language, example, windows, 6.0, keep=["nothing"])
    with pytest.raises(ConfigError, match="nothing is left to quantize"):
        plan(language, example, windows, 6.0, keep=["*"])


def test_a_budget_that_nothing_meets(language: Language, windows: Tensor) -> None:
    example = {"input_ids": windows[:2]}
    with pytest.raises(ConfigError, match=r"below the smallest possible, 4 \(e2m0/group16:fp16, scales included\)"):
        plan(language, example, windows, 3.9)
    assert {row.spec for row in plan(language, example, windows, 4.0).rows} == {"e2m0/group16:fp16"}
    with pytest.raises(ConfigError, match="token"):
        allocation.plan(language, example, budget=5.0, candidates=["e4m3/token"], calibration=windows)
    with pytest.raises(ConfigError, match="no candidates"):
        allocation.plan(language, example, budget=5.0, candidates=[], calibration=windows)


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    return model.eval(), torch.randn(256, 16)


def test_the_losses_of_layers_add_up() -> None:
    """Linearity: predicted squared errors of several uniform schemes against what all layers together give."""
    model, x = deep()
    specs: Sequence[str] = ("e2m1/channel", "int4/channel", "e2m3/channel", "e4m3/channel")
    found = allocation.plan(model, (x[:4],), budget=9.0, candidates=specs, calibration=[(x,)] * 20)
    for uniform in found.uniform:
        config = fxquant.Config(rules=({"match": "*", "weight": uniform.spec},))  # type: ignore[arg-type]
        measured = allocation.check(model, (x[:4],), config, [(x,)])
        assert measured.error**2 == pytest.approx(uniform.loss, rel=0.5)


def test_default_candidates_are_specs() -> None:
    assert [str(parse_spec(text)) for text in allocation.CANDIDATES] == list(allocation.CANDIDATES)
