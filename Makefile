# make demo: set up and run the main job on the built-in model. make test: set up and run the tests.
# make test-vllm: those that need vLLM, which say so where it is not installed. make docs: the documentation as a site.
PYTHON ?= python3
VENV ?= .venv
# Passed to pip install, for example --extra-index-url of an index with CPU builds of torch.
PIP_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-vllm lint docs format clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/cospadi demo

test: $(READY)
	$(BIN)/python -m pytest

test-vllm: $(READY)
	$(BIN)/python -m pytest -n 0 -m vllm -rs tests/integrations/test_vllm.py || test $$? -eq 5

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/site

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/cospadi/runtime/cpp/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "CoSpaDi needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,docs]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
