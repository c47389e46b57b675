"""A language model of 98 characters with its tokenizer, in a folder, made in a moment and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CHARACTERS = ["<s>", "</s>", *map(chr, range(32, 127)), "\n"]


def tiny_tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def word_tokenizer(words: Sequence[str]) -> Any:
    """One token a word or mark, of ``words``, which hold ``<unk>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def tiny_language_model(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
        **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def save_tiny(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_language_model(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
