"""``check_onnx`` finds what differs, ``fxquant export --check`` says so, and files tell what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from test_onnx_export import Cnn, Mlp, Tokens, compiled, padded, tiny_bert, tokens
from torch import Tensor, nn
from typer.testing import CliRunner

import fxquant
from fxquant.capture import capture
from fxquant.cli import app
from fxquant.codegen.onnx_builder import Options
from fxquant.codegen.onnx_check import EXACT, ROUNDED, check_onnx, compared, made_up
from fxquant.codegen.onnx_export import export_onnx
from fxquant.codegen.onnx_metadata import digest, summarize
from fxquant.errors import ExportError, KernelError, ModelError
from fxquant.program import Program


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the functions in the file; those of the library are elsewhere."""

    def without() -> str:
        raise KernelError("there is none")

    monkeypatch.setattr(fxquant, "custom_ops_library", without, raising=False)


def spoil(path: Path, name: str) -> None:
    """Change one byte of an initializer."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1).view(np.uint8)[3] ^= 0x1F
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def test_what_is_exact_passes_at_every_size(tmp_path: Path) -> None:
    given = [(Tokens(), (torch.randint(0, 31, (2, 7)),)), (Cnn(), (torch.randn(2, 3, 16, 16),))]
    for model, example in given:
        program = compiled(model, example)
        export_onnx(program, tmp_path / "m.onnx")
        found = check_onnx(program, tmp_path / "m.onnx")
        assert found.ok, str(found)
        assert len({row.sizes for row in found.rows}) == 3
        assert all(row.bound == EXACT and row.relative < 1e-5 for row in found.rows)


def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    program = compiled(Mlp(), (torch.randn(3, 22),))
    export_onnx(program, tmp_path / "m.onnx")
    spoil(tmp_path / "m.onnx", "down.weight_packed")
    found = check_onnx(program, tmp_path / "m.onnx")
    assert not found.ok
    assert "TOO FAR" in str(found)


def test_what_rounds_activations_is_told_apart(tmp_path: Path) -> None:
    program = compiled(nn.Linear(64, 9), (torch.randn(3, 64),), "int4/group32")
    export_onnx(program, tmp_path / "m.onnx", options=Options(activation_bits=8))
    found = check_onnx(program, tmp_path / "m.onnx")
    assert found.ok
    assert all(row.bound == ROUNDED and row.relative > EXACT for row in found.rows)
    export_onnx(program, tmp_path / "m.onnx", options=Options("fxquant", 8))
    assert all(row.bound == EXACT for row in check_onnx(program, tmp_path / "m.onnx").rows)


def test_own_inputs(tmp_path: Path) -> None:
    program = compiled(Tokens(), (torch.randint(0, 31, (2, 7)),))
    export_onnx(program, tmp_path / "m.onnx")
    inputs = [(torch.zeros(1, 3, dtype=torch.long),), {"ids": torch.ones(4, 1, dtype=torch.long)}]
    found = check_onnx(program, tmp_path / "m.onnx", inputs=inputs)
    assert [row.sizes for row in found.rows] == ["batch=1 sequence=3", "batch=4 sequence=1"]
    assert [row.same_top for row in found.rows] == [1.0, 1.0]


def test_made_up_inputs_fit(tmp_path: Path) -> None:
    """Token ids lie below the rows of their table, limits of the signature hold."""
    program = compiled(tiny_bert(), {"input_ids": tokens(2, 8), "attention_mask": padded(2, 8)})
    for _, call in made_up(program):
        assert int(call["input_ids"].max()) < 64
        assert bool((call["attention_mask"] == 1).all())

    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., 0] * 2 if x.shape[0] > 1 else x[..., 1]

    program = compiled(Even(), (torch.randn(4, 3),))
    assert {call["x"].shape[0] for _, call in made_up(program)} == {2, 3, 4}


def test_made_up_inputs_of_a_size_that_is_not_among_the_usual_ones() -> None:
    class Patches(nn.Module):
        """Positions for 5 patches of 8: 40 to 47 steps, as the Audio Spectrogram Transformer has it."""

        def __init__(self) -> None:
            super().__init__()
            self.positions, self.embed = nn.Parameter(torch.randn(5, 4)), nn.Conv1d(3, 4, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x.transpose(1, 2)).transpose(1, 2) + self.positions

    program = compiled(Patches(), (torch.randn(2, 41, 3),))
    (((), call),) = made_up(program)
    assert 40 <= call["x"].shape[1] <= 47


def test_shapes_and_not_a_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    same = torch.tensor([[1.0, nan, inf]])
    assert compared(same, same.clone(), "", "", "y", EXACT).relative == 0.0
    assert not compared(torch.ones(1, 3), torch.tensor([[1.0, nan, 1.0]]), "", "", "y", EXACT).ok
    assert not compared(torch.ones(1, 3), torch.tensor([[1.0, inf, 1.0]]), "", "", "y", ROUNDED).ok
    assert not compared(torch.ones(1, 3), torch.ones(1, 4), "", "", "y", EXACT).ok


def test_a_file_that_does_not_load_or_run(tmp_path: Path) -> None:
    program = compiled(Mlp(), (torch.randn(3, 22),))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"cannot load .*The file stays where it is"):
        check_onnx(program, tmp_path / "bad.onnx")
    other = compiled(nn.Linear(7, 3), (torch.randn(3, 7),))
    export_onnx(other, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="does not run in onnxruntime"):
        check_onnx(program, tmp_path / "other.onnx")


# --- the API and the command line -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("compiled") / "out"
    fxquant.compile(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 9)), (torch.randn(3, 64),), "W4A16-INT").save(out)
    return out


def test_export_with_check(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_model = fxquant.load(folder)
    with pytest.warns(UserWarning, match="checked without fxquant's custom-op library: there is none"):
        compiled_model.export_onnx(tmp_path / "m.onnx", check=True)
    for name in ("EXACT", "UNSURE"):
        monkeypatch.setattr(f"fxquant.codegen.onnx_check.{name}", 0.0)
    with pytest.raises(ExportError, match="was written, and does not compute what the model does"):
        compiled_model.export_onnx(tmp_path / "far.onnx", check=True)
    assert (tmp_path / "far.onnx").is_file()


def test_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    done = run(app, ["export", str(folder), "-o", str(tmp_path / "m.onnx"), "--check", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)["check"]
    assert found["ok"]
    assert {row["sizes"] for row in found["rows"]} == {"batch=2", "batch=1", "batch=3"}
    options = ["--operators", "fxquant", "--activation-bits", "8", "--optimize-for", "memory", "--opset", "26"]
    assert run(app, ["export", str(folder), "-o", str(tmp_path / "n.onnx"), *options]).exit_code == 0
    shown = run(app, ["inspect", str(tmp_path / "n.onnx")]).stdout
    assert "opset 26" in shown
    assert "fxquant.LinearBias_int4" in shown
    assert run(app, ["inspect", str(tmp_path / "n.onnx"), "--layers"]).exit_code == 2
    for name in ("EXACT", "UNSURE"):
        monkeypatch.setattr(f"fxquant.codegen.onnx_check.{name}", 0.0)
    done = run(app, ["export", str(folder), "-o", str(tmp_path / "far.onnx"), "--check"])
    assert done.exit_code == 1
    assert "TOO FAR" in done.stdout
    assert (tmp_path / "far.onnx").is_file()


def test_a_file_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    model = fxquant.load(folder)
    model.export_onnx(tmp_path / "m.onnx", activation_bits=8)
    found = summarize(tmp_path / "m.onnx")
    about = found.metadata
    assert json.loads(about["fxquant.config"])["rules"][0]["weight"] == "int4/group64"
    assert json.loads(about["fxquant.weights"]) == {"0.weight": "int4/group64", "1.weight": "int4/group64"}
    assert (about["fxquant.operators"], about["fxquant.activation_bits"]) == ("auto", "8")
    assert about["fxquant.program_sha256"] == digest(fxquant.load(folder).program)
    assert found.operators == {"com.microsoft.MatMulNBits": 2}
    assert json.loads(json.dumps(found.to_dict()))["opset"] == 21
    with pytest.raises(ModelError, match="cannot be read as an ONNX file"):
        summarize(folder / "graph.json")


def test_a_property_that_is_no_utf_8_is_shown(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    model.metadata_props.add(key="made", value="x?y")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(b"x?y", b"x\xffy"))
    assert summarize(tmp_path / "m.onnx").metadata == {"made": "x\ufffdy"}


def test_the_digest_is_of_every_bit() -> None:
    def program(scale: float) -> Program:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        with torch.no_grad():
            model.weight[1, 2] += scale
        return compiled(model, (torch.randn(3, 8),), "e3m2/channel")

    assert digest(program(0.0)) == digest(program(0.0)) != digest(program(1.0))


def test_where_torch_is_unsure_itself_more_is_allowed_but_not_anything(tmp_path: Path) -> None:
    """The difference of two numbers that are almost the same: no bit of it means much, and a wrong one is far off."""

    class Difference(torch.nn.Module):
        def __init__(self, off: float = 0.0) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 8)
            self.off = off
            with torch.no_grad():
                self.linear.weight.copy_(1 + 1e-6 * torch.rand(8, 64, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return (y - x.sum(-1, keepdim=True)) * (1 + self.off)

    x = (1 + torch.rand(3, 64, generator=torch.Generator().manual_seed(1)),)
    model = Difference()
    program = capture(model, x)
    for off, ok in ((2e-4, True), (0.5, False)):
        other = Difference(off)
        other.load_state_dict(model.state_dict())
        export_onnx(capture(other, x), tmp_path / "m.onnx")
        checked = check_onnx(program, tmp_path / "m.onnx", inputs=[x])
        assert checked.ok == ok, checked
        assert 1e-4 < checked.rows[0].bound <= 1e-2
