# `make demo` and `make test` work on a fresh machine with Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
BACKPACK ?= backpack-for-pytorch==1.7.1 unfoldNd==0.2.3
WORKERS ?= 2
JUNK := build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint docs bench clean

help: ## list what make can do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=64" wheel

$(VENV)/.demo: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[demo]"
	@touch $@

# torchvision asks for its own build of torch, and BackPACK for an old one, so they come without dependencies
$(VENV)/.test: setup.cfg Makefile | $(BIN)/python
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,demo,lint,docs]"
	$(BIN)/python -m pip install -q --no-deps "$(TORCHVISION)" $(BACKPACK)
	@touch $@

demo: $(VENV)/.demo ## train on real data: quality, progress and cost of HesScale; pictures in demo-output/
	$(BIN)/python -m curvext demo $(ARGS)

test: $(VENV)/.test ## all tests, the examples in the docs included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.test ## regenerate docs/support.md and docs/operators.md and run every example
	$(BIN)/python -m curvext support docs/support.md
	$(BIN)/python -m tests.opdb docs/operators.md
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: $(VENV)/.test ## cost and quality benchmarks; JSON in benchmarks/results/
	$(BIN)/python benchmarks/hesscale_cost.py
	$(BIN)/python benchmarks/hesscale_quality.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/backpack_cost.py
	$(BIN)/python benchmarks/backpack_cost.py --docs
	$(BIN)/python benchmarks/hierarchical.py
	$(BIN)/python benchmarks/hierarchical.py --docs

clean: ## remove what the above made
	rm -rf $(VENV) $(JUNK)
