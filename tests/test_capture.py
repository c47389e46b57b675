"""Capture: the program is the model, bit for bit, at sizes other than the example's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.capture import capture
from fxquant.errors import CaptureError, InputError, WeightError
from fxquant.graph import info
from fxquant.layers import find_layers, ties
from fxquant.passes.normalize import NORMALIZE
from fxquant.program import Program, Stage, run
from fxquant.signature import as_call

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = [(1, 1), (3, 37), (1, 5), (4, 1)]


def leaves(output: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


def assert_same(program: Program, model: nn.Module, inputs: Any) -> None:
    """The program gives what the model gives, in every bit."""
    args, kwargs = as_call(inputs)
    extra = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    with torch.no_grad():
        got, want = leaves(program(*args, **kwargs)), leaves(model(*args, **kwargs, **extra))
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def is_flat(program: Program) -> bool:
    """Whether every call is an operator (or plain Python arithmetic on sizes) and none writes in place."""
    calls = [n for n in program.gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    writes = [n for n in calls if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
    return all(n.op == "call_function" for n in calls) and not writes


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def masked(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, (length + 1) // 2 + 1 :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **settings)).eval()


@pytest.fixture(scope="module")
def captured_llama() -> tuple[Program, nn.Module]:
    """A Llama with a tied head, captured from an example of one token."""
    model = llama(tie_word_embeddings=True)
    return capture(model, {"input_ids": ids(1, 1)}), model


class CNN(nn.Module):
    """In-place activations, batch norm, grouped and 'same' convolutions, an in-place addition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding="same", groups=4), nn.GELU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x += 1
        return self.head(x.flatten(1))


# --- no difference ----------------------------------------------------------------------------------------------------
def test_llama_at_other_sizes_from_an_example_of_size_one(captured_llama: tuple[Program, nn.Module]) -> None:
    program, model = captured_llama
    assert [str(i.type) for i in program.signature.inputs] == ["int64[batch, sequence]"]
    for size in SIZES:
        assert_same(program, model, {"input_ids": ids(*size)})
    assert is_flat(program)


def test_bert_with_mask_shares_batch_and_sequence() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    program = capture(model, {"attention_mask": masked(2, 16)["attention_mask"], "input_ids": ids(2, 16)})
    assert [str(i.type) for i in program.signature.inputs] == ["int64[batch, sequence]"] * 2
    for size in SIZES:
        assert_same(program, model, masked(*size))
    given = masked(3, 5)
    by_position = program(given["input_ids"], given["attention_mask"])  # forward's order, not the example's
    assert torch.equal(by_position.last_hidden_state, program(**given).last_hidden_state)
    with pytest.raises(InputError, match=r"'attention_mask' is int64.2, 5.; expected .* batch = 3"):
        program(input_ids=given["input_ids"], attention_mask=given["attention_mask"][:2])


def test_gpt2_products_become_linear() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    program = run(capture(model, {"input_ids": ids(2, 16)}), [Stage(NORMALIZE)], check=lambda gm: None)
    for size in SIZES:
        assert_same(program, model, {"input_ids": ids(*size)})
    layers = {layer.name: layer for layer in find_layers(program.gm)}
    assert layers["transformer.h.1.attn.c_attn"].transposed
    assert len([layer for layer in layers.values() if layer.type == "linear"]) == 9


def test_vit() -> None:
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    model = transformers.ViTForImageClassification(config).eval()
    program = capture(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    for batch in (1, 3):
        assert_same(program, model, {"pixel_values": torch.randn(batch, 3, 32, 32)})


def test_cnn_has_one_spelling_whether_in_place_or_not() -> None:
    model = CNN().eval()
    program = capture(model, (torch.randn(1, 3, 16, 16),))
    for batch in (1, 3):
        assert_same(program, model, (torch.randn(batch, 3, 16, 16),))
    targets = {n.target for n in program.gm.graph.nodes}
    assert is_flat(program)
    assert {torch.ops.aten.relu.default, torch.ops.aten.batch_norm.default} <= targets


def test_writing_through_a_view() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] += 1
            return y.relu_()

    program = capture(Model(), (torch.randn(2, 4),))
    assert is_flat(program)
    assert_same(program, Model(), (torch.randn(3, 4),))


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_experts(experts: str) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(experts)
    program = capture(model, {"input_ids": ids(2, 16)})
    for size in [(1, 1), (3, 37)]:
        assert_same(program, model, {"input_ids": ids(*size)})
    assert is_flat(program)


