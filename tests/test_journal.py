"""The journal of a job: what is finished stays, what is torn or altered is found, and two jobs are never mixed."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import results
from fxquant.encoding import MalformedError
from fxquant.errors import JobError, SaveError
from fxquant.journal import DONE, TASKS, Journal, Journaled
from fxquant.qtensor import quantize_tensor
from fxquant.tasks import IN_PROCESS, Task

ABOUT = {"config": {"rules": ["*"]}, "threads": 1}


@dataclass(frozen=True)
class Found:
    """What a task of these tests returns."""

    weight: Any
    error: float
    names: tuple[str, ...]
    more: dict[str, int] | None = None


TYPES = results.CORE | results.table(Found)


def journal(tmp_path: Path, **more: Any) -> Journal:
    return Journal(tmp_path / "out.job", ABOUT, types=TYPES, **more)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, and of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, k), getattr(b, k)) for k in a.__dataclass_fields__)
    return bool(a == b)


def quantized(spec: str = "e3m2/channel") -> Any:
    return quantize_tensor(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), spec)


# --- values -----------------------------------------------------------------------------------------------------------
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    raw = torch.randint(0, 2, (*shape, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    value = raw.reshape(-1).view(draw(st.sampled_from(DTYPES)))[: math.prod(shape)].reshape(shape)
    return value.t() if value.dim() == 2 and draw(st.booleans()) else value


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), tensors(),
    st.sampled_from([torch.float32, torch.uint8]),
    st.sampled_from(["e3m2/channel", "int4/group16:fp16", "e2m1/group16:e4m3"]).map(results.parse_spec),
    st.sampled_from(["e3m2", "uint4", "nf4"]).map(results.parse_format),
    st.sampled_from(["e3m2/channel", "uint4/group8", "e2m1/group16:e4m3"]).map(quantized),
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers())), inner, max_size=3),
        st.builds(Found, inner, st.floats(), st.lists(st.text(max_size=3), max_size=2).map(tuple)),
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    made = journal(tmp_path_factory.mktemp("values"))
    yield made
    made.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_a_result_is_kept_in_every_bit(shared: Journal, value: Any) -> None:
    recorded = shared.record("task", value)
    found = shared.find("task")
    assert found is not None
    assert same(recorded, value)
    assert same(found.value, value)


def test_what_is_kept_lies_in_memory_as_what_was_computed(shared: Journal) -> None:
    """Products differ in the last bit with strides and alignment, so both ways have to give the same ones."""
    base = torch.randn(9, 7)
    value = [base.t(), base[1:], base.flatten()[3:], base, base, torch.randn(5, 1).t().t()]
    recorded, found = shared.record("strides", value), shared.find("strides")
    assert found is not None
    for a, b, c in zip(value, recorded, found.value, strict=True):
        assert torch.equal(a, b)
        assert b.stride() == c.stride() == torch.empty(a.shape).stride()
        assert b.data_ptr() % 64 == c.data_ptr() % 64 == 0


@pytest.mark.parametrize("value", [object(), {1, 2}, [lambda: 0], Task("a", print)])
def test_what_no_file_can_hold_is_returned_and_not_kept(shared: Journal, value: Any) -> None:
    with pytest.warns(UserWarning, match="is not kept"):
        assert shared.record("odd", value) is value
    assert shared.find("odd") is None


TEXTS = st.sampled_from(
    ["e3m2/channel", "float32", "nan", "e3m2", *TYPES, "x", "codes", "scale", "zero_point", "spec", "shape", "error",
     "tensor_scale", "exponent_bias", "weight", "names", "more"]
)  # fmt: skip
PARTS = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False), TEXTS, st.text(max_size=3))
KINDS = st.sampled_from(["tensor", "tuple", "dict", "spec", "format", "value", "float", "dtype", "other"])
DOCUMENTS = st.recursive(
    PARTS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.builds(lambda kind, value: {kind: value}, KINDS, inner),
        st.builds(lambda name, value: {"value": [name, value]}, st.sampled_from(list(TYPES)), inner),
        st.dictionaries(TEXTS, inner, max_size=7),
        st.builds(lambda pairs: {"dict": pairs}, st.lists(st.tuples(inner, inner).map(list), max_size=2)),
    ),
    max_leaves=12,
)
QUANTIZED = {"codes": {"tensor": 0}, "scale": {"tensor": 1}, "zero_point": None, "spec": {"spec": "e3m2/channel"},
             "shape": {"tuple": [4, 16]}, "tensor_scale": None, "exponent_bias": None}  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS)
def test_a_structure_that_somebody_made_up_is_malformed_or_a_value(document: Any) -> None:
    for tensors in ([], [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]):
        with contextlib.suppress(MalformedError):
            results.decode(document, tensors, TYPES)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(QUANTIZED)), DOCUMENTS, st.sampled_from(DTYPES))
def test_a_quantized_tensor_that_somebody_made_up_is_checked(field: str, value: Any, dtype: torch.dtype) -> None:
    value_of = {**QUANTIZED, field: value}
    for codes in (torch.full((4, 16), 63, dtype=torch.uint8), torch.full((4, 16), 64, dtype=torch.uint8),
                  torch.ones(4, 16).to(dtype), torch.zeros(0, 0, dtype=torch.uint8)):  # fmt: skip
        with contextlib.suppress(MalformedError):
            made = results.decode({"value": ["qtensor.QuantizedTensor", value_of]}, [codes, torch.ones(4, 1)], TYPES)
            made.check()


# --- damage -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[Journal, Path, Any]]:
    """A journal with one task, its file, and what it holds."""
    value = Found(quantized("uint4/group8"), math.inf, ("a", "b"), {"c": 1})
    made = journal(tmp_path)
    made.record("solve/a", value)
    (path,) = (tmp_path / "out.job" / TASKS).iterdir()
    yield made, path, value
    made.close()


def test_every_altered_byte_is_found(kept: tuple[Journal, Path, Any]) -> None:
    made, path, value = kept
    content, accepted = path.read_bytes(), 0
    for at in range(len(content)):
        for flip in (0x01, 0x80) if at % 5 else (0x01, 0x20, 0x40, 0x80, 0xFF):
            path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = made.find("solve/a")
            if found is None:
                assert [str(w.message) for w in told if "is solved again" in str(w.message)]
            else:  # spaces that pad the header
                assert same(found.value, value)
                accepted += 1
    assert accepted <= 8 * 5


def test_every_torn_file_is_found(kept: tuple[Journal, Path, Any]) -> None:
    made, path, value = kept
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.warns(UserWarning, match="task solve/a is solved again"):
            assert made.find("solve/a") is None
    path.write_bytes(content + b"\0")
    with pytest.warns(UserWarning, match="is solved again"):
        assert made.find("solve/a") is None
    made.record("solve/a", value)
    assert made.find("solve/a") is not None


def test_a_file_of_another_task_is_not_taken_for_it(kept: tuple[Journal, Path, Any]) -> None:
    made, path, _ = kept
    made.record("solve/b", 1)
    (other,) = [p for p in path.parent.iterdir() if p != path]
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="not that of the task"):
        assert made.find("solve/a") is None


FACTS = {"unit 0": {"sha256": "ab", "bytes": 3}, "unit 1": {"x": None, "y": [1.5, {"z": "ü"}]}, "unit 2": {}}


def noted(made: Journal) -> dict[str, Any]:
    return {name: made.noted(name) for name in FACTS if made.noted(name) is not None}


def test_every_prefix_of_the_facts_is_read(tmp_path: Path) -> None:
    path = with_facts(tmp_path)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        again = journal(tmp_path)
        whole = sum(end <= length for end in ends)
        assert noted(again) == dict(list(FACTS.items())[:whole])
        again.note("unit 2", {"last": length})  # what is appended is not glued to a torn line
        again.close()
        again = journal(tmp_path)
        assert noted(again) == dict(list(FACTS.items())[: min(whole, 2)]) | {"unit 2": {"last": length}}
        again.close()


def with_task(tmp_path: Path) -> None:
    """A job in which something is finished, so that its folder stays."""
    made = journal(tmp_path)
    made.record("first", 1)
    made.close()


def with_facts(tmp_path: Path) -> Path:
    """A job with FACTS; the file that holds them."""
    with_task(tmp_path)
    made = journal(tmp_path)
    for name, facts in FACTS.items():
        made.note(name, facts)
    made.close()
    return tmp_path / "out.job" / DONE


def test_altered_facts_are_left_out(tmp_path: Path) -> None:
    path = with_facts(tmp_path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = journal(tmp_path)
        found = noted(again)
        assert len(found) >= (1 if content[at] == 10 else 2)
        assert all(FACTS[name] == facts for name, facts in found.items())
        again.close()


# --- the job ----------------------------------------------------------------------------------------------------------
def test_another_job_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    with_task(tmp_path)
    other = {"config": {"rules": ["*.q_proj"]}, "threads": 2, "new": True}
    with pytest.raises(JobError) as told:
        Journal(tmp_path / "out.job", other)
    assert 'config.rules[0]: "*" then, "*.q_proj" now' in str(told.value)
    assert "threads: 1 then, 2 now" in str(told.value)
    assert "new: nothing then, true now" in str(told.value)
    assert "--restart" in str(told.value)
    again = journal(tmp_path)  # nothing was lost
    assert again.find("first") is not None
    again.close()


def test_a_job_that_is_there_is_refused_continued_or_discarded(tmp_path: Path) -> None:
    with_task(tmp_path)
    with pytest.raises(JobError, match=r"--resume.*--restart"):
        journal(tmp_path, start="new")
    made = Journal(tmp_path / "out.job", {"another": 1}, start="restart")
    assert made.find("first") is None
    made.close()
    assert not (tmp_path / "out.job").exists()  # nothing was finished


def test_a_finished_job_leaves_nothing(tmp_path: Path) -> None:
    made = journal(tmp_path, start="new")
    made.record("a", torch.ones(3))
    made.note("b", {})
    made.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["new", "resume", "restart"])
def test_other_folders_are_left_alone(tmp_path: Path, start: Any) -> None:
    (tmp_path / "out.job").mkdir()
    (tmp_path / "out.job" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(JobError, match=r"thesis\.txt"):
        journal(tmp_path, start=start)
    assert (tmp_path / "out.job" / "thesis.txt").read_text() == "irreplaceable"


def test_a_manifest_that_cannot_be_read_is_no_job_to_continue(tmp_path: Path) -> None:
    with_task(tmp_path)
    (tmp_path / "out.job" / "manifest.json").write_text("{")
    with pytest.raises(JobError, match="--restart"):
        journal(tmp_path)
    made = journal(tmp_path, start="restart")
    assert made.find("first") is None
    made.close()


def test_a_job_killed_before_it_began_is_begun(tmp_path: Path) -> None:
    with_task(tmp_path)
    (tmp_path / "out.job" / "manifest.json").unlink()
    made = journal(tmp_path, start="new")
    assert made.find("first") is None
    made.close()


HOLDER = """
import sys, time
from fxquant.journal import Journal
journal = Journal(sys.argv[1], {"config": {"rules": ["*"]}, "threads": 1})
journal.record("first", 1)
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_never_work_on_one_job(tmp_path: Path) -> None:
    folder = tmp_path / "out.job"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for start in ("new", "resume", "restart"):
            with pytest.raises(JobError, match=f"process {other.pid} is working"):
                journal(tmp_path, start=start)
        other.send_signal(signal.SIGKILL)
        other.wait()
    made = journal(tmp_path)  # a lock of a process that died is no obstacle
    assert made.find("first") is not None
    made.close()


