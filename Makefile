# make demo: train, evaluate and report on this machine.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes of a thread each, whatever the machine, of whole files: each takes up to 4 GB. WORKERS=0 runs the
# tests in one.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
export PYTHONUNBUFFERED := 1

.PHONY: help setup compiler demo train-all lint test test-full bench bench-gpu check clean

help:
	@echo "make setup      .venv with everything the demo and the tests need"
	@echo "make demo       train the embedded FLUX, evaluate before and after, report in $(RUN) (ARGS='key=value …')"
	@echo "make train-all  the recipes of every embedded pipeline (two hours)"
	@echo "make test       the tests that need no GPU"
	@echo "make test-full  the minutes-long ones too"
	@echo "make bench      time every model family's tiny recipe on this machine"
	@echo "make bench-gpu  the tests that need a GPU, then the benchmarks, on this machine's (75 minutes at most)"
	@echo "make check      linters, types, tests: what CI runs"

setup: $(STAMP)

$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastgrpo needs Python 3.11 or newer, and '$(PYTHON)' is not: install one (Debian 12: sudo apt-get install" \
	       "python3 python3-venv), or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot create a virtual environment: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (the first time downloads PyTorch; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e ./kernels -e '.[dev]'
	@touch $@

# torch.compile, and Triton on a GPU, compile with it; nothing in the demo does.
compiler:
	@command -v cc >/dev/null || { echo "the tests need a C compiler: sudo apt-get install build-essential" >&2; exit 1; }

demo: setup
	@$(BIN)/fastgrpo train configs/shapes-flux.yaml run.dir=$(RUN) run.resume=auto $(ARGS)
	@$(BIN)/fastgrpo eval $(RUN)
	@$(BIN)/fastgrpo report $(RUN)

# The recipes of every embedded pipeline, one after the other: two hours on two cores.
train-all: setup
	@for recipe in shapes-flux shapes-stable-diffusion shapes-hunyuan-video shapes-skyreels; do \
	  $(BIN)/fastgrpo train configs/$$recipe.yaml run.dir=runs/$$recipe run.resume=auto $(ARGS) && \
	  $(BIN)/fastgrpo eval runs/$$recipe && $(BIN)/fastgrpo report runs/$$recipe || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup compiler
	$(PYTEST) -m "not full and not gpu" $(ARGS)

test-full: setup compiler
	$(PYTEST) -m "full or not full" $(ARGS)

# A recipe of every family at the tiny size, beside the sequential baseline: rows, plot and page of this machine.
bench: setup compiler
	$(BIN)/fastgrpo bench train --compare sequential $(ARGS)

# Tests of the kernels on the device, those that only a GPU can answer, and the kernels' benchmarks, ten minutes at most;
# then whole iterations of every family, tiny and real, each run with a limit of its own.
bench-gpu: setup compiler
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { \
	  echo "make bench-gpu: needs a CUDA GPU, and torch sees none" >&2; exit 1; }
	$(PIP_INSTALL) -e ./kernels -e '.[dev,gpu]'
	timeout 600 sh -c '$(BIN)/python -m pytest tests/gpu tests/kernels -m "not full" && $(BIN)/fastgrpo bench kernels $(ARGS)'
	timeout 900 $(BIN)/fastgrpo bench train --compare sequential
	timeout 3600 $(BIN)/fastgrpo bench train --size real

check: lint
	@$(MAKE) test

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
