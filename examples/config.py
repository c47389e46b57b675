"""A config of one's own: ordered rules, a layer kept in float, and the answer to "why was my layer not quantized?"."""

import torch
from torch import nn

import fxquant


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


config = {
    "rules": [  # the first rule that matches a layer wins; * crosses dots
        {"match": "head", "keep": True},
        {"match": "encoder.0", "weight": "e2m1/group64"},
        {"match": "*", "weight": {"format": "e2m3", "granularity": "channel", "scale": "fp16"}},
    ]
}
compiled = fxquant.compile(Classifier().eval(), {"tokens": torch.randint(0, 100, (2, 7))}, config=config)
for layer in ("encoder.0", "head", "embed"):
    print(compiled.explain(layer), end="\n\n")