# --- disks that are full ----------------------------------------------------------------------------------------------
CALLS = ("write", "fsync", "replace", "open")


@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with_task(tmp_path)
    made = journal(tmp_path)
    made.note("unit", {"a": 1})
    for action in (lambda: made.record("second", torch.ones(64)), lambda: made.note("more", {"b": 2})):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_, **__: raise_(OSError(errno.ENOSPC, "No space left on device")))
            if call == "write":
                patch.setattr(Path, "write_bytes", lambda *_: raise_(OSError(errno.ENOSPC, "No space left on device")))
            if call != "replace" or action.__code__.co_consts[1] == "second":
                with pytest.raises(SaveError, match=r"No space left.*--resume"):
                    action()
    made.close()
    again = journal(tmp_path)
    assert again.find("first") is not None
    assert again.noted("unit") == {"a": 1}
    assert again.noted("more") in (None, {"b": 2})
    again.close()


def raise_(error: BaseException) -> Any:
    raise error


# --- an executor ------------------------------------------------------------------------------------------------------
CALLED: list[int] = []


def solve(x: int) -> Found:
    CALLED.append(x)
    if x < 0:
        raise ValueError("as asked")
    return Found(torch.full((2,), float(x)), x / 2, (str(x),))


def test_finished_tasks_are_not_solved_again(tmp_path: Path) -> None:
    CALLED.clear()
    first = journal(tmp_path)
    run = Journaled(IN_PROCESS, first)
    values = [run.submit(Task(f"solve/{x}", solve, (x,))).result() for x in range(3)]
    with pytest.raises(ValueError, match="as asked"):
        run.submit(Task("solve/-1", solve, (-1,)))
    with pytest.raises(ValueError, match="two tasks are called 'solve/1'"):
        run.submit(Task("solve/1", solve, (1,)))
    first.close()
    second = journal(tmp_path)
    run = Journaled(IN_PROCESS, second)
    again = [run.submit(Task(f"solve/{x}", solve, (x,))).result() for x in range(4)]
    assert CALLED == [0, 1, 2, -1, 3]
    assert same(again[:3], values)
    second.close()


class Slow:
    """An executor whose tasks end when they are told to."""

    workers = 4

    def __init__(self) -> None:
        self.ends: dict[str, threading.Event] = {}

    def submit(self, task: Task) -> Any:
        event = self.ends[task.name] = threading.Event()

        class Waiting:
            def result(self) -> Any:
                event.wait()
                return task.function(*task.args)

        return Waiting()


def test_results_are_recorded_when_they_come(tmp_path: Path) -> None:
    """The last one first, while nobody asks for it."""
    made, slow = journal(tmp_path), Slow()
    run = Journaled(slow, made)
    pending = [run.submit(Task(f"solve/{x}", solve, (x,))) for x in range(3)]
    slow.ends["solve/2"].set()
    pending[2].result()
    assert made.find("solve/2") is not None
    assert made.find("solve/0") is None
    slow.ends["solve/0"].set()
    slow.ends["solve/1"].set()
    assert [p.result().error for p in pending] == [0.0, 0.5, 1.0]
    assert made.finished() == 3
    bad = run.submit(Task("bad", solve, (-1,)))
    slow.ends["bad"].set()
    with pytest.raises(ValueError, match="as asked"):
        bad.result()
    made.finish()
