"""compile, save, load, quantize_: the whole path on small models, and every mistake a user can make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Conv1D, Convolutions, Experts, Tied, mlp
from torch import fx, nn

import fxquant
from fxquant.errors import CaptureError, ConfigError, InputError, SaveError, WeightError
from fxquant.program import Pass
from fxquant.rewrite import Call, Decline, Match, Rule, Var, apply_rules, aten

X = torch.randn(4, 20)


def test_compile_save_load(tmp_path: Path) -> None:
    compiled = fxquant.compile(mlp(), (X,), config="W6A16-E3M2")
    want = compiled(X)
    compiled.save(tmp_path / "out")
    loaded = fxquant.load(tmp_path / "out")
    assert torch.equal(loaded(X), want)
    assert torch.equal(loaded(X[:1]), compiled(X[:1]))
    assert loaded.config == compiled.config
    assert loaded.diff() == compiled.diff()
    assert loaded.explain("0") == compiled.explain("0")
    assert loaded.summary().to_dict() == compiled.summary().to_dict()


class Words:
    """Stands for a tokenizer: what it saves lies in the folder ``tokenizer``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, folder: str) -> None:
        if self.text == "broken":
            raise OSError("no space left")
        Path(folder).mkdir()
        (Path(folder) / "words.txt").write_text(self.text)


def test_a_tokenizer_is_saved_with_the_model_or_not_at_all(tmp_path: Path) -> None:
    compiled, out = fxquant.compile(mlp(), (X,)), tmp_path / "out"
    compiled.save(out, tokenizer=Words("one"))
    compiled.save(out, tokenizer=Words("two"), overwrite=True)
    with pytest.raises(SaveError, match="no space left"):
        compiled.save(out, tokenizer=Words("broken"), overwrite=True)
    assert (out / "tokenizer" / "words.txt").read_text() == "two"
    assert torch.equal(fxquant.load(out)(X), compiled(X))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_type_is_the_models_and_a_dict_after_load(tmp_path: Path) -> None:
    tokens = torch.randint(0, 50, (2, 5))
    compiled = fxquant.compile(Tied(), {"tokens": tokens})
    assert set(compiled(tokens=tokens)) == {"logits", "hidden"}
    compiled.save(tmp_path / "out")
    again = fxquant.load(tmp_path / "out")(tokens=tokens)
    assert torch.equal(again["logits"], compiled(tokens)["logits"])


def test_weights_on_disk_are_packed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fxquant.compile(mlp(), (X,)).save(tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {k for k in held if k.startswith("0.")} == {"0.weight_packed", "0.weight_scale", "0.bias"}
    assert held["0.weight_packed"].nbytes == 32 * 20 * 6 // 8


def test_the_model_is_not_changed() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fxquant.compile(model, (X,))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_trace_tells_every_pass_its_error_and_time() -> None:
    trace = fxquant.compile(mlp(), (X,)).program.trace
    assert [s.name for s in trace] == ["capture", "normalize", "insert_qdq", "remove_dead", "lower", "remove_dead"]
    assert trace[1].error == 0.0
    assert trace[2].error == trace[-1].error
    assert 0 < trace[2].error < 0.2
    assert all(s.seconds >= 0 and s.text for s in trace)


def test_passes_of_ones_own_run_first_and_are_in_the_trace(tmp_path: Path) -> None:
    def relu_away(match: Match) -> fx.Node | Decline:
        return match["x"]  # type: ignore[no-any-return]

    rules = (Rule(Call(aten.relu.default, Var("x")), relu_away),)
    own = Pass("relu_away", "no ReLU", lambda program, settings: apply_rules(program.gm, rules))
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 16)
    q = fxquant.compile(model, (x,), "W8A16-FP8", passes=[own])
    assert [step.name for step in q.program.trace][1:4] == ["normalize", "relu_away", "insert_qdq"]
    without = fxquant.compile(nn.Sequential(model[0], model[2]), (x,), "W8A16-FP8")
    assert torch.equal(q(x), without(x))
    q.save(tmp_path / "out")
    assert torch.equal(fxquant.load(tmp_path / "out")(x), q(x))


