"""Export a compiled model to ONNX with packed weights, and run the file in plain onnxruntime."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import fxquant

model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 16)).eval()
compiled = fxquant.compile(model, (torch.randn(2, 256),), config="W6A16-E3M2")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.onnx"
    compiled.export_onnx(path)
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    print(f"{path.name}: {path.stat().st_size} bytes, the float parameters alone are {float_bytes}")
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(5, 256)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    print(f"largest difference from torch: {float((torch.from_numpy(y) - compiled(x)).abs().max()):.2e}")
