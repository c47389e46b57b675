"""What an interrupted download leaves is told as that, with what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_language import tiny_language_model

from fxquant.checkpoints import load_model
from fxquant.errors import ModelError

pytest.importorskip("transformers")
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 5368709120
"""
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards and more."""
    folder = tmp_path_factory.mktemp("downloads") / "whole"
    tiny_language_model().save_pretrained(folder, max_shard_size="12KB")
    names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(names) >= 3
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for file in whole.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def told(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(folder)
    return str(error.value)


def test_the_whole_folder_is_read(folder: Path) -> None:
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "old.incomplete").write_bytes(b"1")  # of an earlier attempt
    assert load_model(folder).model is not None


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    shards(folder)[1].write_text(POINTER)
    text = told(folder)
    assert f"{shards(folder)[1]} is a pointer of Git LFS" in text
    assert "5368709120 bytes" in text
    assert "git lfs pull" in text


def test_a_gguf_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text(POINTER)
    assert "pointer of Git LFS" in told(tmp_path / "m.gguf")


@pytest.mark.parametrize("unfinished", ["", ".cache/huggingface/download/4d7a.incomplete", "x.safetensors.crdownload"])
def test_a_missing_shard(folder: Path, unfinished: str) -> None:
    first, second = shards(folder)[:2]
    first.unlink()
    second.unlink()
    if unfinished:
        (folder / unfinished).parent.mkdir(parents=True, exist_ok=True)
        (folder / unfinished).write_bytes(b"half")
    text = told(folder)
    assert f"lacks {first.name} and 1 more of" in text
    assert ("its download was interrupted" in text) == bool(unfinished)
    assert "hf download NAME" in text


def test_nothing_but_a_download_in_progress(folder: Path) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    assert "has a config.json and no weights" in told(folder)
    (folder / "model.safetensors.part").write_bytes(b"half")
    assert "lacks model.safetensors of 1 files of weights; its download was interrupted" in told(folder)


def test_a_link_of_the_hubs_cache_to_nothing(folder: Path, tmp_path: Path) -> None:
    shard = shards(folder)[0]
    shard.unlink()
    os.symlink("../../blobs/4d7a", shard)
    text = told(folder)
    assert "is a link to ../../blobs/4d7a, which is not there" in text


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_shard(folder: Path, left: int) -> None:
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:left])
    text = told(folder)
    assert str(shard) in text or shard.name in text
    assert "truncated" in text
    assert "again" in text
