"""gwq and pb_llm: what is kept, what becomes of the rest, and that the packed model carries both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Convolutions, Experts, Tied, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import CalibrationError, ConfigError, LoadError, VerifyError
from fxquant.graph import info
from fxquant.ops import operators as ops
from fxquant.qtensor import quantize_tensor
from fxquant.rewrite import fetch
from fxquant.verify import verify

G = torch.Generator().manual_seed(0)
DATA = [torch.randn(16, 20, generator=G) for _ in range(3)]


def made(model: nn.Module, passes: list[Any], spec: str = "e2m1/group16", data: Any = DATA) -> fxquant.CompiledModel:
    config = {"rules": [{"match": "*", "weight": spec}], "passes": passes}
    return fxquant.compile(model, (data[0],), config, calibration=data)


def weights(compiled: fxquant.CompiledModel) -> dict[str, Tensor]:
    """The weights with outliers as the lowered graph computes them, by name."""
    gm, found = compiled.program.gm, {}
    for node in gm.graph.nodes:
        if node.target is ops.with_outliers.default:
            packed = node.args[0]
            value = ops.dequantize_packed(
                *(fetch(gm, a.target) if a is not None else None for a in packed.args[:3]), *packed.args[3:5]
            )
            last = node.args[2]
            kept = (
                fetch(gm, last.target)
                if last.op == "get_attr"
                else ops.dequantize_packed(
                    *(fetch(gm, a.target) if a is not None else None for a in last.args[:3]), *last.args[3:5]
                )
            )
            found[info(packed).weight.weight] = ops.with_outliers(value, fetch(gm, node.args[1].target), kept)
    return found


def test_gwq_keeps_the_weights_with_the_largest_gradients() -> None:
    """By hand: autograd on the model itself, the top tenth in 16 bits, the rest quantized without them."""
    model = mlp().eval()
    found = weights(made(model, [{"gwq": {"fraction": 0.1, "samples": 2}}]))
    grads = [torch.autograd.grad(model(x).square().sum() / 2, [model[0].weight, model[2].weight]) for x in DATA[:2]]
    for i, (name, layer) in enumerate([("0.weight", model[0]), ("2.weight", model[2])]):
        score, value = sum(g[i].abs() for g in grads), layer.weight.detach()
        top = score.flatten().topk(round(0.1 * value.numel())).indices
        mask = torch.zeros(value.numel(), dtype=torch.bool).scatter(0, top, True).reshape(value.shape)
        rest = quantize_tensor(value.masked_fill(mask, 0.0), "e2m1/group16").dequantize()
        assert torch.equal(found[name], torch.where(mask, value.half().float(), rest))


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


def test_gwq_takes_the_cross_entropy_of_language_models() -> None:
    model, tokens = Bigram().eval(), torch.randint(0, 30, (3, 12), generator=G)
    found = weights(made(model, [{"gwq": {"fraction": 0.1}}], data=[row[None] for row in tokens]))["head.weight"]
    loss = F.cross_entropy(model(tokens[:1])[:, :-1].flatten(0, 1), tokens[:1, 1:].flatten())
    score = torch.autograd.grad(loss, model.head.weight)[0].abs()
    top = score.flatten().topk(48).indices
    assert torch.equal(found.flatten()[top], model.head.weight.detach().flatten()[top].half().float())
    assert int((found == model.head.weight.detach().half().float()).sum()) < 100


@pytest.mark.parametrize("criterion", ["magnitude", "hessian"])
def test_pb_llm_has_salient_int8_and_signs(criterion: str) -> None:
    model = mlp().eval()
    data = [torch.randn(64, 20, generator=G) * torch.linspace(0.1, 3, 20) for _ in range(2)]
    compiled = made(model, [{"pb_llm": {"fraction": 0.2, "criterion": criterion}}], "lut(-1,1)/channel", data)
    value, got = model[0].weight.detach(), weights(compiled)["0.weight"]
    score = value.abs()
    if criterion == "hessian":
        x = torch.cat(data)
        H = 2 * x.T @ x / len(x)
        inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(20)).diagonal()
        score = (value / inverse).abs()
    index = score.flatten().topk(128).indices
    mask = torch.zeros(640, dtype=torch.bool).scatter(0, index, True).reshape(32, 20)
    alpha = (value.abs() * ~mask).sum(1) / (~mask).sum(1)
    assert torch.allclose(got[~mask], (alpha[:, None] * value.sign())[~mask], atol=1e-6)
    assert torch.allclose(got[mask], value[mask], atol=float(value.abs().max()) / 200)
    layer = compiled.summary().layers[0]
    assert (layer.method, layer.bits) == ("pb_llm", 1)
    assert layer.error == pytest.approx(float((got - value).norm() / value.norm()), rel=1e-3)


def test_outliers_are_counted() -> None:
    """Bytes: one bit a code, a scale a row, four bytes a position, a byte and a share of a scale a salient weight."""
    layer = made(mlp(), [{"pb_llm": {"fraction": 0.2}}], "lut(-1,1)/channel").summary()
    assert layer.layers[0].bytes_after == 32 * 3 + 32 * 4 + 128 * 4 + 128 + 2
    summary = made(mlp(), [{"gwq": {"fraction": 0.1}}], "e2m1/channel").summary()
    assert summary.layers[0].bytes_after == 32 * 10 + 32 * 4 + 64 * (4 + 2)
    assert summary.bytes_after == summary.weight_bytes_after + (32 + 6) * 4  # and the biases


@pytest.mark.parametrize(
    ("passes", "spec"),
    [([{"gwq": {"fraction": 0.1}}], "e2m1/group16"), ([{"pb_llm": {}}], "lut(-1,1)/group16"),
     (["gptq", {"gwq": {"fraction": 0.05}}], "int4/channel"), (["rotate", {"gwq": {"fraction": 0.05}}], "nf4/group32")],
)  # fmt: skip
def test_saved_loaded_exported(passes: list[Any], spec: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    data = [torch.randn(64, 20, generator=G) for _ in range(2)]
    compiled = made(mlp().eval(), passes, spec, data)
    x = data[1]
    compiled.save(tmp_path / "m")
    assert torch.equal(fxquant.load(tmp_path / "m")(x), compiled(x))
    compiled.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), compiled(x), atol=1e-4)
    assert {t.target for t in compiled.program.gm.graph.nodes if "dequantize" in str(t.target)} == {
        ops.dequantize_packed.default
    }


def test_gwq_keeps_codes_that_gptq_refined() -> None:
    data = [torch.randn(64, 20, generator=G) for _ in range(4)]
    model = mlp().eval()
    plain, both = (made(model, p, "int4/channel", data) for p in (["gptq"], ["gptq", "gwq"]))
    assert torch.equal(fetch(plain.program.gm, "0.weight_packed"), fetch(both.program.gm, "0.weight_packed"))
    assert [q.method for q in both.summary().layers] == ["gptq", "gptq"]
    late = made(model, ["gwq", "gptq"], "int4/channel", data)
    assert "with_outliers" in next(s for s in late.program.trace if s.name == "gptq").declines[0].reason


@pytest.mark.parametrize(("kind", "shape"), [(Convolutions, (2, 3, 12, 12)), (Experts, (3, 4, 8))])
def test_every_kind_of_layer(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # by how much less is lost depends on the weights
        model, x = kind(), torch.randn(shape)
    compiled = made(model.eval(), [{"gwq": {"fraction": 0.5}}], "int4/channel", [x])
    plain = fxquant.compile(model, (x,), {"rules": [{"match": "*", "weight": "int4/channel"}]})
    assert compiled(x).isfinite().all()
    pairs = zip(compiled.summary().layers, plain.summary().layers, strict=True)
    assert all(a.error < 0.8 * b.error and a.bytes_after > b.bytes_after for a, b in pairs)


def test_tied_weights_keep_one_set_of_outliers() -> None:
    tokens = torch.randint(0, 50, (2, 6), generator=G)
    rules = [{"match": "*", "weight": "int4/channel", "types": ["linear", "embedding"]}]
    config = {"rules": rules, "passes": [{"gwq": {"fraction": 0.1}}]}
    compiled = fxquant.compile(Tied().eval(), (tokens,), config, calibration=[tokens])
    nodes = [n for n in compiled.program.gm.graph.nodes if n.target is ops.with_outliers.default]
    assert len(nodes) == 3
    assert compiled(tokens)["logits"].isfinite().all()


def test_what_declines_and_what_raises() -> None:
    step = next(s for s in made(mlp(), ["pb_llm"]).program.trace if s.name == "pb_llm")
    assert "lut(-1,1); its rule gives e2m1" in step.declines[0].reason
    step = next(s for s in made(mlp(), [{"gwq": {"fraction": 0.0}}]).program.trace if s.name == "gwq")
    assert "none to keep" in step.declines[0].reason
    with pytest.raises(CalibrationError, match=r"gradient is NaN or Inf in batch 0"):
        made(mlp(), ["gwq"], data=[torch.full((4, 20), torch.nan)])
    config = {"rules": [{"match": "*", "weight": "e2m1"}], "passes": ["gwq"]}
    with pytest.raises(ConfigError, match="gwq changes more"):
        fxquant.quantize_(mlp(), config, (DATA[0],), calibration=DATA)


@pytest.mark.parametrize("change", ["last", "order", "dtype", "count"])
def test_damaged_positions_are_found(change: str) -> None:
    compiled = made(mlp(), [{"gwq": {"fraction": 0.1}}])
    gm = compiled.program.gm
    verify(gm)
    node = next(n for n in gm.graph.nodes if n.target is ops.with_outliers.default)
    owner, leaf = gm.get_submodule("0"), node.args[1].target.rpartition(".")[2]
    index = fetch(gm, node.args[1].target)
    index[-1] = 640 if change == "last" else index[-1]
    index[0] = index[1] if change == "order" else index[0]
    if change in ("dtype", "count"):
        setattr(owner, leaf, index.long() if change == "dtype" else index[:-1])
    with pytest.raises(VerifyError, match=r"positions|its node says"):
        verify(gm)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made(mlp(), [{"gwq": {"fraction": 0.1}}]).save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["0.weight_outlier_index"][-1] = 10**6
    save_file(tensors, path)
    with pytest.raises(LoadError, match="positions of outliers"):
        fxquant.load(tmp_path / "m")


def test_opcheck() -> None:
    args = (torch.randn(4, 6), torch.tensor([1, 7], dtype=torch.int32), torch.tensor([[1.0, 2.0]]))
    torch.library.opcheck(ops.with_outliers.default, args)
    got = ops.with_outliers(*args)
    assert torch.equal(got.flatten()[[1, 7]], torch.tensor([1.0, 2.0]))
    assert torch.equal(args[0].flatten()[[0, 2]], got.flatten()[[0, 2]])
    assert torch.equal(ops.with_outliers(args[0].t(), *args[1:]).flatten()[[1, 7]], torch.tensor([1.0, 2.0]))
