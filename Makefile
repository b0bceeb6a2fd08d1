# The same commands as .ci/run, on the environment in .venv. `make setup` builds it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test parity check format ci

setup:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test,parity,dev]'

test:
	$(BIN)/pytest

parity:
	$(BIN)/pytest -m '(slow or parity) and not metal' -n 2

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ci:
	.ci/run
