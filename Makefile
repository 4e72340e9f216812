# Everything runs in .venv, made on first use; `make help` lists the targets.
# PYTHON chooses the interpreter the environment is made from, and for `make gpu` the one that runs it, without any environment.

.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
GPU_PYTHON := $(PY)
GPU_SETUP := $(VENV)/.built
else
GPU_PYTHON := $(PYTHON)
GPU_SETUP :=
endif

# Not in constraints.txt: torch's CUDA builds ask for one exact older Triton, its CPU builds for none. Kernels are developed on this one.
TRITON := 'triton==3.9.0; platform_system == "Linux" and python_version >= "3.11"' \
          'triton==3.8.0; platform_system == "Linux" and python_version < "3.11"'
NATIVE_SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)
PIP := $(PY) -m pip --disable-pip-version-check -qq
# Python compiles a module when it is first imported; all of torch and of the trainers at once takes most of a minute.
INSTALL := $(PIP) install --no-compile
# Without their dependencies, which want GPUs and other versions than TRL's.
BARE_TRAINERS := 'verl; python_version >= "3.11" and python_version < "3.13"' \
                 'openrlhf; python_version >= "3.11" and python_version < "3.13"'
TESTS ?= tests
WORKERS ?= 2
RANKS ?= 2

.PHONY: help setup quickstart lab curriculum diffusion kept-sets parallel test fuzz soak sanitize lint format bench bench-check bench-losses bench-bgpo bench-head bench-keep bench-packed bench-parallel report gpu torch-versions trl-versions peers docs wheels clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built  ## make .venv, install everything in it, build the CPU kernels

quickstart: $(VENV)/.built  ## DPO on real text, eager PyTorch against rlkern (ARGS="--steps 20" and so on)
	$(PY) examples/quickstart.py $(ARGS)

lab: $(VENV)/.built  ## entropy and accuracy under GRPO, Clip-Cov, KL-Cov, Lp-Reg: reinforcement learning of a small model (ARGS="--first-seed 3")
	$(PY) examples/entropy_lab.py $(ARGS)

curriculum: $(VENV)/.built  ## rules that choose prompts or weigh rewards, in the training of a small model (ARGS="--study weights")
	$(PY) examples/curriculum_lab.py $(ARGS)

diffusion: $(VENV)/.built  ## BGPO on a small diffusion model: memory and reward against the number of draws (ARGS="--quick")
	$(PY) examples/diffusion_rl.py $(ARGS)

kept-sets: $(VENV)/.built  ## importance ratios of tokens sampled with top-p, with and without the sampler's sets (ARGS="--top-p 0.95")
	$(PY) examples/kept_sets.py $(ARGS)

parallel: $(VENV)/.built  ## GRPO with the output matrix cut over RANKS=2 processes, compared with one process (ARGS="--steps 6")
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) examples/tensor_parallel.py $(ARGS)

# Tests start many processes. Each would compile torch, or verl, anew.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.trainers $(VENV)/.docs  ## all tests (TESTS=tests/test_operator.py, WORKERS=1, ARGS="-k name" narrow it)
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(TESTS) $(ARGS)

fuzz: $(VENV)/.fuzz  ## ten minutes of random calls, numerical properties and steered bytes (ARGS="--minutes 30 --seed 1")
	$(PY) tests/fuzz $(ARGS)

soak: $(VENV)/.built  ## thirty minutes of legal calls from several threads: same bits, flat memory (ARGS="--minutes 2")
	$(PY) tests/soak.py $(ARGS)

sanitize: $(VENV)/.built  ## the CPU kernels under the address, undefined-behaviour and thread sanitizers (ARGS="--only thread --calls 2000")
	$(PY) tests/sanitizers.py $(ARGS)

