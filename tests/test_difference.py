"""compare_models: what differs between two compiled models, and nothing where nothing does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tied, mlp
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.show.difference import compare_models

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(5))


def compiled(config: Any = "W6A16-E3M2") -> fxquant.CompiledModel:
    torch.manual_seed(0)
    return fxquant.compile(mlp().eval(), (X[:4],), config, calibration=[(X,)])


def test_a_model_is_the_same_as_itself(tmp_path: Path) -> None:
    model = compiled()
    model.save(tmp_path / "out")
    found = compare_models(model, fxquant.load(tmp_path / "out"))
    assert found.same
    assert found.config == ""
    assert "the same layers, byte for byte" in str(found)


def test_other_methods_change_bytes() -> None:
    config = {"rules": [{"match": "*", "weight": "e3m2/channel"}]}
    found = compare_models(compiled(config), compiled({**config, "passes": ["gptq"]}), ("rtn", "gptq"))
    assert not found.same
    assert not found.reasons
    assert [layer.name for layer in found.layers] == ["0", "2"]
    for layer in found.layers:
        assert layer.changed is not None
        assert 0 < layer.changed < 1
        assert layer.a is not None
        assert layer.b is not None
        assert (layer.a.method, layer.b.method) == ("rtn", "gptq")
        assert layer.a.bytes == layer.b.bytes
    assert "+passes:" in found.config.splitlines()
    assert "+- gptq: {}" in found.config.splitlines()
    assert "gptq" in found.passes[1]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["same"] is False


def test_a_share_of_bytes_is_counted() -> None:
    a, b = compiled(), compiled()
    packed = next(t for n, t in b.program.gm.named_buffers() if n.endswith("packed"))
    packed.view(-1)[:7] ^= 1
    found = compare_models(a, b)
    stored = sum(t.numel() * t.itemsize for n, t in a.program.gm.named_buffers() if n.startswith("0.weight"))
    assert found.layers[0].changed == pytest.approx(7 / stored)
    assert found.layers[1].same


def test_other_formats_and_added_tensors() -> None:
    rules = [{"match": "0", "weight": "e2m1/group16"}, {"match": "2", "keep": True}]
    found = compare_models(compiled(), compiled({"rules": rules, "passes": [{"lorc": {"rank": 2}}]}), ("x", "y"))
    assert [layer.changed for layer in found.layers] == [None, None]
    told = str(found)
    assert "e3m2/channel  -> e2m1/group16" in told
    assert "-> float" in told
    assert any("lorc_U" in name for name in found.tensors)


def test_another_architecture_is_said() -> None:
    torch.manual_seed(0)
    other = fxquant.compile(Tied(), (torch.randint(0, 50, (2, 9)),), "W6A16-E3M2")
    found = compare_models(compiled(), other, ("x", "y"))
    told = str(found)
    assert "the models are not of one architecture" in told
    assert "2 layers only in x, such as 0" in told
    assert "other inputs" in told
    assert "no layer is in both" in told


def test_command(tmp_path: Path) -> None:
    compiled().save(tmp_path / "a")
    compiled("W4A16-RTN").save(tmp_path / "b")
    run = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--limit", "1"])
    assert run.exit_code == 0, run.output
    assert "2 layers of 2 differ" in run.output
    assert "... 1 more" in run.output
    run = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "a"), "--json"])
    assert json.loads(run.output)["same"] is True
