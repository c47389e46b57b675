"""The report of a compiled model: seconds to build it, its bytes, and what Chromium needs to show it.

    python benchmarks/report.py OUT [--runs 5]

First paint is the browser's own figure (performance.getEntriesByType("paint")), of a new page each run; the others are
the times in which the script answers, all modules unfolded for the last.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

import fxquant

UNFOLD = """() => {
  const begin = performance.now();
  for (let round = 0; round < 12; round++) {
    const folded = document.querySelectorAll('#graph [data-path] > .unfold');
    if (!folded.length) break;
    folded[0].dispatchEvent(new MouseEvent('click', { bubbles: true }));
  }
  return performance.now() - begin;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that fxquant compile wrote")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    compiled = fxquant.load(given.out)
    nodes = len(compiled.program.gm.graph.nodes)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, build = Path(folder) / "report.html", []
        for _ in range(given.runs):
            begin = time.perf_counter()
            compiled.report(path)
            build.append(time.perf_counter() - begin)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        paint, model, unfold = [], [], []
        for _ in range(given.runs):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"file://{path}")
            page.wait_for_timeout(300)
            entries = dict(page.evaluate("performance.getEntriesByType('paint').map((p) => [p.name, p.startTime])"))
            paint.append(entries["first-contentful-paint"] / 1000)
            begin = time.perf_counter()
            page.evaluate("location.hash = 'model'")
            page.wait_for_selector("#world")
            model.append(time.perf_counter() - begin)
            unfold.append(page.evaluate(UNFOLD) / 1000)
            page.close()
        browser.close()
        print(f"{nodes} nodes, {path.stat().st_size / 1e6:.2f} MB")
        for name, times in (
            ("build", build),
            ("first paint", paint),
            ("model", model),
            ("12 modules unfolded", unfold),
        ):
            print(f"{name:20} best {min(times):6.2f} s  median {statistics.median(times):6.2f} s")


if __name__ == "__main__":
    main()