lint: $(VENV)/.deps  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h tests/native/*.cpp

format: $(VENV)/.deps  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h tests/native/*.cpp

bench: $(VENV)/.built  ## time and memory against other implementations on this machine
	$(PY) benchmarks/run.py $(ARGS)

bench-check: $(VENV)/.built  ## fail if the kernels have become slower than the recorded figures
	$(PY) benchmarks/check.py $(ARGS)

bench-losses: $(VENV)/.built  ## Clip-Cov, KL-Cov and Lp-Reg from logits to gradient, against eager PyTorch
	$(PY) benchmarks/losses.py $(ARGS)

bench-bgpo: $(VENV)/.built  ## one Monte-Carlo draw of BGPO from logits to gradient, against eager PyTorch
	$(PY) benchmarks/bgpo.py $(ARGS)

bench-head: $(VENV)/.built  ## from hidden states to gradients: the linear head's plans, eager, compiled, PyTorch's and TRL's functions
	$(PY) benchmarks/linear_head.py $(ARGS)

bench-keep: $(VENV)/.built  ## rows over kept ids by format, against eager PyTorch; sampler_threshold against sorting
	$(PY) benchmarks/kept_sets.py $(ARGS)

bench-packed: $(VENV)/.built  ## losses of packed tokens against the padded form and eager PyTorch (ARGS="--sizes 65536x128")
	$(PY) benchmarks/packed.py $(ARGS)

bench-parallel: $(VENV)/.built  ## vocabularies cut over 1, 2 and 4 processes: time, traffic, against three all_reduces (ARGS="--rows 256")
	$(PY) benchmarks/parallel.py $(ARGS)

report: $(VENV)/.built  ## compile every GPU kernel offline and tabulate what the compiler made of it; needs no GPU
	$(PY) benchmarks/report.py $(ARGS)

gpu: $(GPU_SETUP)  ## tests and benchmarks on this machine's GPU (PYTHON=python3: with that, no .venv, no network; STAGE=first or second: half of it)
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(STAGE),--stage $(STAGE)) $(ARGS)

torch-versions: $(VENV)/.built  ## the core tests with torch 2.6 to 2.14, each with a Triton of its own; downloads gigabytes (ARGS="2.6.0 2.14.1")
	$(PY) tests/torch_versions.py $(ARGS)

trl-versions: $(VENV)/.trainers  ## the TRL tests with every release of TRL that the integration knows
	$(PY) tests/integrations/trl_versions.py $(ARGS)

peers: $(VENV)/.deps  ## fetch the packages that benchmarks compare with into build/peers (make gpu takes them from there)
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(PIP) download --no-deps --no-build-isolation --no-binary flash-attn -d build/peers -r benchmarks/peers.txt

wheels: $(VENV)/.deps  ## sdist and manylinux wheels in dist/, for every CPython here, audited and tried (ARGS="--torch 2.6.0 2.14.1")
	$(PY) release/wheels.py $(ARGS)

docs: $(VENV)/.docs  ## the documentation as a site in build/site
	@$(PY) -c "import mkdocs" 2>/dev/null || { echo "mkdocs-material needs Python 3.11 or newer; make clean and make PYTHON=/path/to/python3 chooses another one"; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "build/site/index.html; to search in it: python3 -m http.server -d build/site"

clean:  ## remove everything that make made
	rm -rf $(VENV) .editable build dist out *.egg-info rlkern/*.so .benchmarks .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "rlkern needs Python 3.10 or newer; make PYTHON=/path/to/python3 chooses another one"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python's venv module is missing (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/.deps: requirements-dev.txt constraints.txt Makefile | $(PY)
	@echo "installing the packages of requirements-dev.txt into $(VENV) (the first time: a minute or more)"
	$(INSTALL) -r requirements-dev.txt -c constraints.txt
	$(INSTALL) --no-deps $(TRITON)
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE_SOURCES)
	@echo "building the CPU kernels and installing rlkern in place"
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.fuzz: $(VENV)/.built requirements-fuzz.txt
	$(INSTALL) -r requirements-fuzz.txt -c constraints.txt
	@touch $@

$(VENV)/.trainers: $(VENV)/.built requirements-trainers.txt
	@echo "installing the trainers of requirements-trainers.txt into $(VENV) (the first time: a minute)"
	$(INSTALL) -r requirements-trainers.txt -c constraints.txt
	$(INSTALL) --no-deps -c constraints.txt $(BARE_TRAINERS)
	@touch $@

$(VENV)/.docs: requirements-docs.txt constraints.txt | $(PY)
	@echo "installing the packages of requirements-docs.txt into $(VENV)"
	$(INSTALL) -r requirements-docs.txt -c constraints.txt
	@touch $@
