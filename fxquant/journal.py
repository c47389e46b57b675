"""The journal of a job: a folder that keeps what is finished, through SIGKILL and power loss.

    OUT.job/
      manifest.json             what the job is; another one is never continued
      tasks/<hash>.safetensors  the result of a finished task: tensors, its structure, its name and a checksum
      model.safetensors         weights that are written one after the other (``stream``)
      done.jsonl                facts about finished units, a line each with its own checksum; only appended to
      lock                      held by the process that works on the job

A file is written to a temporary name, synced, renamed, and its folder synced, before a task counts as finished. What
is torn or was altered is found by its checksum, and solved again. Nothing is unpickled (``results``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from fxquant import files, outputs, results
from fxquant.encoding import Json, MalformedError
from fxquant.errors import JobError, SaveError
from fxquant.outputs import HeldError
from fxquant.tasks import Done, Executor, Pending, Task

MANIFEST, TASKS, DONE, LOCK = "manifest.json", "tasks", "done.jsonl", "lock"
WEIGHTS = "model.safetensors"
_OURS = (MANIFEST, TASKS, DONE, LOCK, WEIGHTS)
FORMAT = 1
Start = Literal["new", "resume", "restart"]
"""With an unfinished job in the folder: refuse, continue it, or discard it."""
_MAX_HEADER, _MAX_DONE = 1 << 26, 1 << 30
_WHAT_TO_DO = "continue it (--resume), or discard it and begin anew (--restart)"


class Journal:
    """The journal in ``folder`` of the job that ``manifest`` (plain JSON values) describes.

    ``types`` are the frozen dataclasses that results may hold (``results.table``). The folder is locked until
    ``close``. Raises JobError where another process has it, where it is there and ``start`` is "new", where ``start``
    is "resume" and its manifest differs (saying in what), and where it is not the folder of a job; SaveError where it
    cannot be written.
    """

    def __init__(
        self, folder: str | Path, manifest: Mapping[str, Json], *, types: results.Types = results.CORE,
        start: Start = "resume",
    ) -> None:  # fmt: skip
        self.folder = Path(os.path.abspath(folder))
        self.types = types
        self._guard = threading.Lock()
        self._facts: dict[str, dict[str, Json]] = {}
        check(self.folder, start)
        document = {"fxquant job": FORMAT, **json.loads(json.dumps(manifest, allow_nan=False))}
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = outputs.lock(self.folder / LOCK)
        except HeldError as error:
            raise _held(self.folder, error) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            self._begin(document, start)
        except OSError as error:
            self.close()
            raise error if isinstance(error, SaveError) else _unwritable(self.folder, error) from error
        except BaseException:
            self.close()
            raise

    def _begin(self, document: dict[str, Json], start: Start) -> None:
        there = (self.folder / MANIFEST).exists()
        if there and start == "new":
            raise _unfinished(self.folder)
        if there and start == "resume":
            found = _read_manifest(self.folder)
            if changes := list(differences(found, document)):
                raise JobError(_changed(self.folder, changes))
        else:
            _clear(self.folder)
            (self.folder / TASKS).mkdir()
            outputs.write(self.folder / MANIFEST, json.dumps(document, indent=1, sort_keys=True).encode())
            outputs.sync(self.folder.parent)
        for left in self.folder.glob(".*.*"):  # of a process that was killed while it wrote
            left.unlink()
        for left in (self.folder / TASKS).glob(".*.*"):
            left.unlink()
        self._facts, end = _read_done(self.folder / DONE)
        if (self.folder / DONE).exists():
            os.truncate(self.folder / DONE, end)

    # --- tasks
    def find(self, name: str) -> Done | None:
        """The result of the task ``name`` where it is finished; None, with a warning, where its file is damaged."""
        path = self._file(name)
        try:
            return Done(_read_task(path, name, self.types))
        except FileNotFoundError:
            return None
        except (MalformedError, OSError) as error:
            warnings.warn(f"{path}: {error}; task {name} is solved again", stacklevel=2)
            return None

    def record(self, name: str, value: Any) -> Any:
        """Keep the result of a finished task; returns it as ``find`` will. SaveError where it cannot be written.

        A value of a type that a file cannot hold is returned as it is, with a warning: its task is solved again when
        the job is continued.
        """
        try:
            structure, tensors = results.encode(value, self.types)
            made = results.decode(structure, tensors, self.types)
        except MalformedError as error:
            warnings.warn(f"task {name} is not kept: {error}", stacklevel=2)
            return value
        text = json.dumps(structure, allow_nan=False, separators=(",", ":"))
        header = {"task": name, "value": text, "sha256": _digest(name, text, tensors)}
        content = safetensors.torch.save({str(i): t for i, t in enumerate(tensors)}, header)
        try:
            outputs.write(self._file(name), content, mode=0o600)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return made

    def finished(self) -> int:
        """How many tasks and noted units are finished."""
        return len(list((self.folder / TASKS).glob("[0-9a-f]*.safetensors"))) + len(self._facts)

    def _file(self, name: str) -> Path:
        return self.folder / TASKS / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.safetensors"

    # --- facts
    def note(self, name: str, facts: dict[str, Json]) -> None:
        """Keep ``facts``, plain JSON values, of the finished unit ``name``; later ones replace earlier ones."""
        self.note_all({name: facts})

    def note_all(self, units: Mapping[str, dict[str, Json]]) -> None:
        """``note`` of several units, for which the disk is waited once: it may take a tenth of a second."""
        content = b"".join(_line(name, facts) for name, facts in units.items())
        with self._guard:
            path = self.folder / DONE
            try:
                new = not path.exists()
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                try:
                    _append(handle, content)
                finally:
                    os.close(handle)
                if new:
                    outputs.sync(self.folder)
            except OSError as error:
                raise _unwritable(self.folder, error) from error
            self._facts.update(units)

    def noted(self, name: str) -> dict[str, Json] | None:
        """What was noted of the unit ``name``, None where it is not finished."""
        return self._facts.get(name)

    # --- the end
    def close(self) -> None:
        """Let go of the folder, for another process to continue; a folder in which nothing is finished is removed."""
        if self._lock < 0:
            return
        if not (self.folder / MANIFEST).exists() or not self.finished():
            _remove(self.folder)
        os.close(self._lock)
        self._lock = -1

    def finish(self) -> None:
        """The job is done: remove the folder."""
        _remove(self.folder)
        os.close(self._lock)
        self._lock = -1


def check(folder: Path, start: Start) -> None:
    """Raise JobError, before any work, where a Journal with ``start`` would: but what the job is, it does not know."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise JobError(f"{folder} is not a folder; it is where an unfinished job is kept: move it away")
    foreign = [n for n in sorted(os.listdir(folder)) if n not in _OURS and not n.startswith(".")]
    if foreign:
        raise JobError(f"{folder} holds {foreign[0]!r}, which is not part of a job; it is where an unfinished job is "
                       f"kept: move it away")  # fmt: skip
    if (folder / LOCK).exists():
        try:
            os.close(outputs.lock(folder / LOCK))
        except HeldError as error:
            raise _held(folder, error) from None
        except OSError as error:
            raise _unwritable(folder, error) from error
    if start == "new" and (folder / MANIFEST).exists():
        raise _unfinished(folder)


