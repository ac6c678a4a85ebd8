# Everything begins with `make demo` or `make test`; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = passive
export PYTHONUNBUFFERED = 1

.PHONY: help install data demo check test test-all format clean

help:
	@echo "make demo      install, prepare data, train, merge, quantize, serve, ask, and print one table"
	@echo "make test      install, then the fast tests"
	@echo "make check     lint and types"
	@echo "make test-all  every test, the slow ones too"
	@echo "make install   only the environment, from requirements/*.lock"

install:
	@$(PYTHON) requirements/install.py

data: install
	@test -f recipes/data/azure-cli/heldout.jsonl || $(BIN)/python recipes/data/azure_cli.py

demo: data
	@$(BIN)/tuner prove recipes/demo.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: data
	$(BIN)/pytest -m "not slow and not gpu"

test-all: data
	@test -f recipes/data/speeches/heldout.jsonl || $(BIN)/python recipes/data/speeches.py
	$(BIN)/pytest -m "not gpu"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
