# The active virtual environment, or else .venv, which sees the packages of the Python that made it: a torch that is there
# is used. Nothing is downloaded that is there already.
PYTHON ?= python3
VENV := $(abspath $(shell $(PYTHON) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else ".venv")'))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMP := build/installed$(subst /,-,$(VENV))
LINTERS := build/linters$(subst /,-,$(VENV))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/emulator -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
PYTEST := $(BIN)/python -m pytest

.PHONY: train test test-slow lint format bench gpu clean

train: $(STAMP)
	$(BIN)/python -m bigkern train cnn

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_adam.py
	$(BIN)/python benchmarks/bench_attention.py
	$(BIN)/python benchmarks/bench_int8_mm.py
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_generate.py

# On a machine with a GPU: everything that needs no network, and the result files.
gpu: $(STAMP)
	$(BIN)/python -m bigkern info
	$(PYTEST) -k "not one_wheel"
	$(BIN)/python benchmarks/bench_adam.py --device cuda --save
	$(BIN)/python benchmarks/bench_train.py --device cuda --save

$(BIN)/python:
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) uninstall --yes setuptools  # an old one, that would hide a newer one of the system

# Three steps, since only the last may fail, for want of a network: what it brings is optional.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(PIP) install 'torch>=2.10' numpy ninja 'setuptools>=77' pytest
	$(PIP) install --no-build-isolation --no-deps --editable .
	$(PIP) --retries 1 install 'bigkern[train,test,bench]' || echo "bigkern: without its optional packages (no network?)"
	mkdir -p build && touch $@

$(LINTERS): Makefile | $(BIN)/python
	$(PIP) install ruff==0.17.6 clang-format==23.1.5
	mkdir -p build && touch $@

clean:
	rm -rf build bigkern/*.so *.egg-info
