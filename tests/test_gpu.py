"""On a real GPU: what no interpreter and no disassembler can show. ``python -m pytest tests/test_gpu.py``

First what was assumed without one: tensor cores take subnormal numbers as they are, every code decodes, sums of
integers are exact for every format, group, split and order of operands. Then the operators and whole graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant import packing
from fxquant.codegen import launch, tuning
from fxquant.codegen.gemm import Epilogue, run_dense, run_gemm, run_round, run_to_half
from fxquant.codegen.prepack import KernelWeight, Operands, prepare
from fxquant.codegen.rounding import BYTE_DOTS, InputRounding, RoundedProduct, plan
from fxquant.codegen.tiles import Tiles, tiles
from fxquant.decodings import KERNEL_FORMATS, decodes, decoding
from fxquant.errors import InputError
from fxquant.formats import parse_format
from fxquant.grids import IntFormat
from fxquant.ops import operators as ops
from fxquant.scheme import parse_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA device of sm_80 or later, and there is none: these tests have not run",
    ),
]
CUDA = "cuda"
E4M3 = parse_format("e4m3")


@pytest.fixture(autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in a folder of the test's own; references are computed without TF32 and with full sums."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    tuning.stored.cache_clear()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before
    tuning.stored.cache_clear()


def gpu() -> launch.Device:
    return launch.device(torch.cuda.current_device())


def operands(codes: Tensor, spec: str, scale: Tensor, zero_point: Tensor | None = None) -> Operands:
    """A weight of these codes and scales, on the GPU."""
    packed = packing.pack(codes, packing.planar(parse_spec(spec).format.bits))
    move = (packed, scale, zero_point)
    return Operands(*(None if t is None else t.to(CUDA) for t in move), spec, tuple(codes.shape))


def random_weight(spec: str, N: int, K: int) -> Operands:
    q = fxquant.quantize_tensor(torch.randn(N, K), spec)
    parts = (q.packed, q.stored_scale, q.zero_point)
    moved = tuple(None if t is None else t.to(CUDA) for t in parts)
    outer = None if q.tensor_scale is None else q.tensor_scale.to(CUDA)
    return Operands(*moved, spec, q.shape, outer)


def integers(spec: str, N: int, K: int) -> Operands:
    """Random codes that kernels take, and scales that are small powers of two: sums in float32 are exact."""
    parsed = parse_spec(spec)
    left_out = decoding(parsed.format).left_out
    good = torch.tensor([c for c in range(2**parsed.format.bits) if c not in left_out], dtype=torch.uint8)
    values = parsed.format.table()[good.long()].abs()
    good = good[values <= 16] if not parsed.has_zero_point else good
    codes = good[torch.randint(0, len(good), (N, K))]
    shape = parsed.scale_shape(N, K)
    zero = torch.randint(0, 2**parsed.format.bits, shape).to(torch.uint8) if parsed.has_zero_point else None
    return operands(codes, spec, torch.exp2(torch.randint(-2, 3, shape).float()), zero)


def kernel(weight: Operands, target: object = None) -> KernelWeight:
    found = prepare(weight, target)  # type: ignore[arg-type]
    assert isinstance(found, KernelWeight), found
    return found


def value(weight: Operands) -> Tensor:
    """W in float64."""
    return ops.dequantize_packed(
        weight.packed, weight.scale, weight.zero_point, weight.spec, list(weight.shape), weight.tensor_scale
    ).double()


def rule(M: int, weight: KernelWeight) -> Tiles:
    return tiles(M, weight.rows, tuning.steps(weight), sms=gpu().sms, arch=gpu().arch)


def within(got: Tensor, x: Tensor, w: Tensor, want: Tensor, *, unit: float = 2.0**-24) -> bool:
    """Whether sums of K terms in any order, rounded once to the dtype of ``got``, may come out so."""
    bound = (x.double().abs() @ w.abs().T) * (x.shape[1] + 8) * unit
    if got.dtype != torch.float32:
        bound = bound + want.abs() * torch.finfo(got.dtype).eps + 2.0**-24
    return bool(((got.double() - want).abs() <= bound).all())


SWAPS = (False, True)


# --- what was assumed ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("format", [str(f) for f in KERNEL_FORMATS if decodes(f) is None])
def test_tensor_cores_take_every_code_as_it_is(format: str, swap: bool) -> None:
    """W = all codes, x = 1: each output is one value. Subnormals of the format are subnormal float16 there (open point
    of the design: were they flushed, INT4 and INT8 would come out as zeros)."""
    parsed = parse_format(format)
    left_out = decoding(parsed).left_out
    codes = torch.arange(2**parsed.bits, dtype=torch.uint8)
    codes = codes[[c not in left_out for c in codes.tolist()]]
    square = torch.zeros(len(codes), 256, dtype=torch.uint8)
    square[:, :] = next(c for c in codes.tolist() if float(parsed.table()[c]) == 0)
    zero = None
    if isinstance(parsed, IntFormat) and not parsed.signed:
        zero = torch.zeros(len(codes), 1, dtype=torch.uint8)
    want = parsed.table()[codes.long()].to(CUDA)
    for column in (0, 1, 31, 37, 128, 255):
        here = square.clone()
        here[:, column] = codes
        weight = kernel(operands(here, f"{format}/channel", torch.ones(len(codes), 1), zero))
        x = torch.zeros(16, 256, dtype=torch.float16, device=CUDA)
        x[:, column] = 1
        chosen = Tiles(BM=16, BN=64, splits=1, swap=swap, warps=4, stages=2)
        for use_asm in (True, False):
            got = run_gemm(x, weight, chosen, dtype=torch.float32, use_asm=use_asm)
            assert torch.equal(got.double(), want.expand(16, -1))


@pytest.mark.parametrize("swap", SWAPS)
def test_subnormal_times_subnormal(swap: bool) -> None:
    """x = 2^-24 times INT8 codes, whose decoded values are at most 127 * 2^-24."""
    weight = integers("int8/channel", 64, 256)
    weight = dataclasses.replace(weight, scale=torch.ones_like(weight.scale))
    x = torch.randint(-9, 10, (16, 256), device=CUDA).half() * 2.0**-24
    chosen = Tiles(BM=16, BN=64, splits=1, swap=swap, warps=4, stages=2)
    got = run_gemm(x, kernel(weight), chosen, dtype=torch.float32)
    assert torch.equal(got.double(), x.double() @ value(weight).T)


def test_rows_of_bfloat16() -> None:
    x = torch.randn(33, 4099, device=CUDA).bfloat16() * torch.exp2(torch.arange(33.0, device=CUDA) * 7 - 120)[:, None]
    x = x.bfloat16()
    x[5] = 0
    half, power = run_to_half(x)
    back, largest = half.double() * power.double()[:, None], x.double().abs().amax(1, keepdim=True)
    assert bool(((back - x.double()).abs() <= largest * 2.0**-39).all())
    exact = x.double().abs() >= largest * 2.0**-31
    assert torch.equal(back[exact], x.double()[exact])


# --- exact products --------------------------------------------------------------------------------------------------
GROUPS = (
    "channel",
    "tensor",
    "group16",
    "group20",
    "group32",
    "group48",
    "group64",
    "group100",
    "group128",
    "group400",
)


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", [str(f) for f in KERNEL_FORMATS if decodes(f) is None])
def test_products_of_integers_are_exact(format: str, granularity: str) -> None:
    weight = integers(f"{format}/{granularity}", 133, 777)
    ready = kernel(weight)
    for M, splits, swap in itertools.product((1, 16, 37), (1, 2, 4), SWAPS):
        x = torch.randint(-4, 5, (M, 777), device=CUDA).half()
        want = x.double() @ value(weight).T
        chosen = Tiles(BM=16, BN=64, splits=min(splits, ready.blocks), swap=swap, warps=4, stages=3)
        got = run_gemm(x, ready, chosen, dtype=torch.float32)
        assert torch.equal(got.double(), want), (M, splits, swap)


@pytest.mark.parametrize("M", [1, 7, 16, 17, 32, 33, 64, 65, 128, 255])
@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group128", "int4/group64", "uint4/group128"])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1, 256), (577, 1544), (11008, 4096)])
def test_the_tiles_that_are_chosen(N: int, K: int, spec: str, M: int) -> None:
    weight = integers(spec, N, K)
    ready = kernel(weight)
    x = torch.randint(-1, 2, (M, K), device=CUDA).half()
    got = run_gemm(x, ready, rule(M, ready), dtype=torch.float32)
    assert torch.equal(got.double(), x.double() @ value(weight).T)


@pytest.mark.parametrize("M", [1, 16, 64, 255])
def test_nothing_beside_the_arguments_is_read(M: int) -> None:
    """NaN lies around x, on all sides: a value of it would show."""
    weight = random_weight("e3m2/group48", 133, 777)
    around = torch.full((M + 40, 777 + 64), torch.nan, dtype=torch.float16, device=CUDA)
    x = around[20 : 20 + M, 32 : 32 + 777]
    x.copy_(torch.randn(M, 777))
    ready = kernel(weight)
    got = run_gemm(x, ready, rule(M, ready), dtype=torch.float32)
    assert within(got, x, value(weight), x.double() @ value(weight).T)


@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group48", "uint4/group64"])
def test_the_dense_weight(spec: str) -> None:
    weight = random_weight(spec, 133, 777)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(run_dense(kernel(weight), dtype), value(weight).float().to(dtype))


def test_runs_give_the_same_bits() -> None:
    weight = kernel(random_weight("e3m2/group64", 4096, 4096))
    for M in (1, 16, 100):
        x = torch.randn(M, 4096, device=CUDA).half()
        chosen = dataclasses.replace(rule(M, weight), splits=8)
        first = run_gemm(x, weight, chosen)
        assert all(torch.equal(run_gemm(x, weight, chosen), first) for _ in range(20))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_epilogues(activation: str, swap: bool, splits: int) -> None:
    weight = random_weight("e3m2/channel", 133, 1024)
    x, bias = torch.randn(19, 1024, device=CUDA).half(), torch.randn(133, device=CUDA).half()
    residual = torch.randn(19, 160, device=CUDA).half()[:, :133]
    thin, wide = torch.randn(19, 8, device=CUDA).half(), torch.randn(133, 8, device=CUDA).half()
    row_scale = torch.exp2(torch.randint(-3, 4, (19,), device=CUDA).float())
    y = x.double() @ value(weight).T * row_scale.double()[:, None] + thin.double() @ wide.double().T + bias.double()
    want = fxquant.ops.ACTIVATIONS[activation](y) + residual.double()
    more = Epilogue(bias, activation, residual, thin, wide)
    chosen = Tiles(BM=32, BN=64, splits=splits, swap=swap, warps=4, stages=3)
    got = run_gemm(x, kernel(weight), chosen, row_scale=row_scale, epilogue=more, dtype=torch.float32)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=2e-5 * float(y.abs().max()))


# --- rounded activations ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", ["e4m3/token", "e5m2/token", "e2m1/token", "e3m2/token", "int8/token"])
def test_rounded_rows_are_those_of_the_reference(spec: str, dtype: torch.dtype) -> None:
    x = (torch.randn(65, 4099) * torch.exp2(torch.randint(-12, 4, (65, 4099)).float())).to(dtype).to(CUDA)
    x[1] = 0
    found = plan(random_weight("e2m1/channel", 64, 4099), InputRounding(spec), arch=gpu().arch)
    assert isinstance(found, RoundedProduct)
    codes, scale = run_round(x, parse_spec(spec).format, None, found)
    assert torch.equal(codes.float() * scale[:, None], ops.fake_quantize_dynamic(x.float(), spec))


@pytest.mark.parametrize("M", [1, 16, 33, 100])
@pytest.mark.parametrize("spec", ["e2m1/channel", "e2m1/group128", "e3m2/channel", "e4m3/channel", "e2m1/group64:m2"])
def test_fp8_products(spec: str, M: int) -> None:
    """Hopper's FP8 products add with fewer bits: sums of 128 terms at 2^-13 of the largest, then float32."""
    if gpu().arch < BYTE_DOTS:
        pytest.skip("this GPU does not multiply FP8")
    weight, rounding = random_weight(spec, 512, 2048), InputRounding("e4m3/token")
    x = torch.randn(M, 2048, device=CUDA).half()
    found = plan(weight, rounding, arch=gpu().arch)
    assert isinstance(found, RoundedProduct)
    assert found.x == E4M3
    got = launch.linear(x, found, gpu(), Epilogue(), rounding)
    rounded = ops.fake_quantize_dynamic(x.float(), "e4m3/token")
    want = rounded.double() @ value(weight).T
    bound = (rounded.double().abs() @ value(weight).abs().T) * 2.0**-12 + want.abs() * 2.0**-10 + 2.0**-24
    assert bool(((got.double() - want).abs() <= bound).all())
    half = plan(weight, rounding, arch=80)
    assert isinstance(half, RoundedProduct)
    assert half.x is None
    precise = launch.linear(x.float(), half, gpu(), Epilogue(), rounding)
    assert within(precise, rounded, value(weight), want)


