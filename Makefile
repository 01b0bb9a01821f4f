# make quickstart : install into .venv, run the quickstart grid, print the boards
# make check      : format, lint, types, the core of the tests: about a minute
# make docs       : fill the pages' tables and numbers from the boards, build the site into site/
# make test       : format, lint, types, all tests (both install into .venv first)
# make oldest     : the tests of models on the oldest releases of the model libraries that pyproject.toml admits
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

.PHONY: quickstart check test oldest docs install install-dev lint types clean

quickstart: install
	$(BIN)/bench run --grid quickstart

check: install-dev lint types
	$(PYTEST) -m "not slow" $(CORE)

test: install-dev lint types
	$(PYTEST)

# laid over .venv; tests of datasets skip, which needs a newer hub
oldest: $(VENV)/.oldest
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(PYTEST) $(addprefix tests/,campaigns diffusers tasks text vision)

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

$(VENV)/.oldest: $(VENV)/.dev
	$(BIN)/python -m pip install -q --upgrade --no-deps --target $(VENV)/oldest \
	  transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 diffusers==0.35.2
	touch $@

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy --strict -p mergesec -p mergesec_tasks -p mergesec_methods

clean:
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache
