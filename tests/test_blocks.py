"""Blocks: which parts of a graph repeat, and that computing it block by block is computing it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import mlp
from torch import Tensor, fx, nn

from fxquant.blocks import Block, Values, find_blocks, repeated, schedule
from fxquant.capture import capture
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.quantize_activations import QUANTIZE_ACTIVATIONS
from fxquant.program import Program, Stage, run
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify

RULES = (LayerRule("*", parse_spec("e2m1/group8"), parse_spec("e4m3/token")),)
STAGES = [Stage(p, {"rules": RULES}) for p in (NORMALIZE, QUANTIZE_ACTIVATIONS, INSERT_QDQ)]
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def program(model: nn.Module, inputs: Any) -> Program:
    return run(capture(model.eval(), inputs), STAGES, check=verify)


def transformer(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers as hf

    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(0, 40, (2, 9))}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1)), tokens
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**SMALL)), {**tokens, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    if kind == "gpt2":
        special = {"bos_token_id": 0, "eos_token_id": 0}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=3, n_head=2, **special)
        ), tokens
    if kind == "albert":
        return hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=8)), tokens
    size = {"image_size": 16, "patch_size": 8, "num_labels": 3}
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **size)), {"pixel_values": torch.randn(2, 3, 16, 16)}


BLOCKS = {
    "llama": ("model.layers.{}", ["lm_head"]),
    "bert": ("encoder.layer.{}", ["pooler.dense"]),
    "gpt2": ("transformer.h.{}", []),  # the head is tied to the embedding, both stay in float
    "vit": ("vit.layers.{}", ["classifier", "vit.embeddings.patch_embeddings.projection"]),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_transformers(kind: str) -> None:
    """Their blocks are found; one after the other they give what the graph gives, bit for bit."""
    model, inputs = transformer(kind)
    p = program(model, inputs)
    blocks = find_blocks(p.gm)
    pattern, singles = BLOCKS[kind]
    assert sorted(b.name for b in blocks) == sorted([pattern.format(i) for i in range(3)] + singles)
    assert [b.name for b in blocks if b.name not in singles] == [pattern.format(i) for i in range(3)]
    numbered = [b for b in blocks if b.name not in singles]
    assert len({len(b.weights) for b in numbered}) == 1
    for before, after in pairwise(numbered):
        assert len(before.outputs) == 1
        assert before.outputs[0] in after.inputs
    compare(p, blocks, p.signature.bind((), inputs))


def compare(p: Program, blocks: list[Block], inputs: list[Any]) -> None:
    """Every block's outputs are those of the whole graph."""
    seen: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Record(p.gm).run(*inputs)
    values = Values(p.gm, [inputs], as_float=False)
    everything = set(p.gm.graph.nodes)
    done = []
    for unit in schedule(p.gm, blocks):
        values.advance(unit, values.outputs(unit), everything)
        if isinstance(unit, Block):
            done.append(unit.name)
            for node in unit.outputs:
                got, want = values.values[node][0], seen[node]
                assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
    assert done == [b.name for b in blocks]


def test_the_float_walk_is_the_float_model() -> None:
    """Neither rounded weights nor rounded activations: the last block gives the model's own logits."""
    model, inputs = transformer("llama")
    p = program(model, inputs)
    blocks = find_blocks(p.gm)
    walk = Values(p.gm, [p.signature.bind((), inputs)], as_float=True)
    for unit in schedule(p.gm, blocks):
        walk.advance(unit, walk.outputs(unit), set(p.gm.graph.nodes))
    with torch.no_grad():
        want = model(**inputs).logits
    assert torch.equal(walk.values[blocks[-1].outputs[0]][0], want)


def test_values_that_nobody_wants_are_dropped() -> None:
    p = program(mlp(), (torch.randn(4, 20),))
    walk = Values(p.gm, [[torch.randn(4, 20)]] * 3, as_float=False)
    units = schedule(p.gm, find_blocks(p.gm))
    for unit in units:
        walk.advance(unit, walk.outputs(unit), set(unit.outputs) if isinstance(unit, Block) else {unit})
        assert len(walk.values) == 1
    assert walk.nbytes() == 3 * 4 * 6 * 4


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "head"], {"layers.0", "layers.1"}),
        (["0", "2"], set()),  # a list of single layers
        (["layers.0.mlp.0", "layers.0.mlp.2", "layers.1.mlp.0", "layers.1.mlp.2"], {"layers.0", "layers.1"}),
        ([f"layers.{i}.{w}" for i in (0, 1) for w in ("q", "experts.0.up", "experts.0.down", "experts.1.up",
          "experts.1.down")], {"layers.0", "layers.1"}),
        (["1.layers.0.q", "1.layers.0.k", "1.layers.1.q", "1.layers.1.k", "2.w"], {"1.layers.0", "1.layers.1"}),
        (["block.0.layer.0.q", "block.0.layer.0.o", "block.0.layer.1.wi", "block.0.layer.1.wo",
          "block.1.layer.0.q", "block.1.layer.0.o", "block.1.layer.1.wi", "block.1.layer.1.wo"],
         {"block.0", "block.1"}),
        (["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.2.q"], {"layers.0", "layers.1", "layers.2"}),
    ],
)  # fmt: skip
def test_which_lists_repeat(paths: list[str], want: set[str]) -> None:
    assert set(repeated(paths)) == want


def test_a_glob_takes_the_shortest_path() -> None:
    model, inputs = transformer("llama")
    p = program(model, inputs)
    assert [b.name for b in find_blocks(p.gm, "model.layers.*")] == [f"model.layers.{i}" for i in range(3)]
    assert [b.name for b in find_blocks(p.gm, "*.mlp")] == [f"model.layers.{i}.mlp" for i in range(3)]
    compare(p, find_blocks(p.gm, "*.mlp"), p.signature.bind((), inputs))
    with pytest.raises(ValueError, match=r"blocks 'layers.\*' matches no module .* such as model.layers.0, "):
        find_blocks(p.gm, "layers.*")


def test_a_model_without_repeats_has_a_block_for_each_layer() -> None:
    p = program(mlp(), (torch.randn(4, 20),))
    blocks = find_blocks(p.gm)
    assert [(b.name, len(b.weights)) for b in blocks] == [("0", 1), ("2", 1)]
    assert [len(b.nodes) for b in blocks] == [2, 2]  # the rounding of its input and the layer


# --- blocks that cannot be told apart ---------------------------------------------------------------------------------
def test_layers_that_share_their_weights_are_one_block() -> None:
    """ALBERT goes through one layer three times."""
    model, inputs = transformer("albert")
    p = program(model, inputs)
    blocks = find_blocks(p.gm)
    shared = next(b for b in blocks if "layers.0" in b.name or len(b.weights) > 1)
    assert len([n for n in shared.nodes if "linear" in str(n.target)]) == 3 * len(shared.weights)
    compare(p, blocks, p.signature.bind((), inputs))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Recurrent(nn.Module):
    """A list of blocks gone through twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = x + layer.b(layer.a(x).relu())
        return x


class Crossed(Recurrent):
    """Two blocks, each of two unrelated nodes, and each needs a node of the other."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return second.b(first.a(x)) + first.b(second.a(x))


@pytest.mark.parametrize("model", [Recurrent(), Crossed()], ids=["gone through twice", "crossed"])
def test_blocks_that_need_each_other_are_one(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    p = program(model, (x,))
    (block,) = find_blocks(p.gm)
    assert block.name == "layers.0"
    assert len(block.weights) == 4
    compare(p, [block], [x])
