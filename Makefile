BIN := .venv/bin

.PHONY: help demo test test-slow lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.ready ## run the whole job on text that every machine has
	$(BIN)/wmtp demo

test: lint ## check style, types and layers, then run the tests
	$(BIN)/pytest -m "not slow"

test-slow: .venv/.ready ## run the tests that take long
	$(BIN)/pytest -m slow

lint: .venv/.ready ## check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready ## put the sources into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready ## run the benchmarks
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" .ci/setup
