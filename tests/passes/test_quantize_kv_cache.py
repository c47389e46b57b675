"""quantize_kv_cache and store_kv_cache: past tokens rounded, the current ones exact; floats and codes alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant import ops
from fxquant.calibrate import batches_of
from fxquant.capture import capture
from fxquant.errors import ConfigError, ExportError
from fxquant.evaluate import OnnxModel
from fxquant.hf import with_cache
from fxquant.kv_cache import CachedDecoder, past_of
from fxquant.passes.quantize_kv_cache import QUANTIZE_KV_CACHE, turned_channels
from fxquant.passes.store_kv_cache import STORE_KV_CACHE
from fxquant.program import Stage, copied, run
from fxquant.rewrite import tensors
from fxquant.scheme import parse_spec
from fxquant.verify import verify
from tests.tiny_models import tiny_decoder

pytest.importorskip("transformers")
G = torch.Generator().manual_seed(0)
IDS, DATA = torch.randint(0, 64, (2, 9), generator=G), torch.randint(0, 64, (4, 24), generator=G)
SPECS = [
    ("int8/channel", "int8/token"),
    ("e4m3/channel", "e4m3/token:fp16"),
    ("int4/channel:fp16", "e2m1/token"),
    ("e3m2/token", "int5/channel"),
]


@pytest.fixture(scope="module")
def decoder() -> CachedDecoder:
    return with_cache(tiny_decoder())


def config(key: str, value: str) -> dict[str, Any]:
    passes = [{"quantize_kv_cache": {"key": key, "value": value}}]
    return {"rules": [{"match": "lm_head", "weight": "e3m2/channel"}, {"match": "*", "keep": True}], "passes": passes}


def compiled(decoder: CachedDecoder, key: str, value: str) -> fxquant.CompiledModel:
    return fxquant.compile(decoder, decoder.example_inputs(), config(key, value), calibration=DATA)


# --- operators --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text", ["int8/token", "e4m3/token", "e5m2/channel", "e3m2/token:fp16", "int4/token", "e2m1/token"]
)
@pytest.mark.parametrize("width", [6, 5])
def test_codes_are_those_of_the_nearest_values(text: str, width: int) -> None:
    spec = parse_spec(text)
    x = torch.randn(2, 3, 7, width, generator=G) * 3
    x[0, 0, 0] = 0
    scale = ops.kv_scale(x, text) if spec.dynamic else torch.rand(3, 1, width, generator=G) + 0.1
    codes = ops.quantize_kv(x, scale, text)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == (width // 2 if spec.format.bits <= 4 and width % 2 == 0 else width)
    got = ops.dequantize_kv(codes, scale, text, width)
    assert torch.equal(got, spec.format.round(x / scale.float()) * scale.float())
    if spec.dynamic:
        assert scale.dtype == spec.scale_dtype
        assert float(((got - x).abs() / scale.float()).max()) <= spec.format.max


# --- the graph --------------------------------------------------------------------------------------------------------
def rounded(past: Tensor, spec: str, largest: Tensor) -> Tensor:
    """``past [b, heads, p, width]`` through the grid, from the definition."""
    parsed = parse_spec(spec)
    absmax = past.abs().amax(-1, keepdim=True) if parsed.dynamic else largest
    scale = (absmax / parsed.format.max).to(parsed.scale_dtype).float()
    scale = torch.where(absmax == 0, torch.ones_like(scale), scale)
    return parsed.format.round(past / scale) * scale


@pytest.mark.parametrize(("key", "value"), SPECS)
def test_only_past_tokens_are_rounded(decoder: CachedDecoder, key: str, value: str, tmp_path: Path) -> None:
    q = compiled(decoder, key, value)
    plain = fxquant.compile(decoder, decoder.example_inputs(), {"rules": config(key, value)["rules"]})
    first, exact = q(input_ids=IDS[:, :6]), plain(input_ids=IDS[:, :6])
    assert torch.equal(first["logits"], exact["logits"])
    largest = {}  # of what calibration appended: all of it, since every past is empty there
    for name in list(exact)[1:]:
        every = [plain(input_ids=window[None])[name] for window in DATA]
        if name.endswith("key"):  # RoPE turns channels i and i + 4 into each other
            every = [torch.hypot(x[..., :4], x[..., 4:]).repeat(1, 1, 1, 2) for x in every]
        largest[name] = torch.stack([x.abs().amax((0, 2)) for x in every]).amax(0)[:, None]
    given = {
        name: rounded(exact[name], key if name.endswith("key") else value, largest[name]) for name in list(exact)[1:]
    }
    want = plain(input_ids=IDS[:, 6:], **past_of(given))["logits"]
    got = q(input_ids=IDS[:, 6:], **past_of(first))
    assert torch.allclose(got["logits"], want, rtol=0, atol=1e-6)
    # the codes of earlier tokens stay as they are
    assert torch.equal(got["present_1_key"][:, :, :6], first["present_1_key"])

    q.save(tmp_path / "m")
    again = fxquant.load(tmp_path / "m")
    assert torch.equal(again(input_ids=IDS[:, 6:], **past_of(first))["logits"], got["logits"])
    q.export_onnx(tmp_path / "m.onnx")
    session = OnnxModel(tmp_path / "m.onnx")
    start = session(input_ids=IDS[:, :6])
    assert all(torch.equal(start[name], first[name]) for name in first if first[name].dtype == torch.uint8)
    step = session(input_ids=IDS[:, 6:], **past_of(start))
    assert torch.allclose(step["logits"], got["logits"], rtol=0, atol=1e-5)


def test_ranges_hold_at_positions_that_calibration_does_not_reach(decoder: CachedDecoder) -> None:
    q = fxquant.compile(
        decoder, decoder.example_inputs(), config("int8/channel", "int8/token"), calibration=torch.full((4, 2), 7)
    )
    plain = fxquant.compile(decoder, decoder.example_inputs(), {"rules": config("int8/token", "int8/token")["rules"]})
    ids = torch.full((1, 60), 7)  # the key of one token, at 60 positions; calibration has seen two of them
    want, codes = plain(input_ids=ids)["present_0_key"], q(input_ids=ids)["present_0_key"]
    scale = next(v for k, v in tensors(q.program.gm).items() if k.startswith("past_0_key_scale"))
    assert float(((codes.view(torch.int8) * scale - want) / scale).abs().max()) < 0.51


@pytest.mark.parametrize(
    ("cls", "settings", "channels"),
    [("Llama", {}, 8), ("GPTNeoX", {"rotary_pct": 0.5}, 4), ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, 0)],
)
def test_channels_that_rope_turns_are_found(cls: str, settings: dict[str, Any], channels: int) -> None:
    cached = with_cache(tiny_decoder(cls, **settings))
    graph = capture(cached, cached.example_inputs()).gm.graph
    past = next(n for n in graph.nodes if n.name == "past_0_key")
    (cat,) = past.users
    assert turned_channels(cat.args[0][1]) == channels  # type: ignore[index, arg-type]


def test_floats_and_codes_compute_the_same(decoder: CachedDecoder) -> None:
    program = capture(decoder, decoder.example_inputs())
    settings = {"key": "int4/channel", "value": "e2m1/token", "calibration": batches_of(DATA, program.signature)}
    run(program, [Stage(QUANTIZE_KV_CACHE, settings)], check=verify)
    codes = run(copied(program), [Stage(STORE_KV_CACHE)], check=verify)
    a, b = program(input_ids=IDS[:, :4]), codes(input_ids=IDS[:, :4])
    for start in range(4, 9):
        a, b = (p(input_ids=IDS[:, start : start + 1], **past_of(o)) for p, o in ((program, a), (codes, b)))
        assert torch.equal(a["logits"], b["logits"])
    assert b["present_0_key"].shape == (2, 2, 9, 4)
    size = sum(v.nbytes for n, v in b.items() if n != "logits")
    assert size == 2 * 2 * 9 * 2 * (4 + 4 + 4)  # layers x batch x tokens x heads x (keys, values, a scale)
    assert str(codes.signature.inputs[3].type) == "float32[batch, 2, past, 1]"


def test_what_it_takes(decoder: CachedDecoder) -> None:
    with pytest.raises(ConfigError, match="the model has no KV cache; compile it with one: fxquant compile --kv-cache"):
        fxquant.compile(tiny_decoder(), {"input_ids": IDS}, config("int8/token", "int8/token"))
    with pytest.raises(ConfigError, match="quantize_kv_cache needs calibration data"):
        fxquant.compile(decoder, decoder.example_inputs(), config("int8/channel", "int8/token"))
    for spec in ("int8/group8", "uint4/token", "int8/token:e8m0"):
        with pytest.raises(ConfigError, match="a KV cache takes <format>/channel or <format>/token"):
            fxquant.load_config(config(spec, "int8/token"))
    nf4 = fxquant.compile(decoder, decoder.example_inputs(), config("nf4/token", "int8/token"))
    with pytest.raises(ExportError, match="a KV cache in nf4; this exporter has"):
        nf4.export_onnx("never.onnx")
