"""Running a model as it is, beside its program: on copies of its inputs, without a trace left on it.

What the model gives on the example is what its program must give; where it fails, the error names the user's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxquant.errors import InputError

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The flat outputs of ``model``, which stays unchanged; random numbers are those of seed 0.

    Attention takes the path that is exported, not the fused one that eager mode has for nn.MultiheadAttention.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    args, kwargs = copies((args, kwargs))
    with unchanged(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return pytree.tree_leaves(model(*args, **kwargs))
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def run_example_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """``run_model`` on the example inputs; InputError with the model's own error, and where, if it fails on them."""
    try:
        return run_model(model, args, kwargs)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} fails on the example inputs{where(model, error)}: {type(error).__name__}: "
            f"{summary(error, 400)}\nWhat to do: give example_inputs that the model itself runs on"
        ) from error


def difference(got: list[Any], want: list[Any]) -> str | None:
    """What differs between two flat outputs, or None. They are equal, up to rounding where an operator is fused."""
    if len(got) != len(want):
        return f"{len(got)} outputs, not {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        same = close_to(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else _equal(a, b)
        if not same:
            return f"output {i}"
    return None


def _equal(got: Any, want: Any) -> bool:
    return not isinstance(got, Tensor) and not isinstance(want, Tensor) and bool(got == want or got != got)


def close_to(got: Tensor, want: Tensor) -> bool:
    """Equal, or within 1e-5 of the largest value (more for a dtype of less precision)."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if isinstance(got, FakeTensor) or isinstance(want, FakeTensor):
        return True  # there are no values to compare
    if torch.equal(got, want):
        return True
    if not want.is_floating_point() or not want.numel():
        return torch.equal(got, want)
    scale = float(want.abs().nan_to_num(posinf=0).max())
    bound = max(1e-5, 4 * torch.finfo(want.dtype).eps) if want.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return torch.allclose(got, want, rtol=0, atol=bound * scale, equal_nan=True)


def copies(value: Any, *, alias: bool = True) -> Any:
    """``value`` with its tensors cloned; with ``alias``, a tensor that occurs twice stays one tensor."""
    made: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return made.setdefault(id(leaf), leaf.clone()) if alias else leaf.clone()

    return pytree.tree_map(copy, value)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes that a forward assigns and buffers that it updates, as they were before: tracing leaves proxies."""
    state = [
        (m, dict(vars(m)), {k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)}) for m in model.modules()
    ]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, tables in state:
            for key, table in tables.items():
                attributes[key].clear()
                attributes[key].update(table)
            vars(module).clear()
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no KV cache, restored afterwards: module by module, since a model may mix modes."""
    modes = [(m, m.training) for m in model.modules()]
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", None)}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in configs.values():
            config.use_cache = True


# --- where an error comes from ----------------------------------------------------------------------------------------
def where(model: nn.Module, error: Exception) -> str:
    """`` in module 'a.b' (Class) at file.py:12``: the innermost module of the traceback and line of the user's code."""
    names = {id(m): n for n, m in model.named_modules()}
    module, line, frame = "", "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        owner = frame.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in names and hasattr(owner, code.co_name):  # a method of it
            module = f" in module {names[id(owner)] or '(root)'!r} ({type(owner).__name__})"
        if module and is_users(code.co_filename):
            line = f" at {code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    return module + line


def is_users(file: str) -> bool:
    """Whether a line of this file is the user's to change: not torch's, not ours, not generated."""
    return not file.startswith(_NOT_THE_USERS)


def summary(error: Exception, length: int) -> str:
    """The first paragraph of an error's text."""
    return " ".join(str(error).strip().partition("\n\n")[0].split())[:length]
