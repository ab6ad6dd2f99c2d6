# `make run` and `make test` do all the set-up on a fresh machine: Python 3.11 or newer with venv is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup run test slow check bench gpu docs image clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

setup: $(READY) ## .venv with every extra and the development tools

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "found Python %d.%d; needed 3.11 or newer. Run: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing into $(VENV) (several GB on the first run)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

run: setup ## the main job: recipe tiny from versioned data to a promoted bundle
	@$(BIN)/manyeyes run train --recipe tiny

test: setup ## all tests that need no outside service and take no minute each
	@# In their own order: by number of tests, as xdist would have it, the few that take longest come last.
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not integration and not slow"

slow: setup ## whole pipelines, trainings of several processes, real services (skipped where they cannot be started)
	@# The files that take longest first, so that no core waits for the other at the end.
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "integration or slow" -o timeout=900 --durations=10 \
		tests/pipelines tests/integration tests/invariants tests/contract tests/unit

check: setup ## formatting, lint, types, import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup ## side-by-side performance ratios, with equality checks; odd inputs by the thousand
	@$(BIN)/python -m bench
	@$(BIN)/python -m bench.peers
	@$(BIN)/python -m bench.scorers
	@$(BIN)/python -m bench.fuzz images
	@$(BIN)/python -m bench.fuzz records 10000
	@$(BIN)/python -m bench.fuzz import 10000
	@$(BIN)/python -m bench.bundles
	@$(BIN)/python -m bench.large_bundle
	@$(BIN)/python -m bench.cache
	@$(BIN)/python -m bench.loader
	@$(BIN)/python -m bench.importing
	@$(BIN)/python -m bench.validation
	@$(BIN)/python -m bench.near_duplicates
	@$(BIN)/python -m bench.gate
	@$(BIN)/python -m bench.packing
	@$(BIN)/python -m bench.kills
	@$(BIN)/python -m bench.memory
	@$(BIN)/python -m bench.training
	@$(BIN)/python -m bench.sft
	@$(BIN)/python -m bench.soak --minutes 3
	@$(BIN)/python -m bench.soak --figures
	@$(BIN)/python -m bench.takeover
	@$(BIN)/python -m bench.images
	@$(BIN)/python -m bench.encoders
	@$(BIN)/python -m bench.features
	@$(BIN)/python -m bench.variants
	@.ci/twins

gpu: setup ## what only a GPU shows: its tests, and LLaVA-1.5-7B's stages beside the estimate; says so where there is none
	@$(BIN)/python -m pytest -m gpu -p no:cacheprovider tests/invariants
	@$(BIN)/python -m bench.gpu

docs: setup ## documents that are generated from code
	@$(BIN)/python docs/formats.py > docs/formats.md
	@$(BIN)/python docs/benchmarks.py > docs/benchmarks.md
	@$(BIN)/python docs/recipes.py > docs/recipes.new && mv docs/recipes.new docs/recipes.md
	@$(BIN)/python docs/performance.py > docs/performance.new && mv docs/performance.new docs/performance.md
	@$(BIN)/python docs/scaling.py > docs/scaling.new && mv docs/scaling.new docs/scaling.md
	@$(BIN)/python docs/architecture.py > docs/architecture.new && mv docs/architecture.new docs/architecture.md

image: setup ## the container images, with size and digest; options in IMAGE="...": infra/images/README.md
	@$(BIN)/python infra/images/build.py $(IMAGE)

clean: ## runs, caches and the registry of this checkout; keeps .venv and data
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
