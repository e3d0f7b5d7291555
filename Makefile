PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
RECIPE ?= recipes/digits_rescaled_ct.toml

.PHONY: demo emoji quick test install lint docs clean

demo: install  ## Train, search, sample, measure and report on real digits (a few minutes).
	$(BIN)/cmkit run $(RECIPE)

emoji: install  ## Text to image from nothing: a teacher of emoji, and its distillation.
	$(BIN)/cmkit run recipes/emoji_teacher.toml
	$(BIN)/cmkit run recipes/emoji_lcm.toml

quick: install  ## The tests that a change must keep before it is committed (minutes).
	$(PYTEST) -m "not (browser or compile or slow or wheels)"

test: install  ## The whole test suite.
	$(PYTEST)

install: $(VENV)/installed  ## An environment with all that the other targets need.

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'cmkit needs Python 3.11 or newer: make PYTHON=python3.12 install'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: install  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## Write the generated part of the documentation.
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist
