"""Scales folded into producers: with powers of two no bit changes; what cannot be folded is declined, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.producers import Fold, plan_fold, scale_constant
from fxquant.program import Program, Stage, run
from fxquant.rewrite import Decline, aten
from fxquant.scheme import LayerRule, parse_spec
from fxquant.verify import verify

G = torch.Generator().manual_seed(0)


class Norm(nn.Module):
    """RMS norm as Hugging Face models write it."""

    def __init__(self, width: int, *, after: bool = False) -> None:
        super().__init__()
        self.weight, self.after = nn.Parameter(torch.rand(width) + 0.5), after

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if x.dtype != torch.float64 else x
        normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return normal * self.weight if self.after else self.weight * normal


class Block(nn.Module):
    """Norm, grouped-query attention, norm, gated MLP: every producer a transformer has."""

    def __init__(self, width: int = 16, heads: int = 4, kv: int = 2) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, width // heads
        self.norm1, self.norm2 = Norm(width), Norm(width, after=True)
        self.q = nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv * self.size), nn.Linear(width, kv * self.size)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 24), nn.Linear(width, 24)
        self.down = nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        h, (b, s, _) = self.norm1(x), x.shape
        q, k, v = (y.view(b, s, -1, self.size).transpose(1, 2) for y in (self.q(h), self.k(h), self.v(h)))
        k, v = (
            y[:, :, None].expand(b, self.kv, self.heads // self.kv, s, self.size).reshape(b, -1, s, self.size)
            for y in (k, v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def program_of(model: nn.Module, x: Tensor, spec: str | None = None) -> Program:
    program = capture(model.eval(), (x,))
    stages = [Stage(NORMALIZE)]
    if spec:
        stages += [Stage(INSERT_QDQ, {"rules": (LayerRule("*", parse_spec(spec)),)}), Stage(REMOVE_DEAD)]
    return run(program, stages, check=verify)


def linear(program: Program, name: str) -> fx.Node:
    return next(n for n in program.gm.graph.nodes if n.target is aten.linear.default and info(n).path == name)


def powers(k: int) -> Tensor:
    return 2.0 ** torch.randint(-4, 5, (k,), generator=G)


def folded(program: Program, name: str) -> Fold:
    found = plan_fold(program.gm, linear(program, name).args[0])
    assert isinstance(found, Fold), found
    return found


def values(program: Program, x: Tensor) -> dict[str, Tensor]:
    """The value of every node that computes a tensor, by name."""
    seen: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = value
            return value

    with torch.no_grad():
        Keep(program.gm).run(x)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["q", "o", "gate", "down"])
def test_powers_of_two_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """x becomes x * s exactly, and with W / s in all readers the output is the same in every bit."""
    x = torch.randn(2, 5, 16, generator=G).to(dtype)
    program = program_of(Block().to(dtype), x)
    node = linear(program, name).args[0]
    before, want = values(program, x), program(x)
    fold = folded(program, name)
    s = fold.merge(powers(len(fold.sources)))
    readers = list(node.users)
    fold.apply(s)
    program.gm.recompile()
    assert torch.equal(values(program, x)[node.name], before[node.name] * s.to(dtype))
    for reader in readers:
        scale_constant(program.gm, reader, 1, 1 / s.double(), axis=1)
    program.gm.recompile()
    assert torch.equal(program(x), want)


@pytest.mark.parametrize("spec", ["e2m1/channel", "e2m1/group8", "int4/group8:fp16", "uint4/channel", "e2m1/group8:m2"])
@pytest.mark.parametrize("name", ["o", "down"])
def test_powers_of_two_into_the_scales_of_codes(name: str, spec: str) -> None:
    x = torch.randn(2, 5, 16, generator=G)
    model = Block()
    program = program_of(model, x, spec)
    node, fold = linear(program, name).args[0], folded(program, name)
    assert fold.exact
    before, weights = values(program, x), {k: v.clone() for k, v in model.state_dict().items()}
    s = fold.merge(powers(len(fold.sources)))
    error = info(fold.producer.args[1]).weight.error
    fold.apply(s)
    program.gm.recompile()
    verify(program.gm)
    assert torch.equal(values(program, x)[node.name], before[node.name] * s)
    quant = info(fold.producer.args[1]).weight
    assert quant.error == pytest.approx(error, rel=0.5)
    rows = torch.ones(fold.channels).scatter(0, fold.sources, s)
    kept = dict(program.gm.named_buffers())[quant.weight]
    assert torch.equal(kept, weights[quant.weight] * rows[:, None])  # the float weight goes along
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())  # the model's own memory


def test_heads_that_are_repeated_share_their_scales() -> None:
    x = torch.randn(2, 5, 16, generator=G)
    fold = folded(program_of(Block(), x), "o")
    want = torch.arange(8).reshape(2, 1, 4).expand(2, 2, 4).reshape(-1)  # kv heads, queries of each, size
    assert torch.equal(fold.sources, want)
    s = torch.arange(1.0, 17)
    assert torch.equal(fold.merge(s), s.reshape(2, 2, 4).amax(1, keepdim=True).expand(2, 2, 4).reshape(-1))
    with pytest.raises(ValueError, match="from one source"):
        fold.apply(s)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_written_out_and_layer_norm(heads: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
            self.relu_in, self.relu_out = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x: Tensor) -> Tensor:
            b, s, _ = x.shape
            parts = self.qkv(self.norm(x)).chunk(3, -1)
            q, k, v = (p.reshape(b, s, heads, -1).permute(0, 2, 1, 3) for p in parts)
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            x = self.out(mixed.permute(0, 2, 1, 3).flatten(2))
            return self.relu_out(F.relu(self.relu_in(x)))

    x = torch.randn(2, 5, 12, generator=G)
    program = program_of(Model(), x)
    want, before = program(x), values(program, x)
    assert torch.equal(folded(program, "out").sources, torch.arange(24, 36))  # the last third of the fused weight
    for name in ("qkv", "out", "relu_out"):
        fold, node = folded(program, name), linear(program, name)
        s = powers(len(fold.sources))
        fold.apply(s)
        program.gm.recompile()
        scaled = values(program, x)[node.args[0].name]
        scale_constant(program.gm, node, 1, 1 / s.double(), axis=1)
        program.gm.recompile()
        assert torch.equal(scaled, before[node.args[0].name] * s)
        assert torch.equal(program(x), want)


def test_any_positive_scale_changes_the_output_by_rounding_only() -> None:
    x = torch.randn(2, 5, 16, generator=G).double()
    program = program_of(Block().double(), x)
    want, fold, node = program(x), folded(program, "down"), linear(program, "down")
    s = torch.rand(24, generator=G).double() + 0.1
    fold.apply(s)
    scale_constant(program.gm, node, 1, 1 / s, axis=1)
    program.gm.recompile()
    assert torch.allclose(program(x), want, rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    """Two norms with one weight; two linears with one weight, one of them a producer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.linear(self.norm(x), self.first.weight))
        return F.linear(torch.sigmoid(self.second(h)), self.first.weight) + self.norm(x * 2)