def _unfinished(folder: Path) -> JobError:
    return JobError(f"{folder} holds an unfinished job; {_WHAT_TO_DO}")


def _held(folder: Path, error: HeldError) -> JobError:
    who = f"process {error.pid}" if error.pid else "another process"
    return JobError(f"{who} is working on the job in {folder}; wait for it, end it, or choose another output")


def _unwritable(folder: Path, error: OSError) -> SaveError:
    return SaveError(
        f"cannot keep finished tasks in {folder}: {error}. What is finished stays; free some space, or make the folder "
        f"writable, and continue with --resume"
    )


def _clear(folder: Path) -> None:
    """Remove a job's files: first what says that there is one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    outputs.sync(folder)
    for name in (DONE, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    if (folder / TASKS).exists():
        shutil.rmtree(folder / TASKS)


def _remove(folder: Path) -> None:
    _clear(folder)
    shutil.rmtree(folder)


# --- the manifest -----------------------------------------------------------------------------------------------------
def _read_manifest(folder: Path) -> Json:
    path = folder / MANIFEST
    try:
        found = files.read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return found
    except (OSError, ValueError) as error:
        raise JobError(
            f"{path} cannot be read ({str(error)[:200]}), so nobody can tell which job it is of; begin anew (--restart)"
        ) from None


_MISSING = object()


def differences(old: Json, new: Json, path: str = "") -> Iterator[tuple[str, str, str]]:
    """``(where, old, new)`` for every value that differs in two documents, as text; "nothing" for what is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif old is _MISSING or new is _MISSING or old != new or type(old) is not type(new):
        yield path, _shown(old), _shown(new)


def _shown(value: Json) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _changed(folder: Path, changes: list[tuple[str, str, str]], most: int = 8) -> str:
    lines = [f"  {where}: {old} then, {new} now" for where, old, new in changes[:most]]
    if len(changes) > most:
        lines.append(f"  and {len(changes) - most} more")
    return "\n".join([
        f"the unfinished job in {folder} is another one, and is not mixed with this:", *lines,
        "What to do: run with what it was started with, or discard it and begin anew (--restart)",
    ])  # fmt: skip


