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
# By several processes, where pytest-xdist is; their OpenMP threads are more than the cores and mustn't spin.
PARALLEL = $(shell $(BIN)/python -c 'import xdist' 2>/dev/null && echo '--numprocesses logical --maxprocesses 8 --dist worksteal')
SANITIZER := $(firstword $(wildcard $(CUDA_HOME)/bin/compute-sanitizer /usr/local/cuda/bin/compute-sanitizer) compute-sanitizer)

.PHONY: train test test-slow lint format bench readme gpu gpu-build gpu-test gpu-sanitize gpu-bench clean

train: $(STAMP)
	$(BIN)/python -m bigkern train cnn

test test-slow: export OMP_WAIT_POLICY = passive
test: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) $(PARALLEL) -m slow

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

# What is generated in README.md and benchmarks/README.md.
readme: $(STAMP)
	$(BIN)/python tools/readme.py

# On a machine with a GPU, without a network. Each step takes less than 9 minutes on 16 cores; a step that fails doesn't
# keep the others from running with `make -k gpu`.
gpu: gpu-build gpu-test gpu-sanitize gpu-bench

gpu-build: export BIGKERN_CUDA = 1
gpu-build: $(STAMP)
	$(BIN)/python -m bigkern info
	$(BIN)/python -c "import torch; torch.cuda.init(); import bigkern; assert not bigkern.libraries.problems['_C_cuda']"

# All but the emulator's, which is for machines without a GPU, and what needs a network.
# Triton's kernels run there too, as `cuda triton`.
gpu-test: $(STAMP)
	timeout 540 $(BIN)/python tests/run_parallel.py -m "not slow" -k "not emulat and not one_wheel and (cuda or not triton)"

# torch's cache would hide accesses beyond a tensor.
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-sanitize: $(STAMP)
	for tool in memcheck racecheck; do \
	  timeout 270 $(SANITIZER) --tool $$tool --error-exitcode 9 $(PYTEST) -q -m sanitize -k cuda || exit 1; \
	done

gpu-bench: $(STAMP)
	timeout 540 sh -ec 'for name in adam attention int8_mm train generate; do \
	  $(BIN)/python benchmarks/bench_$$name.py --device cuda --save; done'

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