def test_a_constant_that_others_read_is_copied() -> None:
    x, model = torch.randn(3, 8, generator=G), Shared()
    program = program_of(model, x)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    want = program(x)
    layers = [n for n in program.gm.graph.nodes if n.target is aten.linear.default]
    for layer in layers[:2]:  # behind the norm whose weight is used twice; behind the linear whose weight is
        fold = plan_fold(program.gm, layer.args[0])
        assert isinstance(fold, Fold)
        s = powers(8)
        fold.apply(s)
        scale_constant(program.gm, layer, 1, 1 / s.double(), axis=1)
    program.gm.recompile()
    verify(program.gm)
    assert torch.equal(program(x), want)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


class Declined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bare = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "input":
            return self.b(x)
        if how == "sum":
            return self.b(x + self.a(x))
        if how == "gelu":
            return self.b(F.gelu(self.a(x)))
        if how == "read twice":
            h = self.a(x)
            return self.b(h.view(-1, 8)) + h.sigmoid()
        if how == "square":
            h = self.a(x)
            return self.b(h * h)
        if how == "bare":
            return self.b(self.bare(x))
        if how == "rows":
            return self.b(self.a(x).transpose(0, 1))
        h = self.a(x)
        return self.b(torch.cat([h[:, :4].view(-1, 4)] * 2, 1)) + h[:, 2:6].sum()


