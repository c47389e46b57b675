"""What memory from_pretrained and generate() take on packed weights: the growth of the process over its imports.

    python benchmarks/hf_loading.py FOLDER [--tokens 16] [--read] [--json]

FOLDER is one that ``fxquant compile --format hf`` wrote. Linux only: /proc/self/status is read every 2 ms. RssAnon is
memory of the process's own, RssFile pages of files that it has mapped: safetensors maps the checkpoint, and pages count
from when they are first read. Their sum, VmRSS, is held against the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

PROMPT = [6403, 1980, 253, 655]
KINDS = ("RssAnon", "RssFile", "VmRSS")


def resident() -> dict[str, int]:
    """Bytes by kind."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in KINDS}


class Watch:
    """The largest of each kind since it was made."""

    def __init__(self) -> None:
        self.most, self._going = resident(), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while self._going:
            now = resident()
            self.most = {kind: max(self.most[kind], now[kind]) for kind in KINDS}
            time.sleep(0.002)

    def stop(self) -> dict[str, int]:
        self._going = False
        self._thread.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--read", action="store_true", help="read the checkpoint instead of mapping it (disable_mmap)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    import torch
    import transformers
    import transformers.models.llama.modeling_llama  # else its import counts

    import fxquant.hf  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    ids = torch.tensor([PROMPT])
    before = resident()
    watch = Watch()
    model = transformers.AutoModelForCausalLM.from_pretrained(given.folder, disable_mmap=given.read)
    loaded = watch.stop()
    watch = Watch()
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=given.tokens, do_sample=False, pad_token_id=0)[0].tolist()
    generated = watch.stop()
    size = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    grown = {
        name: {kind: figure[kind] - before[kind] for kind in KINDS}
        for name, figure in (("loading", loaded), ("generating", generated))
    }
    if given.json:
        print(json.dumps({"bytes": size, "tokens": tokens, **grown}))
        return
    print(f"checkpoint {size / 1e6:.1f} MB; tokens {tokens}")
    for name, figures in grown.items():
        told = ", ".join(f"{kind} {figures[kind] / 1e6:.1f} MB" for kind in KINDS)
        print(f"peak while {name}: {told}; {figures['VmRSS'] / size:.2f}x the checkpoint")


if __name__ == "__main__":
    main()
