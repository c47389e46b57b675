"""Triton's interpreter (``TRITON_INTERPRET=1``), made fit for these kernels; ``install()`` before one runs.

Triton 3.9 interprets a kernel with numpy and falls short in three places, which ``install`` mends:

=======================  ============================================  ================================================
inline assembly          not implemented                               ``ptx.elementwise`` on the string that ships;
                                                                       with pack > 1 also under other groupings of the
                                                                       elements, which must give the same
bfloat16                 dot, +, * and compare work on the bits as     dot widens to float32 first; all other
                         if they were integers; from float32 it is     arithmetic is an error; conversion rounds to
                         truncated                                     nearest even
loads and stores         anywhere                                      inside the memory that ``within`` names, else
                                                                       an error
=======================  ============================================  ================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

import ptx

GROUPINGS = 2
"""Random groupings under which assembly with pack > 1 is run again."""
_original = {name: getattr(InterpreterBuilder, name) for name in
             ("create_dot", "cast_impl", "binary_op", "unary_op", "create_masked_load", "create_masked_store")}  # fmt: skip
_memory: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []


class OutOfBounds(Exception):
    """A kernel reads or writes what is not its own."""


def install() -> None:
    """Mend the interpreter of this process. Raises RuntimeError where kernels are compiled, not interpreted."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    for name, mended in {
        "create_inline_asm": create_inline_asm, "create_dot": create_dot, "cast_impl": cast_impl,
        "binary_op": binary_op, "unary_op": unary_op, "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
    }.items():  # fmt: skip
        setattr(InterpreterBuilder, name, mended)


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


# --- bfloat16 --------------------------------------------------------------------------------------------------------
def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
    return _original["create_dot"](self, _widened(a), _widened(b), d, *options)


def cast_impl(self: Any, src: TensorHandle, to: Any) -> TensorHandle:
    if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(src.data.shape), tl.bfloat16)
    return _original["cast_impl"](self, src, to)


def binary_op(self: Any, one: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
    if _is_bf16(one) or _is_bf16(other):
        raise TypeError(f"{op.__name__} of bfloat16: the interpreter would take the bits as integers; use float32")
    return _original["binary_op"](self, one, other, op)


def unary_op(self: Any, x: TensorHandle, op: Any) -> TensorHandle:
    if _is_bf16(x):
        raise TypeError(f"{op.__name__} of bfloat16: the interpreter would take the bits as integers; use float32")
    return _original["unary_op"](self, x, op)


# --- memory ----------------------------------------------------------------------------------------------------------
@contextmanager
def within(readable: Sequence[Tensor], writable: Sequence[Tensor] = ()) -> Iterator[None]:
    """Kernels may read the elements of these tensors and write those of ``writable``, and nothing else.

    Of a strided tensor, what lies between its elements is not its own. Raises OutOfBounds where a kernel goes beyond.
    """
    _memory.append((_addresses([*readable, *writable]), _addresses(writable)))
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


def _check(what: str, allowed: NDArray[np.uint64], ptrs: TensorHandle, mask: TensorHandle) -> None:
    used = np.unique(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.uint64))
    at = np.searchsorted(allowed, used).clip(max=max(len(allowed) - 1, 0))
    if len(used) and (not len(allowed) or bool((allowed[at] != used).any())):
        wrong = used if not len(allowed) else used[allowed[at] != used]
        raise OutOfBounds(f"{len(wrong)} of {len(used)} addresses {what} are outside, the first {int(wrong[0]):#x}")


def create_masked_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
    if _memory:
        _check("read", _memory[-1][0], ptrs, mask)
    return _original["create_masked_load"](self, ptrs, mask, *rest)


def create_masked_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
    if _memory:
        _check("written", _memory[-1][1], ptrs, mask)
    return _original["create_masked_store"](self, ptrs, value, mask, *rest)
