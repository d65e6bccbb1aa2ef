BIN := .venv/bin
PYTEST := $(BIN)/pytest
# A file of tests stays in one process, so that the fixtures of its module are made once.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast test-slow soak lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.ready ## run the whole job on text that every machine has
	$(BIN)/wmtp demo

test: .venv/.ready ## check style, types and layers, then run all tests but the slow ones
	@.ci/passed .venv/.passed-test sh -ec '$(MAKE) --no-print-directory lint; $(PYTEST) $(PARALLEL) -m "not slow"'

test-fast: .venv/.ready ## run the tests that need no Ray, vLLM, store or training run: under a minute
	$(PYTEST) $(PARALLEL) -m "not integration and not slow"

test-slow: .venv/.ready ## run the slow tests: up to 25 minutes
	@.ci/passed .venv/.passed-test-slow $(PYTEST) -m "slow and not soak"

soak: .venv/.ready ## run the tests that take longer still
	$(PYTEST) -m soak

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
