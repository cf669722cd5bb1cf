# `make demo` and `make test` work from a bare clone: the environment is made when missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-newest slow long wheel site lint types check clean

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

# Sdist and wheel as they would be released; the wheel, in an environment of its own, holds the
# library alone, which trains.
wheel: $(INSTALLED)
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	cd dist && ../.venv-wheel/bin/python ../.ci/fit_from_wheel.py

# The site in build/site, from docs, README, records, docstrings and stored results.
site: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) .venv-newest .venv-wheel build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache tests/.compiled
