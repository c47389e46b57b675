"""lm-eval's adapter: its scores are those of the model's logits, and of lm-eval's own class for transformers."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import InputError, ModelError

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from tiny_language import save_tiny, tiny_language_model, tiny_tokenizer

from fxquant import hf
from fxquant.lm_eval import FxquantLM, main

PAIRS = [
    ("To be or", " not to be"),
    ("", "abc"),
    ("x ", "y"),
    ("a longer text before it", " and more"),
    ("q", "r" * 40),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model compiled, and on packed weights."""
    root = tmp_path_factory.mktemp("models")
    compiled = fxquant.quantize_(model := tiny_language_model(), "W4A16-RTN")
    hf.save(model, root / "packed", tokenizer=tiny_tokenizer())
    compiled.save(root / "compiled", tokenizer=tiny_tokenizer())
    return {"packed": root / "packed", "compiled": root / "compiled"}


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given) for given in args]


def reference(folder: Path) -> Any:
    from fxquant.checkpoints import load_packed

    return load_packed(folder)[0]


def score(model: Any, before: list[int], scored: list[int]) -> tuple[float, bool]:
    """By hand, a token at a time: the log probability of each after all that come before it."""
    total, greedy, ids = 0.0, True, list(before)
    for token in scored:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]))["logits"][0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


@pytest.mark.parametrize("kind", ["packed", "compiled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_loglikelihoods_are_those_of_the_logits(folders: dict[str, Path], kind: str, batch: int) -> None:
    lm, words, model = FxquantLM(folders[kind], batch_size=batch), tiny_tokenizer(), reference(folders["packed"])
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (before, scored), (total, greedy) in zip(PAIRS, found, strict=True):
        moved = len(before) - len(before.rstrip())  # the harness moves blanks to what is scored
        ids = words.encode(before.rstrip()) or [0]
        want = score(model, ids, words.encode(before[len(before) - moved :] + scored))
        assert total == pytest.approx(want[0], abs=1e-3)
        assert greedy == want[1]


@pytest.mark.parametrize("kind", ["packed", "compiled"])
def test_a_greedy_continuation_is_found_to_be_one(folders: dict[str, Path], kind: str) -> None:
    lm = FxquantLM(folders[kind])
    text = lm.generate_until(requests(("To be", {"max_gen_toks": 8})), disable_tqdm=True)[0]
    assert 0 < len(text) <= 8
    (total, greedy), (_, other) = lm.loglikelihood(requests(("To be", text), ("To be", text[:-1] + "~")))
    assert greedy
    assert total < 0
    assert not other or text.endswith("~")


def test_it_agrees_with_the_harness_own_class_for_transformers(folders: dict[str, Path]) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=reference(folders["packed"]), tokenizer=tiny_tokenizer(), device="cpu", max_length=48)
    ours = FxquantLM(folders["compiled"], max_length=48, batch_size=2)
    texts = requests(("A text that is much longer than what the model reads at a time. " * 3,), ("short",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    pairs = requests(*PAIRS)
    for mine, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-3), other[1])
    prompts = requests(*[(before, {"until": ["e", "\n"], "max_gen_toks": 12}) for before, _ in PAIRS if before])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_a_stop_is_left_out_and_ends_the_text(folders: dict[str, Path]) -> None:
    lm = FxquantLM(folders["packed"])
    whole = lm.generate_until(requests(("To be", {"max_gen_toks": 10})))[0]
    stop = whole[3]
    assert lm.generate_until(requests(("To be", {"max_gen_toks": 10, "until": stop}))) == [whole[: whole.index(stop)]]


def test_a_context_that_is_too_long_loses_its_beginning(folders: dict[str, Path]) -> None:
    lm = FxquantLM(folders["packed"], max_length=16)
    assert lm.max_length == 16
    end = "0123456789"
    given = requests(("x" * 40 + end, {"max_gen_toks": 6}), (end, {"max_gen_toks": 6}))
    a, b = lm.generate_until(given)
    assert a == b
    (long, _), (short, _) = lm.loglikelihood(requests(("x" * 40 + "y" * 14, "ab"), ("y" * 15, "ab")))
    assert long == pytest.approx(
        score(reference(folders["packed"]), tiny_tokenizer().encode("x" + "y" * 14), [67, 68])[0]
    )
    assert long != short


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of a task ``own``, which lies in ``tmp_path``."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(json.dumps({
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_target": "label", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    return rows


def accuracy(folder: Path, rows: list[dict[str, Any]]) -> float:
    lm, right = FxquantLM(folder), 0
    for row in rows:
        yes, no = lm.loglikelihood(requests((row["question"], " yes"), (row["question"], " no")))
        right += (no[0] > yes[0]) == bool(row["label"])
    return right / len(rows)


def test_a_task_runs_in_python(folders: dict[str, Path], tmp_path: Path, task: list[dict[str, Any]]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        "fxquant", model_args={"path": str(folders["packed"])}, tasks=["own"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert found["results"]["own"]["acc,none"] == accuracy(folders["packed"], task)


@pytest.mark.slow  # the harness reads all of its tasks
def test_a_task_runs_by_the_command(
    folders: dict[str, Path], tmp_path: Path, task: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What python -m fxquant.lm_eval does."""
    given = ["--model", "fxquant", "--tasks", "own", "--include_path", str(tmp_path), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given, "--model_args", f"path={folders['packed']}"])
    main()
    report = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert report["results"]["own"]["acc,none"] == accuracy(folders["packed"], task)
    assert "|own" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given, "--model_args", f"path={tmp_path}"])
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is no folder that fxquant compile"):
        main()


def test_what_cannot_be_evaluated_says_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float models are evaluated with --model hf --model_args pretrained="):
        FxquantLM(save_tiny(tmp_path / "float"))
    with pytest.raises(InputError, match="batch_size is auto; expected a whole number from 1"):
        FxquantLM(folders["packed"], batch_size="auto")
    for file in folders["packed"].glob("*"):
        if "token" not in file.name:
            (tmp_path / "bare").mkdir(exist_ok=True)
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        InputError, match=r"holds no tokenizer; give the folder of one: --model_args path=.*,tokenizer="
    ):
        FxquantLM(tmp_path / "bare")
    assert FxquantLM(tmp_path / "bare", tokenizer=folders["packed"], device="cuda:0").max_length == 64
    lm = FxquantLM(folders["packed"], max_length=8)
    with pytest.raises(InputError, match="256 new tokens are asked for, and the model takes 8 in all"):
        lm.generate_until(requests(("a", {})))
    with pytest.raises(InputError, match="9 tokens after 1 are to be scored; the model takes 8"):
        lm.loglikelihood(requests(("a", "b" * 9)))