def test_product_with_a_batch_of_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8, 6))

        def forward(self, x: Tensor, expert: Tensor) -> Tensor:
            return torch.bmm(x.unsqueeze(1), self.w[expert]).squeeze(1)

    model = Model()
    program = capture(model, (torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 0])))
    assert [(layer.name, layer.type) for layer in find_layers(program.gm)] == [("w", "matmul")]
    with torch.no_grad():
        x = torch.randn(2, 8), torch.tensor([3, 3])
        assert torch.equal(program(*x), model(*x))


# --- the model is left as it was, and shared --------------------------------------------------------------------------
def test_weights_are_shared_and_ties_stay(captured_llama: tuple[Program, nn.Module]) -> None:
    program, model = captured_llama
    layers = {layer.name: layer for layer in find_layers(program.gm)}
    tied = ties(list(layers.values()))["lm_head"]
    assert {layer.name for layer in tied} == {"lm_head", "model.embed_tokens"}
    assert {layer.weight.data_ptr() for layer in tied} == {model.lm_head.weight.data_ptr()}


def test_modes_and_cache_are_restored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Dropout(), nn.Dropout()
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not self.config.use_cache
            return self.a(self.b(x))

    model = Model().train()
    model.b.eval()
    capture(model, (torch.randn(2, 4),))
    assert (model.training, model.a.training, model.b.training, model.config.use_cache) == (True, True, False, True)


def test_nodes_know_module_and_line(captured_llama: tuple[Program, nn.Module]) -> None:
    program, _ = captured_llama
    layer = next(x for x in find_layers(program.gm) if x.name == "model.layers.1.mlp.up_proj")
    assert info(layer.node).module == "Linear"
    assert info(layer.node).source
    assert not any("metadata_hook" in info(n).path for n in program.gm.graph.nodes)


# --- inputs and outputs -----------------------------------------------------------------------------------------------
class Nested(nn.Module):
    """A list and a dict of tensors in; a dict, a tuple and None out; a number and a flag that are fixed."""

    def forward(self, xs: list[Tensor], extra: dict[str, Tensor], scale: float = 1.0, flag: bool = True) -> Any:
        y = xs[0] + xs[1] * scale
        return {"sum": y, "pair": (y + extra["a"], y - extra["b"]), "none": None if flag else y}


def nested(batch: int) -> dict[str, Any]:
    x = torch.randn(batch, 4)
    return {"xs": [x, x + 1], "extra": {"a": x * 2, "b": x * 3}}


def test_nested_inputs_and_outputs() -> None:
    program = capture(Nested(), {**nested(1), "scale": 2.0})
    given = nested(3)
    want, got = Nested()(**given, scale=2.0), program(**given)
    assert got["none"] is None
    assert torch.equal(got["sum"], want["sum"])
    assert all(torch.equal(a, b) for a, b in zip(got["pair"], want["pair"], strict=True))
    assert torch.equal(program(given["xs"], given["extra"], 2.0)["sum"], want["sum"])
    with pytest.raises(InputError, match=r"'scale' was fixed to 2\.0"):
        program(**given, scale=3.0)
    with pytest.raises(InputError, match=r"'scale' was fixed to 2\.0"):
        program(given["xs"], given["extra"], 3.0)


