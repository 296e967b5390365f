# The environment is .venv; every target makes it first where it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo serve test check bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## serve the bundled model on Ray, ask it a few things, show where the experts ran, stop
	$(BIN)/python -m moeless.demo

serve: $(INSTALLED) ## serve the bundled model on 127.0.0.1:8000 until Ctrl-C
	$(BIN)/moeless serve moeless-mini --workers 2

test: $(INSTALLED) ## run the tests (one part: make test ARGS=tests/unit)
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED) ## lint, format, types, the rule of direction, and the links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/docs

bench: $(INSTALLED) ## run the benchmarks' quick set (all: make bench ARGS=--all)
	$(BIN)/python -m benchmarks $(ARGS)

# torch goes first and alone, so that a CPU build which pip was pointed to is kept by the second step.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moeless needs Python 3.11 or newer; set PYTHON=, found " + sys.version.split()[0])'
	@echo 'installing into .venv: minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[serve,plot,operator,dev]"
	@touch $@
