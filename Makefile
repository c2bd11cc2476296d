# Most targets run in .venv. They first run the set-up (`make setup`) if .venv is missing or out of date.

PYTHON ?= python3
# The arguments of `pip install` for torch, such as "torch==2.13.0" or "torch torchvision --index-url <address>".
TORCH ?= torch torchvision
# The images of the demo: digits, fashion-mnist, cifar10 or a folder of class folders.
DATA ?= digits
# How many processes run the tests of `make test`.
WORKERS ?= 2
# How many seconds `make fuzz` runs.
SECONDS ?= 60
# How many minutes `make soak`, gpu-soak, gpu-bench and gpu-bench-hamming run. After this time, a benchmark starts no
# measurement. gpu-bench spends half of the time on search, a quarter on kernels, a tenth on kernels in CUDA graphs and
# the rest on networks. The default is chosen so that gpu-bench ends within ten minutes, including the set-up, the start
# of five programs and the last measurement of each.
MINUTES ?= 6
# How many compilers `make lint` runs in parallel.
JOBS ?= $(shell nproc)

BIN := .venv/bin
READY := .venv/.ready
LINTERS_READY := .venv/.linters
SOURCES := pyproject.toml setup.py hashengine/_toolchain.py hashengine/_version.py $(shell find csrc -mindepth 2 -type f)

# GPU_TESTS need a GPU. SMALL is an expression for pytest -k: it selects short tests, for racecheck and synccheck.
GPU_TESTS := tests/gpu
SMALL := packing or nan or (accurate and (7 or 11)) and not 2048 or (equals_the_cpu and (70 or 1000))

# The name of the GPU, as a part of the names of result files.
GPU = $(shell nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' A-Z' '-a-z')

share = $(shell awk 'BEGIN { print $(MINUTES) * $(1) }')

CPP_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
TEXT_FILES = $(wildcard *.md) csrc docs hashengine training benchmarks tests
WARNINGS := -Wall -Wextra -Wshadow -Wconversion -Werror

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint lint-fast lint-warnings format docs fuzz soak bench \
	gpu-first gpu-test gpu-sanitize gpu-soak gpu-bench gpu-bench-hamming gpu-profile clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY)  ## install every dependency into .venv and build the native module (HASHENGINE_BUILD=auto|cpu|cuda)
	@$(BIN)/hashengine doctor

# uv installs torch faster than pip does; pip is used if uv cannot be installed. The first installation chooses the
# version of torch. The second must use the same version, so that the native module is compiled for the installed torch.
# Unlike pip, uv compiles bytecode only if it is asked to. Without bytecode, every start of Python compiles torch again if
# PYTHONDONTWRITEBYTECODE is set.
$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hashengine needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@set -e; \
	install="$(BIN)/python -m pip install"; \
	if $$install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python "setuptools>=77"; then \
		install="$(BIN)/uv pip install --python $(BIN)/python"; \
		rebuild="--reinstall-package hashengine --compile-bytecode"; \
	fi; \
	echo "installing $(TORCH)"; \
	$$install "setuptools>=77" ninja numpy pybind11 $(TORCH); \
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > .venv/constraints.txt; \
	echo "building hashengine and installing its extras"; \
	$$install $$rebuild --no-build-isolation --constraint .venv/constraints.txt --editable ".[all]"
	@touch $@ $(LINTERS_READY)

demo: $(READY)  ## train on DATA=digits, encode, index, search, evaluate; writes demo/report.html
	$(BIN)/hashengine demo --data $(DATA)

test: $(READY)  ## run the tests that take less than ten seconds each, in WORKERS=2 processes
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-full: $(READY)  ## run all tests
	$(BIN)/python -m pytest

lint: lint-fast $(READY)  ## check format, style, spelling, compiler warnings and types; changes no file
	$(BIN)/mypy

# These checks need no torch, so .ci/run starts with them, before the set-up.
lint-fast: $(LINTERS_READY) lint-warnings  ## run the checks of lint that need no torch; takes seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/codespell $(TEXT_FILES)

# The compiler parses each source file of the CPU kernels, and each header of csrc/include on its own.
lint-warnings:  ## compile the CPU kernels and the shared headers with warnings as errors; writes no object files
	@find csrc/cpu -name '*.cpp' | xargs -P $(JOBS) -I{} $(CXX) -x c++ -fsyntax-only -fopenmp \
		$(WARNINGS) -Wno-psabi -Icsrc/include -Icsrc {}
	@find csrc/include -name '*.h' | xargs -P $(JOBS) -I{} sh -c \
		'echo "#include \"{}\"" | $(CXX) -x c++ -fsyntax-only $(WARNINGS) -Icsrc/include -I. -'

