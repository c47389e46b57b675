"""Quantize a Hugging Face model in place, so that its own generate() runs on packed weights (needs fxquant[hf])."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()  # random weights; LlamaForCausalLM.from_pretrained(...) works the same
compiled = fxquant.quantize_(model, "W6A16-E3M2")
print(compiled.summary())
print(model.model.layers[0].self_attn.q_proj)

prompt = torch.tensor([[1, 2, 3]])
print(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0))
