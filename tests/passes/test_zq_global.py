"""The zq_global pass: blocks trained on what they are given, towards what the float model gives; what it declines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied
from tiny_models import mlp as unseeded
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError
from fxquant.qtensor import quantize_tensor
from fxquant.solvers.distill import Latent, distill, relative_error

SPEC, TOKENS = "e2m1/group16", "e4m3/token"
G = torch.Generator().manual_seed(0)
MIX = torch.randn(20, 20, generator=G)
BATCHES = [torch.randn(64, 20, generator=G) @ MIX for _ in range(8)]
OPTIONS = {"iterations": 48, "learning_rate": 0.015, "batch": 2}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return unseeded()


def compiled(model: nn.Module, data: Any, *passes: Any, spec: str = SPEC, **rule: Any) -> fxquant.CompiledModel:
    config = {"rules": [{"match": "*", "weight": spec, **rule}], "passes": list(passes)}
    example = data[0] if isinstance(data[0], dict) else (data[0],)
    return fxquant.compile(model, example, config, calibration=data)


def zq(**options: Any) -> dict[str, Any]:
    return {"zq_global": OPTIONS | options}


def told(model: fxquant.CompiledModel) -> tuple[dict[str, str], dict[str, str]]:
    """Details of what was trained and reasons of what was declined, by layer."""
    step = next(s for s in model.program.trace if s.name == "zq_global")
    return {r.layer: r.detail for r in step.rewrites if r.rule == "zq_global"}, {
        d.layer: d.reason for d in step.declines
    }


def errors(detail: str) -> tuple[float, float]:
    before, after = re.search(r"output error ([\d.]+)% -> ([\d.]+)%", detail).groups()
    return float(before) / 100, float(after) / 100


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    return LlamaForCausalLM(config).eval(), [{"input_ids": t} for t in torch.randint(0, 60, (16, 4, 24), generator=G)]


def logits_error(model: fxquant.CompiledModel, llama: tuple[nn.Module, list[dict[str, Tensor]]]) -> float:
    with torch.no_grad():
        want = torch.cat([llama[0](**batch).logits for batch in llama[1][7::8]])
        got = torch.cat([model(**batch)["logits"] for batch in llama[1][7::8]])
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("first", [[], ["gptq"]], ids=["from rtn", "from gptq"])
def test_blocks_come_closer_to_the_float_model(first: list[str], llama: Any) -> None:
    """W4A8: the blocks of a small Llama, and its logits for batches that were not trained on. Without iterations
    nothing changes."""
    before, idle, after = (compiled(*llama, *first, *more, activation=TOKENS)
                           for more in ([], [zq(iterations=0)], [zq()]))  # fmt: skip
    details, declined = told(after)
    assert {re.search(r"block (\S+):", text)[1] for text in (details | declined).values()} == {
        "model.layers.0", "model.layers.1", "lm_head",
    }  # fmt: skip
    assert "model.layers.1.mlp.down_proj" in details
    assert all(b < a for a, b in map(errors, details.values()))
    assert logits_error(after, llama) < logits_error(before, llama)
    assert {q.method for q in after.summary().layers if q.name in details} == {"zq_global"}
    assert torch.equal(idle(**llama[1][0])["logits"], before(**llama[1][0])["logits"])
    assert not told(idle)[0]
    assert all("nothing was better than the codes it had" in reason for reason in told(idle)[1].values())


def rounded(x: Tensor) -> Tensor:
    return quantize_tensor(x, "e4m3/channel").dequantize()


@pytest.mark.parametrize(
    ("sequential", "float_targets"), [(True, True), (True, False), (False, False)], ids=["both", "inputs", "neither"]
)
def test_what_a_block_is_given_and_aims_at(sequential: bool, float_targets: bool) -> None:
    """By hand, two blocks of one layer each, with activations rounded in the student only: the same codes."""
    model = mlp().eval()
    options = {"sequential": sequential, "float_targets": float_targets, "loss": "mse"}
    got = compiled(model, BATCHES, zq(**options), activation=TOKENS)

    def trained(layer: nn.Linear, given: list[Tensor], targets: list[Tensor]) -> Tensor:
        power = sum(float(t.square().mean()) for t in targets) / len(targets)
        latent = Latent(quantize_tensor(layer.weight, SPEC), layer.weight)

        def loss(weights: list[Tensor], i: int) -> Tensor:
            return relative_error(
                nn.functional.linear(rounded(given[i]), weights[0], layer.bias), targets[i], power, "mse"
            )

        assert distill([latent], loss, range(7), [7], **OPTIONS).improved
        return latent.quantized().dequantize()

    with torch.no_grad():
        hidden = [model[0](x) for x in BATCHES]
        first = trained(model[0], BATCHES, hidden)
        own = [nn.functional.linear(rounded(x), first, model[0].bias) for x in BATCHES]
        given = [nn.functional.gelu(x) for x in (own if sequential else hidden)]
        on_float = [model[2](nn.functional.gelu(x)) for x in hidden]
        second = trained(model[2], given, on_float if float_targets else [model[2](x) for x in given])
        x = nn.functional.gelu(nn.functional.linear(rounded(BATCHES[0]), first, model[0].bias))
        want = nn.functional.linear(rounded(x), second, model[2].bias)
    assert torch.allclose(got(BATCHES[0]), want, atol=1e-5)


def test_what_is_worse_on_held_out_data_is_not_taken() -> None:
    """The last of eight batches is not trained on; where its inputs lie elsewhere, training does harm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8, bias=False)).eval()
    narrow = [torch.randn(16, 2, generator=G) @ torch.randn(2, 20, generator=G) for _ in range(7)]
    wide = torch.randn(400, 20, generator=G)
    refused = compiled(model, [*narrow, wide], zq(learning_rate=0.3))
    assert "nothing was better than the codes it had" in told(refused)[1]["0"]
    assert torch.equal(refused(wide), compiled(model, [wide])(wide))
    assert "held out" in told(compiled(model, BATCHES, zq()))[0]["0"]
    assert "held out" not in told(compiled(model, BATCHES[:7], zq()))[0]["0"]


