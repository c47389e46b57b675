"""Triton's interpreter (``TRITON_INTERPRET=1``), made fit for these kernels; ``install()`` before one runs.

Triton 3.9 interprets a kernel with numpy and falls short in three places, which ``install`` mends:

=======================  ============================================  ================================================
inline assembly          not implemented                               ``ptx.elementwise`` on the string that ships;
                                                                       with pack > 1 also under other groupings of the
                                                                       elements, which must give the same
bfloat16, FP8            dot, +, * and compare of bfloat16 work on     dot widens to float32 first; all other
                         the bits as if they were integers; float32    arithmetic is an error; torch converts: to
                         to bfloat16 is truncated, subnormals of       nearest even, to FP8 no further than its
                         E5M2 become 0 as float16, scales of E4M3      largest number
                         are taken for E8M0
loads and stores         anywhere                                      inside the memory that ``within`` names, and
                                                                       each element written once, else an error
=======================  ============================================  ================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import ptx
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

GROUPINGS = 2
"""Random groupings under which assembly with pack > 1 is run again."""
_NAMES = ("create_dot", "binary_op", "unary_op", "create_masked_load", "create_masked_store")
_original = {name: getattr(InterpreterBuilder, name) for name in _NAMES}
_original_scale = interpreter._dot_scaled_scale_to_f32


class MemoryFaultError(Exception):
    """A kernel reads or writes what is not its own, or what another program writes."""


def install() -> None:
    """Mend the interpreter of this process. Raises RuntimeError where kernels are compiled, not interpreted."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    interpreter._convert_float = convert_float
    interpreter._dot_scaled_scale_to_f32 = scale_to_float
    interpreter._patch_lang = patch_lang
    for name, mended in {
        "create_inline_asm": create_inline_asm, "create_dot": create_dot,
        "binary_op": binary_op, "unary_op": unary_op, "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
    }.items():  # fmt: skip
        setattr(InterpreterBuilder, name, mended)


# --- speed -----------------------------------------------------------------------------------------------------------
_original_patch = interpreter._patch_lang
_LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
_patched: list[Any] = []


class _Scope:
    """What ends when a function does; for functions that a kernel calls, nothing."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope:
            _patched.remove(self.scope)
            self.scope.restore()


def patch_lang(fn: Any) -> _Scope:
    """The language made one of numpy: once a launch, where the interpreter does it again for every function called."""
    if _patched:
        return _Scope(None)
    _patched.append(_original_patch(_LANGUAGE))
    return _Scope(_patched[0])


# --- inline assembly -------------------------------------------------------------------------------------------------
class _Results:
    def __init__(self, handles: Sequence[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, i: int) -> TensorHandle:
        return self.handles[i]


def create_inline_asm(
    self: Any, asm: str, constraints: str, values: Sequence[TensorHandle], types: Sequence[Any], pure: bool, pack: int
) -> _Results:
    """Raises ptx.PtxError for assembly that is wrong or whose results depend on which elements meet in it."""
    arrays = [value.data for value in values]
    dtypes = [_get_np_dtype(ty) for ty in types]
    made = ptx.elementwise(asm, constraints, arrays, dtypes, pack)
    for seed in range(GROUPINGS if pack > 1 else 0):
        order = np.random.default_rng(seed).permutation(arrays[0].size)
        again = ptx.elementwise(asm, constraints, arrays, dtypes, pack, order)
        for one, other in zip(made, again, strict=True):
            if one.tobytes() != other.tobytes():
                raise ptx.PtxError(f"results depend on which {pack} elements meet, that is on the register layout")
    return _Results([TensorHandle(data, ty.scalar) for data, ty in zip(made, types, strict=True)])


# --- bfloat16 and FP8 -----------------------------------------------------------------------------------------------
TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16, tl.float32: torch.float32,
}  # fmt: skip
RAW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""What the interpreter keeps as unsigned integers."""
BITS: dict[int, Any] = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def convert_float(data: NDArray[Any], of: Any, to: Any, rounding: Any) -> NDArray[Any]:
    """The bits of ``data``, floats of type ``of``, as the nearest ones of ``to``; ties to even, FP8 saturates."""
    if rounding not in (None, ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"rounding mode {rounding}")
    bits = np.ascontiguousarray(data)
    x = torch.from_numpy(bits.view(f"u{bits.itemsize}").copy()).view(TORCH[of]).to(torch.float32)
    target = TORCH[to]
    if target.itemsize == 1:
        most = torch.finfo(target).max
        x = x.clamp(-most, most)
    return x.to(target).view(BITS[target.itemsize]).numpy().reshape(data.shape)


