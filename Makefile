# make demo: train, evaluate and report on this machine.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
ARGS ?=
STAGES ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes of a thread each, whatever the machine, of whole files: each takes up to 4 GB. WORKERS=0 runs the
# tests in one.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
export PYTHONUNBUFFERED := 1

.PHONY: help setup compiler demo train-all lint test test-full test-range bench bench-gpu gpu-check gpu-wheels real-run-check \
  check docs browser-check dist clean

help:
	@echo "make setup      .venv with everything the demo and the tests need"
	@echo "make demo       train the embedded FLUX, evaluate before and after, report in $(RUN) (ARGS='key=value …')"
	@echo "make train-all  the recipes of every embedded pipeline (two hours)"
	@echo "make test       the tests that need no GPU"
	@echo "make test-full  the minutes-long ones too"
	@echo "make test-range the kernels' tests at both ends of the promised torch and Triton (downloads gigabytes)"
	@echo "make bench      time every model family's tiny recipe on this machine"
	@echo "make gpu-check  numbers, hazards and times on this machine's GPU in five minutes, offline (STAGES='host device')"
	@echo "make gpu-wheels what gpu-check needs on a machine without a registry, into .wheels"
	@echo "make bench-gpu  every stage of gpu-check, then the benchmarks (90 minutes at most)"
	@echo "make real-run-check  Stable Diffusion on all GPUs here: scores, seconds by phase, a row to contribute"
	@echo "make check      linters, types, tests: what CI runs"
	@echo "make docs       the documents as a site, strictly, in site/"
	@echo "make browser-check  the report and the live page in headless Chromium"
	@echo "make dist       both packages, built and checked, in dist/"

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
	@for recipe in shapes-flux shapes-stable-diffusion shapes-z-image shapes-flux2 shapes-hunyuan-video shapes-skyreels; do \
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

# The kernels' tests at the oldest torch and Triton that kernels/pyproject.toml promises, and at the newest there are,
# each in an environment of its own: .venv-oldest, .venv-newest. ARGS goes to pytest; one end: make test-range-oldest.
RANGE_oldest = torch==2.8.0 triton==3.4.0 'numpy<2.4'
RANGE_newest = torch triton numpy

test-range: test-range-oldest test-range-newest

test-range-%: compiler
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(RANGE_$*) pytest pydantic pyyaml scipy -e ./kernels
	@.venv-$*/bin/python -c 'import torch, triton, numpy; \
	  print("torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
	@OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/kernels tests/compat -m "not full and not gpu" $(ARGS)

# A recipe of every family at the tiny size, beside the sequential baseline: rows, plot and page of this machine.
bench: setup compiler
	$(BIN)/fastgrpo bench train --compare sequential $(ARGS)

# One call on a GPU: see bench/gpu_check.sh. It installs nothing: PYTHON is the machine's, or $(BIN)/python after setup.
gpu-check:
	@PYTHON=$(PYTHON) bench/gpu_check.sh $(STAGES)

gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .wheels -r bench/gpu_wheels.txt

# Every stage of gpu-check; then the kernels' benchmarks, and whole iterations of every family, tiny and real. Each has a
# limit of its own, and writes its rows as they are measured.
bench-gpu: setup compiler
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { \
	  echo "make bench-gpu: needs a CUDA GPU, and torch sees none" >&2; exit 1; }
	$(PIP_INSTALL) -e ./kernels -e '.[dev,gpu]'
	PYTHON=$(abspath $(BIN)/python) BUDGET=1800 bench/gpu_check.sh
	timeout 600 $(BIN)/fastgrpo bench kernels $(ARGS)
	timeout 900 $(BIN)/fastgrpo bench train --compare sequential
	timeout 3600 $(BIN)/fastgrpo bench train --size real

# On GPUs with the weights: docs/first-real-run.md. ARGS='CONFIG key=value … --gpus N --iterations N --images N --run DIR'
real-run-check: setup
	@$(BIN)/python bench/real_run.py $(ARGS)

check: lint
	@$(MAKE) test

# A page for every command and the Python interface are made from the code: docs/_site/pages.py.
docs: setup
	$(PIP_INSTALL) -e ./kernels -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Debian's Chromium where it is installed, else the one that playwright downloads.
browser-check: setup
	$(PIP_INSTALL) -e ./kernels -e '.[browser]'
	@command -v chromium >/dev/null || $(BIN)/python -m playwright install --with-deps chromium-headless-shell
	$(BIN)/python -m pytest tests/commands/test_browser.py

# It needs no set-up beyond its own.
dist:
	rm -rf dist
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	build/release/bin/python -m build --outdir dist kernels
	build/release/bin/python -m build --outdir dist .
	build/release/bin/python -m twine check --strict dist/*

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