def test_llm_fp4_is_an_exact_product() -> None:
    """W4A4 with exponents folded into W: all operands are small powers of two, so every sum is exact."""
    weight = integers("e2m1/channel", 128, 512)
    bias = torch.randint(0, 4, (512,), device=CUDA).to(torch.int8)
    weight = dataclasses.replace(weight, exponent_bias=bias)
    x = torch.randint(-4, 5, (16, 512), device=CUDA).half()
    scale = torch.ones(1, 1, device=CUDA)
    arguments = (weight.packed, weight.scale, None, None, weight.spec, list(weight.shape), None, bias)
    more = {"input_spec": "e2m1/tensor", "input_scale": scale, "shifted": True}
    got = ops.linear_wq_fused(x.float(), *arguments, **more)
    want = fxquant.ops.linear_wq_fused(x.double().cpu(), *(t.cpu() if isinstance(t, Tensor) else t for t in arguments),
                                       **{**more, "input_scale": scale.cpu()})  # fmt: skip
    assert torch.equal(got.double().cpu(), want)


# --- the operators ---------------------------------------------------------------------------------------------------
def call(x: Tensor, weight: Operands, bias: Tensor | None = None) -> Tensor:
    return ops.linear_wq(x, weight.packed, weight.scale, weight.zero_point, bias, weight.spec, list(weight.shape),
                         weight.tensor_scale)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (4, 0, 2), (3, 1, 17), (300,), (2, 200)])
