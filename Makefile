# Everything a newcomer needs: `make study` and `make test`. `make` alone prints what can be made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup study test test-all lock quick check bench lab clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(SETUP)  ## set up .venv, the embedded model and a Chrome for PNG export (once)

# Rerun only when the dependencies change; each step says what it does, so a failure names itself.
$(SETUP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo "python3 -m venv failed: install Debian's python3-venv, then run make again." >&2; exit 1; }
	@echo "Installing the Python packages into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@echo "Fetching the embedded model (98 MB, once) ..."
	@$(BIN)/python -m lib.models
	@$(MAKE) --no-print-directory chrome
	@touch $@

# PNG figures are drawn by a Chrome; without one the study still writes its HTML figures.
.PHONY: chrome
chrome:
	@if command -v chromium google-chrome google-chrome-stable chromium-browser >/dev/null 2>&1; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null && { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1; then echo "Installed Debian's chromium for PNG figures."; \
	elif $(BIN)/plotly_get_chrome -y >/dev/null 2>&1; then echo "Installed a Chrome for PNG figures with plotly's helper."; \
	else echo "No Chrome found: figures are written as HTML only. For PNGs install chromium (apt-get install chromium), then run the study again."; fi

study: $(SETUP)  ## set up everything and run the demo study end to end; figures land in results/
	@$(BIN)/study run demo --jobs 2

test: $(SETUP)  ## set up everything and run all checks and tests
	@$(MAKE) --no-print-directory check
	@$(BIN)/python -m pytest

test-all: $(SETUP)  ## as test, with twenty kills in place of five
	@STUDY_FAULTS=20 $(MAKE) --no-print-directory test

quick: $(SETUP)  ## the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow"

check: $(SETUP)  ## ruff, mypy (strict on lib) and notebooks without outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/nbstripout --verify notebooks/*.ipynb

bench: $(SETUP)  ## benchmarks: coverage of the intervals, the judge, and speed beside what people use (two hours)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@$(BIN)/python benchmarks/coverage.py
	@$(BIN)/python benchmarks/judge_concurrency.py
	@$(BIN)/python benchmarks/throughput.py

# A lock for who wants these very files: pip install torch==2.13.0, then pip install --require-hashes --no-deps -r requirements.lock.
lock: $(SETUP)  ## make requirements.lock (pins and hashes) from pyproject.toml, with uv in an environment of its own
	@$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/lock/bin/uv pip compile --quiet pyproject.toml --output-file requirements.lock

lab: $(SETUP)  ## JupyterLab on loopback, with its token
	@$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

clean:  ## remove .venv; results/ and data/ stay
	rm -rf $(VENV) *.egg-info
