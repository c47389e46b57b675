"""Small models that show one thing each, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """Token embedding, two linears, and a head that shares the embedding's weight."""

    def __init__(self, vocabulary: int = 50, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.down(torch.relu(self.up(self.embed(tokens))))
        return {"logits": self.head(hidden), "hidden": hidden}


class Convolutions(nn.Module):
    """2-D convolutions with stride and groups, a 1-D one, batch norm, in-place ReLU and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x)).flatten(2)
        return self.head(self.line(x).mean(2))


class Experts(nn.Module):
    """Batched products with 3-D weights, in both orders: [experts, in, out] and [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.up).relu(), self.down.transpose(1, 2))


class RoutedExperts(nn.Module):
    """Each token's expert picked by index, with the weight as the left operand: bmm(W[ids], x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 12, 8))  # [experts, out, in]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(self.weight[ids], x.unsqueeze(-1)).squeeze(-1)


class BothWays(nn.Module):
    """One square weight used as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w) + x @ self.w


class Conv1D(nn.Module):
    """A linear stored [in, out], as GPT-2 has it: addmm(bias, x, W)."""

    def __init__(self, width: int = 10, out: int = 14) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 6))


def tiny_decoder(cls: str = "Llama", **settings: Any) -> nn.Module:
    """A causal language model of transformers with two layers and random weights; its vocabulary is 64."""
    import transformers

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}Config")(**{**small, **settings})
    kind = "GPT2LMHeadModel" if cls == "GPT2" else f"{cls}ForCausalLM"
    return getattr(transformers, kind)(config).eval()  # type: ignore[no-any-return]
