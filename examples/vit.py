"""A vision transformer: trained here on scikit-learn's digits, then FP6, and FP4 with FP8 activations."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import fxquant

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 1,797 images of 8x8
labels = torch.tensor(digits.target)
train, test = slice(0, 1300), slice(1300, None)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )
)  # fmt: skip

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(16):
    for part in torch.randperm(1300).split(65):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=images[part]).logits, labels[part]).backward()
        optimizer.step()
model.eval()


def accuracy(call):
    with torch.no_grad():
        return float((call(pixel_values=images[test])["logits"].argmax(-1) == labels[test]).float().mean())


print(f"{'float':12} accuracy {accuracy(model):.3f}")
w4a8 = {"rules": [{"match": "*", "weight": "e2m1/group32", "activation": "e4m3/token"}]}
for name, config in (("W6A16-E3M2", "W6A16-E3M2"), ("W4A8", w4a8)):
    compiled = fxquant.compile(model, {"pixel_values": images[:8]}, config)
    print(f"{name:12} accuracy {accuracy(compiled):.3f}")

page = Path(tempfile.mkdtemp()) / "report.html"
compiled.report(page)
print(f"what was done, layer by layer: {page}")
