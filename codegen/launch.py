"""launch: the packed operators on a GPU, by generated Triton kernels. Importing this registers them.

What runs for ``linear_wq`` and ``linear_wq_fused`` on CUDA tensors; everything else runs its reference body::

    x float16                    kernel on x                                          sums in float32
    x bfloat16                   kernel on x as float16, a power of two a row         off by <= 2^-39 of a row's largest
    x to be rounded (W4A8 ...)   kernel on codes, FP8 from sm_89 on, else float16     sums in float32; see ``rounding``
    256 rows and more            W decoded once by a kernel, then torch's product
    x float32, float64           reference: float16 would lose bits of x, unless x is rounded anyway
    a weight without a kernel    reference (``prepack`` says why): codebooks, exponent biases
    below sm_80, no triton       reference

The last three are said once, as a warning. ``import triton`` happens when the first kernel is launched.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxquant import ops
from fxquant.codegen import tiles, tuning
from fxquant.codegen.gemm import Epilogue, run_dense, run_gemm, run_round, run_to_half
from fxquant.codegen.prepack import Declined, KernelWeight, Operands, prepare
from fxquant.codegen.rounding import InputRounding, RoundedProduct, plan
from fxquant.errors import InputError
from fxquant.program import Progress, quiet
from fxquant.rewrite import fetch
from fxquant.scheme import parse_spec


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: its name, its multiprocessors, its architecture as 10 * major + minor."""

    name: str
    sms: int
    arch: int


@cache
def device(index: int) -> Device:
    """The properties of CUDA device ``index``, read once."""
    found = torch.cuda.get_device_properties(index)
    return Device(found.name, found.multi_processor_count, 10 * found.major + found.minor)


