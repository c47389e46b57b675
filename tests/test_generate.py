"""Generation: the loop, its two engines, and the command."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import fxquant
from fxquant import cli
from fxquant.errors import InputError, ModelError
from fxquant.generate import OnnxEngine, Sampling, Speed, TorchEngine, choose, generate, pieces, prompt_ids
from fxquant.hf import with_cache
from tests.tiny_models import mlp, tiny_decoder

transformers = pytest.importorskip("transformers")
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "for",
    *(f"w{i}" for i in range(51)),
]
PROMPT = [3, 5, 7, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tiny_decoder().save_pretrained(folder)  # type: ignore[operator]
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def cached(model: Path) -> Path:
    run("compile", model, "-o", model.parent / "cached", "--kv-cache")
    run("export", model.parent / "cached", "-o", model.parent / "cached.onnx")
    return model.parent / "cached"


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    run("compile", model, "-o", model.parent / "whole")
    run("export", model.parent / "whole", "-o", model.parent / "whole.onnx")
    return model.parent / "whole"


def test_all_engines_go_on_alike(cached: Path, whole: Path) -> None:
    engines = [
        TorchEngine(fxquant.load(cached)), OnnxEngine(cached.with_suffix(".onnx"), threads=1),
        TorchEngine(fxquant.load(whole)), OnnxEngine(whole.with_suffix(".onnx"), threads=1),
    ]  # fmt: skip
    assert [e.cached for e in engines] == [True, True, False, False]
    model = fxquant.load(whole)
    want = list(PROMPT)
    for _ in range(12):
        want.append(int(model(input_ids=torch.tensor([want]))["logits"][0, -1].argmax()))
    for engine in engines:
        for _ in range(2):  # what one text leaves behind does not show in the next
            assert list(generate(engine, PROMPT, most=12)) == want[4:]
        drawn = [list(generate(engine, PROMPT, most=8, sampling=Sampling(1.5, seed=seed))) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_it_ends_at_a_stop_token_and_at_the_last_position(cached: Path) -> None:
    for engine in (TorchEngine(fxquant.load(cached)), OnnxEngine(cached.with_suffix(".onnx"))):
        found = list(generate(engine, PROMPT, most=1000))
        assert len(PROMPT) + len(found) == 64 + 1  # the last token is predicted, and has no position of its own
        stop = found[5]
        assert list(generate(engine, PROMPT, stop=[stop])) == found[: found.index(stop)]
        speed = Speed()
        list(generate(engine, PROMPT, most=5, speed=speed))
        assert (speed.prompt_tokens, speed.steps) == (4, 4)
        assert speed.prompt_rate > 0 < speed.step_rate
        with pytest.raises(InputError, match=r"the prompt has 65 tokens; the model takes past . sequence <= 64"):
            next(generate(engine, [3] * 65))
        with pytest.raises(InputError, match="the prompt is empty"):
            next(generate(engine, []))


def test_choices() -> None:
    logits, random = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)

    def drawn(sampling: Sampling) -> list[int]:
        return [choose(logits, sampling, random) for _ in range(400)]

    assert choose(logits, Sampling(), random) == 1
    assert set(drawn(Sampling(1.0, top_k=2))) == {1, 3}
    p = torch.softmax(logits, 0)  # 0.64, 0.24, 0.09, 0.03
    assert set(drawn(Sampling(1.0, top_p=0.6))) == {1}
    assert set(drawn(Sampling(1.0, top_p=0.7))) == {1, 3}
    counts = torch.bincount(torch.tensor(drawn(Sampling(1.0))), minlength=4) / 400
    assert float((counts - p).abs().max()) < 0.08
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError, match="expected a temperature of at least 0"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_other_models_are_refused(tmp_path: Path) -> None:
    q = fxquant.compile(mlp(), (torch.randn(2, 20),))
    with pytest.raises(InputError, match="generation takes a causal language model"):
        TorchEngine(q)
    q.export_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="generation takes a causal language model"):
        OnnxEngine(tmp_path / "m.onnx")


class Bytes:
    """A tokenizer of UTF-8 bytes: a character may take several tokens."""

    chat_template: str | None = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return f"<{messages[0]['content']}>"


def test_text_comes_in_whole_characters() -> None:
    new = list("né€!".encode())
    parts = list(pieces(Bytes(), list(b"A "), iter(new)))
    assert [p for p in parts if p] == ["n", "é", "€", "!"]
    assert "".join(pieces(Bytes(), [], iter(new[:2]))) == "n�"  # cut off in the middle


def test_prompts() -> None:
    tokenizer = Bytes()
    assert prompt_ids(tokenizer, "hi") == list(b"hi")
    with pytest.raises(InputError, match="no chat template; give the prompt as it is, with --raw"):
        prompt_ids(tokenizer, "hi", chat=True)
    tokenizer.chat_template = "{{ messages }}"
    assert prompt_ids(tokenizer, "hi") == prompt_ids(tokenizer, "hi", chat=True) == list(b"<hi>")
    assert prompt_ids(tokenizer, "hi", chat=False) == list(b"hi")
    with pytest.raises(InputError, match="the prompt is empty"):
        prompt_ids(tokenizer, "")


# --- the command ------------------------------------------------------------------------------------------------------
def test_text_on_stdout_and_figures_on_stderr(cached: Path, whole: Path) -> None:
    onnx = cached.with_suffix(".onnx")
    results = [run("generate", folder, "the of to", "-n", 8) for folder in (cached, whole)]
    results.append(run("generate", cached, "the of to", "-n", 8, "--onnx", onnx, "--threads", 1))
    assert len({r.stdout for r in results}) == 1
    assert len(results[0].stdout.split()) == 8
    assert "3 tokens of prompt at" in results[0].stderr
    assert "compile it with --kv-cache" in results[1].stderr
    assert "--kv-cache" not in results[0].stderr
    found = json.loads(run("generate", cached, "the of to", "-n", 8, "--json").stdout)
    assert found["text"].split() == results[0].stdout.split() == [WORDS[t] for t in found["tokens"]]
    assert found["kv_cache"] is True
    assert found["tokens_per_second"] > 0


def test_mistakes_are_named(cached: Path, model: Path, tmp_path: Path) -> None:
    for args, says in (
        ((model, "the"), "is a model that is not compiled"),
        ((cached, ""), "the prompt is empty"),
        ((cached, "the", "--chat"), "no chat template"),
        ((cached, "the " * 70), "the prompt has 70 tokens"),
        ((cached, "the", "--onnx", tmp_path / "no.onnx"), "does not exist; write it with fxquant export"),
        ((cached, "the", "--temperature", "1", "--top-p", "0"), "top_p above 0"),
    ):
        assert says in run("generate", *args, code=1).stderr
    bare = tmp_path / "bare"
    fxquant.load(cached).save(bare)
    assert "give the folder of one with --tokenizer FOLDER" in run("generate", bare, "the", code=1).stderr
    assert run("generate", bare, "the", "-n", 2, "--tokenizer", cached).stdout
    fxquant.compile(mlp(), (torch.randn(2, 20),)).save(tmp_path / "mlp")
    other = run("generate", tmp_path / "mlp", "the", "--tokenizer", cached, code=1)
    assert "generation takes a causal language model" in other.stderr
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot be read as an ONNX file"):
        OnnxEngine(tmp_path / "broken.onnx")


def test_the_example_runs(cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    example = str(Path(__file__).parent.parent / "examples" / "onnx_generate.py")
    monkeypatch.setattr("sys.argv", [example])
    runpy.run_path(example)
    assert len(capsys.readouterr().out.split()) == 16
    args = [example, str(cached.with_suffix(".onnx")), str(cached / "tokenizer"), "the of to"]
    monkeypatch.setattr("sys.argv", args)
    runpy.run_path(example)
    shown = capsys.readouterr().out.split()
    want = list(generate(TorchEngine(fxquant.load(cached)), [3, 5, 7], most=48))
    assert shown == ["the", "of", "to", *(WORDS[t] for t in want)]


def test_a_model_in_memory_generates() -> None:
    decoder = with_cache(tiny_decoder())
    q = fxquant.compile(decoder, decoder.example_inputs(), "W8A16-FP8")
    tokens = list(generate(TorchEngine(q), PROMPT, most=3))
    want: Tensor = q(input_ids=torch.tensor([PROMPT]))["logits"]
    assert tokens[0] == int(want[0, -1].argmax())
    assert len(tokens) == 3
