# Each target makes .venv by itself when it is missing or older than pyproject.toml or requirements-dev.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --quiet
RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-dev.txt)

# An environment counts as missing, too, where its interpreter is gone or too old.
MISSING := $(shell $(BIN)/python $(RECENT) || echo missing)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clinic clinic-quick clinic-cures clean missing

help:  ## Say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## Diagnose a sick 20-layer network and its healthy twin
	$(BIN)/gradguard demo

test: $(STAMP)  ## Run every test and doctest; at least 90 % of lines and branches must be covered
	$(BIN)/python -m pytest --cov --cov-report=term --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(STAMP)  ## Check style, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clinic: $(STAMP)  ## Score gradguard and its rivals on 206 labelled configurations, five seeds each; about half an hour
	$(BIN)/python -m benchmarks.clinic

clinic-quick: $(STAMP)  ## The same on a third of them, one seed; under three minutes
	$(BIN)/python -m benchmarks.clinic --quick --results out/clinic/quick.jsonl --json out/clinic/quick.json

clinic-cures: $(STAMP)  ## Cure the sick runs of the clinic in four ways, and compare; about half an hour
	$(BIN)/python -m benchmarks.clinic.cures --healthy

clean:  ## Remove the environment and everything that tools have left behind
	rm -rf $(VENV) .coverage htmlcov dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

missing:
	@$(PYTHON) $(RECENT) || { \
	    echo "gradguard needs Python 3.11 or newer, got $$($(PYTHON) --version 2>/dev/null || echo nothing) from '$(PYTHON)'." \
	         "Name another one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# torch goes in first, by its exact version, so that no other requirement can bring another build of it.
$(STAMP): pyproject.toml requirements-dev.txt $(MISSING)
	@echo "Installing gradguard and its tools into $(VENV); the first time this takes a few minutes."
	$(INSTALL) --upgrade pip
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable '.[lightning,demo]' --requirement requirements-dev.txt
	@touch $@