def linear_wq(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, spec: str,
    shape: Sequence[int], tensor_scale: Tensor | None = None, exponent_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``ops.linear_wq`` for CUDA tensors. Raises InputError for an argument that does not fit."""
    weight = Operands(packed, scale, zero_point, spec, tuple(shape), tensor_scale, exponent_bias)
    check_arguments(x, weight, bias)
    kernel = kernel_for(x, weight)
    if isinstance(kernel, Declined):
        _warn(spec, x, kernel)
        return ops.linear_wq(x, packed, scale, zero_point, bias, spec, shape, tensor_scale, exponent_bias)
    return linear(x, kernel, device(x.device.index), Epilogue(bias))


def linear_wq_fused(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, spec: str,
    shape: Sequence[int], tensor_scale: Tensor | None = None, exponent_bias: Tensor | None = None, *,
    input_spec: str = "", input_scale: Tensor | None = None, input_bias: Tensor | None = None, shifted: bool = False,
    thin: Tensor | None = None, wide: Tensor | None = None, activation: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``ops.linear_wq_fused`` for CUDA tensors. Raises InputError for an argument that does not fit."""
    weight = Operands(packed, scale, zero_point, spec, tuple(shape), tensor_scale, exponent_bias)
    epilogue = Epilogue(bias, activation, residual, thin, wide)
    rounding = InputRounding(input_spec, input_scale, input_bias, shifted) if input_spec else None
    check_arguments(x, weight, bias)
    check_around(x, weight, epilogue, rounding)
    kernel = kernel_for(x, weight, rounding)
    if isinstance(kernel, Declined):
        _warn(spec, x, kernel)
        return ops.linear_wq_fused(
            x, packed, scale, zero_point, bias, spec, shape, tensor_scale, exponent_bias, input_spec=input_spec,
            input_scale=input_scale, input_bias=input_bias, shifted=shifted, thin=thin, wide=wide,
            activation=activation, residual=residual,
        )  # fmt: skip
    return linear(x, kernel, device(x.device.index), epilogue, rounding)


def _warn(spec: str, x: Tensor, declined: Declined) -> None:
    warn_once(f"{spec} linear on {x.device.type}: {declined.reason}; W is decoded by torch at every call instead")


Kernel = KernelWeight | RoundedProduct
_SIXTEEN = (torch.float16, torch.bfloat16)


def kernel_for(x: Tensor, weight: Operands, rounding: InputRounding | None = None) -> Kernel | Declined:
    """The weight for a kernel, or why none runs."""
    if 0 in weight.shape:
        return Declined("the weight is empty")
    if x.dtype not in _SIXTEEN and (rounding is None or x.dtype == torch.float64):
        return Declined(f"x is {x.dtype}, and kernels take float16 and bfloat16")
    gpu = device(x.device.index)
    if reason := no_kernels(gpu):
        return Declined(reason)
    return prepare(weight) if rounding is None else plan(weight, rounding, arch=gpu.arch)


@cache
def no_kernels(gpu: Device) -> str | None:
    """Why no kernel runs on a device; None where they do."""
    if torch.version.hip is not None:
        return "kernels are written for CUDA, and this is ROCm"
    if find_spec("triton") is None:
        return "triton is not installed"
    if gpu.arch < tiles.OLDEST:
        return f"{gpu.name} is sm_{gpu.arch}, and kernels need sm_{tiles.OLDEST}"
    return None


def linear(
    x: Tensor, kernel: Kernel, gpu: Device, epilogue: Epilogue, rounding: InputRounding | None = None, *,
    use_asm: bool = True,
) -> Tensor:  # fmt: skip
    """``epilogue(x @ W^T)`` for x ``[..., K]``, rounded as ``rounding`` says, by kernels; ``[..., N]``."""
    weight = kernel.weight if isinstance(kernel, RoundedProduct) else kernel
    shape, N = (*x.shape[:-1], weight.rows), weight.rows
    rows = x.reshape(-1, x.shape[-1])
    if rows.numel() and rows.stride(1) != 1:
        rows = rows.contiguous()
    M = len(rows)
    if M == 0:
        return x.new_empty(shape)
    flat = epilogue.flattened(M, N)
    if M >= tiles.DENSE:
        return _by_dense(rows, kernel, flat, rounding, use_asm).reshape(shape)
    row_scale = None
    if isinstance(kernel, RoundedProduct) and rounding is not None:
        rows, row_scale = run_round(rows, parse_spec(rounding.spec).format, rounding.scale, kernel)
    elif x.dtype == torch.bfloat16:
        rows, row_scale = run_to_half(rows)
    timed = tuning.stored(gpu.name)
    found = timed.get(tuning.key(M, weight)) if timed else None
    chosen = found or tiles.tiles(M, N, tuning.steps(weight), sms=gpu.sms, arch=gpu.arch)
    own = flat if flat.thin is None or flat.thin.dtype in _SIXTEEN else Epilogue(flat.bias)
    y = run_gemm(rows, weight, chosen, row_scale=row_scale, epilogue=own, dtype=x.dtype, use_asm=use_asm)
    if own is not flat:  # float32 factors, which the kernel would multiply as TF32
        y = ops.finish(y, flat.thin, flat.wide, flat.activation, flat.residual)
    return y.reshape(shape)


def _by_dense(
    rows: Tensor, kernel: Kernel, epilogue: Epilogue, rounding: InputRounding | None, use_asm: bool
) -> Tensor:
    """The same for so many rows that W is decoded once for all of them, and torch does the rest."""
    weight = kernel
    if isinstance(kernel, RoundedProduct) and rounding is not None:
        weight = kernel.weight
        half = replace(kernel, x=None)
        codes, row_scale = run_round(rows, parse_spec(rounding.spec).format, rounding.scale, half)
        rows = (codes.float() * row_scale[:, None]).to(rows.dtype)
    assert isinstance(weight, KernelWeight)
    y = F.linear(rows, run_dense(weight, rows.dtype, use_asm=use_asm), epilogue.bias)
    return ops.finish(y, epilogue.thin, epilogue.wide, epilogue.activation, epilogue.residual)


def check_arguments(x: Tensor, weight: Operands, bias: Tensor | None) -> None:
    """Raise InputError, naming the argument, for what a kernel would read wrongly or beyond its end.

    The weight's own tensors are looked at once, when they are prepared."""
    named = {
        "packed": weight.packed, "scale": weight.scale, "zero_point": weight.zero_point,
        "tensor_scale": weight.tensor_scale, "exponent_bias": weight.exponent_bias, "bias": bias,
    }  # fmt: skip
    for name, value in named.items():
        if value is not None and value.device != x.device:
            raise InputError(f"{name} is on {value.device}, x is on {x.device}; move the model or its inputs")
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64")
    if len(weight.shape) != 2:
        raise InputError(f"shape is {list(weight.shape)}; expected [out_features, in_features]")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise InputError(f"x has shape {list(x.shape)}; expected [..., {K}]")
    if bias is not None and (tuple(bias.shape) != (N,) or bias.dtype != x.dtype):
        raise InputError(f"bias is {bias.dtype} {list(bias.shape)}; expected {x.dtype} [{N}]")


def check_around(x: Tensor, weight: Operands, epilogue: Epilogue, rounding: InputRounding | None) -> None:
    """The same for what is around a packed linear."""
    N, K = weight.shape
    lead, rank = list(x.shape[:-1]), 0 if epilogue.thin is None else epilogue.thin.shape[-1]
    if (epilogue.thin is None) != (epilogue.wide is None):
        raise InputError(f"{'thin' if epilogue.thin is None else 'wide'} is missing; they go together")
    wanted = {
        "residual": (epilogue.residual, x.dtype, [*lead, N]), "thin": (epilogue.thin, x.dtype, [*lead, rank]),
        "wide": (epilogue.wide, x.dtype, [N, rank]),
        "input_scale": (rounding.scale if rounding else None, torch.float32, [1, 1]),
        "input_bias": (rounding.exponent_bias if rounding else None, torch.int8, [K]),
    }  # fmt: skip
    for name, (value, dtype, shape) in wanted.items():
        if value is None:
            continue
        if value.device != x.device:
            raise InputError(f"{name} is on {value.device}, x is on {x.device}; move the model or its inputs")
        if value.dtype != dtype or list(value.shape) != shape:
            raise InputError(f"{name} is {value.dtype} {list(value.shape)}; expected {dtype} {shape}")
    if epilogue.activation not in ops.ACTIVATIONS:
        raise InputError(f"unknown activation {epilogue.activation!r}; expected one of {', '.join(ops.ACTIVATIONS)}")


@cache
def warn_once(text: str) -> None:
    """Say what runs instead of a kernel, once a process."""
    warnings.warn(text, stacklevel=3)


def autotune(gm: fx.GraphModule, rows: Sequence[int] = (1,), *, progress: Progress = quiet) -> dict[str, tiles.Tiles]:
    """Time tiles for the packed linears of a graph on the GPU they are on, for so many rows of x; keep the fastest.

    They are kept in the private cache and used from then on, in this process and others. Returns them by what they are
    for. Raises InputError where a weight is not on a GPU, or kernels do not run there.
    """
    found: dict[str, tiles.Tiles] = {}
    targets = (_linear, ops.operators.linear_wq_fused.default)
    nodes = [node for node in gm.graph.nodes if node.target in targets]
    for done, node in enumerate(nodes):
        progress("autotune", done, len(nodes))
        weight, rounding = _operands(gm, node), _rounding(gm, node)
        if not weight.packed.is_cuda:
            raise InputError(f"a weight is on {weight.packed.device}; tiles are timed on a GPU: move the model there")
        gpu = device(weight.packed.device.index)
        if reason := no_kernels(gpu):
            raise InputError(f"no tiles to time: {reason}")
        kernel = prepare(weight) if rounding is None else plan(weight, rounding, arch=gpu.arch)
        if isinstance(kernel, Declined):
            continue
        if isinstance(kernel, RoundedProduct):
            kernel = kernel.weight
        for M in rows:
            if not 1 <= M < tiles.DENSE:
                raise InputError(f"rows is {M}; expected 1 to {tiles.DENSE - 1}, above which W is decoded once")
            if (name := tuning.key(M, kernel)) not in found:
                with torch.cuda.device(weight.packed.device):
                    found[name] = tuning.tune(
                        M, kernel, gpu=gpu.name, sms=gpu.sms, arch=gpu.arch, time=tuning.cuda_time
                    )
    return found


def _operands(gm: fx.GraphModule, node: fx.Node) -> Operands:
    """The weight of a packed linear's node."""
    value = _values(gm, node, _OPERANDS)
    return Operands(**{**value, "shape": tuple(value["shape"])})


def _rounding(gm: fx.GraphModule, node: fx.Node) -> InputRounding | None:
    """How the input of a packed linear's node is rounded."""
    value = _values(gm, node, ("input_spec", "input_scale", "input_bias", "shifted"))
    if not value["input_spec"]:
        return None
    return InputRounding(value["input_spec"], value["input_scale"], value["input_bias"], bool(value["shifted"]))


def _values(gm: fx.GraphModule, node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Arguments of a node by name, None where they are left out, constants as their tensors."""
    given = {a.name: v for a, v in zip(_linear._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    found: dict[str, Any] = {name: given.get(name) for name in names}
    return {k: fetch(gm, str(v.target)) if isinstance(v, fx.Node) else v for k, v in found.items()}


_OPERANDS = ("packed", "scale", "zero_point", "spec", "shape", "tensor_scale", "exponent_bias")
_linear: Any = ops.operators.linear_wq.default
_library = torch.library.Library(ops.NAMESPACE, "IMPL")
_library.impl("linear_wq", linear_wq, "CUDA")
_library.impl("linear_wq_fused", linear_wq_fused, "CUDA")