def scale_to_float(handle: TensorHandle, compute: Any) -> NDArray[Any]:
    """Scales of ``tl.dot_scaled``: E8M0 as the interpreter has it, E4M3 (NVFP4), which it would take for E8M0."""
    if handle.dtype.scalar not in RAW:
        return _original_scale(handle, compute)
    return _widened(handle).data


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
    return _original["create_dot"](self, _widened(a), _widened(b), d, *options)


def _widened(handle: TensorHandle) -> TensorHandle:
    of = handle.dtype.scalar
    if of not in RAW:
        return handle
    return TensorHandle(convert_float(handle.data, of, tl.float32, None).view(np.float32), tl.float32)


def _refuse_raw(op: Any, *operands: TensorHandle) -> None:
    if raw := [handle.dtype.scalar for handle in operands if handle.dtype.scalar in RAW]:
        raise TypeError(f"{op.__name__} of {raw[0]}: the interpreter would take the bits as integers; use float32")


def binary_op(self: Any, one: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
    _refuse_raw(op, one, other)
    return _original["binary_op"](self, one, other, op)


def unary_op(self: Any, x: TensorHandle, op: Any) -> TensorHandle:
    _refuse_raw(op, x)
    return _original["unary_op"](self, x, op)


# --- memory ----------------------------------------------------------------------------------------------------------
@dataclass
class Memory:
    """Addresses of elements, sorted; of those that may be written, whether they are."""

    readable: NDArray[np.uint64]
    writable: NDArray[np.uint64]
    written: NDArray[np.bool_]

    def read(self, used: NDArray[np.uint64]) -> None:
        owned = _among(used, self.readable)
        owned |= _among(used, self.writable[self.written])
        if not owned.all():
            raise MemoryFaultError(f"{_count(~owned)} addresses read are outside, or not yet written")

    def write(self, used: NDArray[np.uint64]) -> None:
        owned = _among(used, self.writable)
        if not owned.all():
            raise MemoryFaultError(f"{_count(~owned)} addresses written are outside")
        at = np.searchsorted(self.writable, used)
        again = self.written[at].sum() + len(at) - len(np.unique(at))
        if again:
            raise MemoryFaultError(f"{again} of {len(at)} addresses are written twice: the order may differ on a GPU")
        self.written[at] = True


_memory: list[Memory] = []


@contextmanager
def within(readable: Sequence[Tensor], writable: Sequence[Tensor] = ()) -> Iterator[None]:
    """Kernels may read the elements of ``readable``, write those of ``writable`` once each, and read them from then on.

    Of a strided tensor, what lies between its elements is not its own. Raises MemoryFaultError.
    """
    own = _addresses(writable)
    _memory.append(Memory(_addresses(readable), own, np.zeros(len(own), np.bool_)))
    try:
        yield
    finally:
        _memory.pop()


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    """The address of every element, sorted."""
    found = [np.zeros(0, np.int64)]
    for tensor in tensors:
        at = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            at = at.unsqueeze(-1) + torch.arange(size) * stride
        found.append((tensor.data_ptr() + at.flatten() * tensor.element_size()).numpy())
    return np.unique(np.concatenate(found)).astype(np.uint64)


def _among(used: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(used), np.bool_)
    return known[np.searchsorted(known, used).clip(max=len(known) - 1)] == used


def _count(wrong: NDArray[np.bool_]) -> str:
    return f"{int(wrong.sum())} of {len(wrong)}"


def _used(ptrs: TensorHandle, mask: TensorHandle) -> NDArray[np.uint64]:
    return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.uint64)


def create_masked_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
    if _memory:
        _memory[-1].read(np.unique(_used(ptrs, mask)))
    return _original["create_masked_load"](self, ptrs, mask, *rest)


def create_masked_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
    if _memory:
        _memory[-1].write(_used(ptrs, mask))
    return _original["create_masked_store"](self, ptrs, value, mask, *rest)