@pytest.mark.parametrize(
    ("how", "reason"),
    [("input", "it is the input"), ("sum", "add.Tensor"), ("gelu", "gelu"), ("read twice", "sigmoid"),
     ("square", "twice"), ("bare", "no constant weight"), ("rows", "no fixed channels"), ("overlap", "cat")],
)  # fmt: skip
def test_what_cannot_be_folded_says_why(how: str, reason: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Declined()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, how)

    x = torch.randn(8, 8, generator=G)
    program = run(capture(Model(), (x,), dynamic_shapes=({},)), [Stage(NORMALIZE)], check=verify)
    found = plan_fold(program.gm, linear(program, "inner.b").args[0])
    assert isinstance(found, Decline)
    assert reason in found.reason


def test_a_reader_that_does_not_undo_the_scale_declines() -> None:
    x = torch.randn(2, 5, 16, generator=G)
    program = program_of(Block(), x)
    node = linear(program, "q").args[0]
    found = plan_fold(program.gm, node, readers={linear(program, "q"), linear(program, "k")})
    assert isinstance(found, Decline)
    assert "linear of v reads it too" in found.reason
    assert isinstance(plan_fold(program.gm, node, readers=set(node.users)), Fold)


def test_a_part_of_a_fused_weight_that_another_reads_declines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.out = nn.Linear(8, 16), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.wide(x)
            return self.out(h[:, :8]) + h[:, 7:15]

    x = torch.randn(3, 8, generator=G)
    program = program_of(Model(), x)
    found = plan_fold(program.gm, linear(program, "out").args[0])
    assert isinstance(found, Decline)
    assert "same channels" in found.reason


@pytest.mark.parametrize(
    ("s", "error"),
    [(torch.ones(5), "16 channels"), (torch.zeros(16), "positive"), (torch.full((16,), torch.inf), "positive")],
)
def test_bad_scales(s: Tensor, error: str) -> None:
    x = torch.randn(2, 5, 16, generator=G)
    with pytest.raises(ValueError, match=error):
        folded(program_of(Block(), x), "q").apply(s)


def test_codes_take_powers_of_two_within_the_range_of_their_scales() -> None:
    x = torch.randn(2, 5, 16, generator=G)
    fold = folded(program_of(Block(), x, "e2m1/channel"), "down")
    with pytest.raises(ValueError, match="powers of two"):
        fold.apply(torch.full((24,), 1.5))
    fold = folded(program_of(Block(), x, "e2m1/channel:fp16"), "down")
    with pytest.raises(ValueError, match="leaves the range of fp16"):
        fold.apply(torch.full((24,), 2.0**30))
    program = program_of(Block(), x, "e2m1/tensor")
    found = plan_fold(program.gm, linear(program, "down").args[0])
    assert isinstance(found, Decline)
    assert "share" in found.reason


@pytest.mark.parametrize(("name", "size"), [("o", 4), ("o", 2), ("inner", 8)])
def test_channels_behind_linear_operators_can_be_mixed(name: str, size: int) -> None:
    """v -> o through grouped-query attention, head by head; and a linear right before another."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.outer, self.inner = Block(), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.outer(self.block(x)).reshape(-1, 2, 16))

    x = torch.randn(2, 5, 16, generator=G).double()
    program = program_of(Model().double(), x)
    name = "block.o" if name == "o" else name
    node, fold = linear(program, name).args[0], folded(program, name)
    before = values(program, x)[node.name]
    matrix = torch.linalg.qr(torch.randn(size, size, generator=G).double())[0]
    fold.mix(matrix)
    program.gm.recompile()
    want = (before.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    assert torch.allclose(values(program, x)[node.name], want, atol=1e-12)


def test_what_cannot_be_mixed() -> None:
    x = torch.randn(2, 5, 16, generator=G)
    program = program_of(Block(), x)
    assert not folded(program, "o").can_mix(8)  # a run over two heads that share one
    own = program_of(Block(kv=4), x)
    assert not folded(own, "o").can_mix(8)  # two heads, each with probabilities of its own
    assert folded(own, "o").can_mix(4)
    assert not folded(program, "o").can_mix(3)
    assert not folded(program, "down").can_mix(2)  # every channel has a gate of its own
    assert not folded(program, "q").can_mix(2)
    assert not folded(program_of(Block(), x, "e2m1/channel"), "o").can_mix(2)
    with pytest.raises(ValueError, match="no runs"):
        folded(program, "down").mix(torch.eye(2))
