# Everything runs in .venv, which `make setup` makes from constraints.txt. Each target makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check audit format chaos long cluster-up cluster-down lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything, pinned; `mm` is then .venv/bin/mm

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another: make setup PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV): some minutes, and gigabytes where torch brings CUDA."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## the main job, end to end, on this machine; DATA="path/*.tar" for your own shards
	@$(BIN)/mm demo $(if $(DATA),--data "$(DATA)")

test: $(READY)  ## the test suite, in two processes
	@$(BIN)/python -m pytest -n 2

check: $(READY)  ## format, lint, types, import contracts, cluster descriptions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m cluster.validate

audit: $(READY)  ## published flaws of the pinned packages, and the versions that must not be gone below
	@$(BIN)/python -m cluster.audit

format: $(READY)  ## rewrite files as `make check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

chaos: $(READY)  ## tests that kill processes for minutes
	@$(BIN)/python -m pytest -m chaos -rPs tests

long: $(READY)  ## tests that take minutes: 120,000 tampered requests, from shards to an endpoint on three nodes, a compiled model
	@$(BIN)/python -m pytest -m long -rPs tests

cluster-up: $(READY)  ## a Ray cluster of three nodes on this machine, behind a token, until `make cluster-down`
	@$(BIN)/python -m cluster.local up

cluster-down: $(READY)  ## end it
	@$(BIN)/python -m cluster.local down

lock: ## write constraints.txt anew from what pyproject.toml allows today
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet 'torch==2.13.0' '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude mm-pretrain --exclude pip | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt && rm -rf .venv-lock build

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
