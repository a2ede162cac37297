# Two commands: `make demo` (install, train, sample, evaluate) and `make test` (install, test).
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: install install-dev demo test lint docs clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# Eight minutes on two CPU cores. If it is interrupted, run it again: it resumes.
demo: install $(RUN)/grid.png $(RUN)/digits.npz $(RUN)/metrics.json
	@echo
	@echo "$(RUN)/ holds the whole run:"
	@echo "  grid.png      samples, one row per class    metrics.json  the table above"
	@echo "  curves.png    loss over training            samples.npz   1,000 samples and their labels"
	@echo "  config.yaml   the settings                  checkpoints/  weights (safetensors)"

$(RUN)/trained: | install
	$(BIN)/python train_dit.py --config digits --run_dir $(RUN) --resume
	@touch $@

$(RUN)/grid.png: | $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --images_per_class 10 --output $@

$(RUN)/samples.npz: | $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --num_samples 1000 --resume --output $@

$(RUN)/digits.npz: | $(RUN)/trained
	$(BIN)/moh-dit export --data digits --image_size 32 --output $@

$(RUN)/metrics.json: $(RUN)/digits.npz $(RUN)/samples.npz
	@echo
	$(BIN)/fid-eval $^ --extractor digits --resume --output $@

test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# The site, into build/site. It works offline: loading from another host is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site
	@! grep -rlE '(src=|stylesheet"[^>]*href=|url\()["'"'"']?(https?:)?//' build/site --include '*.html' \
	    --include '*.css' || { echo "these files load from the network"; exit 1; }
	@echo "open build/site/index.html"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
