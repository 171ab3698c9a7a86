# Everything works from nothing but Python >= 3.10, pip and make; .venv is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed is what the constraints file pins; the stamp notices when either file changes.
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all check prose format benchmarks benchmarks-quick audit clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## make .venv with everything in it

demo: install  ## unlearn toxicity on the built-in model: minutes on a laptop
	$(BIN)/quarkrl demo

test: install  ## the fast tests
	$(BIN)/python -m pytest

test-all: test  ## every test, the slow ones too, two at a time
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2 --dist loadgroup

check: install prose  ## what CI runs besides the tests: lint, format, types, prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prose: install  ## the style of README and docs: sentence length and glossary (styles/quarkrl)
	$(BIN)/python tools/prose.py README.md AGENTS.md CHANGELOG.md docs

format: install  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: install  ## speed and memory, against the textbook, on an idle machine; into benchmarks/results
	for name in iteration pool overlap scaling; do \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results || exit 1; \
	done

benchmarks-quick: install  ## the same, small: fails where results are wrong, never where they are slow
	for name in iteration pool overlap scaling; do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

audit: install  ## known vulnerabilities of what is installed; asks PyPI
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --no-deps --disable-pip --requirement $(VENV)/audit/installed.txt

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