def test_scales_are_trained_where_they_can_be() -> None:
    model = mlp().eval()
    fixed, trained = (compiled(model, BATCHES, zq(train_scales=t), spec="e2m1/channel:fp16") for t in (False, True))
    before = {k: v for k, v in fixed.program.gm.state_dict().items() if k.endswith("scale")}
    after = trained.program.gm.state_dict()
    assert all(not torch.equal(v, after[k]) and v.dtype == after[k].dtype == torch.float16 for k, v in before.items())
    reasons = [d.reason for s in compiled(model, BATCHES, zq(train_scales=True), spec="mxfp4").program.trace
               for d in s.declines if s.name == "zq_global"]  # fmt: skip
    assert any("its scales stay: scales stored as e8m0 are too coarse to be trained" in r for r in reasons)


@pytest.mark.parametrize(
    "spec", ["int4/channel", "uint4/group8:fp16", "nf4/group16", "mxfp4", "nvfp4", "e2m1/group8:m2"]
)
def test_every_kind_of_scale(spec: str) -> None:
    details, declined = told(compiled(mlp().eval(), BATCHES, zq(), spec=spec))
    assert "2" in details
    assert set(details) | set(declined) == {"0", "2"}
    assert all(b < a for a, b in map(errors, details.values()))


def test_other_kinds_of_layer() -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 12, 12, generator=G).cumsum(2).cumsum(3) for _ in range(8)]  # smooth images
    assert set(told(compiled(Convolutions().eval(), data, zq()))[0]) == {"stem.0", "depthwise", "line", "head"}
    mix = torch.randn(8, 8, generator=G)
    experts = [torch.randn(3, 20, 8, generator=G) @ mix for _ in range(8)]
    assert set(told(compiled(Experts().eval(), experts, zq()))[0]) == {"up", "down"}
    torch.manual_seed(0)
    stored_in_out = [torch.randn(6, 5, 10, generator=G) @ MIX[:10, :10] for _ in range(8)]
    assert set(told(compiled(Conv1D().eval(), stored_in_out, zq(), spec="int4/group4"))[0]) == {"weight"}


def test_what_stays_says_why(llama: Any) -> None:
    tokens = [torch.randint(0, 50, (4, 20), generator=G) for _ in range(8)]
    details, declined = told(compiled(Tied().eval(), tokens, zq(), types=["linear", "embedding"]))
    assert set(details) == {"up", "down"}
    assert "shared by embed, head, which are not in one block" in declined["embed"]
    details, declined = told(compiled(*llama, zq(blocks="*.mlp"), types=["linear", "embedding"]))
    assert {path.split(".")[-2] for path in details} == {"mlp"}
    assert declined["lm_head"] == "it is in none of the blocks; its codes stay"
    assert declined["model.embed_tokens"].startswith("it is in none of the blocks")


def test_the_trace_says_what_was_done(tmp_path: Path) -> None:
    model = compiled(mlp().eval(), BATCHES, zq())
    step = next(s for s in model.program.trace if s.name == "zq_global")
    assert re.fullmatch(r"8 batches, \d+\.\d MiB at most", step.rewrites[0].detail)
    assert "output error" in model.explain("0")
    model.save(tmp_path / "out")
    assert torch.equal(fxquant.load(tmp_path / "out")(BATCHES[0]), model(BATCHES[0]))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"pass 'zq_global': blocks 'layer.\*' matches no module"):
        compiled(mlp(), BATCHES, zq(blocks="layer.*"))
    with pytest.raises(ConfigError, match="learning_rate=0: "):
        compiled(mlp(), BATCHES, zq(learning_rate=0))
    with pytest.raises(ConfigError, match="zq_global needs calibration data"):
        fxquant.compile(mlp(), (BATCHES[0],), {"rules": [{"match": "*", "weight": SPEC}], "passes": ["zq_global"]})
    data = [*BATCHES[:4], BATCHES[4] * torch.nan, *BATCHES[5:]]
    with pytest.raises(CalibrationError, match=r"block '0': its input input_1 holds 1280 NaN or Inf .* batch 4;"):
        compiled(mlp(), data, zq())


def test_the_model_is_not_changed() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled(model, BATCHES, zq())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_block_that_gives_no_floats_has_nothing_to_aim_at() -> None:
    class Picks(nn.Module):
        """Two blocks; the second gives an index."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([mlp_block(), mlp_block(pick=True)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    details, declined = told(compiled(Picks().eval(), BATCHES, zq()))
    assert set(details) == {"blocks.0.up", "blocks.0.down"}
    assert declined == dict.fromkeys(["blocks.1.up", "blocks.1.down"], "block blocks.1 gives no floats to aim at")


def mlp_block(*, pick: bool = False) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(20, 32), nn.Linear(32, 20)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.down(self.up(x).relu())
            return y.argmax(-1) if pick else y

    return Block()
