"""Fusion: no bit changes where the reference bodies run, and nothing is fused that something else reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.codegen import launch
from fxquant.codegen.fuse import FUSE_EPILOGUES, fused
from fxquant.compiled import CompiledModel
from fxquant.errors import InputError
from fxquant.ops import operators as ops
from fxquant.program import Stage, run
from fxquant.rewrite import tensors
from fxquant.verify import verify


class Block(nn.Module):
    """What a transformer has around its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.gate, self.wide = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.gelu(self.up(h), approximate="tanh"))
        x = self.down(F.silu(self.gate(h)) * self.wide(h)) + x
        return F.relu(self.up(F.gelu(self.down(F.relu(self.gate(x))))))


def compiled(model: nn.Module, config: str, x: Tensor) -> CompiledModel:
    torch.manual_seed(1)
    return fxquant.compile(model.eval(), (x,), config, calibration=[(torch.randn(4, 5, 64),) for _ in range(4)])


@pytest.fixture(scope="module")
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 64)


def around(program: fxquant.program.Program) -> list[dict[str, object]]:
    """What was put around each fused linear, in graph order, spec of the weight left out."""
    found = program.gm.graph.find_nodes(op="call_function", target=ops.linear_wq_fused.default)
    return [{k: v if isinstance(v, (str, bool)) else True for k, v in node.kwargs.items()} for node in found]


@pytest.mark.parametrize("config", ["W6A16-E3M2", "W4A8-FP", "W4A16-GPTQ-LoRC", "W8A8-FP8", "W4A4-FPQ", "W8A8-INT"])
def test_no_bit_changes(config: str, x: Tensor) -> None:
    torch.manual_seed(2)
    model = compiled(Block(), config, x)
    quick = fused(model.program)
    verify(quick.gm)
    assert torch.equal(quick(x), model(x))
    assert not quick.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)
    assert not [n for n in quick.gm.graph.nodes if n.target in fxquant.ops.ROUNDINGS]
    longer = torch.randn(1, 9, 64)
    assert torch.equal(quick(longer), model(longer))


def test_what_is_fused_where(x: Tensor) -> None:
    model = compiled(Block(), "W6A16-E3M2", x)
    assert around(fused(model.program)) == [
        {"activation": "gelu_tanh"}, {"residual": True}, {"activation": "silu"}, {"residual": True},
        {"activation": "relu"}, {"activation": "gelu"}, {"activation": "relu"},
    ]  # fmt: skip


def test_the_compensation_goes_in_before_the_activation(x: Tensor) -> None:
    torch.manual_seed(0)
    model = compiled(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), "W4A16-GPTQ-LoRC", x)
    quick = fused(model.program)
    assert around(quick) == [{"thin": True, "wide": True, "activation": "gelu"}, {"thin": True, "wide": True}]
    assert torch.equal(quick(x), model(x))


def test_the_program_stays_as_it_is_and_shares_its_tensors(x: Tensor) -> None:
    model = compiled(Block(), "W4A8-FP", x)
    before = str(model.program.gm.graph)
    quick = fused(model.program)
    assert str(model.program.gm.graph) == before
    own, shared = tensors(model.program.gm), tensors(quick.gm)
    assert all(value is own[name] for name, value in shared.items())


def test_a_copy_on_another_device_is_a_model_of_its_own(x: Tensor) -> None:
    model = compiled(Block(), "W4A8-FP", x)
    other = model.to("cpu")
    own, copies = tensors(model.program.gm), tensors(other.program.gm)
    assert torch.equal(other(x), model(x))
    assert {name: value.dtype for name, value in copies.items()} == {k: own[k].dtype for k in copies}
    meta = model.to("meta")
    assert all(value.is_meta for value in tensors(meta.program.gm).values())
    with pytest.raises(InputError, match="a weight is on cpu; tiles are timed on a GPU"):
        model.autotune()


