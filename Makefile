# Two commands are enough: `make demo` sets up and sizes a deployment, `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo app test bench clean

demo: $(VENV)/.core
	$(BIN)/longctx size Qwen/Qwen2.5-14B-Instruct-1M --gpu h200 --gpus 8 --context 1M --concurrency 4

app: $(VENV)/.app
	$(BIN)/longctx app

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_sweep.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.app: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[app]'
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
