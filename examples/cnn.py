"""Compile a small CNN to FP6, compare it with the float model, save it and load it again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fxquant

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).eval()  # fmt: skip
images = torch.randn(8, 1, 28, 28)

compiled = fxquant.compile(model, (images,), config="W6A16-E3M2")
print(compiled.summary())

more = torch.randn(3, 1, 28, 28)  # another batch size: the batch dimension stays free
with torch.no_grad():
    want = model(more)
got = compiled(more)
print(f"relative error against float: {float((got - want).norm() / want.norm()):.4f}")

with tempfile.TemporaryDirectory() as folder:
    compiled.save(Path(folder) / "cnn-fp6")
    again = fxquant.load(Path(folder) / "cnn-fp6")
    print("loaded model gives the same output:", torch.equal(again(more), got))
