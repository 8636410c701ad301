# One command per job; `make test` needs nothing typed before it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# The first Python on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.autopar-setup
WORKERS ?= 2

.PHONY: setup demo test test-all check bench docs clean

setup: $(STAMP)

# torch comes first and pinned: the version decides what else fits. autopar itself is installed
# last and without build isolation, so that it is built by the pinned setuptools.
$(STAMP): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "autopar needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# ruff and mypy run first: they are cheap, and CI calls this target.
test: check
	$(BIN)/python -m pytest -q -n $(WORKERS)

test-all: check
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'slow or not slow'

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# All of them run, also after one that is beyond its limits.
bench: setup
	failed=0; for script in planning throughput published; do \
	  echo "== $$script"; $(BIN)/python "benchmarks/$$script.py" || failed=1; done; exit $$failed

# Pages that are made from the code; tests/test_docs.py and tests/test_compatibility.py compare them.
docs: setup
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_compatibility.py

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
