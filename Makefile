# Everything runs inside .venv, made by `make setup`. `make demo` and `make test` set it up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch on every machine; override for CUDA: make setup TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
RECIPES := $(basename $(notdir $(wildcard recipes/*.yaml)))

.PHONY: setup demo test lint zoo ablation $(RECIPES)

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[zoo,dev]"
	touch $@

# The main job: a 4-bit model out of the embedded one, trained with the defaults and compared with it on 1024 images.
demo: setup
	$(BIN)/dqtool run recipes/digits-ddpm-w4a4.yaml -o demo --set eval.samples=1024
	@echo "The model: demo/exported   the report: demo/eval.json   the picture: demo/samples.png"

# One target per recipe: `make digits-ddpm-w4a4` writes results/digits-ddpm-w4a4/.
$(RECIPES): setup
	$(BIN)/dqtool run recipes/$@.yaml

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Retrains the embedded models and their classifier (about an hour on two cores).
zoo: setup
	$(BIN)/python -m dqtool.zoo.train_classifier
	$(BIN)/python -m dqtool.zoo.train_ddpm

# The table of what each part gains, over three seeds: recipes/results/ablation.md (about two hours on two cores).
ablation: setup
	$(BIN)/python recipes/ablation.py
