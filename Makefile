# make quickstart   a venv in .venv, then a first training run
# make test         the test suite, as CI runs it
# make battery      the acceptance tests: kills, resumes, threads, seeded bugs (FULL=1: every size, recorded)
# make gpu          the tests that need a card
# make lint         ruff over the tree

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test battery gpu lint

help:  ## this text
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1  \2/p' Makefile | sed 's/^  make \([a-z]*\) /  make \1\t/'

quickstart: $(VENV)/.installed  ## install into .venv and train a small model
	@$(BIN)/local-tinker quickstart

test: $(VENV)/.installed-test  ## run the tests
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

battery: $(VENV)/.installed-test  ## run the acceptance tests (FULL=1: every size, recorded)
	@FULL=$(FULL) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m battery tests/battery tests/model/kernels -n auto --maxprocesses 8 --dist worksteal

gpu: $(VENV)/.installed-test  ## run the tests that need a card (NVIDIA, 24 GiB or more)
	@TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m gpu tests -n 4 --dist loadfile

lint: $(VENV)/.installed-dev  ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: it is the largest download and everything else builds on it
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	@echo "installing local-tinker and its dependencies"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what lint needs"
	@$(PIP) --editable '.[dev]'
	@touch $@
