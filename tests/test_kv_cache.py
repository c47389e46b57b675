"""Decoders with a KV cache: one call or many give the same logits, from the model to a saved program and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibrate import batches_of
from fxquant.capture import capture
from fxquant.errors import InputError, LoadError, ModelError
from fxquant.evaluate import OnnxModel, perplexity
from fxquant.hf import with_cache
from fxquant.kv_cache import InPieces, past_of
from fxquant.layers import find_layers
from fxquant.signature import Input
from tests.tiny_models import tiny_decoder

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def in_pieces(call: Any, ids: Tensor, *sizes: int) -> Tensor:
    """Logits of ``ids`` given in pieces of these sizes, one behind the other."""
    past: dict[str, Any] = {}
    found = []
    for piece in ids.split(list(sizes), dim=1):
        out = call(input_ids=piece, **past)
        past = past_of(out)
        found.append(out["logits"])
    return torch.cat(found, dim=1)


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("cls", DECODERS)
def test_prompt_and_steps_give_the_logits_of_the_whole(cls: str) -> None:
    model = tiny_decoder(cls, **DECODERS[cls])
    cached = with_cache(model)
    program = capture(cached, cached.example_inputs())
    with torch.no_grad():
        want = model(IDS).logits
        for call in (cached, program):
            assert close(call(input_ids=IDS)["logits"], want)  # an empty past, left out
            assert close(in_pieces(call, IDS, 1, 1, 3, 1, 2, 1), want)
            assert close(in_pieces(call, IDS[:1], 8, 1), want[:1])
    assert program.signature.limits[-1] == "past + sequence <= 64"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_decoder()


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> fxquant.CompiledModel:
    cached = with_cache(model)
    return fxquant.compile(cached, cached.example_inputs(), "W6A16-E3M2")


@pytest.fixture(scope="module")
def uncached(model: nn.Module) -> fxquant.CompiledModel:
    return fxquant.compile(model, {"input_ids": IDS}, "W6A16-E3M2")


def test_names_sizes_and_paths_are_those_of_the_model(
    model: nn.Module, compiled: fxquant.CompiledModel, uncached: fxquant.CompiledModel
) -> None:
    shown = [f"{i.name}: {i.type}" for i in compiled.program.signature.inputs]
    assert shown[:2] == ["input_ids: int64[batch, sequence]", "past_0_key: float32[batch, 2, past, 8]"]
    assert len(shown) == 1 + 2 * 2
    assert list(compiled(input_ids=IDS))[:3] == ["logits", "present_0_key", "present_0_value"]
    names = [[layer.name for layer in find_layers(q.program.gm)] for q in (compiled, uncached)]
    assert names[0] == names[1]
    assert with_cache(cached := with_cache(model)) is cached


def test_calls_without_a_past_are_calls_of_the_model(
    compiled: fxquant.CompiledModel, uncached: fxquant.CompiledModel
) -> None:
    windows = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(2))
    want = perplexity(uncached, windows).value
    assert perplexity(compiled, windows).value == pytest.approx(want, rel=1e-6)
    assert perplexity(InPieces(compiled, 7), windows).value == pytest.approx(want, rel=1e-6)
    batch = batches_of(windows, compiled.program.signature)[0]
    assert [tuple(t.shape) for t in batch[:2]] == [(1, 40), (1, 2, 0, 8)]


def test_methods_that_need_data_run_on_it(model: nn.Module) -> None:
    cached, data = with_cache(model), torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(3))
    with_, without = (
        fxquant.compile(m, example, {"rules": [{"match": "*", "weight": "e2m1/group16"}], "passes": ["gptq"]},
                        calibration=data)
        for m, example in ((cached, cached.example_inputs()), (model, {"input_ids": IDS}))
    )  # fmt: skip
    assert any("hessian" in r.detail or "%" in r.detail for s in with_.program.trace for r in s.rewrites)
    assert close(with_(input_ids=IDS)["logits"], without(input_ids=IDS).logits)


def test_part_of_a_past_or_too_long_a_text_is_refused(compiled: fxquant.CompiledModel) -> None:
    out = compiled(input_ids=IDS)
    with pytest.raises(InputError, match=r"missing inputs .'past_0_value', 'past_1_key', 'past_1_value'"):
        compiled(input_ids=IDS, past_0_key=out["present_0_key"])
    with pytest.raises(InputError, match=r"sequence = 56, past = 9; the program holds for past . sequence <= 64"):
        compiled(input_ids=IDS[:, :1].expand(3, 56), **past_of(out))
    with pytest.raises(InputError, match="past_0_key"):
        compiled(input_ids=IDS[:2], **past_of(out))  # a past of another batch


def test_a_saved_model_keeps_its_cache(compiled: fxquant.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "m")
    again = fxquant.load(tmp_path / "m")
    assert again.program.signature.inputs == compiled.program.signature.inputs
    assert torch.equal(in_pieces(again, IDS, 4, 1, 4), in_pieces(compiled, IDS, 4, 1, 4))
    text = (tmp_path / "m" / "graph.json").read_text()
    assert '"empty": "past"' in text or '"empty":"past"' in text
    damaged = text.replace('"empty": "past"', '"empty": "future"').replace('"empty":"past"', '"empty":"future"')
    (tmp_path / "m" / "graph.json").write_text(damaged)
    with pytest.raises(LoadError, match="no dimension 'future'"):
        fxquant.load(tmp_path / "m")


def test_onnx_has_the_same_inputs_and_logits(compiled: fxquant.CompiledModel, tmp_path: Path) -> None:
    compiled.export_onnx(tmp_path / "m.onnx")
    session = OnnxModel(tmp_path / "m.onnx")
    assert session.declared[1] == Input("past_0_key", compiled.program.signature.inputs[1].type, "past")
    assert session.outputs[:2] == ["logits", "present_0_key"]
    want = in_pieces(compiled, IDS, 1, 4, 1, 3)
    for got in (session(input_ids=IDS)["logits"], in_pieces(session, IDS, 1, 4, 1, 3)):
        assert torch.allclose(got, want, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="the ONNX model takes"):
        session(input_ids=IDS, past_0_key=torch.zeros(3, 2, 1, 8))


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="takes no past_key_values"):
        with_cache(tiny_decoder("Mamba"))
    with pytest.raises(ModelError, match="takes no position_ids"):
        with_cache(tiny_decoder("Bloom"))


def test_a_folder_is_loaded_with_its_cache(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    loaded = fxquant.hf.load_model(tmp_path / "m", kv_cache=True)
    assert list(loaded.example_inputs)[:2] == ["input_ids", "past_0_key"]
    with torch.no_grad():
        assert close(loaded.model(input_ids=IDS)["logits"], model(IDS).logits)