@pytest.mark.parametrize("spec", ["e3m2/channel", "e2m1/group32:e8m0", "e2m1/group16:e4m3", "e3m2/block16x64"])
def test_linear_wq(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, bias = random_weight(spec, 133, 1024), torch.randn(133, device=CUDA).to(dtype)
    x = torch.randn(*shape, 1024, device=CUDA).to(dtype)
    got, want = call(x, weight, bias), x.double() @ value(weight).T + bias.double()
    assert got.dtype == dtype
    assert got.shape == want.shape
    eps = torch.finfo(dtype).eps
    bound = (
        (x.double().abs() @ value(weight).abs().T) * eps + want.abs() * eps + 2.0**-24
    )  # W is rounded from 256 rows on
    assert bool(((got.double() - want).abs() <= bound).all())


def test_inputs_that_are_not_contiguous() -> None:
    weight = random_weight("e3m2/channel", 133, 1024)
    base = torch.randn(5, 2048, device=CUDA).half()
    for x in (base[:, 3:1027], base[:, ::2], base[:1, :1024].expand(5, -1), torch.randn(1024, 5, device=CUDA).half().T):
        assert within(call(x, weight), x, value(weight), x.double() @ value(weight).T)


def test_float32_runs_the_reference_and_says_so() -> None:
    weight, x = random_weight("e3m2/channel", 64, 256), torch.randn(3, 256, device=CUDA)
    launch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="x is torch.float32"):
        got = call(x, weight)
    assert torch.equal(got, F.linear(x, value(weight).float()))
    table = random_weight("nf4/group64", 64, 256)
    with pytest.warns(UserWarning, match="table of values"):
        got = call(x.half(), table)
    assert torch.equal(got, F.linear(x.half(), value(table).half()))


