# Each target needs python3 (>= 3.11), make and a package index; .venv is created on first use.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TS := $(VENV)/bin/tinystories
# Programs that use `tinystories serve`, in an environment of their own.
CLIENTS ?= .venv-clients
# Tests run in parallel, one thread each.
WORKERS := --numprocesses=auto --maxprocesses=8
# Numba cannot cache functions that the import hook wraps, so engine/cpu is left out.
HOOK := --jaxtyping-packages=tinystories.model,tinystories.engine.native_step,tinystories.engine.cuda_graph,tinystories.engine.torch_engine,beartype.beartype

# Options of gpu-kit and gpu-rehearsal; whatever is not given is replaced by a stand-in.
KIT := $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(DATA),--data "$(DATA)")

# Tests that need nothing but the dev extra and a few minutes.
HERE := not slow and not gpu and not interop and not browser

.PHONY: help install clients demo page storyteller test test-all test-extended test-slow test-wheel test-interop test-browser test-gpu gpu-kit gpu-rehearsal check format objects dist clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/installed  ## create .venv and install the package with all extras

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clients: $(CLIENTS)/installed  ## create .venv-clients with programs that use the server: openai, litellm, schemathesis

$(CLIENTS)/installed: tests/serve/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/serve/clients/requirements.txt
	@touch $@

demo: install  ## read a story, then train a tiny model for half a minute (offline after the install)
	@echo "== 1. A story by the bundled storyteller"
	$(TS) generate --seed 49
	@echo; echo "== 2. Your own: tokenize the 172 bundled stories"
	$(TS) prepare sample --tokenizer bpe:1024 --out data/demo
	@echo; echo "== 3. Train for half a minute"
	$(TS) train --config nano --data data/demo --out runs/demo --resume --model.dropout 0.1 \
	  --train.steps 90 --train.batch_size 8 --train.micro_batch 8 --train.eval_every 45 --train.sample_tokens 60
	@echo; echo "== 4. Its story (trained on 172 stories for half a minute: expect the sound of one, not the sense)"
	$(TS) generate runs/demo --prompt "Once upon a time" --max-tokens 150 --seed 4
	@echo; echo "The loss curve is in runs/demo/loss.png. Three commands to try next:"
	@echo "  $(TS) generate runs/demo --prompt 'The little bear' --temperature 0.6"
	@echo "  $(TS) train --config small --out runs/small     # downloads TinyStories; an hour on 2 cores"
	@echo "  $(TS) prepare YOUR_STORIES.txt --tokenizer bpe:2048 --out data/mine   # then train --data data/mine"

page: install  ## the bundled storyteller as one HTML file in build/page/, ready for GitHub Pages (docs/interop.md)
	@mkdir -p build/page
	$(TS) export --format html --out build/page/index.html --force
	@touch build/page/.nojekyll

storyteller: install  ## retrain the bundled storyteller: TRAIN=train.txt VAL=valid.txt (hours; resumes if interrupted)
	@test -f "$(TRAIN)" -a -f "$(VAL)" || { echo "make storyteller TRAIN=train.txt VAL=valid.txt (text files, stories separated by <|endoftext|>)"; exit 1; }
	$(TS) prepare "$(TRAIN)" --val "$(VAL)" --tokenizer src/tinystories/bundled --out data/storyteller
	$(TS) train --config storyteller --data data/storyteller --out runs/storyteller-512 --resume --model.n_ctx 512 \
	  --model.dropout 0.05 --train.batch_size 4 --train.micro_batch 4 --train.steps 7800
	$(TS) train --config storyteller --data data/storyteller --out runs/storyteller-taught --resume --model.n_ctx 512 \
	  --model.dropout 0.05 --train.batch_size 4 --train.micro_batch 4 --train.steps 7800 --train.seed 3 \
	  --train.teacher runs/storyteller-512 --train.teacher_weight 0.5
	$(TS) train --config storyteller --data data/storyteller --out runs/storyteller-two-teachers --resume --model.n_ctx 512 \
	  --model.dropout 0.05 --train.batch_size 4 --train.micro_batch 4 --train.steps 3700 --train.seed 4 \
	  --train.init runs/storyteller-taught --train.teacher "runs/storyteller-512|runs/storyteller-taught" \
	  --train.teacher_weight 0.6 --optim.muon_rate 0.009 --optim.learning_rate 0.004
	rm -rf runs/storyteller-packed && $(TS) quantize runs/storyteller-two-teachers --out runs/storyteller-packed --repetition-penalty 1.2 \
	  --repetition-window 128 --spare-names
	$(PY) benchmarks/storyteller.py runs/storyteller-packed --train "$(TRAIN)" --val "$(VAL)"

test: install  ## fast tests, some minutes: no network, no GPU
	@$(TS) warmup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) $(HOOK) -m "not extended and not compile and $(HERE)"

test-all: test test-extended  ## the fast tests and those that take longer

test-extended: install clients  ## tests that take longer than those of `make test`: some minutes, also of torch.compile
	@$(TS) warmup
	OMP_NUM_THREADS=1 TINYSTORIES_CLIENTS=$(abspath $(CLIENTS)) $(PY) -m pytest $(WORKERS) $(HOOK) -m "extended and not compile and $(HERE)"
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "compile and $(HERE)"

test-slow: install  ## tests that take minutes
	$(PY) -m pytest -m "slow and not gpu and not interop" --timeout=3600
	$(MAKE) gpu-rehearsal

test-wheel: objects  ## install the wheel into an empty environment; its first story compiles nothing
	$(PY) -m pytest -m interop tests/test_wheel.py

test-interop: objects clients  ## install llama.cpp and other slow-to-build packages, then run the tests marked interop
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt llama-cpp-python lm_eval transformer_lens
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/serve/clients/requirements-lm-eval.txt
	OMP_NUM_THREADS=1 TINYSTORIES_CLIENTS=$(abspath $(CLIENTS)) $(PY) -m pytest -m interop

test-browser: install  ## tests of the pages in a real browser: needs Debian's chromium (apt-get install chromium)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright axe-playwright-python
	@$(TS) warmup
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "browser and not slow" -rs

test-gpu: install  ## tests that need a CUDA device
	$(PY) -m pytest -m gpu

gpu-kit: install  ## put everything a borrowed GPU needs into gpu-kit/: NANOGPT=nanoGPT/model.py DATA=stories (docs/gpu.md)
	$(PY) benchmarks/gpu_kit.py $(KIT)

gpu-rehearsal: install  ## run both plans of benchmarks/gpu.py on the CPU at toy size, as the borrowed machine would
	$(PY) benchmarks/gpu_rehearsal.py $(KIT)

check: install  ## lint, type-check and check the import order
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest tests/test_architecture.py

format: install  ## format the code with ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

objects: install  ## compile the CPU engine for all levels of processors (minutes; the same sources give the same bytes)
	$(PY) -m tinystories.engine.cpu.objects

dist: objects  ## build the wheel, with the objects, and the source distribution
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build
	$(PY) -m build --sdist --wheel

clean:  ## remove the output of the demo, of objects and of dist
	rm -rf runs/demo data/demo build dist src/tinystories/engine/cpu/objects