# Installs the packages of the extra "lint" in pyproject.toml, which lint-fast needs.
$(LINTERS_READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@set -e; \
	install="$(BIN)/python -m pip install --quiet"; \
	if $$install uv; then install="$(BIN)/uv pip install --quiet --python $(BIN)/python"; fi; \
	sed -n '/^lint = \[/,/^]/s/^    "\([^"]*\)",$$/\1/p' pyproject.toml > .venv/linters.txt; \
	$$install --requirement .venv/linters.txt
	@touch $@

format: $(LINTERS_READY)  ## format the Python, C++ and CUDA sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

docs: $(READY)  ## build the documentation site in build/site; open its index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

fuzz: $(READY)  ## fuzz the file readers for SECONDS=60, under AddressSanitizer
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

soak: $(READY)  ## run random index operations on the CPU for MINUTES=6 and compare every answer with a second index
	$(BIN)/python -m tests.soak --device cpu --minutes $(MINUTES)

bench: $(READY)  ## time the pytest-benchmark cases
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

# Runs without a network and without the set-up. STEPS is a list of step names, such as "setup tests"; all by default.
gpu-first:  ## on a GPU without a network: set up from WHEELS=folder, then check and measure, step by step
	$(PYTHON) -m benchmarks.gpu_first $(if $(WHEELS),--wheels $(WHEELS)) $(STEPS)

gpu-test: $(READY)  ## on a machine with a GPU: run the tests that need one, with the CUDA build
	$(BIN)/python -m pytest $(GPU_TESTS)
	$(BIN)/python -m pytest tests/cuda/test_hamming_topk.py -k gpu

# Memcheck leaves out tests with 31 in their names, such as the test of more than 2^31 elements. Racecheck makes
# accesses to shared memory much slower, so it runs only the tests of SMALL. Synccheck runs the same tests.
gpu-sanitize: $(READY)  ## run the GPU tests under compute-sanitizer: memcheck, racecheck, synccheck
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "not 31"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "$(SMALL)"
	compute-sanitizer --tool synccheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "$(SMALL)"

gpu-soak: $(READY)  ## run random index operations on the GPU for MINUTES=6 and compare every answer with the CPU's
	$(BIN)/python -m tests.soak --device cuda --minutes $(MINUTES)

# `model` gets --no-compile, because torch.compile takes too long for whole networks; `kernels` compiles every layer.
gpu-bench: $(READY)  ## on a GPU, for MINUTES=6: measure search, kernels and networks; writes benchmarks/results
	$(BIN)/python -m benchmarks hamming-gpu --minutes $(call share,0.5) --output benchmarks/results/hamming-gpu-$(GPU).jsonl
	$(BIN)/python -m benchmarks kernels --minutes $(call share,0.25) --device cuda --seconds 0.5 \
		--layout contiguous --layout channels_last --output benchmarks/results/kernels-$(GPU).jsonl
	$(BIN)/python -m benchmarks kernels --minutes $(call share,0.1) --device cuda --seconds 0.5 --cuda-graphs \
		--output benchmarks/results/kernels-$(GPU)-graphs.jsonl
	$(BIN)/python -m benchmarks model resnet50 resnet18 --minutes $(call share,0.15) --device cuda --steps 20 --no-compile \
		--attention triplet --attention simam --batch 128 --dtype bfloat16 --layout channels_last \
		--output benchmarks/results/model-$(GPU).jsonl
	$(BIN)/python -m benchmarks report

gpu-bench-hamming: $(READY)  ## on a GPU, for MINUTES=6: measure search alone, the most important cases first
	$(BIN)/python -m benchmarks hamming-gpu --minutes $(MINUTES) --output benchmarks/results/hamming-gpu-$(GPU).jsonl
	$(BIN)/python -m benchmarks report

gpu-profile: $(READY)  ## on a GPU: measure the time of each kernel of five ops; writes traces to build/profile
	for op in simam triplet_attention greedy_sign pack_bits hamming_topk; do \
		$(BIN)/python -m benchmarks profile $$op --device cuda --output build/profile || exit 1; done

clean:  ## remove build outputs and the demo; keeps .venv, but builds again when it is needed
	rm -rf build dist demo *.egg-info hashengine/_C.*so hashengine/_build.json $(READY)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
