"""Saved models: exact round trips, nothing half-written, and a LoadError for everything that is not a saved model."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import outputs, store
from fxquant.capture import capture
from fxquant.codegen.lower import LOWER
from fxquant.encoding import MalformedError, path
from fxquant.errors import SaveError
from fxquant.graph import info
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.program import Program, Stage, run, text
from fxquant.rewrite import aten, attach, get_attr, identity, tensors
from fxquant.scheme import LayerRule, parse_spec
from fxquant.show.summary import summarize
from fxquant.store import load, save

CONFIG = {"recipe": "rtn", "rules": [{"match": "*", "weight": "e3m2/channel"}], "ratio": 0.5, "none": None}
SPECS = (
    "e3m2/channel",
    "e2m1/group8",
    "e4m3/tensor",
    "e5m2/channel:bf16",
    "int4/group16:fp16",
    "uint4/group8",
    "uint3/tensor",
)


class Net(nn.Module):
    """A CNN with a non-contiguous buffer and a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("mix", torch.randn(5, 7).t())

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.norm(self.conv(x))).masked_fill(x[:, :1] > 1e9, -float("inf"))
        y = self.head(y.clamp(min=-1).mean((2, 3)))
        return {"logits": y, "more": [(y.unsqueeze(1) * self.mix).sum(-1), (y.to(torch.float64),)]}


class Lm(nn.Module):
    """A small transformer: tied embedding and head, sizes computed from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        b, s, d = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        causal = torch.full((s, s), -float("inf")).triu(1) + torch.zeros(s * s).reshape(s, s)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return self.head(x), (x @ x.transpose(1, 2)).flatten()


@cache
def captured(model: type[nn.Module]) -> Program:
    torch.manual_seed(0)
    example = torch.randint(32, (2, 5)) if model is Lm else torch.randn(2, 3, 6, 6)
    return capture(model().eval(), (example,))


def quantized(model: type[nn.Module], spec: str, *, lowered: bool) -> Program:
    program = copy.deepcopy(captured(model))
    rules = (
        LayerRule("mix", keep=True),
        LayerRule("*", parse_spec(spec), types=("linear", "conv", "embedding")),
    )
    stages = [Stage(NORMALIZE), Stage(INSERT_QDQ, {"rules": rules}), Stage(REMOVE_DEAD)]
    return run(program, stages + [Stage(LOWER), Stage(REMOVE_DEAD)] * lowered, check=lambda gm: None)


def net(spec: str = "e3m2/channel", *, lowered: bool = True) -> tuple[Program, tuple[Tensor, ...]]:
    return quantized(Net, spec, lowered=lowered), (torch.randn(4, 3, 6, 6),)


def lm(spec: str = "e3m2/channel", *, lowered: bool = True) -> tuple[Program, tuple[Tensor, ...]]:
    return quantized(Lm, spec, lowered=lowered), (torch.randint(32, (3, 7)),)


def same(a: Any, b: Any) -> bool:
    flat_a, flat_b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return len(flat_a) == len(flat_b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that tests copy and damage."""
    folder = tmp_path_factory.mktemp("store") / "model"
    save(net("uint4/group8")[0], folder, config=CONFIG)
    return folder


# --- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [net, lm])
@pytest.mark.parametrize("lowered", [False, True])
def test_a_loaded_program_is_the_saved_one(make: Any, lowered: bool, tmp_path: Path) -> None:
    program, inputs = make(lowered=lowered)
    save(program, tmp_path / "m", config=CONFIG)
    loaded, config = load(str(tmp_path / "m"))
    assert config == CONFIG
    assert loaded.trace == program.trace
    assert text(loaded.gm) == text(program.gm)
    assert (loaded.signature.inputs, loaded.signature.fixed) == (program.signature.inputs, program.signature.fixed)
    assert loaded.signature.output == program.signature.output
    assert loaded.signature.out_spec is None
    assert [info(n) for n in loaded.gm.graph.nodes] == [info(n) for n in program.gm.graph.nodes]
    assert same(loaded(*inputs), program(*inputs))
    loaded.gm.graph.lint()
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert sorted(os.listdir(tmp_path / "m")) == ["graph.json", "manifest.json", "model.safetensors", "timings.json"]


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_round_trips(spec: str, tmp_path: Path) -> None:
    program, inputs = lm(spec)
    save(program, tmp_path / "m", config={})
    loaded, _ = load(tmp_path / "m")
    assert same(loaded(*inputs), program(*inputs))
    for key, value in tensors(loaded.gm).items():
        assert value.dtype == tensors(program.gm)[key].dtype


