# Two commands: `make repro` runs the whole pipeline, `make test` the tests. Both set up .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup repro readme lock test coverage lint docs ui clean

# The first Python on PATH that is new enough; override with `make PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
STAMP := .venv/.installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "Python 3.11 or newer is needed; found: $$("$(or $(PYTHON),python3)" --version 2>&1 || echo none)." >&2; \
		echo "Install one (https://www.python.org/downloads/) or run: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "This Python lacks venv; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@if [ ! -e .git ]; then .venv/bin/dvc config --local core.no_scm true; fi
	@touch "$@"

setup: $(STAMP)  ## Make .venv and install the pinned packages; again only when they change

repro: $(STAMP)  ## Run every stage that is not up to date, then print the results
	@python -m pipeline check
	@dvc repro
	@python -m pipeline sync || true
	@python -m pipeline show

readme: $(STAMP)  ## Write the last report's results into README.md, and the record that a test compares it with
	@cp results/report/results.json docs/measured/demo.json
	@python -m pipeline show --into README.md

lock: $(STAMP)  ## Write constraints.txt again: the exact versions that exact results hold for
	@{ grep '^#' constraints.txt; python -m pip freeze --exclude-editable; } > constraints.new
	@mv constraints.new constraints.txt

test: $(STAMP)  ## Run the tests; ARGS="-m 'not slow' tests/test_solvers.py" runs some
	@python -m pytest $(ARGS)

coverage: $(STAMP)  ## The same, with the lines and branches that no test reaches
	@python -m pytest --cov --cov-report=term-missing $(ARGS)

lint: $(STAMP)  ## Style, types, Dockerfile
	@ruff check mdeq pipeline tests benchmarks
	@ruff format --check --quiet
	@pyright
	@hadolint Dockerfile

docs: $(STAMP)  ## Build site/: the pages of docs/ and the library's reference
	@python -c 'import material, mkdocstrings' 2>/dev/null || \
		python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet && echo site/index.html

ui: $(STAMP)  ## Open the recorded runs (MLflow) on http://127.0.0.1:5000
	@python -m pipeline ui

clean:  ## Remove results and resumable state; keeps data, recorded runs and the cache of DVC
	rm -rf results work
