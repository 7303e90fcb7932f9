# Every target below installs what it needs first: Python >= 3.10, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# as many at once as there are cores; a file stays on one of them, because its tests share what they train
PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile
CODE := graftory tests examples benchmarks

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is missing or older than 3.10; name a newer one, such as: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): installing torch, transformers and the other packages of constraints.txt."
	@echo "This happens once and takes a few minutes (most of it is the download of torch)."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment; install its venv module" \
	    "(Debian, Ubuntu: apt install python3-venv) or name another Python: make PYTHON=..." >&2; exit 1; }
	@# setuptools first, so that it is the pinned one that builds the package
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train, version, merge, continue and export real adapters, in graftory-demo/
	$(BIN)/hub demo

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest $(PARALLEL)

check: $(STAMP) ## Run the tests, the linter, the formatter's check and the type checker
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean: ## Remove .venv, caches and the demo's folder
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache graftory-demo
	find graftory tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
