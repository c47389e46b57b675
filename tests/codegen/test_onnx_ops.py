"""Every converter of the ONNX exporter against torch: a module of one call is captured, exported and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.capture import capture
from fxquant.codegen.onnx_export import export_onnx

Case = tuple[str, Callable[..., Any], Sequence[Tensor]]


def module(function: Callable[..., Any], count: int) -> nn.Module:
    """A module whose forward calls ``function`` on ``count`` named inputs."""

    class One(nn.Module):
        def forward(self, a: Tensor) -> Any:
            return function(a)

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Any:
            return function(a, b)

    class Three(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
            return function(a, b, c)

    class Four(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
            return function(a, b, c, d)

    return (One, Two, Three, Four)[count - 1]()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*shape: int, high: int = 9) -> Tensor:
    return torch.randint(-high, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


X, POSITIVE, UNIT = randn(3, 5), randn(3, 5).abs() + 0.5, randn(3, 5).tanh() * 0.9
IMAGE, INTS, BITS = randn(2, 4, 9, 10), ints(3, 5), ints(3, 5) > 0
Q, K, V = randn(2, 4, 7, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)
MASK = torch.ones(2, 1, 7, 6, dtype=torch.bool).tril()
BLIND = MASK & (torch.arange(7) != 3)[:, None]
ROWS = torch.tensor([[0, 2], [1, -1]])

ON_FLOAT = [line.split() for line in (
    "abs neg exp sin cos tan sinh cosh atan asinh tanh sigmoid erf expm1 erfc square clone zeros_like ones_like",
    "floor ceil round trunc sign relu isnan isinf logical_not any all",
    "sum mean std var argmax argmin amax amin prod",
)]  # fmt: skip
ON_POSITIVE = ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "acosh"]
ACTIVATIONS = [
    "gelu",
    "silu",
    "elu",
    "celu",
    "selu",
    "leaky_relu",
    "hardtanh",
    "relu6",
    "hardsigmoid",
    "hardswish",
    "softplus",
    "mish",
    "logsigmoid",
]


def each(owner: Any, names: Sequence[str]) -> Callable[[Tensor], Any]:
    """A function that returns the results of several."""
    return lambda x: [getattr(owner, name)(x) for name in names]


UNARY: list[Case] = [
    *((" ".join(names), each(torch, names), (X,)) for names in ON_FLOAT),
    ("positive", each(torch, ON_POSITIVE), (POSITIVE + 1,)),
    ("inverse", each(torch, ["asin", "acos", "atanh"]), (UNIT,)),
    ("activations", each(F, ACTIVATIONS), (X * 3,)),
    ("exp of integers", torch.exp, (INTS,)),
    ("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (X,)),
    ("glu", lambda x: F.glu(x, dim=0), (randn(4, 3),)),
    ("bitwise_not", lambda i, b: (~i, ~b), (INTS, BITS)),
    ("round decimals", lambda x: torch.round(x, decimals=2), (X,)),
    ("threshold", lambda x: F.threshold(x, 0.2, -1.0), (X,)),
    ("casts", lambda x: (x.to(torch.int32), x.bool(), x.double(), x.half().float(), x.to(torch.uint8)), (POSITIVE,)),
]
BINARY: list[Case] = [
    ("add alpha", lambda x, y: torch.add(x, y, alpha=2) + 1, (X, POSITIVE)),
    ("int plus float", lambda i, x: (i + x, i + 1.5, i * 2, i + True), (INTS, X)),
    ("rank 0 does not promote", lambda x, s: x.half() + s, (X, torch.tensor(2.0))),
    ("bool arithmetic", lambda a, b: (a + b, a * b, a + 1, a * 2.0), (BITS, ~BITS)),
    ("narrow integers", lambda a: (a + a, a * 3, a.to(torch.int8) - 100), (INTS.abs().to(torch.uint8),)),
    ("rsub", lambda x: (1 - x, torch.rsub(x, x, alpha=3)), (X,)),
    ("div", lambda x, i: (x / 3, i / 2, i / i.abs().clamp(min=1)), (X, INTS)),
    (
        "div modes",
        lambda i: (torch.div(i, 4, rounding_mode="floor"), torch.div(i, 4, rounding_mode="trunc"), i // -4),
        (INTS,),
    ),
    ("div modes of floats", lambda x: [torch.div(x, 0.3, rounding_mode=m) for m in ("floor", "trunc")], (X,)),
    ("remainder", lambda i, x: (i % 4, i % -4, x % 0.7, torch.fmod(x, 0.7), torch.fmod(i, 4)), (INTS, X)),
    ("pow", lambda x: (x**2, x**0.5, x**-1, x**-0.5, x**3, x**1.7, 2**x, x**x), (POSITIVE,)),
    ("maximum", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), (X, POSITIVE)),
    ("bitwise", lambda a, b: (a & b, a | b, a ^ b, a & 6), (INTS, INTS.flip(0))),
    (
        "logical",
        lambda a, b: (a & b, torch.logical_or(a, b), torch.logical_xor(a, b), torch.logical_and(a, b)),
        (BITS, ~BITS),
    ),
    ("compare", lambda x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y), (INTS, INTS.flip(0))),
    ("compare mixed", lambda i, x, b: (i > x, i == 2.5, x != 1, b == 1, b < 1), (INTS, X, BITS)),
    (
        "where",
        lambda b, x, i: (torch.where(b, x, 0.0), torch.where(b, i, x), torch.where(b, b, False)),
        (BITS, X, INTS),
    ),
    ("masked_fill", lambda x, b: (x.masked_fill(b, -1e9), b.masked_fill(b, False)), (X, BITS)),
    ("clamp", lambda x, i: (x.clamp(-1, 1), x.clamp(min=0), i.clamp(max=2), x.clamp(x - 1, x * 0)), (X, INTS)),
    (
        "lerp",
        lambda x, y: (torch.lerp(x, y, 0.3), torch.addcmul(x, x, y, value=2), torch.addcdiv(x, x, y)),
        (X, POSITIVE),
    ),
]
SHAPES: list[Case] = [
    ("view", lambda x: (x.reshape(-1), x.view(x.shape[0], 5, 1), x.reshape(5, -1).unsqueeze(0)), (X,)),
    ("flatten", lambda x: (x.flatten(1), x.flatten(), x.flatten(2).unflatten(1, (2, 2))), (IMAGE,)),
    ("squeeze", lambda x: (x.unsqueeze(1).squeeze(), x.unsqueeze(0).squeeze(0), x.squeeze(1)), (X,)),
    ("permute", lambda x: (x.permute(0, 2, 3, 1), x.transpose(-1, 1), x.mT, torch.movedim(x, 1, -1)), (IMAGE,)),
    ("expand", lambda x: (x.unsqueeze(1).expand(-1, 4, -1), x[:1].expand(3, 5), x[:1].expand_as(x)), (X,)),
    ("repeat", lambda x: (x.repeat(2, 1, 3), x.repeat_interleave(2, dim=1), x.repeat_interleave(3)), (X,)),
    ("tile", lambda x: (x.tile(2), x.tile(2, 3), x.tile(2, 1, 2)), (X,)),
    ("roll", lambda x: (x.roll(2, 1), x.roll((1, -1), (0, 1)), x.flip(0, 1)), (X,)),
    ("slice", lambda x: (x[:, 1:-1], x[:, ::2], x[1:], x[..., -3:], x.narrow(1, 1, 2), x[:, 3], x[-1]), (X,)),
    (
        "cat",
        lambda x, i: (torch.cat([x, i], 1), torch.stack([x, x], 1), torch.hstack([x, x]), torch.vstack([x, x[:1]])),
        (X, INTS),
    ),
    ("concatenate", lambda x: torch.concatenate([x, x], -1), (X,)),
    ("split", lambda x: (*x.split(2, 1), *x.split([1, 4], 1), *x.chunk(2, 1), *x.tensor_split(3, 1)), (X,)),
    ("unbind", lambda x: x.unbind(1), (X,)),
    ("index rows", lambda x, r: (x[r], x[:, r]), (X, ROWS)),
    (
        "index pairs",
        lambda x, r: (x[r, r], x[r[:, :1], r[:1]], x[r % 3, :, r], x[:, r[0], r[1]]),
        (randn(5, 4, 6), ROWS),
    ),
    ("index mask", lambda x, b: x[b], (X, BITS)),
    ("index_put", lambda x, r: x.index_put((r[0],), x[0], accumulate=True), (X, ROWS)),
    ("gather", lambda x, i: (x.gather(1, i), x.index_select(1, i[0])), (X, INTS.abs() % 5)),
    (
        "scatter",
        lambda x, i: (x.scatter(1, i, x), x.scatter(1, i, 2.0), x.scatter_add(1, i, x)),
        (X, torch.arange(5).repeat(3, 1)),
    ),
    (
        "index_add",
        lambda x, i: (x.index_add(0, i, x[:2]), x.index_add(1, i.int(), x[:, :2], alpha=-2)),
        (X, torch.tensor([2, 2])),
    ),
    ("slice_scatter", lambda x: (x.slice_scatter(x[:, :2] * 2, 1, 1, 3), x.select_scatter(x[:, 0], 1, 2)), (X,)),
    ("triu", lambda x, b: (x.triu(), x.tril(-1), b.triu(1), x.int().tril()), (randn(5, 5), ints(5, 5) > 0)),
    (
        "pad",
        lambda x: [F.pad(x, (1, 2, 0, 1), mode=m) for m in ("constant", "reflect", "replicate", "circular")],
        (IMAGE,),
    ),
    ("pad value", lambda x: (F.pad(x, (-1, 1), value=3.0), F.pad(x > 0, (1, 1))), (X,)),
    ("arange", lambda x: (torch.arange(x.shape[0]), torch.arange(1, 9, 2), torch.arange(0, 1, 0.25) + x[0, 0]), (X,)),
    (
        "fill",
        lambda x: (x.new_ones(2, x.shape[0]), torch.full((x.shape[0], 2), 7), torch.full_like(x, 2.5), x.new_zeros(3)),
        (X,),
    ),
    ("linspace", lambda x: torch.linspace(0, 1, 5) + x, (X,)),
    ("eye", lambda x: torch.eye(5) + x[0], (X,)),
    ("one_hot", lambda i: F.one_hot(i, 9), (INTS.abs(),)),
    ("meshgrid", lambda x, i: torch.meshgrid(x, i, indexing="ij"), (X[0], X[1, :3])),
    ("sizes", lambda x: x * (x.shape[0] // 2 + x.shape[0] % 2) + x.shape[0] ** 2 - max(x.shape[0], 4), (X,)),
]
REDUCTIONS: list[Case] = [
    ("histc", lambda a: torch.histc(a, 6, 0, 5), (INTS.float(),)),
    ("histc within", lambda a: torch.histc(a, bins=4, min=-1, max=1.5), (X,)),
    ("along", lambda x: (x.sum(1), x.mean((0, 1), keepdim=True), x.amax(-1), x.amin(0), x.prod(1), x.std(1)), (X,)),
    ("of integers", lambda i, b: (i.sum(), b.sum(1), b.any(1), b.all(0), i.max(), i.min(), i.amax(0)), (INTS, BITS)),
    ("max dim", lambda x, i: (*x.max(1), *i.min(0, keepdim=True), x.argmax(1, keepdim=True), i.argmin(0)), (X, INTS)),
    (
        "var",
        lambda x: (
            x.var(1, correction=0),
            x.var(unbiased=False),
            *torch.var_mean(x, 1),
            *torch.std_mean(x, dim=(0, 1), keepdim=True),
            x.std((0, 1), correction=2),
        ),
        (X,),
    ),
    ("norm", lambda x: (x.norm(dim=1), torch.linalg.vector_norm(x, 1, dim=0), F.normalize(x), x.logsumexp(1)), (X,)),
    ("cumsum", lambda x, b: (x.cumsum(1), b.cumsum(0), x.cumsum(-1, dtype=torch.double)), (X, BITS)),
    ("diff", lambda x: (x.diff(), x.diff(n=2, dim=0), x.diff(prepend=x[:, :1], append=x[:, :2])), (X,)),
    ("softmax", lambda x: (x.softmax(-1), x.log_softmax(0), (x * 0).softmax(1, dtype=torch.double)), (X,)),
    ("topk", lambda x: (*x.topk(3), *x.topk(2, dim=0, largest=False)), (X,)),
    ("sort", lambda x: (*x.sort(), x.argsort(0, descending=True)), (X,)),
]
LAYERS: list[Case] = [
    (
        "matmul",
        lambda x, y: (x @ y, torch.bmm(x, y), x[0] @ y[0], x[0] @ y[0, :, 0], torch.baddbmm(x @ y, x, y, beta=2)),
        (randn(3, 4, 5), randn(3, 5, 4)),
    ),
    ("einsum", lambda x, y: torch.einsum("bij,bjk->bik", x, y), (randn(3, 4, 5), randn(3, 5, 2))),
    ("outer", lambda x: torch.outer(x[0], x[1]), (X,)),
    ("linear", F.linear, (randn(2, 3, 5), randn(4, 5), randn(4))),
    ("embedding", lambda i, w: F.embedding(i, w), (INTS.abs(), randn(9, 4))),
    ("attention", F.scaled_dot_product_attention, (Q, K, V)),
    ("attention mask", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), (Q, K, V, MASK)),
    ("attention blind query", F.scaled_dot_product_attention, (Q, K, V, BLIND)),
    ("attention bias", F.scaled_dot_product_attention, (Q, K, V, randn(2, 1, 7, 6))),
    (
        "attention bias -inf",
        F.scaled_dot_product_attention,
        (Q, K, V, torch.zeros(2, 1, 7, 6).masked_fill(~BLIND, -torch.inf)),
    ),
    ("attention causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (Q, K, V)),
    (
        "attention gqa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (Q, K[:, :2], V[:, :2]),
    ),
    (
        "layer_norm",
        lambda x, w: (F.layer_norm(x, (5,), w, w), F.layer_norm(x, (3, 5)), F.rms_norm(x, (5,), w)),
        (randn(2, 3, 5), randn(5)),
    ),
    ("batch_norm", lambda x, m: F.batch_norm(x, m, m.abs() + 1, m, None), (IMAGE, randn(4))),
    ("group_norm", lambda x, w: (F.group_norm(x, 2, w, w), F.group_norm(x, 4), F.instance_norm(x)), (IMAGE, randn(4))),
    (
        "conv1d",
        lambda x, w: (F.conv1d(x, w, padding=1), F.conv1d(x, w, padding="same", dilation=2)),
        (randn(2, 4, 9), randn(6, 4, 3)),
    ),
    (
        "conv2d",
        lambda x, w: (F.conv2d(x, w, stride=2, padding=(1, 0), groups=2), F.conv2d(x[0], w, groups=2)),
        (IMAGE, randn(6, 2, 3, 3)),
    ),
    ("conv3d", lambda x, w: F.conv3d(x, w, padding=1), (randn(2, 2, 4, 5, 6), randn(3, 2, 3, 3, 3))),
    (
        "conv_transpose",
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
        (IMAGE, randn(4, 3, 3, 3)),
    ),
    (
        "max_pool",
        lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 2, ceil_mode=True), F.max_pool1d(x[:, 0], 2)),
        (IMAGE,),
    ),
    ("avg_pool", lambda x: (F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)), (IMAGE,)),
    ("avg_pool ceil", lambda x: F.avg_pool2d(x, 2, ceil_mode=True), (IMAGE,)),
    (
        "adaptive",
        lambda x: [F.adaptive_avg_pool2d(x, s) for s in (1, (3, 5), (4, 3))] + [F.adaptive_max_pool2d(x, (3, 5))],
        (IMAGE,),
    ),
    ("nearest", lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, size=(7, 15))), (IMAGE,)),
    (
        "bilinear",
        lambda x: [F.interpolate(x, size=(18, 7), mode="bilinear", align_corners=a) for a in (True, False)],
        (IMAGE,),
    ),
    ("bicubic", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (IMAGE,)),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (IMAGE,)),
]
CASES = [*UNARY, *BINARY, *SHAPES, *REDUCTIONS, *LAYERS]


@pytest.mark.parametrize(("name", "function", "inputs"), CASES, ids=[c[0] for c in CASES])
def test_operator(name: str, function: Callable[..., Any], inputs: Sequence[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    program = capture(module(function, len(inputs)), tuple(inputs))
    export_onnx(program, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(program.signature.inputs, inputs, strict=True)}
    got = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    want = program.gm(*inputs)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.numpy().dtype
        assert a.shape == tuple(b.shape)
        rough = a.dtype == np.float16
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-3 if rough else 2e-5, atol=2e-6)
