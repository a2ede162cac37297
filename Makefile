# Two commands: `make demo` (install, train, sample, evaluate) and `make test` (install, test).
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: install demo test lint docs clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# Eight minutes on two CPU cores. Run again, it goes on where it stopped.
demo: install $(RUN)/grid.png $(RUN)/digits.npz $(RUN)/samples.npz
	@echo
	$(BIN)/fid-eval $(RUN)/digits.npz $(RUN)/samples.npz --extractor digits --output $(RUN)/metrics.json
	@echo
	@echo "$(RUN)/ holds the whole run:"
	@echo "  grid.png      samples, a row a class    metrics.json  the table above"
	@echo "  curves.png    loss over training        samples.npz   1,000 samples and their labels"
	@echo "  config.yaml   what was computed         checkpoints/  weights (safetensors)"

$(RUN)/trained: | install
	$(BIN)/python train_dit.py --config digits --run_dir $(RUN) --resume
	@touch $@

$(RUN)/grid.png: | $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --images_per_class 10 --output $@

$(RUN)/samples.npz: | $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --num_samples 1000 --output $@

$(RUN)/digits.npz: | $(RUN)/trained
	$(BIN)/python -m moh_dit.data.export_images --data digits --output $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# The site, into build/site. No network: what a page would load from elsewhere is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site
	@! grep -rlE '(src=|stylesheet"[^>]*href=|url\()["'"'"']?(https?:)?//' build/site --include '*.html' \
	    --include '*.css' || { echo "these files load from the network"; exit 1; }
	@echo "open build/site/index.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
