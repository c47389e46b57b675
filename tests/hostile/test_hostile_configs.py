"""Configs, texts and data files that lie."""

from __future__ import annotations

import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import SECONDS, CommandError, Row, check, command

from fxquant.cli_measure import read_tensors
from fxquant.cli_options import read_text
from fxquant.config import load_config
from fxquant.errors import ConfigError, InputError
from fxquant.scheme import LayerRule


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return place / name

    return make


def sparse(name: str, size: int) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).touch()
        os.truncate(place / name, size)
        return place / name

    return make


def fifo(name: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        os.mkfifo(place / name)
        return place / name

    return make


def link(name: str, target: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).symlink_to(target)
        return place / name

    return make


def laughs(merged: bool) -> str:
    """Ten lists of ten times the one before: 10^10 values in 500 bytes."""
    rows = ["a0: &a0 {x: 1}" if merged else "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, 11):
        names = ", ".join([f"*a{i - 1}"] * 10)
        rows.append(f"a{i}: &a{i} {{<<: [{names}]}}" if merged else f"a{i}: &a{i} [{names}]")
    return "\n".join([*rows, "rules: *a10", ""])


def rule(**keys: Any) -> str:
    return json.dumps({"rules": [{"match": "*", "weight": "e3m2/channel"} | keys]})


CONFIGS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "billion laughs": (written("c.yaml", laughs(False)), "more than 100000 values come of its aliases"),
    "billion merges": (written("c.yaml", laughs(True)), "more than 100000 values come of its aliases"),
    "alias of itself": (written("c.yaml", "rules: &a [*a]\n"), "values come of its aliases"),
    "python object": (written("c.yaml", "rules: !!python/object/apply:os.system ['true']\n"), "not valid YAML"),
    "python name": (written("c.yaml", "rules: !!python/name:os.system\n"), "not valid YAML"),
    "unknown tag": (written("c.yaml", "rules: !evil 1\n"), "not valid YAML"),
    "deep YAML": (written("c.yaml", "[" * 50_000), "32 levels"),
    "deep blocks": (written("c.yaml", "- " * 50_000 + "1"), "32 levels"),
    "YAML of 40 levels": (written("c.yaml", "rules: " + "[" * 40 + "]" * 40), "32 levels"),
    "deep JSON": (written("c.json", "[" * 100_000), "not valid JSON"),
    "JSON of 900 levels": (written("c.json", '{"rules": ' + "[" * 900 + "]" * 900 + "}"), "32 levels"),
    "JSON of 40 levels": (written("c.json", '{"rules": ' + "[" * 40 + "]" * 40 + "}"), "32 levels"),
    "deep TOML": (written("c.toml", "rules = " + "[" * 50_000), "not valid TOML"),
    "key of 50000 dots": (written("c.toml", ".".join(["a"] * 50_000) + " = 1"), "more than 200 dots in a line"),
    "table of 50000 dots": (written("c.toml", f"[{'.'.join(['a'] * 50_000)}]"), "more than 200 dots in a line"),
    "key twice": (written("c.yaml", "rules: []\nrules: []\n"), "'rules' is there twice"),
    "JSON key twice": (written("c.json", '{"rules": [], "rules": []}'), "'rules' is there twice"),
    "binary": (written("c.yaml", bytes(range(256))), "give a file of UTF-8 text"),
    "escape codes": (written("c.yaml", "\x1b[2J: 1\n"), "not valid YAML"),
    "control characters in a key": (written("c.json", '{"\\u001b[2J": 1}'), "unknown key"),
    "half a character": (written("c.json", '{"rules": [{"match": "*", "weight": "\\ud800"}]}'), "unknown"),
    "1 GB": (sparse("c.yaml", 1 << 30), "at most 131072 are read"),
    "FIFO": (fifo("c.yaml"), "not a regular file"),
    "device": (link("c.json", "/dev/zero"), "not a regular file"),
    "circle of links": (link("c.toml", "c.toml"), "cannot read config"),
    "folder": (lambda place: (place / "c.yaml").mkdir() or place / "c.yaml", "cannot read config"),  # type: ignore[func-returns-value]
    "number of 5000 digits": (written("c.json", '{"rules": ' + "9" * 5000 + "}"), "not valid JSON"),
    "hexadecimal of 4000 digits": (written("c.yaml", "rules: 0x" + "f" * 4000), "a number has 16000 bits"),
    "number of base 60": (written("c.yaml", "rules: 1" + ":1" * 50_000), "a value has 100001 characters"),
    "infinity": (written("c.yaml", "rules: .inf"), "expected|should be"),
    "date": (written("c.yaml", "rules: 2001-01-01"), "expected|should be"),
    "number for a key": (written("c.yaml", "1: 2"), "unknown key 1"),
    "group of 10^11": (written("c.json", rule(weight="e3m2/group99999999999")), "group"),
    "group of 10^40": (written("c.json", rule(weight="e3m2/group" + "9" * 40)), "group"),
    "format of 10^9 bits": (written("c.json", rule(weight="e999999999m999999999/channel")), "expected|bits|unknown"),
    "int of 5000 digits": (written("c.json", rule(weight="int" + "9" * 5000)), "expected|unknown|bits"),
    "bias of 10^30": (written("c.json", rule(weight="e3m2b" + "9" * 30 + "/channel")), "expected|bias|range"),
    "codebook of code": (written("c.json", rule(weight="lut(__import__('os'),1)/channel")), "expected|unknown"),
    "codebook of infinities": (written("c.json", rule(weight="lut(1e999,1)/channel")), "finite|expected|unknown"),
    "option of code": (
        written("c.json", json.dumps(json.loads(rule()) | {"passes": [{"gptq": {"__class__": 1}}]})), "__class__"),
    "pass of a module": (written("c.json", json.dumps(json.loads(rule()) | {"passes": ["os.system"]})), "os.system"),
    "path for a recipe": (lambda _: Path("../../etc/passwd"), "unknown recipe|expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_lies(case: str, tmp_path: Path) -> None:
    make, message = CONFIGS[case]
    check(Row(make, load_config, ConfigError, message), tmp_path)


@pytest.mark.parametrize("case", ["billion laughs", "python object", "escape codes", "control characters in a key"])
def test_the_command_says_the_same(case: str, tmp_path: Path) -> None:
    make, message = CONFIGS[case]
    check(Row(make, command("config", "check", "FILE"), CommandError, message), tmp_path)


@pytest.mark.parametrize("option", ["gwq.samples", "lorc.rounds", "zq_global.iterations", "zq_local.iterations"])
def test_no_method_is_asked_to_run_for_ever(option: str) -> None:
    method, key = option.split(".")
    with pytest.raises(ConfigError, match=f"{key}=4611686018427387904: Input should be less than or equal to"):
        load_config({"rules": [{"match": "*", "weight": "e3m2/channel"}], "passes": [{method: {key: 2**62}}]})


@pytest.mark.parametrize("match", ["*" * 5000, "*a" * 500 + "b", "[" * 1000, "[!a]*" * 300, "?*" * 500])
def test_globs_do_not_blow_up(match: str) -> None:
    rule_, start = LayerRule(match, keep=True), time.process_time()
    for i in range(1000):
        rule_.matches(f"model.layers.{i}." + "a" * 240)
    assert time.process_time() - start < SECONDS


# --- texts and data ---------------------------------------------------------------------------------------------------
TEXTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "binary": (written("t.txt", bytes(range(256))), "give a file of UTF-8 text"),
    "1 GB": (sparse("t.txt", 1 << 30), "more than 268435456 bytes"),
    "device": (link("t.txt", "/dev/zero"), "more than 268435456 bytes"),
    "folder": (lambda place: place, "cannot read the text"),
    "missing": (lambda place: place / "none", "cannot read the text"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_lies(case: str, tmp_path: Path) -> None:
    make, message = TEXTS[case]
    check(Row(make, read_text, InputError, message), tmp_path)


def header(content: Any, data: int = 8) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def archive(place: Path) -> Path:
    with zipfile.ZipFile(place / "d.npz", "w", zipfile.ZIP_DEFLATED) as found:
        found.writestr("x.npy", bytes(1 << 26))
    return place / "d.npz"


def huge(place: Path) -> Path:
    """A tensor of 4 TiB, in a file that takes no room on the disk."""
    content = header({"x": {"dtype": "U8", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}, 0)
    (place / "d.safetensors").write_bytes(content)
    os.truncate(place / "d.safetensors", len(content) + (1 << 42))
    return place / "d.safetensors"


DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip": (archive, "not a valid safetensors file"),
    "pickle": (written("d.pt", b"\x80\x04cos\nmkdir\n."), "not a valid safetensors file"),
    "empty": (written("d.safetensors", b""), "not a valid safetensors file"),
    "FIFO": (fifo("d.safetensors"), "not a regular file"),
    "shape that overflows": (
        written("d.safetensors", header({"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}})), "takes"),
    "4 TiB": (huge, "this machine has|truncat|File too large"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_a_data_file_that_lies(case: str, tmp_path: Path) -> None:
    make, message = DATA[case]
    check(Row(make, read_tensors, InputError, message), tmp_path)
