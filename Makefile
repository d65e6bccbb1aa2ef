BIN := .venv/bin
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
# Threads that spin while they wait slow down whatever shares their cores: up to ten times.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest
# Three processes with one thread each: some wait. All tests of a file run in one process, to create the fixtures of a module once.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast test-slow soak lint format bench gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.ready ## run the whole job on text that every machine has
	$(BIN)/wmtp demo

test: .venv/.ready ## check style, types and layers, then run the tests that are not slow
	.ci/passed .venv/.passed-test sh -c '$(LINT) && $(PARALLEL) -m "not slow and not gpu"'

test-fast: .venv/.ready ## run the tests without Ray, vLLM, stores and whole training runs: under a minute
	$(PARALLEL) -m "not integration and not slow and not gpu"

test-slow: .venv/.ready ## run the slow tests, and fuzz for ten minutes: 30 to 45 minutes
	.ci/passed .venv/.passed-test-slow env $(PARALLEL) -m "slow and not soak and not gpu"

soak: .venv/.ready ## run the tests that take minutes each
	$(PYTEST) -m soak

lint: .venv/.ready ## check style, types and layers
	$(LINT)

format: .venv/.ready ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready ## run the benchmarks
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

gpu: .venv/.ready ## run the tests and benchmarks that need a GPU; ARGS=--rehearse: on a CPU, in small
	$(BIN)/python benchmarks/gpu/run.py $(ARGS)

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" .ci/setup
