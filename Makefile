# The commands of a newcomer. Each target first updates .venv when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Tests start pairs of ranks: a second thread in one process would take the core of the other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

ENGINE_TESTS := $(patsubst %,tests/test_%.py,ds_config gathers residency quantized slices \
	zero_matches_local planning peft_parity families moe multimodal_checkpoints)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long newest check fmt bench docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/.runtime ## train several real tasks on two ZeRO-3 workers under Ray, evaluate, export
	$(BIN)/hyperscale train demo

test: .venv/.dev ## every test except those marked `long`
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: .venv/.dev ## the tests marked `long`, least recently run first, for at most HYPERSCALE_LONG_MINUTES (55)
	$(BIN)/python tests/long_run.py

newest: .venv/bin/python ## the engine's tests with the newest versions that pyproject.toml allows, in .venv-newest
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/torch.txt
	.venv-newest/bin/python -m pip --disable-pip-version-check install --quiet --constraint .venv-newest/torch.txt --editable '.[dev]'
	.venv-newest/bin/python -m pip --disable-pip-version-check list | grep -E '^(deepspeed|ray|mlflow|transformers|torch|datasets|peft|numpy) '
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(ENGINE_TESTS)

check: .venv/.dev ## check style, format, types, layers of imports, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

fmt: .venv/.dev ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev ## measure loading, a step against PEFT, mixed tasks, a profile, memory against the plan
	$(BIN)/python -m benchmarks

docs: .venv/.runtime ## write docs/recipe.schema.json and docs/cli.md from the program itself
	$(BIN)/python docs/render.py

clean: ## remove .venv and the tools' caches
	rm -rf .venv .venv-newest .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hyperscale needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the runtime dependencies into .venv (a few minutes, once)"
	$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "Installing the development tools into .venv"
	$(PIP) --editable '.[dev]'
	@touch $@
