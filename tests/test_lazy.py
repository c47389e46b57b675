"""Tensors that are read when they are needed: equal to those they stand for, under every operator, and never kept."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxquant import spool
from fxquant.deferred import Rounding, part_of, quantize_later, taken_from
from fxquant.errors import LoadError, WeightError
from fxquant.headers import safetensors_header
from fxquant.lazy import FromFile, Lazy, later, real
from fxquant.qtensor import error_squares, quantize_tensor, relative_error
from fxquant.rewrite import identity
from fxquant.scheme import parse_spec


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(37, 96, generator=generator).to(torch.bfloat16),
        "e": torch.randn(4, 24, 96, generator=generator),
        "big": torch.randn(300, 512, generator=generator),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def lazy(file: Path, name: str) -> Lazy:
    found = safetensors_header(file)[name]
    return FromFile(file, found.begin, found.dtype, found.shape).lazy()


def plain(file: Path, name: str) -> Tensor:
    from safetensors.torch import load_file

    return load_file(file)[name]


def test_a_lazy_tensor_is_read_by_what_computes_with_it(file: Path) -> None:
    x, want = lazy(file, "w"), plain(file, "w")
    assert type(x * 2) is Tensor
    assert torch.equal(x * 2, want * 2)
    assert torch.equal(torch.ones(3, 37, dtype=want.dtype) @ x, torch.ones(3, 37, dtype=want.dtype) @ want)
    assert (x.shape, x.dtype, x.is_meta, x.stride()) == (want.shape, want.dtype, False, want.stride())


@pytest.mark.parametrize("view", [
    lambda x: x.float(), lambda x: x.t(), lambda x: x[3:9, ::2], lambda x: x.detach().reshape(-1, 48),
    lambda x: x.float().transpose(-1, -2).contiguous(), lambda x: torch.stack([x, x.clone()])[1],
    lambda x: torch.cat([x[:5], x[7:]]), lambda x: x.split(10)[3], lambda x: x.unsqueeze(0).permute(2, 0, 1),
    lambda x: x.chunk(2, dim=1)[1].to(torch.float64),
])  # fmt: skip
def test_views_and_casts_stay_lazy(view: object, file: Path) -> None:
    x, want = view(lazy(file, "w")), view(plain(file, "w"))  # type: ignore[operator]
    assert isinstance(x, Lazy)
    assert (x.shape, x.dtype, x.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(x.read(), want)
    assert torch.equal(pickle.loads(pickle.dumps(x)).read(), want)


def test_rows_are_read_alone_where_they_can_be(file: Path) -> None:
    x, want = lazy(file, "w").float(), plain(file, "w").float()
    assert x.has_rows
    assert torch.equal(x.read_rows(3, 11), want[3:11])
    assert not x.t().has_rows
    assert torch.equal(x.t().read_rows(3, 11), want.t()[3:11])


def test_nothing_is_written_to_a_file(file: Path) -> None:
    x, want = lazy(file, "w"), plain(file, "w").clone()
    with pytest.raises(RuntimeError, match="put another in its place"):
        x.zero_()
    real(x).zero_()  # what was read is the reader's own
    assert torch.equal(plain(file, "w"), want)


def test_ties_are_told_by_what_is_read(file: Path) -> None:
    x = lazy(file, "w")
    assert identity(x)[0] == identity(x.t())[0] == identity(x.detach())[0] == identity(lazy(file, "w"))[0]
    assert identity(x)[0] != identity(lazy(file, "big"))[0]


def test_a_file_that_changes_is_not_read_as_it_was(file: Path) -> None:
    x, content = lazy(file, "w"), file.read_bytes()
    before = x.read().clone()
    file.unlink()
    file.write_bytes(content[:200])
    with pytest.raises(LoadError, match="shorter than it was"):
        x.read()
    file.unlink()
    with pytest.raises(LoadError, match="cannot be read any more"):
        x.read()
    file.write_bytes(content)
    assert torch.equal(x.read(), before)


def test_functions_are_called_later_for_lazy_arguments_only(file: Path) -> None:
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    assert isinstance(later(doubled, lazy(file, "w"), shape=(37, 96), dtype=torch.bfloat16), Lazy)
    assert type(later(doubled, plain(file, "w"), shape=(37, 96), dtype=torch.bfloat16)) is Tensor


@pytest.mark.parametrize("spec", [
    "e3m2/channel", "e2m1/group32:e8m0", "e2m1/group16:e4m3", "int4/block8x32", "uint4/group32", "e3m2/tensor",
    "e4m3/channel1", "e2m1/group32:m2", "nf4/group64",
])  # fmt: skip
@pytest.mark.parametrize("elements", [1, 5000, 1 << 20])
def test_rounding_later_gives_the_bits_of_rounding_now(spec: str, elements: int, file: Path) -> None:
    want = quantize_tensor(plain(file, "big"), spec)
    found = quantize_later(lazy(file, "big"), parse_spec(spec))
    parts = {"codes": found.codes, "scale": found.scale, "zero_point": found.zero_point,
             "tensor_scale": found.tensor_scale}  # fmt: skip
    recipe = part_of(found.codes)
    assert recipe is not None
    rows = list(recipe.of.in_rows(elements))
    for name, part in parts.items():
        value = getattr(want, name)
        assert (part is None) == (value is None)
        if part is not None:
            assert isinstance(part, Lazy)
            assert torch.equal(part.read(), value)
            pieces = [taken_from(part, q) for _, _, q in rows]
            assert torch.equal(torch.cat(pieces), value)
    if elements == 1 and spec in ("e3m2/channel", "uint4/group32"):
        assert len(rows) == 300


def test_experts_are_rounded_as_one_matrix(file: Path) -> None:
    want = quantize_tensor(plain(file, "e"), "e3m2/channel", channel_dims=2)
    found = quantize_later(lazy(file, "e"), parse_spec("e3m2/channel"), channel_dims=2)
    assert torch.equal(found.codes.contiguous() + 0, want.codes)
    ((_, x, q),) = Rounding(lazy(file, "e"), parse_spec("e3m2/channel"), 2).in_rows(100)
    assert torch.equal(q.codes, want.codes)
    assert x.shape == want.codes.shape


def test_integers_are_refused_before_they_are_read(file: Path) -> None:
    x = Lazy(FromFile(file, 0, torch.int32, (2, 2)), torch.empty(2, 2, dtype=torch.int32, device="meta"))
    with pytest.raises(WeightError, match="only floating point"):
        quantize_later(x, parse_spec("e3m2/channel"))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (70, 17), (3, 1040), (2, 2100)])
def test_errors_of_rows_are_those_of_float64(shape: tuple[int, int]) -> None:
    """Of codebooks too, for which there is no kernel; narrow rows are not filled up to long ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize_tensor(x, "nf4/channel")
    lost = (q.dequantize() - x).double().square().sum(1)
    want = torch.stack([lost, x.double().square().sum(1)], dim=1)
    torch.testing.assert_close(error_squares(x, q), want, rtol=1e-13, atol=0)