def test_a_loaded_qdq_program_lowers_to_the_same_program(tmp_path: Path) -> None:
    program, inputs = lm(lowered=False)
    save(program, tmp_path / "m", config={})
    loaded, _ = load(tmp_path / "m")
    for each in (program, loaded):
        run(each, [Stage(LOWER), Stage(REMOVE_DEAD)], check=lambda gm: None)
    assert text(loaded.gm) == text(program.gm)
    assert same(loaded(*inputs), program(*inputs))


def test_saving_a_loaded_program_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    program, config = load(saved)
    save(program, tmp_path / "m", config=config)
    for name in (store.GRAPH, store.WEIGHTS):
        assert (tmp_path / "m" / name).read_bytes() == (saved / name).read_bytes()


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    program = copy.deepcopy(captured(Lm))
    reader = next(n for n in program.gm.graph.nodes if n.op == "get_attr" and "weight" in n.target and len(n.users) > 1)
    linear = next(n for n in reader.users if n.target is aten.linear.default)
    value = tensors(program.gm)[reader.target]
    attach(program.gm, "other.weight", value)
    with program.gm.graph.inserting_before(reader):
        linear.replace_input_with(reader, get_attr(program.gm.graph, "other.weight", value))
    program.gm.recompile()
    save(program, tmp_path / "m", config={})
    loaded, _ = load(tmp_path / "m")
    embed, head = (tensors(loaded.gm)[k] for k in (reader.target, "other.weight"))
    assert embed is head
    assert identity(embed) == identity(head)
    table = json.loads((tmp_path / "m" / "graph.json").read_text())["tensors"]
    assert ["same_as" in entry for entry in table.values()].count(True) == 1


def test_a_trace_keeps_lines_that_steps_share_once(saved: Path) -> None:
    trace = json.loads((saved / "graph.json").read_text())["trace"]
    assert len(set(trace["lines"])) == len(trace["lines"]) < sum(len(step["text"]) for step in trace["steps"])


def test_what_a_job_took_is_apart_and_may_be_missing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    assert "seconds" not in (saved / "graph.json").read_text()
    timed = load(tmp_path / "m")[0].trace
    assert all(step.seconds is not None and step.seconds >= 0 for step in timed)
    (tmp_path / "m" / "timings.json").unlink()
    untimed = load(tmp_path / "m")[0]
    assert [replace(step, seconds=None) for step in timed] == untimed.trace
    assert summarize(untimed).seconds is None
    assert not re.search(r"[0-9] s\b", str(summarize(untimed)))
    assert re.search(r"[0-9] s\b", str(summarize(load(saved)[0])))


