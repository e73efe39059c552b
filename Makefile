# Each target needs python3 (>= 3.11), make and a package index; .venv is made when it is not there.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TS := $(VENV)/bin/tinystories
# Tests run side by side, one thread each.
WORKERS := --numprocesses=auto --maxprocesses=8
# numba cannot cache hooked functions: engine/cpu is left out.
HOOK := --jaxtyping-packages=tinystories.model,tinystories.engine.native_step,tinystories.engine.cuda_graph,tinystories.engine.torch_engine,beartype.beartype

# Of gpu-kit and gpu-rehearsal; stand-ins are made of what is not given.
KIT := $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(DATA),--data "$(DATA)")

.PHONY: help install demo storyteller test test-slow test-interop test-gpu gpu-kit gpu-rehearsal check format dist clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/installed  ## make .venv and install the package with all extras

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## read a story, then train a tiny model for half a minute (no network after the install)
	@echo "== 1. A story by the storyteller that comes with the package"
	$(TS) generate --seed 36
	@echo; echo "== 2. Your own: the 172 stories that come with the package, as tokens"
	$(TS) prepare sample --tokenizer bpe:1024 --out data/demo
	@echo; echo "== 3. Half a minute of training"
	$(TS) train --config nano --data data/demo --out runs/demo --resume --model.dropout 0.1 \
	  --train.steps 90 --train.batch_size 8 --train.micro_batch 8 --train.eval_every 45 --train.sample_tokens 60
	@echo; echo "== 4. Its story (it has read 172 stories for half a minute: expect the sound of one, not the sense)"
	$(TS) generate runs/demo --prompt "Once upon a time" --max-tokens 150 --seed 4
	@echo; echo "The loss curve is in runs/demo/loss.png. Three commands to try next:"
	@echo "  $(TS) generate runs/demo --prompt 'The little bear' --temperature 0.6"
	@echo "  $(TS) train --config small --out runs/small     # downloads TinyStories; an hour on 2 cores"
	@echo "  $(TS) prepare YOUR_STORIES.txt --tokenizer bpe:2048 --out data/mine   # then train --data data/mine"

storyteller: install  ## train the bundled storyteller again: TRAIN=train.txt VAL=valid.txt (hours; goes on where it stopped)
	@test -f "$(TRAIN)" -a -f "$(VAL)" || { echo "make storyteller TRAIN=train.txt VAL=valid.txt (texts, stories divided by <|endoftext|>)"; exit 1; }
	$(TS) prepare "$(TRAIN)" --val "$(VAL)" --tokenizer bpe:4096 --out data/storyteller
	$(TS) train --config storyteller --data data/storyteller --out runs/storyteller --resume --train.compile on
	$(TS) train --config storyteller --data data/storyteller --out runs/storyteller-512 --resume --train.compile on \
	  --train.init runs/storyteller --model.n_ctx 512 --train.batch_size 4 --train.micro_batch 4 --train.steps 1500 \
	  --optim.muon_rate 0.006 --optim.learning_rate 0.0027
	rm -rf runs/storyteller-packed && $(TS) pack runs/storyteller-512 --out runs/storyteller-packed --repetition-penalty 1.2
	$(PY) benchmarks/storyteller.py runs/storyteller-packed --train "$(TRAIN)" --val "$(VAL)"

test: install  ## fast tests: no network, no GPU
	@$(TS) warmup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) $(HOOK) -m "not compile and not slow and not gpu and not interop"
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "compile and not slow and not gpu and not interop"

test-slow: install  ## the tests that take minutes
	$(PY) -m pytest -m "slow and not gpu and not interop" --timeout=3600
	$(MAKE) gpu-rehearsal

test-interop: install  ## install the peers that take long to build, and run the tests marked interop
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt llama-cpp-python lm_eval transformer_lens
	OMP_NUM_THREADS=1 $(PY) -m pytest -m interop

test-gpu: install  ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu

gpu-kit: install  ## what a borrowed GPU needs, in gpu-kit/: NANOGPT=nanoGPT/model.py DATA=stories (docs/gpu.md)
	$(PY) benchmarks/gpu_kit.py $(KIT)

gpu-rehearsal: install  ## both plans of benchmarks/gpu.py on the CPU at toy size, as the borrowed machine would run them
	$(PY) benchmarks/gpu_rehearsal.py $(KIT)

check: install  ## lint, types, import order
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest tests/test_architecture.py

format: install  ## apply ruff's formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

dist: install  ## build the wheel and the source archive
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build
	$(PY) -m build

clean:  ## remove what the demo made
	rm -rf runs/demo data/demo build dist
