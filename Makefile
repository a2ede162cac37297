# Two commands: `make demo` (install, train, sample, evaluate) and `make test` (install, test).
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: install demo test lint clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Ten minutes on two CPU cores. Run again, it goes on where it stopped.
demo: install $(RUN)/grid.png $(RUN)/metrics.json
	@echo
	@echo "$(RUN)/ holds the whole run:"
	@echo "  config.yaml      what was computed      curves.png     loss over training"
	@echo "  grid.png         a row a class          samples.npz    1000 samples and their labels"
	@echo "  checkpoints/     weights (safetensors)  metrics.json   the table below"
	@echo
	@$(BIN)/python -m fid_eval show $(RUN)/metrics.json

$(RUN)/trained: | install
	$(BIN)/python train_dit.py --config digits --run_dir $(RUN) --resume true
	@touch $@

$(RUN)/grid.png: $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --images_per_class 10 --output $@

$(RUN)/samples.npz: $(RUN)/trained
	$(BIN)/python sample_dit.py --checkpoint $(RUN) --guidance_scale 2 --num_inference_steps 50 \
	    --num_samples 1000 --output $@

$(RUN)/digits.npz: $(RUN)/trained
	$(BIN)/python -m moh_dit.data.export --data digits --image_size 32 --output $@

$(RUN)/metrics.json: $(RUN)/digits.npz $(RUN)/samples.npz
	$(BIN)/fid-eval $(RUN)/digits.npz $(RUN)/samples.npz --extractor digits --output $@

test: install
	$(BIN)/python -m pytest --numprocesses 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
