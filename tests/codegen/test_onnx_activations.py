"""Rounded activations in onnxruntime are those of torch, bit for bit: every format, granularity and kind of scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_export import export_onnx
from fxquant.errors import ExportError
from fxquant.formats import parse_format
from fxquant.ops import operators as ops
from fxquant.program import Program
from fxquant.qtensor import quantize_tensor

FORMATS = (
    "e2m1", "e3m0", "e1m2", "e3m2", "e2m3", "e4m3", "e5m2", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3none", "e3m2b-1",
    "e2m1b1.5", "e3m0b2.5", "int2", "int4", "int8", "nf4", "higgs3", "lut(-1,-0.5,0,1)",
)  # fmt: skip
SCALES = (
    "fp32",
    "fp16",
    "bf16",
    "e5m3",
    "e8m0",
    "e8m0.ceil",
    "e8m0.round",
    "e8m0.even",
    "m1.ceil",
    "m1.floor",
    "m1.round",
)


class Dynamic(nn.Module):
    def __init__(self, spec: str, bias: Tensor | None = None, shifted: bool = False) -> None:
        super().__init__()
        self.spec, self.shifted = spec, shifted
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.fake_quantize_dynamic(x, self.spec, self.bias, self.shifted)  # type: ignore[no-any-return]


class Static(nn.Module):
    """Scales that are given: of the spec's own blocks of ``like``."""

    def __init__(self, spec: str, like: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        q = quantize_tensor(like, spec)
        self.spec = spec
        self.register_buffer("scale", q.stored_scale)
        self.register_buffer("zero", q.zero_point)
        self.register_buffer("outer", q.tensor_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.fake_quantize(x, self.scale, self.zero, self.spec, self.outer, self.bias)  # type: ignore[no-any-return]


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of zeros, one of a single value, one of exact powers of two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.logspace(-6, 6, shape[-2])[:, None]
    x.view(-1, shape[-1])[0] = 0
    x.view(-1, shape[-1])[1] = 0.3
    x.view(-1, shape[-1])[2] = 2.0 ** torch.arange(shape[-1]).remainder(9) * torch.randn(shape[-1], generator=g).sign()
    return x


def ratios(name: str) -> Tensor:
    """Every value of a grid, every midpoint, their neighbours, and what lies outside."""
    table = parse_format(name).table()
    values = table[table.isfinite()].unique()
    middle = ((values[1:] + values[:-1]) / 2).float()
    up, down = (torch.nextafter(middle, torch.full_like(middle, s)) for s in (torch.inf, -torch.inf))
    beyond = torch.tensor([1.01, 1.2, 3.0, 1e9]) * float(values.abs().max())
    return torch.cat([values.float(), middle, up, down, beyond, -beyond, torch.tensor([0.0, -0.0, 1e-30, -1e-40])])


def session(program: Program, path: Path, opset: int, operators: str) -> onnxruntime.InferenceSession:
    export_onnx(program, path, opset=opset, options=Options(operators))  # type: ignore[arg-type]
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check(module: nn.Module, *given: Tensor, path: Path, opset: int = 21, operators: str = "auto") -> None:
    """Bit equal to torch for every input; zeros may have either sign."""
    program = capture(module.eval(), (given[0],))
    run = session(program, path, opset, operators)
    for x in given:
        got = torch.from_numpy(run.run(None, {"x": x.numpy()})[0])
        want = program(x)
        bad = ~((got == want) | (got.isnan() & want.isnan()))
        at = bad.nonzero()[:3].tolist()
        assert not bad.any(), (getattr(module, "spec", ""), int(bad.sum()), at, x[bad][:3], got[bad][:3], want[bad][:3])


@pytest.mark.parametrize("opset", [21, 26])
@pytest.mark.parametrize("format", FORMATS)
def test_every_tie_and_saturation_rounds_as_in_torch(format: str, opset: int, tmp_path: Path) -> None:
    """A static scale of 1 makes x the ratio."""
    x = ratios(format)[None]
    module = Static(f"{format}/tensor", torch.ones(2, 2))
    module.scale.fill_(1.0)
    check(module, x, path=tmp_path / "m.onnx", opset=opset)


@pytest.mark.parametrize("format", FORMATS)
def test_scales_a_token_and_a_group(format: str, tmp_path: Path) -> None:
    for granularity in ("token", "group8"):
        if format.startswith("higgs"):
            continue  # their scale is a root mean square, a sum that torch and onnxruntime add in their own order
        check(Dynamic(f"{format}/{granularity}"), rows(2, 7, 24), rows(3, 5, 24), path=tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", SCALES)
def test_every_kind_of_scale(scale: str, tmp_path: Path) -> None:
    for format in ("e2m1", "int8"):
        for granularity in ("token", "group16"):
            x = rows(2, 9, 48).clamp(-6e4, 6e4)  # a scale that fp16 cannot hold is an error in torch
            check(Dynamic(f"{format}/{granularity}:{scale}"), x, path=tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "spec", ["mxfp4", "mxfp6", "mxfp6_e2m3", "mxfp8", "mxfp8_e5m2", "mxint8", "nvfp4", "e2m1/group16:e4m3.ceil"]
)
@pytest.mark.parametrize("opset", [21, 26])
def test_presets(spec: str, opset: int, tmp_path: Path) -> None:
    check(Dynamic(spec), rows(2, 9, 64), rows(1, 3, 64), path=tmp_path / "m.onnx", opset=opset)


def test_powers_by_error(tmp_path: Path) -> None:
    """The one of two powers with the smaller squared error; rows whose errors are equal to rounding aside."""
    for spec in ("e2m1/token:m1", "e2m1/group16:e8m0.mse", "int4/group16:m1"):
        check(Dynamic(spec), rows(2, 9, 48), path=tmp_path / "m.onnx")


def test_unsigned_integers_with_zero_points(tmp_path: Path) -> None:
    for spec in ("uint4/token", "uint8/token", "uint8/group8:fp16", "uint3/group5"):
        check(Dynamic(spec), rows(2, 9, 24), rows(2, 9, 24).abs(), -rows(1, 4, 24).abs(), path=tmp_path / "m.onnx")


def test_groups_that_are_not_whole(tmp_path: Path) -> None:
    for spec in ("e2m1/group8", "int8/group7:e8m0", "e4m3/group30", "nvfp4"):
        check(Dynamic(spec), rows(2, 9, 20), path=tmp_path / "m.onnx")


def test_root_mean_square_scales_within_rounding(tmp_path: Path) -> None:
    program = capture(Dynamic("higgs4/token").eval(), (rows(2, 9, 48),))
    run = session(program, tmp_path / "m.onnx", 21, "auto")
    x = rows(1, 9, 48)
    want = program(x)
    got = torch.from_numpy(run.run(None, {"x": x.numpy()})[0])
    assert bool(((got - want).abs() <= 1e-6 * want.abs().amax(-1, keepdim=True)).all())


@pytest.mark.parametrize("spec", [
    "e4m3/tensor", "int8/tensor:fp16", "e2m1/tensor:e8m0", "nf4/tensor", "uint8/tensor", "e3m2/group8", "e2m1/channel",
    "int4/group16:bf16", "mxfp8", "nvfp4", "uint4/group8",
])  # fmt: skip
def test_given_scales(spec: str, tmp_path: Path) -> None:
    """A tensor, a channel, a group or a block of the matrix view, in plain or coded form."""

    class Rows(Static):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(12, 32)).reshape(3, 4, 32)

    x = rows(3, 4, 32)
    check(Static(spec, x.reshape(12, 32)) if spec.endswith("tensor") else Rows(spec, x.reshape(12, 32)), x,
          path=tmp_path / "m.onnx")  # fmt: skip


def test_given_scales_of_blocks_of_rows(tmp_path: Path) -> None:
    class Fixed(Static):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.like + x.sum() * 0)

    like = rows(3, 4, 32).reshape(12, 32)
    module = Fixed("e2m1/block4x8", like)
    module.register_buffer("like", like)
    check(module, torch.ones(2, 3), path=tmp_path / "m.onnx")


def test_one_row_of_given_scales_serves_every_token(tmp_path: Path) -> None:
    x = rows(3, 4, 32)
    module = Static("e2m1/group8", torch.ones(1, 32))
    module.scale.copy_(torch.tensor([[0.1, 0.7, 3.0, 1.1]]))
    check(module, x, rows(2, 9, 32), path=tmp_path / "m.onnx")


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exponent_biases(shifted: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    bias = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    x = (rows(2, 7, 24).clamp(-60, 60)).to(dtype)
    for spec in ("e2m1/token", "int8/group8"):
        check(Dynamic(spec, bias, shifted), x, path=tmp_path / "m.onnx")
    check(Static("e2m1/tensor", x.float(), bias), x, path=tmp_path / "m.onnx")


def test_float16_inputs(tmp_path: Path) -> None:
    for spec in ("e4m3/token", "e2m1/group8:e8m0", "int8/token"):
        check(Dynamic(spec), rows(2, 7, 24).clamp(-6e4, 6e4).half(), path=tmp_path / "m.onnx")


@pytest.mark.parametrize("spec", [
    "int8/token", "int8/group8", "e4m3/token", "e5m2/group8", "e4m3fnuz/token:fp16", "int8/token:e8m0",
    "int8/token:fp16",
])  # fmt: skip
def test_standard_operators_round_the_same(spec: str, tmp_path: Path) -> None:
    check(Dynamic(spec), rows(2, 9, 24), rows(1, 3, 24), path=tmp_path / "m.onnx", operators="standard")
    types = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ("QuantizeLinear" in types) == spec.startswith("int8")
    assert not [t for t in types if t.startswith("FakeQuantize")]


@pytest.mark.parametrize("format", ["int8", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_standard_operators_with_a_static_scale(format: str, tmp_path: Path) -> None:
    module = Static(f"{format}/tensor", torch.ones(2, 2))
    for value in (1.0, 0.0173):
        module.scale.fill_(value)
        check(module, ratios(format)[None] * value, path=tmp_path / "m.onnx", operators="standard")
    types = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ("QuantizeLinear" if format == "int8" else "Cast") in types
    assert not [t for t in types if t.startswith("FakeQuantize")]


def test_no_tokens(tmp_path: Path) -> None:
    program = capture(Dynamic("e2m1/group8").eval(), (rows(2, 7, 24),))
    for operators in ("auto", "standard"):
        run = session(program, tmp_path / "m.onnx", 21, operators)
        assert run.run(None, {"x": np.zeros((2, 0, 24), dtype=np.float32)})[0].shape == (2, 0, 24)


def test_what_no_config_gives_is_refused(tmp_path: Path) -> None:
    program = capture(Dynamic("e2m1/group8:m2").eval(), (rows(2, 7, 24),))
    with pytest.raises(
        ExportError, match="fake_quantize_dynamic cannot be written in ONNX: activations in e2m1/group8:m2"
    ):
        export_onnx(program, tmp_path / "m.onnx")