def test_outputs_keep_their_type(captured_llama: tuple[Program, nn.Module]) -> None:
    class Single(nn.Module):
        def forward(self, *, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    x = torch.randn(3, 4)
    program = capture(Single(), {"y": torch.randn(2, 4), "x": torch.randn(2, 4)})
    assert torch.equal(program(x=x, y=x), x + x)
    assert type(captured_llama[0](ids(1, 3))).__name__ == "CausalLMOutputWithPast"


def test_dimensions_of_their_own_where_examples_differ() -> None:
    class Model(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return image * 2, text + 1

    program = capture(Model(), (torch.randn(2, 4), torch.randn(3, 4)))
    assert [str(i.type) for i in program.signature.inputs] == ["float32[batch, 4]", "float32[text_batch, 4]"]


def test_a_model_of_fixed_sizes_is_captured_at_them() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(1, 4) + 1

    program = capture(Model(), (torch.randn(1, 4),))
    assert [str(i.type) for i in program.signature.inputs] == ["float32[1, 4]"]


def test_exported_program() -> None:
    model = CNN().eval()
    example = torch.randn(2, 3, 16, 16)
    shapes = ({0: torch.export.Dim.AUTO},)
    program = capture(torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False))
    assert_same(program, model, (torch.randn(3, 3, 16, 16),))
    assert is_flat(program)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.zeros(2, 3)}, r"'input_ids' is float32\[2, 3\]; expected int64\[batch, sequence\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"int64\[3\]; expected int64\[batch, sequence\]"),
        ({"input_ids": [[1, 2]]}, "expected a tensor"),
        ({}, r"missing input \['input_ids'\]"),
        ({"ids": torch.zeros(1, 2)}, "unknown input 'ids'; the model was captured with"),
        ({"input_ids": ids(1, 2), "labels": None}, None),
    ],
)
def test_inputs_are_checked(given: dict[str, Any], message: str | None) -> None:
    class Model(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids + 1

    program = capture(Model(), {"input_ids": ids(2, 3)})
    if message is None:
        program(**given)
    else:
        with pytest.raises(InputError, match=message):
            program(**given)


def test_static_size_and_too_many_inputs() -> None:
    program = capture(CNN(), (torch.randn(2, 3, 16, 16),))
    with pytest.raises(InputError, match=r"'x' is float32\[2, 4, 16, 16\]; expected float32\[batch, 3, 16, 16\]"):
        program(torch.randn(2, 4, 16, 16))
    with pytest.raises(InputError, match="2 positional inputs given; the model takes 1"):
        program(torch.randn(2, 3, 16, 16), torch.randn(1))
    with pytest.raises(InputError, match="given twice"):
        program(torch.randn(2, 3, 16, 16), x=torch.randn(2, 3, 16, 16))


# --- what cannot be captured ------------------------------------------------------------------------------------------
class Branching(nn.Module):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return x if x.sum() > 0 else -x


def test_control_flow_on_data_is_located(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching())
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 4),))
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"in module '1' (Branching) at {__file__}:{line}" in str(caught.value)
    assert "torch.where" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_higher_order_control_flow() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    with pytest.raises(CaptureError, match="cond"):
        capture(Model(), (torch.randn(2, 4),))


def test_experts_in_a_loop_say_how_to_batch_them() -> None:
    config = transformers.MixtralConfig(**SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    with pytest.raises(CaptureError, match=r"set_experts_implementation.'batched_mm'"):
        capture(model, {"input_ids": ids(2, 8)})


def test_advice_about_experts_is_for_their_loop_alone() -> None:
    """A transformers model that fails elsewhere is told what helps there."""

    class Moved(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor) -> Tensor:
            self.lm_head = self.lm_head.to(torch.float32)
            return self.lm_head(self.model(input_ids).last_hidden_state)

    model = Moved(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    with pytest.raises(CaptureError, match=r"What to do: leave out the module.to") as raised:
        capture(model, {"input_ids": ids(2, 8)})
    assert "set_experts" not in str(raised.value)


def test_what_is_no_model() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(WeightError, match="weight is on the meta device"):
        capture(model, (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match="example_inputs is missing"):
        capture(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match="cannot capture a int"):
        capture(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a tuple of positional inputs"):
        capture(nn.Linear(4, 4), 3)


def test_names_that_fx_keeps_for_itself() -> None:
    model = nn.Module()
    model.graph = nn.Linear(2, 2)
    model.forward = lambda x: model.graph(x)  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match="keeps the name 'graph' for itself; rename"):
        capture(model, (torch.randn(3, 2),))


def test_sizes_that_depend_on_another_input_are_checked_in_any_order() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + torch.cat([y, y])

    program = capture(Halves(), (torch.randn(4, 8), torch.randn(2, 8)))
    assert program(torch.randn(6, 8), torch.randn(3, 8)).shape == (6, 8)
    with pytest.raises(InputError):
        program(torch.randn(6, 8), torch.randn(2, 8))


def test_inputs_named_like_builtins_keep_their_names() -> None:
    class Model(nn.Module):
        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return input * type

    program = capture(Model(), {"input": torch.randn(2, 3), "type": torch.randn(2, 3)})
    assert [i.name for i in program.signature.inputs] == ["input", "type"]
    x = torch.randn(5, 3)
    assert torch.equal(program(input=x, type=x), x * x)


@pytest.mark.parametrize("kind", ["module", "parameter", "shared"])
def test_names_that_would_be_code_are_refused(kind: str, tmp_path: Path) -> None:
    """torch.fx writes names between quotes as they are."""
    evil = f'a", getattr(__import__("os"), "mkdir")("{tmp_path}/owned")) or ("'

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.good = nn.Linear(4, 4)
            if kind == "parameter":
                self.inner.register_parameter(evil, nn.Parameter(torch.ones(4)))
            else:
                self.inner.add_module(evil, self.inner.good if kind == "shared" else nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = getattr(self.inner, evil)
            return x * found if kind == "parameter" else found(x)

    with pytest.raises(CaptureError, match=r"has a name with quotes, backslashes.*rename it"):
        capture(Named(), (torch.ones(2, 4),))
    assert not (tmp_path / "owned").exists()