def test_a_model_of_version_1_has_its_times_in_the_graph(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    for name in ("timings.json", "manifest.json"):
        (tmp_path / "m" / name).unlink()
    found = json.loads((saved / "graph.json").read_text())
    found["version"] = 1
    for i, step in enumerate(found["trace"]["steps"]):
        step["seconds"] = i + 0.5
    (tmp_path / "m" / "graph.json").write_text(json.dumps(found))
    program, _ = load(tmp_path / "m")
    assert [step.seconds for step in program.trace] == [i + 0.5 for i in range(len(program.trace))]
    save(program, tmp_path / "again", config={})
    assert load(tmp_path / "again")[0].trace == program.trace


def test_special_values_survive(tmp_path: Path) -> None:
    program, _ = net()
    nodes = [n for n in program.gm.graph.nodes if n.target is aten.masked_fill.Scalar]
    assert nodes[0].args[2] == -float("inf")
    save(program, tmp_path / "m", config={"text": "ü\n\"'\\", "deep": [[{"a": [-0.0, 1e-300, 2**70]}]]})
    loaded, config = load(tmp_path / "m")
    found = next(n for n in loaded.gm.graph.nodes if n.name == nodes[0].name)
    assert found.args[2] == -float("inf")
    assert config == {"text": "ü\n\"'\\", "deep": [[{"a": [-0.0, 1e-300, 2**70]}]]}


# --- saving: refusals, and nothing half-written --------------------------------------------------------------------
def test_an_existing_folder_is_not_replaced_unless_asked(saved: Path, tmp_path: Path) -> None:
    program, _ = net()
    shutil.copytree(saved, tmp_path / "m")
    with pytest.raises(SaveError, match="exists already"):
        save(program, tmp_path / "m", config={})
    save(program, tmp_path / "m", config={"new": True}, overwrite=True)
    assert load(tmp_path / "m")[1] == {"new": True}
    assert os.listdir(tmp_path) == ["m"]


def test_overwrite_replaces_only_saved_models(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(SaveError, match=r"chapter1\.tex"):
        save(net()[0], tmp_path / "thesis", config={}, overwrite=True)
    (tmp_path / "file").write_text("...")
    with pytest.raises(SaveError, match="not a folder"):
        save(net()[0], tmp_path / "file", config={}, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="does not exist; create it"):
        save(net()[0], tmp_path / "no" / "m", config={})


@pytest.mark.parametrize("failing", [(store, "_write_weights"), (outputs, "sync"), (outputs, "_put_in_place")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing_and_harms_nothing(
    failing: tuple[Any, str], error: BaseException, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    shutil.copytree(saved, tmp_path / "old")
    before = (tmp_path / "old" / "graph.json").read_bytes()
    program, _ = net()
    monkeypatch.setattr(*failing, fail)
    for name in ("old",) if failing[1] == "_put_in_place" else ("new", "old"):
        with pytest.raises(SaveError if isinstance(error, OSError) else KeyboardInterrupt):
            save(program, tmp_path / name, config={}, overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old" / "graph.json").read_bytes() == before


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_failed_rename_puts_the_old_model_back(
    exchanged: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a system that exchanges two folders at once, and with one that needs two renames."""
    rename = os.rename
    calls: list[Any] = []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        rename(source, target)

    def broken(a: Path, b: Path) -> bool:
        raise OSError("disk gone")

    shutil.copytree(saved, tmp_path / "m")
    program, _ = net()
    monkeypatch.setattr(outputs, "exchange", broken if exchanged else lambda a, b: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(SaveError, match="disk gone"):
        save(program, tmp_path / "m", config={}, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert load(tmp_path / "m")[1] == CONFIG


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    program, _ = net()
    node = next(n for n in program.gm.graph.nodes if n.target is aten.relu.default)
    node.target = torch.ops.aten.relu_.default
    with pytest.raises(SaveError, match=r"node 'relu': operator 'aten\.relu_\.default'"):
        save(program, tmp_path / "m", config={})
    node.target = torch.load
    with pytest.raises(SaveError, match=r"node 'relu'.*torch\.serialization\.load"):
        save(program, tmp_path / "m", config={})
    node.target, node.args = torch.ops.aten.relu.default, (*node.args, 1)
    with pytest.raises(SaveError, match=r"node 'relu'.*1 positional"):
        save(program, tmp_path / "m", config={})
    with pytest.raises(SaveError, match="config"):
        save(net()[0], tmp_path / "m", config={"spec": object()})
    assert os.listdir(tmp_path) == []


class Named(nn.Module):
    """Modules whose names are no ASCII identifiers, and an output with numbers as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.weiß = nn.Linear(8, 8)
        self.add_module("a b", nn.Linear(8, 8))
        self.add_module("0", nn.Linear(8, 4))

    def forward(self, x: Tensor) -> dict[int | str, Any]:
        y = getattr(self, "0")(getattr(self, "a b")(self.weiß(x)))
        return {3: y, 1: [y + 1], "last": {0: y - 1}}


def test_names_of_any_language_and_keys_that_are_numbers_come_back(tmp_path: Path) -> None:
    import fxquant

    x = torch.randn(2, 8)
    compiled = fxquant.compile(Named(), (x,))
    compiled.save(tmp_path / "m")
    loaded = fxquant.load(tmp_path / "m")
    got, want = loaded(x), compiled(x)
    assert same(got, want)
    assert (list(got), list(got["last"])) == ([3, 1, "last"], [0])
    assert {q.name for q in loaded.summary().quantized} == {"weiß", "a b", "0"}


@pytest.mark.parametrize("name", ["a.b", "", "a b", "weiß", "größe-2", "日本", "x" * 256])
def test_names_that_generated_code_can_name(name: str) -> None:
    assert path(f"block.{name}" if name else "block", "it").startswith("block")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a..b",
        'a"b',
        "a'b",
        "a\\b",
        "a\nb",
        "a\tb",
        "ﬁ",
        "ｃlass",
        "class",
        "__class__",
        "\udc80",
        "x" * 257,
        "../a",
    ],
)
def test_names_that_generated_code_cannot_name(name: str) -> None:
    with pytest.raises(MalformedError, match="tensor name"):
        path(name, "it")


def test_a_table_of_sixteen_values_is_saved(tmp_path: Path) -> None:
    spec = f"lut({','.join(f'{i / 15 - 0.5:.9f}' for i in range(16))})/channel"
    program, inputs = lm(spec)
    save(program, tmp_path / "m", config={})
    loaded, _ = load(tmp_path / "m")
    assert same(loaded(*inputs), program(*inputs))
