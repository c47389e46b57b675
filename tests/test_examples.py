"""Example inputs by what a transformers model says of itself; docs/architectures.md is the test on real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.examples import example_inputs


class Stub(nn.Module):
    """What ``example_inputs`` asks a model: its main input, its config, the parameters of forward."""

    def __init__(self, main: str, **config: Any) -> None:
        super().__init__()
        self.main_input_name = main
        text = SimpleNamespace(vocab_size=config.pop("vocab_size", 50))
        self.config = SimpleNamespace(get_text_config=lambda: text, **config)


class Encoder(Stub):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...  # type: ignore[empty-body]


class Pair(Stub):
    logit_scale = 1.0

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor: ...  # type: ignore[empty-body]


class Speech(Stub):
    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor: ...  # type: ignore[empty-body]


class Detector(Stub):
    def forward(self, pixel_values: Tensor) -> Tensor: ...  # type: ignore[empty-body]


IMAGE = {"vision_config": SimpleNamespace(image_size=24, num_channels=1)}
SHAPES: dict[str, tuple[Stub, dict[str, list[int]]]] = {
    "text": (Encoder("input_ids"), {"input_ids": [2, 16], "attention_mask": [2, 16]}),
    "image and text": (Pair("input_ids", **IMAGE), {"input_ids": [2, 16], "pixel_values": [2, 1, 24, 24]}),
    "Whisper": (
        Speech("input_features", num_mel_bins=80, max_source_positions=1500, is_encoder_decoder=True),
        {"input_features": [2, 80, 3000], "decoder_input_ids": [2, 13]},
    ),
    "Speech2Text": (
        Speech("input_features", input_feat_per_channel=40, input_channels=2, is_encoder_decoder=True),
        {"input_features": [2, 64, 80], "decoder_input_ids": [2, 13]},
    ),
    "wav2vec2-bert": (Detector("input_features", feature_projection_input_dim=160), {"input_features": [2, 64, 160]}),
    "waveform": (Detector("input_values"), {"input_values": [2, 8000]}),
    "waveform with channels": (Detector("input_values", audio_channels=1), {"input_values": [2, 1, 8000]}),
    "spectrogram": (Detector("input_values", num_mel_bins=128, max_length=1024), {"input_values": [2, 1024, 128]}),
    "an encoder-decoder of images": (
        Detector("pixel_values", image_size=[16, 8], is_encoder_decoder=True),
        {"pixel_values": [2, 3, 16, 8]},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_example_inputs(name: str) -> None:
    model, shapes = SHAPES[name]
    inputs = example_inputs(model)
    assert {key: list(value.shape) for key, value in inputs.items()} == shapes
    assert all(int(v.max()) < 50 for key, v in inputs.items() if key.endswith("_ids"))


@pytest.mark.parametrize("main", ["past_values", "input_features"])
def test_what_is_not_known(main: str) -> None:
    with pytest.raises(ModelError, match=f"no example inputs are known for Detector, which takes '{main}'; .* give "):
        example_inputs(Detector(main))
