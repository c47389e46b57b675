"""Files of weights that are written in any order hold what safetensors writes, at places that torch likes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.errors import SaveError
from fxquant.graph import TensorType
from fxquant.headers import DTYPES, safetensors_header
from fxquant.tasks import ALIGNMENT
from fxquant.weight_file import WeightFile, digests_of


def some() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, dtype in enumerate(DTYPES.values()):
        if dtype not in (torch.uint16, torch.uint32, torch.uint64):  # torch fills none of these
            tensors[f'z{i} é"\\'] = (torch.arange(3 * (i + 1)).reshape(3, i + 1) % 2).to(dtype)
            tensors[f"a{i}"], tensors[f"s{i}"], tensors[f"e{i}"] = (
                torch.ones(shape).to(dtype) for shape in ((2,), (), (0, 4))
            )
    return tensors


def types(tensors: dict[str, Tensor]) -> dict[str, TensorType]:
    return {name: TensorType(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def test_the_order_is_that_of_safetensors_and_the_data_lie_aligned(tmp_path: Path) -> None:
    tensors = some()
    save_file(tensors, tmp_path / "theirs")
    with WeightFile(tmp_path / "ours", types(tensors)) as file:
        for name, value in reversed(tensors.items()):
            for row in range(len(value) if value.dim() == 2 else 0):
                file.write(name, value[row : row + 1], row)
            if value.dim() != 2:
                file.write(name, value)
        digests = file.digests()
    assert digests == digests_of(tmp_path / "ours")
    ours, theirs = safetensors_header(tmp_path / "ours"), safetensors_header(tmp_path / "theirs")
    begin = min(t.begin for t in ours.values())
    assert begin % ALIGNMENT == 0
    shift = begin - min(t.begin for t in theirs.values())
    assert {k: t.begin for k, t in ours.items()} == {k: t.begin + shift for k, t in theirs.items()}
    assert (tmp_path / "ours").read_bytes()[begin:] == (tmp_path / "theirs").read_bytes()[begin - shift :]
    found = load_file(tmp_path / "ours")
    for name, value in tensors.items():
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_an_unfinished_file_can_be_gone_on_with(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 8), "b": torch.randn(6)}
    with WeightFile(tmp_path / "w", types(tensors)) as first:
        first.write("b", tensors["b"])
        assert first.unsynced == 24
        first.sync()
        assert first.unsynced == 0
    with WeightFile(tmp_path / "w", types(tensors), resumed=True) as second:
        assert second.digest("b") == hashlib.sha256(tensors["b"].numpy().tobytes()).hexdigest()
        second.write("a", tensors["a"][2:], 2)
        second.write("a", tensors["a"][:2])
        assert second.digests() == digests_of(tmp_path / "w")
    found = load_file(tmp_path / "w")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    with pytest.raises(SaveError, match="not the unfinished file"):
        WeightFile(tmp_path / "w", types({"a": torch.randn(5)}), resumed=True)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_error_that_says_how_much_is_needed(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        with WeightFile(tmp_path / "w", types({"a": torch.randn(5)})) as file:
            file.write("a", torch.ones(5))

    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(SaveError, match=r"takes \d+ bytes.*No space left"):
        fill()


def test_a_disk_that_reserves_nothing_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unable)
    with WeightFile(tmp_path / "w", types({"a": torch.zeros(5)})) as file:
        file.write("a", torch.ones(5))
    assert torch.equal(load_file(tmp_path / "w")["a"], torch.ones(5))