def test_tiles_are_timed_for_the_kernels_that_run(x: Tensor) -> None:
    model = compiled(Block(), "W4A8-FP", x)
    quick = fused(model.program)
    for node in quick.gm.graph.find_nodes(op="call_function", target=ops.linear_wq_fused.default):
        weight, rounding = launch._operands(quick.gm, node), launch._rounding(quick.gm, node)
        weight.check()
        assert rounding is not None
        found = launch.plan(weight, rounding, arch=90)
        assert isinstance(found, launch.RoundedProduct)
        assert str(found.x) == "e4m3"


class Ramp(nn.Module):
    """Makes a tensor, on a device that the graph names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.arange(64, device=x.device))


def test_tensors_that_a_graph_makes_are_made_on_its_device(x: Tensor) -> None:
    model = compiled(Ramp(), "W6A16-E3M2", x)
    nodes = model.to("meta").program.gm.graph.nodes
    devices = [node.kwargs["device"] for node in nodes if node.kwargs.get("device") is not None]
    assert devices
    assert set(devices) == {torch.device("meta")}


def test_as_a_pass_it_is_recorded(x: Tensor) -> None:
    model = compiled(Block(), "W6A16-E3M2", x)
    want = model(x)
    run(model.program, [Stage(FUSE_EPILOGUES)], check=verify)
    assert torch.equal(model(x), want)
    step = model.program.trace[-1]
    assert step.name == "fuse_epilogues"
    assert {r.rule for r in step.rewrites} == {"fuse_activation", "fuse_residual"}


class Shared(nn.Module):
    """Linears whose outputs something else reads, or whose neighbours do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.row = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.silu(y) + y  # y has two readers
        z = z + torch.add(x, self.b(z), alpha=2)  # alpha
        z = self.c(z) + self.row  # another shape
        return F.relu(F.silu(self.d(z))) + z  # a second activation, and z is read twice


def test_what_must_not_be_fused_says_why(x: Tensor) -> None:
    model = compiled(Shared(), "W6A16-E3M2", x)
    want = model(x)
    run(model.program, [Stage(FUSE_EPILOGUES)], check=verify)
    assert torch.equal(model(x), want)
    assert around(model.program) == [{"activation": "silu"}]
    reasons = " ".join(d.reason for d in model.program.trace[-1].declines)
    for part in ("is also read by", "multiplied by alpha", "another type or shape", "comes between"):
        assert part in reasons


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    q = fxquant.quantize_tensor(torch.randn(24, 32), "e3m2/channel")
    thin, wide = torch.randn(3, 4), torch.randn(24, 4)
    arguments = (torch.randn(3, 32), q.packed, q.scale, None, torch.randn(24), "e3m2/channel", [24, 32])
    more = {
        "input_spec": "e4m3/token", "thin": thin, "wide": wide, "activation": "gelu", "residual": torch.randn(3, 24),
    }  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.linear_wq_fused.default, arguments, more, test_utils=tests)

    def f(x: Tensor) -> Tensor:
        return ops.linear_wq_fused(x, *arguments[1:], **more) * 2

    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(arguments[0]), f(arguments[0]))
    with pytest.raises(ValueError, match="unknown activation 'tanh'; expected one of none, relu"):
        ops.linear_wq_fused(*arguments, activation="tanh")


@pytest.mark.slow
def test_aot_inductor_packages_a_fused_graph(tmp_path: Path) -> None:
    """The operators stay opaque calls in the compiled library, which finds them once fxquant is imported."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)).eval()
    x = torch.randn(3, 64)
    made = fxquant.compile(model, (x,), "W4A8-FP", calibration=[(torch.randn(128, 64),) for _ in range(2)])
    with torch.no_grad():
        exported = torch.export.export(fused(made.program).gm, (x,), strict=False)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        got = torch._inductor.aoti_load_package(package)(x)
    assert torch.equal(got[0] if isinstance(got, (list, tuple)) else got, made(x))
