# `make quickstart` runs the main job, `make test` the tests; both set up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: help quickstart test lint types wheel check clean

help:
	@echo "make quickstart   train a real 135M model on real preferences (about 10 minutes on 2 cores)"
	@echo "make test         the whole test suite"
	@echo "make check        lint, types, tests and wheel"
	@echo "make clean        remove .venv and runs/quickstart"

# Made anew when what it is made from changed.
.venv/ready: pyproject.toml constraints.txt
	@echo "==> setting up .venv with $$($(PYTHON) --version) (1.6 GB, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
# Of 20,000 files, Python compiles those that are used, now or later, and not pip all of them.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import mallowspo_cli.commands.train"
	@touch $@

quickstart: .venv/ready
	@echo "==> mallowspo train recipe=quickstart"
	@if [ -f runs/quickstart/recipe.yaml ]; then \
	  echo "runs/quickstart is there already: going on with it (rm -r runs/quickstart starts afresh)"; fi
	@$(BIN)/mallowspo train recipe=quickstart --resume

test: .venv/ready
	@echo "==> the test suite"
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/ready
	@$(BIN)/pyright

wheel: .venv/ready
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls dist/*.whl

check: lint types test wheel

clean:
	rm -rf .venv runs/quickstart dist
