"""Perplexity of SmolLM2-135M under round-to-nearest, beside what other tools measured. The numbers in docs/results.md.

Text: the standard library's pydoc topics; the last 2 windows of 2,048 tokens; see fxquant.evaluate. The text differs
between Python versions: the reference figures are those of CPython 3.11.
"""

from __future__ import annotations

import argparse
import json

import fxquant
from fxquant.demo import find_model
from fxquant.evaluate import perplexity, text_windows
from fxquant.hf import load_model

REFERENCE: dict[str, tuple[str | None, str | None, float]] = {
    "float": (None, None, 8.1090),
    "FP6 E3M2 a row": ("e3m2/channel", None, 8.5767),  # torchao's private primitives and brevitas agree to 4 digits
    "FP6 E2M3 a row": ("e2m3/channel", None, 8.2141),
    "FP4 E2M1 groups of 64": ("e2m1/group64", None, 10.4268),  # brevitas
    "INT4 groups of 64": ("int4/group64", None, 11.5987),
    "MXFP6 E3M2": ("mxfp6", None, 8.5769),
    "NVFP4": ("nvfp4", None, 9.9446),  # llmcompressor, which shares the tensor scale of q, k, v and of gate, up
    "FP8 E4M3 a row": ("e4m3/channel", None, 8.2760),
    "FP8 E4M3 a row, E4M3 a token": ("e4m3/channel", "e4m3/token", 8.3520),  # llmcompressor, quark; noise 0.03
}
"""Name: weights, activations, perplexity measured with other tools; head and embedding in float."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    arguments = parser.parse_args()
    loaded = load_model(find_model())
    windows = text_windows(loaded.tokenizer)[-2:]
    rows = {}
    for name, (weight, activation, want) in REFERENCE.items():
        if weight is None:
            got, size = perplexity(loaded.model, windows).value, None
        else:
            config = {"rules": [{"match": "*", "weight": weight, "activation": activation}]}
            compiled = fxquant.compile(loaded.model, loaded.example_inputs, config=config)
            got, size = perplexity(compiled, windows).value, compiled.summary().bytes_per_weight
        rows[name] = {"perplexity": got, "reference": want, "difference": got - want, "bytes_per_weight": size}
        if not arguments.json:
            shown = f"{size:.4f} bytes a weight" if size else ""
            print(f"{name:30} {got:9.4f}  reference {want:9.4f}  difference {got - want:+.4f}  {shown}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
