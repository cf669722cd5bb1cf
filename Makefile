# `make demo` and `make test` work from a bare clone: the environment is made when missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-newest slow long lint types check clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m experiments.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The same on the newest interpreter that is found, with what pip resolves there today.
test-newest:
	python=$$(.ci/newest_python) && $(MAKE) VENV=.venv-newest PYTHON=$$python test

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n 2

long: $(INSTALLED)
	$(BIN)/python -m pytest -m long -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info .mypy_cache .pytest_cache .ruff_cache tests/.compiled
