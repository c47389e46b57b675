"""compare: figures against ones computed by hand, what methods change, loaded models, wrong models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BothWays, Convolutions, Experts, RoutedExperts, Tied, mlp, tiny_decoder
from torch import Tensor, nn

import fxquant
from fxquant.comparison import _reference, _SideBySide
from fxquant.counterparts import counterparts
from fxquant.errors import CaptureError, ConfigError, InputError
from fxquant.show.numerics import Errors

ROUNDED = {"rules": [{"match": "lm_head", "keep": True}, {"match": "*", "weight": "e4m3/channel",
                                                         "activation": "e4m3/token"}]}  # fmt: skip
TOKENS = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """One layer of a decoder, with the layer names of a Llama: four heads, a gated MLP."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.embed, self.norm, self.mlp_norm = nn.Embedding(64, width), Norm(width), Norm(width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj, self.lm_head = nn.Linear(inner, width, bias=False), nn.Linear(width, 64, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        x = x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return {"logits": self.lm_head(x), "hidden": x}


def fresh(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(**sizes).eval()


def decoder(*passes: Any, **more: Any) -> tuple[fxquant.CompiledModel, nn.Module]:
    config = {**ROUNDED, **more, "passes": list(passes)}
    return fxquant.compile(fresh(), {"input_ids": TOKENS[:2]}, config, calibration=TOKENS), fresh()


def test_figures_are_those_of_the_definition() -> None:
    """One linear after the other: local from the float model's input, accumulated from the quantized one's."""
    torch.manual_seed(0)
    model = mlp().eval()
    x = torch.randn(5, 20)
    compiled = fxquant.compile(model, (x,), "W6A16-E3M2")
    found = compiled.compare(model, [(x,)])
    assert [row.name for row in found.layers] == ["0", "2"]

    def restored(layer: Any) -> nn.Linear:
        new = nn.Linear(layer.in_features, layer.out_features)
        weight = fxquant.quantize_tensor(layer.weight, "e3m2/channel").dequantize()
        new.load_state_dict({"weight": weight, "bias": layer.bias})
        return new

    with torch.no_grad():
        first, second = restored(model[0]), restored(model[2])
        hidden, want = model[1](model[0](x)), model(x)
        local, accumulated = second(hidden), second(model[1](first(x)))
    for errors, got in ((found.layers[1].local, local), (found.layers[1].accumulated, accumulated)):
        assert errors is not None
        assert errors.relative == pytest.approx(relative(got, want), rel=1e-4)
        assert errors.sqnr == pytest.approx(-20 * math.log10(relative(got, want)), rel=1e-4)
        assert errors.cosine == pytest.approx(float(torch.cosine_similarity(got.flatten(), want.flatten(), dim=0)))
    assert found.layers[0].local == found.layers[0].accumulated
    assert found.outputs[0].errors == found.layers[1].accumulated
    assert (found.samples, found.tokens, found.seed) == (5, None, None)


def test_what_lies_on_the_grid_is_exact() -> None:
    """Integers up to 7 are values of INT4 under the scale 1."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-7, 8, (8, 16)))[:, 0] = 7.0
    compiled = fxquant.compile(model, (torch.randn(2, 16),), {"rules": [{"match": "*", "weight": "int4/channel"}]})
    found = compiled.compare(model)
    assert found.layers[0].local == Errors(math.inf, 1.0, 0.0)
    assert found.layers[0].weight is not None
    assert sum(found.layers[0].weight.counts) == 128


METHODS: dict[str, tuple[tuple[Any, ...], int]] = {
    "none": ((), 0), "smooth": (("smooth",), 2), "rotate": (("rotate",), 0), "folded": (({"rotate": {"size": 8}},), 1),
    "lorc": (("smooth", {"lorc": {"rank": 4}}), 2), "attention": (("quantize_attention",), 0),
    "both": (("smooth", "quantize_attention"), 2), "gptq": (("gptq",), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    """Layers that are equal in exact arithmetic are compared, the others say why; the output's error is the model's."""
    passes, scaled = METHODS[name]
    compiled, model = decoder(*passes)
    found = compiled.compare(model, TOKENS[:2])
    rows = [row for row in found.layers if row.type != "attention"]
    assert len(rows) == 9
    assert sum(bool(row.reason) for row in rows) == scaled
    for row in found.layers:
        if row.reason:
            assert row.local is None
            assert "scaled or mixed its output channels" in row.reason
        else:
            assert row.local is not None
            assert row.accumulated is not None
            assert row.local.relative < 0.1, row.name
            assert row.accumulated.relative < 0.15, row.name
    with torch.no_grad():
        want = torch.cat([model(TOKENS[i : i + 1])["logits"] for i in range(2)])
        got = torch.cat([compiled(input_ids=TOKENS[i : i + 1])["logits"] for i in range(2)])
    errors = found.outputs[0].errors
    assert errors is not None
    assert errors.relative == pytest.approx(relative(got, want), rel=1e-3)
    assert found.outputs[0].top1 == float((got.argmax(-1) == want.argmax(-1)).float().mean())
    assert not found.notes


def test_compensation_is_part_of_its_layer() -> None:
    plain, model = decoder()
    with_factors, _ = decoder({"lorc": {"rank": 8}})
    before, after = (c.compare(model, TOKENS[:2]).layer("up_proj") for c in (plain, with_factors))
    assert before.local is not None
    assert after.local is not None
    assert after.local.relative < before.local.relative
    assert not after.includes


def test_shifts_and_attention_products() -> None:
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}]
    compiled, model = decoder("pre_shift", "fold_activation_scales", rules=rules)
    found = compiled.compare(model, TOKENS[:2])
    rows = {row.name: row for row in found.layers}
    for part in ("v_proj", "up_proj"):
        assert "fold_activation_scales" in rows[part].reason
    query = rows["q_proj"]
    assert query.local is not None
    assert query.local.relative < 0.3
    assert query.input is not None
    assert query.input.unit == "scale"
    assert rows["o_proj"].includes == ("v_proj",)


def test_kv_cache_at_the_first_step() -> None:
    from fxquant.hf import with_cache

    model = with_cache(tiny_decoder())
    config = {"rules": [{"match": "*", "weight": "e4m3/channel"}], "passes": ["quantize_kv_cache"]}
    compiled = fxquant.compile(model, model.example_inputs(), config, calibration=TOKENS)
    found = compiled.compare(model, TOKENS[:2])
    stored = [row for row in found.layers if row.type == "kv cache"]
    assert {row.name for row in stored} == {f"present_{i}_{kind}" for i in (0, 1) for kind in ("key", "value")}
    for row in stored:
        assert row.local is not None
        assert 0 < row.local.relative < 0.02, row
    assert sum(row.name.endswith(".attention") for row in found.layers) == 2
    assert "kv cache" in next(o.reason for o in found.outputs if o.name == "present_0_key")
    with pytest.raises(InputError, match="with_cache"):
        compiled.compare(tiny_decoder(), TOKENS[:2])


@pytest.mark.parametrize(
    "model", [Experts(), RoutedExperts(), BothWays(), Convolutions(), Tied()], ids=lambda m: type(m).__name__
)
def test_kinds_of_layers(model: nn.Module) -> None:
    """Expert weights, a weight used both ways, convolutions, ties: each layer has an error of its own."""
    example: Any = {
        "Experts": (torch.randn(3, 4, 8),), "RoutedExperts": (torch.randn(4, 8), torch.tensor([0, 2, 1, 1])),
        "BothWays": (torch.randn(4, 16),), "Convolutions": (torch.randn(2, 3, 8, 8),),
        "Tied": (torch.randint(0, 50, (2, 9)),),
    }[type(model).__name__]  # fmt: skip
    named = ["embed"] if isinstance(model, Tied) else []
    rules = [{"match": name, "weight": "e3m2/channel"} for name in (*named, "*")]
    compiled = fxquant.compile(model.eval(), example, {"rules": rules})
    found = compiled.compare(model, [example])
    assert not any(row.reason for row in found.layers)
    for row in found.layers:
        if row.spec is not None:
            assert row.local is not None
            assert 0.005 < row.local.relative < 0.1, row.name
            assert row.weight is not None
            assert row.weight.outside == 0


def test_histograms_count_every_value() -> None:
    compiled, model = decoder()
    found = compiled.compare(model, TOKENS[:2])
    for row in found.layers:
        if row.spec is not None:
            weight = model.get_submodule(row.name).weight
            assert row.weight is not None
            assert row.weight.total == weight.numel()
            assert len(row.weight.counts) <= 64
            assert (row.weight.low, row.weight.high, row.weight.unit) == (-448.0, 448.0, "scale")
            assert row.input is not None
            assert row.input.total == 64 * weight.shape[1]
            assert row.input.unit == "scale"
    head = found.layer("lm_head")
    assert head.weight is None
    assert head.input is not None
    assert head.input.unit == "value"
    with pytest.raises(ConfigError, match="did you mean 'lm_head'"):
        found.layer("lm_hea")


def test_a_loaded_model_compares_alike(tmp_path: Path) -> None:
    compiled, model = decoder("smooth")
    compiled.save(tmp_path / "out")
    before = compiled.compare(model, TOKENS[:1])
    assert fxquant.load(tmp_path / "out").compare(model, TOKENS[:1]) == before


def test_an_exported_program_is_a_float_model() -> None:
    model = fresh()
    exported = torch.export.export(model, (), {"input_ids": TOKENS[:2]}, strict=False)
    compiled = fxquant.compile(exported, None, {"rules": [{"match": "*", "weight": "e3m2/channel"}]})
    found = compiled.compare(exported, [{"input_ids": TOKENS[2:4]}])
    assert not any(row.reason for row in found.layers)
    errors = found.layer("down_proj").local
    assert errors is not None
    assert 0.01 < errors.relative < 0.1


def test_rank_text_and_json() -> None:
    compiled, model = decoder("smooth")
    found = compiled.compare(model)
    assert found.seed == 0
    local = [row.sqnr("local") for row in found.ranked("local")]
    assert local == sorted(local)
    accumulated = [row.sqnr("accumulated") for row in found.ranked("accumulated")]
    assert accumulated == sorted(accumulated)
    worst = found.ranked("local")[0]
    text = str(found).splitlines()
    assert worst.name in next(line for line in text if line.lstrip().startswith("1 "))
    assert any(line.startswith("not compared: 2 layers") for line in text)
    figures = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    exact = next(row for row in figures["layers"] if row["name"] == "embed")
    assert exact["local"] == {"sqnr": None, "cosine": 1.0, "relative": 0.0}
    assert "<script" not in found._repr_html_()
    assert worst.name in found._repr_html_()


def test_values_that_are_not_finite_rank_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        model[1].weight.fill_(1e-30)
    compiled = fxquant.compile(model, (torch.randn(2, 4),), "W6A16-E3M2")
    rows = compiled.compare(model, [(torch.full((2, 4), 10.0),)]).ranked()
    assert rows[0].nonfinite > 0


def test_values_are_dropped_when_they_were_read() -> None:
    compiled, model = decoder("smooth")
    calls: list[Any] = [((), {"input_ids": TOKENS[:1]})]
    reference = _reference(model, compiled.program, calls)
    side = _SideBySide(compiled.program, reference, counterparts(compiled.program, reference))
    most = 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(side.mine.values) + len(side.theirs.values))

    with torch.no_grad():
        side.run([TOKENS[:1]], [TOKENS[:1]], 0, 1, watch)
    assert len(side.mine.values) == len(side.theirs.values) == 2  # the outputs
    assert most < 0.5 * len(side.mine.nodes)


def test_another_model_is_refused() -> None:
    compiled, model = decoder()
    with pytest.raises(InputError, match=r"the weight of gate_proj is \[40, 32\], and \[48, 32\]"):
        compiled.compare(fresh(inner=40), TOKENS[:1])
    with pytest.raises((InputError, CaptureError), match="is it the one that was compiled"):
        compiled.compare(Convolutions(), TOKENS[:1])
    missing = fresh()
    missing.lm_head = nn.Identity()
    with pytest.raises(InputError, match="the float model has no layer 'lm_head'"):
        compiled.compare(missing, TOKENS[:1])
    with torch.no_grad():
        model.up_proj.weight.mul_(1.1)  # type: ignore[union-attr, operator]
    assert "the weights of 1 layer, up_proj" in compiled.compare(model, TOKENS[:1]).notes[0]
    for inputs, told in (("text", "is a str"), ([], "no batches"), ([{"input_ids": torch.randn(1, 4)}], "batch 0")):
        with pytest.raises(InputError, match=told):
            compiled.compare(model, inputs)


def test_exact_and_infinite_figures() -> None:
    from fxquant.show.numerics import figures

    assert figures(None) == ("", "", "")
    assert figures(Errors(math.inf, 1.0, 0.0))[0] == "exact"
    assert figures(Errors(28.1, 0.999, 0.0392)) == ("28.1 dB", "0.99900", "3.92 %")
