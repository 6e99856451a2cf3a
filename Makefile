# `make` alone lists the targets. All but `help` and `clean` stand on `setup`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help setup train test fmt lint type layers golden bench faults trouble damage wheel lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s%s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv from requirements.lock; quick when nothing changed

train: $(STAMP) ## train the main experiment; ARGS="train.steps=100 ..." overrides
	@$(BIN)/python -m runner +experiment=dropout $(ARGS)

test: lint type layers ## lint, type, layers, then every test; ARGS="-k keys ..."
	@$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

fmt: $(STAMP) ## mend what ruff can mend, and format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

layers: $(STAMP) ## import-linter: imports point down only
	@$(BIN)/lint-imports --no-logo

golden: $(STAMP) ## rewrite tests/golden/ from what the code does now
	@UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/test_golden.py $(ARGS)

bench: $(STAMP) ## time the training loop
	@$(BIN)/python benchmarks/loop.py $(ARGS)

faults: $(STAMP) ## kill 200 runs and resume them; ARGS="--kills 20 --seed 7 --verbose"
	@$(BIN)/python tests/kills.py $(ARGS)

trouble: $(STAMP) ## a sweep of 200 jobs that fail and kill; ARGS="--jobs 50 --raising 4 --nan 2"
	@$(BIN)/python tests/trouble.py $(ARGS)

damage: $(STAMP) ## damage 2,000 records, make up 10,000 and read them; ARGS="--seed 7"
	@$(BIN)/python tests/damage.py $(ARGS)
	@$(BIN)/python tests/fuzz.py $(ARGS)

wheel: $(STAMP) ## build the wheel into dist/
	@$(BIN)/python -m hatchling build --target wheel

lock: $(STAMP) ## resolve pyproject.toml into requirements.lock; ARGS=--upgrade
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes \
	    --extra joblib --extra optuna --extra submitit --extra tensorboard \
	    --group dev --annotation-style line \
	    --custom-compile-command 'make lock' $(ARGS) \
	    --output-file requirements.lock pyproject.toml

clean: ## remove build output and caches; keeps .venv and every run
	@rm -rf build dist .hypothesis .*_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# antlr4-python3-runtime has no wheel, so what builds it is installed before it, from
# the same lock: with build isolation, pip would fetch that without a hash.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	    2>/dev/null || { echo "PYTHON: must be Python 3.11 to 3.14" \
	    "(got $(PYTHON), $$($(PYTHON) -V 2>&1)). Set PYTHON=python3.12." >&2; exit 1; }
	@echo 'setup: installing requirements.lock into .venv'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@awk '/^[^ ]/ {on = /^setuptools==/} on' requirements.lock > .venv/setuptools.lock
	@$(PIP) --require-hashes --requirement .venv/setuptools.lock
	@$(PIP) --require-hashes --requirement requirements.lock --no-build-isolation
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
