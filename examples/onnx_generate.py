"""Generate text from an exported language model with its KV cache, in plain onnxruntime: the whole loop.

    fxquant compile ./SmolLM2-135M -o fp6 --kv-cache && fxquant export fp6 -o fp6.onnx
    python examples/onnx_generate.py fp6.onnx fp6/tokenizer "Once upon a time"

Without arguments it makes a tiny model with random weights and generates token ids.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

import fxquant

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def generate(file, ids, count):
    options = onnxruntime.SessionOptions()
    if hasattr(fxquant, "custom_ops_library"):  # packed weights at native speed; without it the file runs as it is
        options.register_custom_ops_library(str(fxquant.custom_ops_library()))
    session = onnxruntime.InferenceSession(file, options)
    names = [output.name for output in session.get_outputs()]
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past = {}  # nothing yet: its dimension "past" is 0
    for item in session.get_inputs()[1:]:
        shape = [{"batch": 1, "past": 0}.get(size, size) for size in item.shape]
        past[item.name] = value(np.zeros(shape, TYPES[item.type]))
    for _ in range(count):
        feed = {"input_ids": value(np.array([ids], np.int64)), **past}
        found = dict(zip(names, session.run_with_ort_values(names, feed), strict=True))
        ids = [int(found.pop("logits").numpy()[0, -1].argmax())]  # from now on the new token alone
        past = {name.replace("present", "past"): cache for name, cache in found.items()}
        yield ids[0]


if len(sys.argv) > 1:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    prompt, begin = tokenizer(sys.argv[3])["input_ids"], time.perf_counter()
    tokens = list(generate(sys.argv[1], prompt, 48))
    print(tokenizer.decode(prompt + tokens))
    print(f"{len(tokens) / (time.perf_counter() - begin):.1f} tokens a second, with the prompt", file=sys.stderr)
else:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model = fxquant.hf.with_cache(LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        fxquant.compile(model, model.example_inputs(), "W6A16-E3M2").export_onnx(path)
        print(*generate(str(path), [1, 2, 3], 16))
