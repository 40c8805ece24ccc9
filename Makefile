# Everything runs inside .venv, made by `make setup`. `make demo` and `make test` set it up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch on every machine; override for CUDA: make setup TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
RECIPES := $(basename $(notdir $(wildcard recipes/*.yaml)))

# Tables of comparisons, by the targets' names: recipes/tables/NAME.yaml.
TABLES := $(basename $(notdir $(wildcard recipes/tables/*.yaml)))

.PHONY: setup demo test fuzz report-check lint zoo $(TABLES) bench-all bench-plan bench-cifar10 bench-sd14 bench-dit-xl2 same-integers soak $(RECIPES) $(RECIPES:=-ptq) full-size dilate-cost published

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[zoo,text,openvino,onnx,compressed-tensors,lora,dev]"
	touch $@

# The main job: a 4-bit model out of the embedded one, trained with the defaults and compared with it on 1024 images.
demo: setup
	$(BIN)/dqtool run recipes/digits-ddpm-w4a4.yaml -o demo --set eval.samples=1024
	@echo "The model: demo/exported   the report: demo/eval.json   the picture: demo/samples.png"

# One target per recipe: `make digits-ddpm-w4a4` writes results/digits-ddpm-w4a4/.
$(RECIPES): setup
	$(BIN)/dqtool run recipes/$@.yaml

# What training and scaling gain over: the same recipe calibrated alone, one quantizer for all steps. `make digits-ddpm-w4a4-ptq`.
$(RECIPES:=-ptq): setup
	$(BIN)/dqtool run recipes/$(@:-ptq=).yaml -o results/$@ --set dilate.scaling=none --set calibrate.scaling=keep --set distill.static=true --set distill.iters=0

test: setup
	$(BIN)/python -m pytest

# The page of `dqtool report`, opened in headless Chromium wide, narrow and dark: fails on any console error. A short PTQ
# chain gives it all sections; the committed results beside it, whose artifacts are not in the repository, leave some out.
report-check: setup
	$(BIN)/dqtool run recipes/digits-ddpm-w4a4.yaml -o results/report-check --set calibrate.samples=160 \
		--set distill.iters=0 --set eval.samples=64
	$(BIN)/dqtool report results/report-check recipes/results -o results/report-check/report.html
	$(BIN)/python tests/browser/check_page.py results/report-check/report.html --pictures results/report-check

# Every parser in process, by corpus and by structure: recipes/results/fuzz.md and .json (some minutes; fails on a traceback, a
# code 1, a second or 200 MB too much).
INPUTS ?= 100000
fuzz: setup
	$(BIN)/python tests/fuzz/driver.py --inputs $(INPUTS) -o recipes/results/fuzz

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Retrains the embedded models, their classifier and their autoencoder (about three hours on two cores), and measures them.
zoo: setup
	$(BIN)/python -m dqtool.zoo.train_classifier
	$(BIN)/python -m dqtool.zoo.train_ddpm
	$(BIN)/python -m dqtool.zoo.train_autoencoder
	$(BIN)/python -m dqtool.zoo.train_latent ldm
	$(BIN)/python -m dqtool.zoo.train_latent sd
	$(BIN)/python -m dqtool.zoo.train_latent dit --iters 6000
	for name in ddpm ldm sd dit; do $(BIN)/python -m dqtool.zoo.measure digits-$$name || exit; done

# A comparison of the paper: recipes/results/NAME.md and .json (`make bench-plan` says how long each takes). On the embedded
# models, or with MODEL=path/to/checkpoint on a published one; ARGS="--set eval.ref-stats=FILE ..." goes to the runner;
# either makes names of their own (NAME-published-..., NAME-set-...).
tables = OMP_NUM_THREADS=1 $(BIN)/python -m dqtool.tables $(1) $(if $(MODEL),--model $(MODEL)) $(ARGS)
$(TABLES): setup
	$(call tables,recipes/tables/$@.yaml)

# Every comparison, by two workers of one thread each. Stopped and started again it redoes nothing that was finished.
bench-all: setup
	$(call tables,recipes/tables/*.yaml) & other=$$!; $(call tables,recipes/tables/*.yaml); mine=$$?; wait $$other && exit $$mine

bench-plan: setup
	$(call tables,--dry-run recipes/tables/*.yaml)

# Speed, load time and memory at full size with random weights, next to what one would use instead:
# recipes/results/bench-*.md and .json (CIFAR-10 about 10 minutes on two cores, the others an hour and 16 GiB).
, := ,
bench = { echo '```' && $(BIN)/dqtool bench --runtime all -o recipes/results/$@.json $(1) && echo '```'; } \
	> recipes/results/$@.md.part && mv recipes/results/$@.md.part recipes/results/$@.md
bench-cifar10: setup
	$(call bench,--arch ddpm-cifar10 --against fp32$(,)bf16$(,)fp32-compile$(,)nncf-int8 --seconds 60)

bench-sd14: setup
	$(call bench,--arch sd14 --against fp32$(,)bf16$(,)nncf-int8 --seconds 120)

bench-dit-xl2: setup
	$(call bench,--arch dit-xl2 --against fp32$(,)bf16$(,)nncf-int8 --seconds 60)

# Accumulators of the integer runtimes against int64, every layer and step of zoo:digits-ddpm: recipes/results/same-integers.md.
same-integers: setup
	$(BIN)/python recipes/same_integers.py

# Kills and other disturbances at random instants of all stages: recipes/results/soak.md (an hour or more).
soak: setup
	$(BIN)/python tests/soak/kills.py --kills 2000 --models tiny,digits-ddpm -o recipes/results/soak

# Every published architecture at full size with random weights through the chain: recipes/results/full-size.md (needs 24 GiB).
full-size: setup
	$(BIN)/python recipes/full_size.py

# Memory and time of `dilate` on the 3.4 GB of Stable Diffusion v1.4: recipes/results/dilate-sd14.md (10 GB of disk; fails
# when a bar is not met).
dilate-cost: setup
	$(BIN)/python recipes/dilate_cost.py

# A published model from its checkpoint, on a GPU: make published RECIPE=cifar10-w4a4 MODEL=path/to/model-790000.ckpt
published: setup
	$(BIN)/dqtool run recipes/published/$(RECIPE).yaml --set model=$(MODEL)