def test_mistakes_are_named() -> None:
    weight, x = random_weight("e3m2/channel", 64, 256), torch.randn(3, 256, device=CUDA).half()
    with pytest.raises(InputError, match=r"x has shape \[3, 255\]; expected \[..., 256\]"):
        call(x[:, :255], weight)
    with pytest.raises(InputError, match="packed is on cpu, x is on cuda"):
        call(x, dataclasses.replace(weight, packed=weight.packed.cpu()))
    with pytest.raises(InputError, match=r"bias is torch.float32 \[64\]"):
        call(x, weight, torch.zeros(64, device=CUDA))
    with pytest.raises(InputError, match="packed is"):
        call(x, dataclasses.replace(weight, packed=weight.packed[:, :-1]))


def test_opcheck() -> None:
    weight = random_weight("e3m2/group64", 64, 256)
    x, bias = torch.randn(3, 256, device=CUDA).half().requires_grad_(), torch.randn(64, device=CUDA).half()
    arguments = (weight.packed, weight.scale, None, bias, weight.spec, list(weight.shape))
    torch.library.opcheck(ops.linear_wq.default, (x, *arguments))
    more = {"activation": "silu", "residual": torch.randn(3, 64, device=CUDA).half(), "input_spec": "e4m3/token"}
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.linear_wq_fused.default, (x.detach(), *arguments), more, test_utils=tests)


