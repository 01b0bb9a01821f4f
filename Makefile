# make quickstart : install into .venv, run the quickstart grid, print the boards
# make check      : format, lint, types, the core of the tests: about a minute
# make docs       : fill the pages' tables and numbers from the boards, build the site into site/
# make test       : format, lint, types, all tests (both install into .venv first)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # compiling the tests anew takes longer than most of them
# a worker for each core, four at most; make WORKERS=0 ... runs the tests in one process
WORKERS ?= auto
# what everything else stands on; make CORE=tests/backdoor check takes another folder. What is slow says so
CORE   := $(addprefix tests/,anatomy conformance engine merging)
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --durations=10

.PHONY: quickstart check test docs install install-dev lint types clean

quickstart: install
	$(BIN)/bench run --grid quickstart

check: install-dev lint types
	$(PYTEST) -m "not slow" $(CORE)

test: install-dev lint types
	$(PYTEST)

# not --quiet: warnings that nobody hears are not strict
docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html"

install: $(VENV)/.core
install-dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# -c constraints.txt: the versions the suite was tested with
$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[real,clip,diffusion,fusionbench,ray,slurm,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy --strict -p mergesec -p mergesec_tasks -p mergesec_methods

clean:
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache
