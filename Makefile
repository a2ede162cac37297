# Two commands: `make demo` (install, train, sample, evaluate) and `make test` (install, test).
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: install demo test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# About ten minutes on two CPU cores; running it again continues where it stopped.
demo: install
	$(BIN)/python train_dit.py --config digits --run_dir $(RUN) --resume true
	$(BIN)/python -m moh_dit.demo $(RUN)

test: install
	$(BIN)/python -m pytest --numprocesses 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