def test_narrow_weights_take_no_more_memory_than_wide_ones() -> None:
    x = torch.ones(100_000, 3)
    q = quantize_tensor(x, "nf4/channel")
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))])
            return found

    with Watch():
        error_squares(x, q)
    assert largest[0] <= 16 * len(x)


def test_an_error_does_not_depend_on_threads_or_cuts() -> None:
    x = torch.randn(513, 5000, generator=torch.Generator().manual_seed(1))
    q = quantize_tensor(x, "e3m2/channel")
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(relative_error(error_squares(x, q)))
            parts = [torch.arange(start, min(start + 100, 513)) for start in range(0, 513, 100)]
            found.add(relative_error(torch.cat([error_squares(x[rows], q.rows(rows)) for rows in parts])))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    want = (q.dequantize().double() - x.double()).norm() / x.double().norm()
    assert found.pop() == pytest.approx(float(want), rel=1e-7)


def test_the_spool_keeps_bits_and_strides(tmp_path: Path) -> None:
    x = torch.randn(700, 3, 500).transpose(0, 2)
    assert spool.keep(x) is x
    with spool.into(tmp_path):
        kept = spool.keep(x)
        small = torch.ones(3)
        assert spool.keep(small) is small
        assert spool.keep((small, None))[0] is small
    assert kept is not x
    assert torch.equal(kept, x)
    assert kept.stride() == x.stride()
    assert not list(tmp_path.iterdir()), "the file has no name"
