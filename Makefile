# The two commands of the README are `make train` and `make test`; each does all its own set-up and can be run again.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train detect test test-all test-clients lint format bench bench-gpu models-table wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv and ensurepip was found; name one with PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev,detection,export]"
	@touch $@

train: $(VENV)/.installed ## train a small NAT on scikit-learn's digits (ARGS="model=... epochs=..." overrides)
	$(BIN)/zoo train $(ARGS)

detect: $(VENV)/.installed ## train a detector on canvases of the same digits (ARGS as for `zoo detect`)
	$(BIN)/zoo detect $(ARGS)

test: $(VENV)/.installed ## the tests, without those marked slow
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed ## every test
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-clients: $(VENV)/.installed ## other programs over every family, installed first; writes docs/clients.md
	$(BIN)/python -m pip install --quiet -e ".[dev,detection,export,clients]"
	$(BIN)/python -m pytest -n $(WORKERS) tests/clients --junitxml=$(VENV)/clients.xml $(ARGS); $(BIN)/python tests/clients/matrix.py $(VENV)/clients.xml

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff rewrite
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed ## time the ops against their peers on this machine
	$(BIN)/python -m benchmarks.ops $(ARGS)

# Of the Pythons at hand the first that can run it: a cluster's image has a PyTorch of its own, and often no network.
BENCH_GPU = -m benchmarks.gpu$(if $(QUICK),_quick) $(if $(TUNE),--tune 90) $(ARGS)
bench-gpu: ## check and time the Triton kernels on this machine's GPU: a table, and JSON (8 minutes; TUNE=1 tunes first, QUICK=1: one minute)
	@for p in python3 python $(PYTHON) $(BIN)/python; do \
		$$p -c 'import timm, torch, triton; assert torch.cuda.is_available()' 2>/dev/null && exec $$p $(BENCH_GPU); done; \
	{ test -e $(VENV)/.installed || $(MAKE_COMMAND) $(VENV)/.installed; } && exec $(BIN)/python $(BENCH_GPU)

models-table: $(VENV)/.installed ## write MODELS.md and zoo/_names.py anew
	$(BIN)/zoo list --markdown > MODELS.md.new && mv MODELS.md.new MODELS.md
	$(BIN)/python -c "import zoo; from zoo.registry import names_table; print(names_table(), end='')" > names.new && mv names.new zoo/_names.py

wheel: $(VENV)/.installed ## build sdist and wheel and try the wheel in a clean environment
	PYTHON=$(BIN)/python .ci/wheel

clean: ## remove what building and testing left, but not runs/ and the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
