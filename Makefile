BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
# A file of tests stays in one process, which computes with one thread; what was compiled is kept for the programs
# that tests start.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv and install everything for development (about 6 GB)

$(STAMP): pyproject.toml
	$(BASE_PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)  ## all three stages, small, on the embedded photos, or on yours: make demo DATA=FOLDER
	bash scripts/demo.sh $(if $(DATA),'$(DATA)')

test: $(STAMP)  ## all tests: the fast ones, then the end-to-end ones
	$(PYTEST)

test-fast: $(STAMP)  ## only the tests that take seconds
	$(PYTEST) -m 'not e2e'

lint: $(STAMP)  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove caches and build results; .venv, checkpoints/ and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
