"""Look at what each pass did to the graph: as a diff, and as an HTML report."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fxquant

model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
compiled = fxquant.compile(model, (torch.randn(4, 32),), config="W4A16-RTN")
print(compiled.diff())

page = Path(tempfile.mkdtemp()) / "report.html"
compiled.report(page)
print(f"report: {page} ({page.stat().st_size / 1e3:.0f} kB)")
