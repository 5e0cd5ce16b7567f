# make demo   set up, make the data, sweep, table            make test       the core test suite
# make lint   ruff and mypy                                   make test-full  everything, slow tests included
# make audit  the pinned dependencies against known vulnerabilities
#
# The environment is made in .venv (uv when present, else pip). An existing one is kept: to bring your own torch, make
# .venv yourself and install torch and torchvision into it first, or point VENV at an environment you have.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.cosa-ray
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# Tests that start Ray run one after the other in one process (see tests/conftest.py), the others beside them.
SPREAD := -n 2 --no-loadscope-reorder
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test test-full lint audit format install clean
demo: install
	$(BIN)/cosa-ray demo

test: install
	$(BIN)/pytest -m "not slow and not soak" $(SPREAD) --durations=15

test-full: install
	$(BIN)/pytest -m "not soak" $(SPREAD)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/audit

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "cosa-ray needs Python 3.11, 3.12 or 3.13; install one or set PYTHON=..." >&2; exit 2; }
	$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

# A torch that is there already is not replaced: its pins, and those of its CUDA parts, are left out.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing cosa-ray into $(VENV) (several GB with torch; only once)" >&2
	@if $(BIN)/python -c 'import torch' 2>/dev/null; \
	then grep -vE '^(torch|torchvision|triton|nvidia-|cuda-)' constraints.txt > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install --quiet) \
		-c $(VENV)/constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
