"""Headers of safetensors files are read as safetensors writes them, and every lie in one is a ModelError."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fxquant.errors import ModelError
from fxquant.headers import DTYPES, INDEX, folder_tensors, safetensors_header

BIG = 2**62


def written(path: Path, header: Any, data: int = 8) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(data))
    return path


def row(dtype: Any = "F32", shape: Any = (2,), at: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


def test_a_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    given = {f"t{i}": torch.zeros(i, 3).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    given["scalar"] = torch.tensor(2.5)
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    found = folder_tensors(tmp_path)
    assert found.keys() == given.keys()
    for name, (dtype, shape, begin, end, file) in found.items():
        assert (dtype, shape, file.name) == (given[name].dtype, tuple(given[name].shape), "model.safetensors")
        raw = given[name].contiguous().reshape(-1).view(torch.uint8) if given[name].numel() else torch.empty(0)
        assert content[begin:end] == bytes(raw.tolist())


LIES = {
    "empty": (b"", 0, "not a valid safetensors file"),
    "not an object": ([], 8, "not a JSON object"),
    "no JSON": (b"{]", 8, "not a valid safetensors file"),
    "deep": (b'{"w": ' + b"[" * 100_000, 8, "nested too deep|not a valid"),
    "name twice": (b'{"w": 1, "w": 2}', 8, "key twice"),
    "metadata": ({"__metadata__": {"a": 1}, "w": row()}, 8, "not an object of texts"),
    "escape code in a name": ({"\x1b[2J": row()}, 8, "not printable"),
    "no name": ({"": row()}, 8, "is empty"),
    "long name": ({"w" * 5000: row()}, 8, "longer than 1024"),
    "fields": ({"w": {"dtype": "F32"}}, 8, "three fields"),
    "type": ({"w": row("F33")}, 8, "has type 'F33'; expected one of BOOL"),
    "type is a list": ({"w": row([])}, 8, "has type"),
    "shape is text": ({"w": row(shape="2")}, 8, "has shape 2; expected"),
    "size in words": ({"w": row(shape=["2"])}, 8, "expected at most 16 sizes"),
    "size of true": ({"w": row(shape=[True])}, 8, "expected at most 16 sizes"),
    "size of 2.0": ({"w": row(shape=[2.0])}, 8, "expected at most 16 sizes"),
    "negative size": ({"w": row(shape=[-2])}, 8, "expected at most 16 sizes"),
    "many sizes": ({"w": row(shape=[1] * 40 + [2])}, 8, "expected at most 16 sizes"),
    "product overflows": ({"w": row(shape=[BIG, 8], at=[0, 0])}, 0, "takes"),
    "more than the file": ({"w": row(shape=[BIG], at=[0, 4 * BIG])}, 8, "expected two sizes"),
    "past the end": ({"w": row(shape=[200], at=[0, 800])}, 8, "truncated"),
    "bytes left over": ({"w": row()}, 80, "more bytes follow"),
    "one offset": ({"w": row(at=[0])}, 8, "expected two sizes"),
    "offsets turned": ({"w": row(at=[8, 0])}, 8, "lies at 8 to 0"),
    "wrong bytes": ({"w": row(at=[0, 4])}, 8, "takes 8 bytes"),
    "overlap": ({"v": row(), "w": row(at=[4, 12])}, 12, "'w' overlaps"),
    "hole": ({"v": row(), "w": row(at=[12, 20])}, 20, "'w' leaves a hole"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_lie_in_a_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, message = LIES[case]
    with pytest.raises(ModelError, match=message) as caught:
        safetensors_header(written(tmp_path / "m.safetensors", header, data))
    assert str(tmp_path / "m.safetensors") in str(caught.value)
    assert "fetch the file again" in str(caught.value)


def test_a_header_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63))
    with pytest.raises(ModelError, match="its header claims 9223372036854775808"):
        safetensors_header(path)
    os.truncate(path, 2**36)  # takes no room on the disk
    path.open("r+b").write(struct.pack("<Q", 2**35))
    with pytest.raises(ModelError, match="at most 33554432 are read"):
        safetensors_header(path)


# --- folders ----------------------------------------------------------------------------------------------------------
def sharded(folder: Path, places: Any = None, *shards: str) -> Path:
    for i, name in enumerate(shards or ("a.safetensors", "b.safetensors")):
        save_file({f"w{i}": torch.zeros(2)}, folder / name)
    document = {"weight_map": {"w0": "a.safetensors", "w1": "b.safetensors"} if places is None else places}
    (folder / INDEX).write_text(json.dumps(document))
    return folder


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    found = folder_tensors(sharded(tmp_path))
    assert {name: entry.file.name for name, entry in found.items()} == {"w0": "a.safetensors", "w1": "b.safetensors"}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"w0": "../a.safetensors"}, r"names the shard '\.\./a\.safetensors'.*the folder itself"),
        ({"w0": "/etc/passwd"}, "names the shard '/etc/passwd'"),
        ({"w0": "config.json"}, "names the shard 'config.json'"),
        ({"w0": "x\x1b[2J.safetensors"}, "names the shard"),
        ({"w0": "..", "w1": ""}, "names the shard"),
        ({"w0": 3}, "no weight_map"),
        ([], "no weight_map"),
        ({"w0": "c.safetensors"}, r"lacks the shard c\.safetensors"),
        ({"w0": "b.safetensors"}, "says that 'b.safetensors' holds tensor 'w0'"),
        ({"w0": "a.safetensors", "w9": "a.safetensors"}, "holds tensor 'w9'"),
    ],
)
def test_an_index_that_lies_is_refused(places: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        folder_tensors(sharded(tmp_path, places))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"tensor 'w0' is in 'a\.safetensors' and in 'b\.safetensors'"):
        folder_tensors(tmp_path)


def test_links_are_followed_inside_the_folder_and_in_the_hub_cache_only(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--x" / "snapshots" / "1234"
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--me--x" / "blobs"
    blobs.mkdir()
    save_file({"w": torch.zeros(2)}, blobs / "abc")
    (folder / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    assert folder_tensors(folder)["w"].shape == (2,)
    save_file({"w": torch.zeros(2)}, tmp_path / "out.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match=r"is a link to .*out\.safetensors', out of the folder; copy the file itself"):
        folder_tensors(folder)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    for name, make in {
        "fifo": lambda p: os.mkfifo(p), "folder": lambda p: p.mkdir(), "circle": lambda p: p.symlink_to(p),
        "device": lambda p: p.symlink_to("/dev/zero"), "nothing": lambda p: p.symlink_to("none"),
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        make(tmp_path / name / "model.safetensors")
        with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
            folder_tensors(tmp_path / name)
    with pytest.raises(ModelError, match="not a regular file"):
        safetensors_header(tmp_path / "fifo" / "model.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        safetensors_header(tmp_path / "none")
