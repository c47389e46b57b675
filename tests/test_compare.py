"""A model against a reference: perplexity ratio, agreement and KL with intervals; accuracy; cosine similarity."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import evaluate
from fxquant.errors import InputError

VOCABULARY = 20
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
OTHER = TABLE + 0.3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))


def model(input_ids: Tensor) -> Tensor:
    return OTHER[input_ids]


def reference(input_ids: Tensor) -> Tensor:
    return TABLE[input_ids]


def windows(count: int = 3, length: int = 300) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(2))


def test_compare_has_the_figures_of_the_parts() -> None:
    data = windows()
    found = evaluate.compare(model, reference, data)
    assert found.perplexity.nll == pytest.approx(evaluate.perplexity(model, data).nll)
    assert found.reference.value == pytest.approx(evaluate.perplexity(reference, data).value)
    assert found.ratio.value == pytest.approx(found.perplexity.value / found.reference.value)
    agreement = evaluate.logit_agreement(reference, model, data)
    assert found.top1.value == pytest.approx(agreement.top1)
    assert found.kl.value == pytest.approx(agreement.kl, rel=1e-4)
    assert found.kl.blocks == 3 * 3  # 128 + 128 + 44 positions of each window
    for part in (found.ratio, found.top1, found.kl):
        assert part.low < part.value < part.high
    assert found.kl.low >= 0
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["block_tokens"] == 128


def test_a_model_against_itself() -> None:
    found = evaluate.compare(model, model, windows())
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (1, 1, 1)
    assert found.kl.value == 0
    assert found.top1.value == 1


def test_the_interval_of_the_ratio_holds_the_value_of_much_text() -> None:
    want = math.log(evaluate.compare(model, reference, windows(40, 1000)).ratio.value)
    parts = windows(40, 1000).reshape(40, 2, 500)
    found = [evaluate.compare(model, reference, part).ratio for part in parts]
    held = sum(math.log(part.low) <= want <= math.log(part.high) for part in found)
    assert held >= 34  # 38 of 40 are expected


def test_compare_refuses_what_gives_no_interval_and_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="one window of 100 tokens gives no confidence interval"):
        evaluate.compare(model, reference, windows(1, 100))
    assert evaluate.compare(model, reference, windows(1, 300)).kl.blocks == 3
    with pytest.raises(InputError, match="the same inputs"):
        evaluate.compare(model, lambda input_ids: TABLE[input_ids][..., :5], windows())


def linear(x: Tensor) -> Tensor:
    return x


def test_accuracy_and_agreement_with_a_reference() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0])] * 5
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 2])
    found = evaluate.accuracy(linear, logits, labels, batch_size=3)
    assert (found.correct, found.samples, found.accuracy.value) == (8, 10, 0.8)
    assert found.accuracy.low == pytest.approx(0.4902, abs=1e-4)
    assert "against" not in found.to_dict()
    against = evaluate.accuracy(linear, logits, labels, reference=lambda x: x.roll(1, 1), batch_size=4)
    assert against.reference is not None
    assert against.change is not None
    assert against.top1 is not None
    assert against.kl is not None
    assert against.reference.value == 0.1
    assert against.change.value == pytest.approx(0.7)
    assert against.top1.value == 0
    p, q = torch.softmax(logits.roll(1, 1), 1), torch.softmax(logits, 1)
    assert against.kl.value == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("inputs", "labels", "says"),
    [
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), r"inputs is \[4, 3\] for 5 labels"),
        (torch.zeros(4, 3), torch.zeros(4), "expected integers"),
        (torch.zeros(4, 3), torch.full((4,), 3), "0 to 2"),
        (torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64), r"logits \[4, classes\] are needed"),
    ],
)
def test_accuracy_refuses(inputs: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate.accuracy(linear, inputs, labels)


def states(x: Tensor, attention_mask: Tensor) -> Any:
    return SimpleNamespace(last_hidden_state=x)


def test_cosine_counts_no_masked_token() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def broken(x: Tensor, attention_mask: Tensor) -> Any:
        return states(torch.where(attention_mask.bool().unsqueeze(2), 2 * x, -x), attention_mask)

    inputs = {"x": x, "attention_mask": mask}
    found = evaluate.cosine(broken, states, inputs, batch_size=2)
    assert found.vectors == 10
    assert found.mean.value == pytest.approx(1)
    assert evaluate.cosine(broken, states, inputs, pooling="mean").vectors == 3
    assert evaluate.cosine(broken, states, inputs, pooling="mean").least == pytest.approx(1)
    assert evaluate.cosine(linear, lambda x: -x, x[:, 0]).mean.value == pytest.approx(-1)
    with pytest.raises(InputError, match="hidden states"):
        evaluate.cosine(nn.Identity(), linear, x.unsqueeze(0))
    with pytest.raises(InputError, match="samples along their first dimension"):
        evaluate.cosine(states, states, {"x": x, "attention_mask": mask[:2]})