# --- files of tasks ---------------------------------------------------------------------------------------------------
def _digest(name: str, text: str, tensors: list[Tensor]) -> str:
    """sha256 of all that a file says."""
    found = hashlib.sha256(json.dumps([name, text]).encode())
    for tensor in tensors:
        found.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_task(path: Path, name: str, types: results.Types) -> Any:
    """The result in a file; FileNotFoundError where there is none, MalformedError where it is not what was written."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise MalformedError("it is not a regular file")
    try:
        with path.open("rb") as stream:
            if (length := int.from_bytes(stream.read(8), "little")) > _MAX_HEADER:
                raise MalformedError(f"its header claims {length} bytes; at most {_MAX_HEADER} are read")
        with safe_open(path, framework="pt") as file:
            header, count = file.metadata() or {}, len(list(file.keys()))
            stored = [file.get_tensor(str(i)) for i in range(count)]
    except (MalformedError, OSError):
        raise
    except Exception as error:  # the reader's own errors are of many types
        raise MalformedError(f"it is not a whole safetensors file: {str(error)[:200]}") from None
    if header.keys() != {"task", "value", "sha256"} or header["task"] != name:
        raise MalformedError("its header is not that of the task")
    if _digest(name, header["value"], stored) != header["sha256"]:
        raise MalformedError("its checksum is wrong: it was torn or altered")
    try:
        structure = json.loads(header["value"])
    except (ValueError, RecursionError):
        raise MalformedError("its structure is not JSON") from None
    tensors = [torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in stored]  # the file is mapped, and lies anywhere
    return results.decode(structure, tensors, types)


# --- done.jsonl -------------------------------------------------------------------------------------------------------
def _line(name: str, facts: Mapping[str, Json]) -> bytes:
    body = json.dumps([name, facts], allow_nan=False, separators=(",", ":"))
    return json.dumps({"unit": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}).encode() + b"\n"


def _append(handle: int, content: bytes) -> None:
    """Write all of a line and sync it; a part of it is taken back where that fails."""
    before = os.fstat(handle).st_size
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except BaseException:
        os.ftruncate(handle, before)
        raise


def _read_done(path: Path) -> tuple[dict[str, dict[str, Json]], int]:
    """Facts by unit, and where the last whole line ends; lines that are damaged are left out, with a warning."""
    try:
        content = files.read(path, _MAX_DONE)
    except FileNotFoundError:
        return {}, 0
    found: dict[str, dict[str, Json]] = {}
    end = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            name, facts = _parse_line(line)
            found[name] = facts
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            warnings.warn(f"{path}: line {number} is damaged, and is left out", stacklevel=2)
    return found, end


def _parse_line(line: bytes) -> tuple[str, dict[str, Json]]:
    row = json.loads(line)
    if row.keys() != {"unit", "sha256"} or hashlib.sha256(row["unit"].encode()).hexdigest() != row["sha256"]:
        raise ValueError("checksum")
    name, facts = json.loads(row["unit"])
    if not isinstance(name, str) or not isinstance(facts, dict):
        raise ValueError("not a name and facts")
    return name, facts


# --- an executor ------------------------------------------------------------------------------------------------------
class Journaled:
    """An executor that answers finished tasks from a journal, and has ``executor`` run the others and records them.

    A result is recorded as soon as it is there, whether or not somebody asks for it. Tasks are known by their names.
    """

    def __init__(self, executor: Executor, journal: Journal) -> None:
        self.executor, self.journal, self.workers = executor, journal, executor.workers
        self._seen: set[str] = set()

    def submit(self, task: Task) -> Pending:
        """As an Executor's; ValueError for a name that a task of this run had already, SaveError as for ``record``."""
        if (found := self._find(task.name)) is not None:
            return found
        pending = self.executor.submit(task)
        if isinstance(pending, Done):
            return Done(self.journal.record(task.name, pending.value))
        return _Recorded(pending, self.journal, task.name)

    def keep(self, name: str, compute: Callable[[], Any]) -> Any:
        """What only this process can compute, kept as a task's result is (``tasks.Keep``)."""
        found = self._find(name)
        return found.value if found is not None else self.journal.record(name, compute())

    def _find(self, name: str) -> Done | None:
        if name in self._seen:
            raise ValueError(f"two tasks are called {name!r}; a journal tells tasks apart by their names")
        self._seen.add(name)
        return self.journal.find(name)


class _Recorded:
    """A task that runs elsewhere; a thread waits for its result and records it."""

    def __init__(self, pending: Pending, journal: Journal, name: str) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, args=(pending, journal, name), daemon=True)
        self._thread.start()

    def _wait(self, pending: Pending, journal: Journal, name: str) -> None:
        try:
            self._value = journal.record(name, pending.result())
        except BaseException as error:  # for whoever asks for the result
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
