# `make demo` and `make test` need python3 (3.11 or newer, with venv) and make, nothing else.
#   make PYTHON=python3.12 test     another interpreter (after `make clean` if .venv exists)
#   make test ARGS="-k bellman"     arguments for pytest
#   make test ARGS='-m "not slow"'  every case of the tests, as CI runs them
#   make test JOBS=0                tests in one process
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all coverage lint format bench frameworks cuda docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.demo ## train on real digits; the picture and the graphs go to demo-output/
	$(BIN)/python -m ddpn_fx demo --out demo-output

test: $(VENV)/.dev ## run the tests, of those with many cases a few
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-all: $(VENV)/.dev ## run the slow tests as well
	$(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow" $(ARGS)

coverage: $(VENV)/.dev ## run the tests in one process and report the lines they miss
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage report

lint: $(VENV)/.dev ## ruff (rules, format) and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.dev ## rewrite the sources in the house's format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.dev ## step time against a compiled SGD step
	$(BIN)/python examples/bench/step.py $(ARGS)

frameworks: $(VENV)/.frameworks ## the usual loop in Lightning, Accelerate and the HF Trainer, which it installs
	$(BIN)/python -m pytest tests/test_frameworks.py $(ARGS)

cuda: $(VENV)/.dev ## on a GPU: the tests that need one, and the benchmarks there; ARGS="FOLDER" of data sets
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make cuda: torch finds no CUDA device")'
	PYTHON=$(BIN)/python examples/bench/gpu.sh examples/results/bench/gpu $(ARGS)

docs: $(VENV)/.docs ## build the documentation into build/site, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

clean: ## remove the virtual environment, the caches and what the demo wrote
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage build demo-output dist htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its step has succeeded, so a broken install is tried again and a good one is not repeated.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"ddpn_fx needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.frameworks: $(VENV)/.dev
	$(PIP) -e '.[dev,frameworks]'
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	@touch $@
