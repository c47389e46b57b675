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

REFERENCE = {
    "float": 8.1090,
    "e3m2/channel": 8.5767,  # torchao's private primitives and brevitas agree to 4 digits
    "e2m3/channel": 8.2141,
    "e2m1/group64": 10.4268,
    "int4/group64": 11.5987,
}  # weights only, fp32 scales of absmax, head and embedding in float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    arguments = parser.parse_args()
    loaded = load_model(find_model())
    windows = text_windows(loaded.tokenizer)[-2:]
    rows = {}
    for name, want in REFERENCE.items():
        if name == "float":
            got, size = perplexity(loaded.model, windows).value, None
        else:
            config = {"rules": [{"match": "*", "weight": name}]}
            compiled = fxquant.compile(loaded.model, loaded.example_inputs, config=config)
            got, size = perplexity(compiled, windows).value, compiled.summary().bytes_per_weight
        rows[name] = {"perplexity": got, "reference": want, "difference": got - want, "bytes_per_weight": size}
        if not arguments.json:
            shown = f"{size:.4f} bytes/weight" if size else ""
            print(f"{name:14} {got:9.4f}  reference {want:9.4f}  difference {got - want:+.4f}  {shown}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
