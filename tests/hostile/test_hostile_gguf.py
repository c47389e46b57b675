"""GGUF files whose headers lie, written byte by byte."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hostile_files import CommandError, Row, check, command, no_hang

from fxquant.errors import ModelError

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from fxquant.checkpoints import empty_model, load_model  # noqa: E402
from fxquant.gguf_header import check_gguf  # noqa: E402

U8, U32, F32, TEXT, ARRAY, U64 = 0, 4, 6, 8, 9, 10
BIG = 2**60


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return setting(key, U32, struct.pack("<I", value))


def array(key: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return setting(key, ARRAY, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, sizes: Sequence[int], offset: int, kind: int = 0, dims: int | None = None) -> bytes:
    return (
        text(name) + struct.pack("<I", len(sizes) if dims is None else dims)
        + struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)
    )  # fmt: skip


def llama(layers: int = 1, width: int = 32, words: int = 8) -> tuple[list[bytes], list[bytes], int]:
    """The settings and the tensors of a Llama, and the bytes of its weights."""
    settings = [
        setting("general.architecture", TEXT, text("llama")), number("llama.block_count", layers),
        number("llama.context_length", 64), number("llama.embedding_length", width),
        number("llama.feed_forward_length", 48), number("llama.attention.head_count", 4),
        number("llama.attention.head_count_kv", 2), number("llama.rope.dimension_count", width // 4),
        setting("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        number("llama.vocab_size", words),
    ]  # fmt: skip
    sizes: dict[str, list[int]] = {
        "token_embd": [32, 8], "output_norm": [32], "output": [32, 8], "blk.0.attn_norm": [32], "blk.0.ffn_norm": [32],
        "blk.0.attn_q": [32, 32], "blk.0.attn_k": [32, 16], "blk.0.attn_v": [32, 16], "blk.0.attn_output": [32, 32],
        "blk.0.ffn_gate": [32, 48], "blk.0.ffn_up": [32, 48], "blk.0.ffn_down": [48, 32],
    }  # fmt: skip
    tensors, end = [], 0
    for name, shape in sizes.items():
        tensors.append(tensor(f"{name}.weight", shape, end))
        end += -(-4 * math.prod(shape) // 32) * 32
    return settings, tensors, end


@dataclass(frozen=True)
class File:
    """A GGUF file in parts; counts are those of the parts where they are not given."""

    settings: list[bytes] = field(default_factory=lambda: llama()[0])
    tensors: list[bytes] = field(default_factory=lambda: llama()[1])
    data: int = llama()[2]
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    setting_count: int | None = None
    cut: int | None = None

    def write(self, folder: Path) -> Path:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.settings) if self.setting_count is None else self.setting_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join([*self.settings, *self.tensors])
        content = head + bytes(-len(head) % 32) + bytes(self.data)
        path = folder / "m.gguf"
        path.write_bytes(content[: self.cut])
        return path


def with_setting(*more: bytes) -> File:
    return File(settings=[*llama()[0], *more])


def instead(name: str, value: bytes) -> File:
    """With another setting in the place of the one of that name."""
    kept = [s for s in llama()[0] if not s.startswith(text(name))]
    return File(settings=[*kept, value])


def one_tensor(*args: Any, **more: Any) -> File:
    return File(tensors=[tensor(*args, **more)], settings=instead("llama.block_count", b"").settings[:-1], data=64)


GGUF: dict[str, tuple[File, str]] = {
    "empty": (File(cut=0), "it is empty"),
    "magic": (File(magic=b"GGML"), "does not begin with GGUF"),
    "cut in the counts": (File(cut=10), "truncated, or made up"),
    "cut in the settings": (File(cut=200), "truncated|claims 12 tensors in"),
    "cut in the data": (File(cut=-100), "truncated, or made up"),
    "version 99": (File(version=99), "version 99; known are 2 and 3"),
    "other byte order": (File(version=3 << 24), "version 50331648"),
    "2^60 tensors": (File(tensor_count=BIG), "claims 1152921504606846976 tensors"),
    "2^63 settings": (File(setting_count=2**63), "claims 9223372036854775808 settings"),
    "one setting too many": (File(setting_count=11), "truncated|not known|claims|not printable"),
    "key of 2^63 bytes": (File(settings=[struct.pack("<Q", 2**63)]), "claims a text of 9223372036854775808 bytes"),
    "key of 2^64 - 1 bytes": (File(settings=[struct.pack("<Q", 2**64 - 1)]), "claims a text of"),
    "text of 2^62 bytes": (with_setting(setting("a", TEXT, struct.pack("<Q", 2**62))), "claims a text of"),
    "text that is no text": (with_setting(setting("a", TEXT, text(b"\xff\xfe"))), "utf-8"),
    "key twice": (with_setting(number("llama.vocab_size", 8)), "there twice"),
    "escape codes in a key": (with_setting(number("\x1b[2J", 8)), "not printable"),
    "unknown type": (with_setting(setting("a", 77, b"")), "has type 77"),
    "array of 2^61": (with_setting(array("a", U8, 2**61)), "claims 2305843009213693952 items"),
    "array that overflows": (with_setting(array("a", U64, 2**61 + 1)), "claims 2305843009213693953 items"),
    "array of 2^61 texts": (with_setting(array("a", TEXT, 2**61)), "claims 2305843009213693952 items"),
    "array of a long text": (with_setting(array("a", TEXT, 1, struct.pack("<Q", 2**63))), "beyond the end"),
    "array of arrays": (with_setting(array("a", ARRAY, 2, struct.pack("<IQ", ARRAY, 2) * 2)), "an array of type 9"),
    "array of nothing known": (with_setting(array("a", 99, 0)), "an array of type 99"),
    "alignment 0": (with_setting(number("general.alignment", 0)), "its alignment is 0"),
    "alignment 33": (with_setting(number("general.alignment", 33)), "its alignment is 33"),
    "alignment is a text": (with_setting(setting("general.alignment", TEXT, text("32"))), "its alignment is 32"),
    "no architecture": (File(settings=llama()[0][1:]), "which architecture it is"),
    "no layers": (File(settings=[llama()[0][0], *llama()[0][2:]]), "how many layers it has"),
    "architecture is a number": (instead("general.architecture", number("general.architecture", 1)), "architecture"),
    "2^31 layers": (instead("llama.block_count", number("llama.block_count", 2**31)), "no setting of a model has"),
    "layers of another architecture": (
        instead("llama.block_count", number("llamb.block_count", 1)), "how many layers it has .llama.block_count",
    ),
    "99999 layers": (instead("llama.block_count", number("llama.block_count", 99_999)), "and it holds 12 tensors"),
    "12 layers": (instead("llama.block_count", number("llama.block_count", 12)), "cannot be read as GGUF|lacks|makes"),
    "layers in words": (instead("llama.block_count", setting("llama.block_count", TEXT, text("1"))), "it holds 12"),
    "2^30 words": (instead("llama.vocab_size", number("llama.vocab_size", 2**30)), "asks for a model of"),
    "width 2^30": (instead("llama.embedding_length", number("llama.embedding_length", 2**30)), "asks for a model of"),
    "no width": (instead("llama.embedding_length", number("llama.embedding_length", 0)), "makes no model|cannot be"),
    "no heads": (instead("llama.attention.head_count", number("llama.attention.head_count", 0)), "a count from 1"),
    "endless epsilon": (
        instead("llama.attention.layer_norm_rms_epsilon", setting(
            "llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", math.inf))), "expected a finite number"),
    "no dimensions": (one_tensor("w", [], 0), "has 0 dimensions"),
    "2^31 dimensions": (one_tensor("w", [4], 0, dims=2**31), "has 2147483648 dimensions"),
    "size 0": (one_tensor("w", [0, 4], 0), "expected rows of whole blocks"),
    "product of sizes overflows": (one_tensor("w", [2**33, 2**33], 0), "truncated, or made up"),
    "size 2^63": (one_tensor("w", [2**63], 0), "expected rows of whole blocks"),
    "half a block": (one_tensor("w", [33], 0, kind=8), "expected rows of whole blocks of 32"),
    "unknown ggml type": (one_tensor("w", [4], 0, kind=9999), "has ggml type 9999"),
    "offset outside": (one_tensor("w", [4], 2**40), "truncated, or made up"),
    "offset 2^64 - 32": (one_tensor("w", [4], 2**64 - 32), "truncated, or made up"),
    "offset between": (one_tensor("w", [4], 3), "not at a multiple of 32"),
    "overlap": (File(tensors=[tensor("v", [16], 0), tensor("w", [16], 32)]), "'w' lies at 32, not at"),
    "tensor twice": (File(tensors=[tensor("v", [8], 0), tensor("v", [8], 32)]), "two tensors have one name"),
    "tensor without a name": (one_tensor("", [4], 0), "is empty or not printable"),
    "escape codes in a tensor": (one_tensor("\x1b]0;x\x07", [4], 0), "is empty or not printable"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_file_that_lies(case: str, tmp_path: Path) -> None:
    file, message = GGUF[case]
    check(Row(file.write, load_model, ModelError, message), tmp_path)


def test_the_file_that_they_are_made_of_is_good(tmp_path: Path) -> None:
    path = File().write(tmp_path)
    claims = check_gguf(path, gguf.GGML_QUANT_SIZES)
    assert len(claims.tensors) == 12
    assert claims.settings["llama.embedding_length"] == 32
    with pytest.warns(UserWarning, match="tokenizer"):
        model = load_model(path).model
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(t.shape) for t in claims.tensors)


def test_another_architecture_is_checked_as_well(tmp_path: Path) -> None:
    """qwen2 goes transformers' general way, which would make weights that are not there."""
    settings = [s.replace(b"llama", b"qwen2") for s in File().settings]
    wide = number("qwen2.embedding_length", 2**30)
    kept = [s for s in settings if not s.startswith(text("qwen2.embedding_length"))]
    file = replace(File(), settings=[*kept, wide])
    check(Row(file.write, load_model, ModelError, "asks for a model of|cannot be read as GGUF"), tmp_path)


@pytest.mark.parametrize("case", ["2^60 tensors", "99999 layers", "2^30 words"])
def test_outlines_check_the_same(case: str, tmp_path: Path) -> None:
    file, message = GGUF[case]
    check(Row(file.write, empty_model, ModelError, message), tmp_path)
    (tmp_path / "b").mkdir()
    check(Row(lambda _: file.write(tmp_path / "b"), command("config", "init", "FILE"), CommandError, message), tmp_path)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    row = Row(lambda place: place / "m.gguf", load_model, ModelError, r"not a regular file|no config\.json")
    check(row, tmp_path)


def test_what_lies_beside_a_file_is_checked(tmp_path: Path) -> None:
    """transformers looks for a tokenizer's files in the folder of a GGUF file."""
    path = File().write(tmp_path)
    os.mkfifo(tmp_path / "added_tokens.json")
    with no_hang(), pytest.warns(UserWarning, match="not a regular file"):
        assert load_model(path).tokenizer is None