def test_summary_counts_bytes() -> None:
    summary = fxquant.compile(mlp(), (X,), config="W6A16-E3M2").summary()
    assert summary.weight_bytes_before == (32 * 20 + 6 * 32) * 4
    assert summary.weight_bytes_after == (32 * 20 + 6 * 32) * 6 // 8 + (32 + 6) * 4


@pytest.mark.parametrize("make", [mlp, Conv1D, Convolutions, Experts, Tied])
def test_quantize_in_place_equals_the_compiled_model(make) -> None:
    inputs = {mlp: X, Conv1D: torch.randn(2, 3, 10), Convolutions: torch.randn(2, 3, 12, 12),
              Experts: torch.randn(3, 5, 8), Tied: torch.randint(0, 50, (2, 5))}[make]  # fmt: skip
    model = make().eval()
    config = {"rules": [{"match": "*", "weight": "e3m2/channel", "types": ["linear", "conv", "matmul", "embedding"]}]}
    compiled = fxquant.quantize_(model, config, (inputs,))
    with torch.no_grad():
        got = model(inputs)
    want = compiled(inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b)
    floats = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert floats == 0


def test_quantize_in_place_moves_with_the_module_and_keeps_a_gradient_for_its_input() -> None:
    model = mlp()
    fxquant.quantize_(model, example_inputs=(X,))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert "weight_packed.packed" in "".join(model[0].state_dict())


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def with_nan() -> nn.Module:
    model = mlp()
    model[2].weight.data[1, 3] = torch.nan
    model[2].weight.data[1, 4] = torch.inf
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fxquant.compile(mlp(), (X,), config="W6A16"), ConfigError, "did you mean"),
        (lambda: fxquant.compile(mlp(), (X,), config={"rules": [{"match": "1", "weight": "e3m2"}]}),
         ConfigError, "rule '1' matches no layer.*the layers are 0, 2"),
        (lambda: fxquant.compile(Tied(), {"tokens": torch.randint(0, 9, (2, 3))},
                                 config={"rules": [{"match": "em*", "weight": "e3m2"}]}),
         ConfigError, "applies to no layer.*embedding"),
        (lambda: fxquant.compile(nn.ReLU(), (X,)), ConfigError, "no layer that can be quantized"),
        (lambda: fxquant.compile(with_nan(), (X,)), WeightError, r"2.weight holds 1 NaN and 1 Inf among 192"),
        (lambda: fxquant.compile(mlp().to("meta"), (X,)), WeightError, "meta device"),
        (lambda: fxquant.compile(nn.Sequential(nn.Linear(4, 0)), (X[:, :4],)), WeightError, "at least one row"),
        (lambda: fxquant.compile(Broken(), (X,)), CaptureError, r"test_pipeline.py:\d+"),
        (lambda: fxquant.compile(mlp()), CaptureError, "example_inputs is missing"),
        (lambda: fxquant.compile("model.pt", (X,)), CaptureError, "expected a torch.nn.Module"),
        (lambda: fxquant.quantize_(mlp()), CaptureError, "give example_inputs"),
        (lambda: fxquant.compile(mlp(), (X,))(X.long()), InputError, "expected float32"),
        (lambda: fxquant.compile(mlp(), (X,))(X[:, :3]), InputError, "expected float32"),
        (lambda: fxquant.compile(mlp(), (X,))(), InputError, "missing input"),
    ],
)  # fmt: skip
def test_mistakes(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_output_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    compiled = fxquant.compile(mlp(), (X,))
    with pytest.raises(SaveError, match="exists"):
        compiled.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_nan_leaves_nothing_behind() -> None:
    model = with_nan()
    with pytest.raises(WeightError):
        fxquant.quantize_(model, example_inputs=(X,))
    assert isinstance(model[0], nn.Linear)