def test_a_side_stream_and_a_cuda_graph() -> None:
    weight, x = random_weight("e3m2/channel", 512, 1024), torch.randn(4, 1024, device=CUDA).half()
    want = call(x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = call(x, weight)
    stream.synchronize()
    assert torch.equal(other, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x, weight)
    x.copy_(torch.randn(4, 1024))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, call(x, weight))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    weight = random_weight("e3m2/channel", 64, 256)
    other = Operands(*(None if t is None else t.to("cuda:1") for t in weight.tensors[:3]), weight.spec, weight.shape)
    x = torch.randn(3, 256, device="cuda:1").half()
    got = call(x, other)
    assert got.device == x.device
    assert within(got, x, value(other), x.double() @ value(other).T)


# --- graphs ----------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """What a transformer has around its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256)
        self.gate, self.wide = nn.Linear(256, 512, bias=False), nn.Linear(256, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))
        return x + F.silu(self.gate(x)).mul(self.wide(x))[..., :256]


RECIPES = [
    "W6A16-E3M2",
    "W4A8-FP",
    "W4A16-GPTQ-LoRC",
    "W8A8-FP8",
    "W4A4-FPQ",
    "MXFP4",
    "NVFP4",
    "W4A16-INT",
    "W8A8-INT",
]


def compiled(config: str, dtype: torch.dtype) -> fxquant.CompiledModel:
    data = [(torch.randn(8, 5, 256).to(dtype),) for _ in range(8)]
    return fxquant.compile(Block().eval().to(dtype), data[0], config, calibration=data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", RECIPES)
def test_a_graph_on_the_gpu_is_that_on_the_cpu_but_for_rounding(config: str, dtype: torch.dtype) -> None:
    model = compiled(config, dtype)
    moved = model.to(CUDA)
    assert moved._runs is not moved.program
    for shape in ((1, 1), (2, 7), (8, 40)):
        x = torch.randn(*shape, 256).to(dtype)
        got, want = moved(x.to(CUDA)), model(x)
        assert got.is_cuda
        error = (got.cpu().double() - want.double()).norm() / want.double().norm()
        assert float(error) < 8 * torch.finfo(dtype).eps
        assert torch.equal(moved(x.to(CUDA)), got)


@pytest.mark.parametrize("config", ["W6A16-E3M2", "W4A8-FP"])
def test_torch_compile_and_export(config: str) -> None:
    moved = compiled(config, torch.float16).to(CUDA)
    gm = moved._runs.gm
    x = torch.randn(2, 7, 256, device=CUDA).half()
    with torch.no_grad():
        (want,) = gm(x)
        (quick,) = torch.compile(gm, fullgraph=True)(x)
        exported = torch.export.export(gm, (x,), strict=False)
        (again,) = exported.module()(x)
    scale = float(want.abs().max())
    assert torch.allclose(quick, want, rtol=4e-3, atol=4e-3 * scale)
    assert torch.equal(again, want)
    assert "fxquant.linear_wq_fused" in str(exported.graph)


def test_a_model_compiled_on_the_gpu_is_saved_and_exported_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 256).half().to(CUDA)
    model = fxquant.compile(Block().eval().half().to(CUDA), (x,), "W6A16-E3M2")
    assert model._runs is not model.program
    model.save(tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    want = model(x)
    assert torch.equal(loaded.to(CUDA)(x), want)
    assert not list((tmp_path / "saved").rglob("*.py"))


def test_gradients_flow_through_the_kernel() -> None:
    weight = random_weight("e3m2/channel", 64, 256)
    x = torch.randn(5, 256, device=CUDA).half().requires_grad_()
    (grad,) = torch.autograd.grad(call(x, weight).float().square().sum(), x)
    plain = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(F.linear(plain, value(weight).half()).float().square().sum(), plain)
    assert torch.allclose(grad, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_autotune_keeps_what_it_finds() -> None:
    moved = compiled("W6A16-E3M2", torch.float16).to(CUDA)
    x = torch.randn(1, 1, 256, device=CUDA).half()
    before = moved(x)
    found = moved.autotune((1, 64))
    assert set(found) <= set(tuning.stored(gpu().name))
    assert torch.allclose(moved(x), before, rtol=4e-3, atol=4e-3 * float(before.abs().max()))


def test_no_warning_where_kernels_run() -> None:
    moved = compiled("W6A16-E3M2", torch.float16).to(CUDA)
    launch.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(torch.randn(1, 3, 256, device=CUDA).half())
