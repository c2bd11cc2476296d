# Everything runs in .venv, which `make setup` fills; each target sets up first where that is needed.

PYTHON ?= python3
# What to install as torch, in pip's words: TORCH="torch==2.13.0", TORCH="torch torchvision --index-url <address>".
TORCH ?= torch torchvision
# digits, fashion-mnist, cifar10 or a folder of class folders
DATA ?= digits
# of make fuzz
SECONDS ?= 60
# of make gpu-soak, gpu-bench-hamming and gpu-bench, after which no measurement is begun. gpu-bench gives half of them to
# the search, a quarter to the kernels, a tenth to their CUDA graphs, and the rest to whole networks. 6 are to leave enough
# of ten minutes for the setup, two on 16 cores, for the starts of five programs, and for the last measurement of each.
MINUTES ?= 6

BIN := .venv/bin
READY := .venv/.ready
SOURCES := pyproject.toml setup.py hashengine/_toolchain.py hashengine/_version.py $(wildcard csrc/*/*.* csrc/*/*/*.*)

# The tests that need a GPU, and those of them that are short enough for a race detector.
GPU_TESTS := tests/gpu
SMALL := packing or formula or nan or (accurate and (7 or 11)) and not 2048 or (equals_the_cpu and (70 or 1000))

# The name of the GPU, for the files of results.
GPU = $(shell nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' A-Z' '-a-z')

share = $(shell awk 'BEGIN { print $(MINUTES) * $(1) }')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full fuzz gpu-test gpu-soak gpu-sanitize gpu-bench gpu-bench-hamming gpu-profile bench lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY)  ## .venv with every dependency and the native module (HASHENGINE_BUILD=auto|cpu|cuda)
	@$(BIN)/hashengine doctor

# uv installs torch in a fifth of the time; where it cannot be had, pip does. The versions that the first installation
# chose bind the second one, which must not replace the torch that the native module is compiled against.
$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hashengine needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@set -e; \
	install="$(BIN)/python -m pip install"; \
	if $$install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python "setuptools>=77"; then \
		install="$(BIN)/uv pip install --python $(BIN)/python"; rebuild="--reinstall-package hashengine"; \
	fi; \
	echo "installing $(TORCH)"; \
	$$install "setuptools>=77" ninja numpy pybind11 $(TORCH); \
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > .venv/constraints.txt; \
	echo "building hashengine and installing its extras"; \
	$$install $$rebuild --no-build-isolation --constraint .venv/constraints.txt --editable ".[all]"
	@touch $@

demo: $(READY)  ## train on DATA=digits, encode, index, search, evaluate; writes demo/report.html
	$(BIN)/hashengine demo --data $(DATA)

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest -m "not slow"

test-full: $(READY)  ## the test suite with its slow parts
	$(BIN)/python -m pytest

fuzz: $(READY)  ## SECONDS=60 of a fuzzer on the readers of files, under AddressSanitizer
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

gpu-test: $(READY)  ## on a machine with a GPU: the tests that need it, and the CUDA build that they run
	$(BIN)/python -m pytest $(GPU_TESTS)
	$(BIN)/python -m pytest tests/cuda/test_hamming_topk.py -k gpu

# Racecheck looks at shared memory, and every access costs a hundred: it takes the small cases only.
gpu-sanitize: $(READY)  ## the same under compute-sanitizer: memcheck, racecheck, synccheck
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "not 31"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "$(SMALL)"
	compute-sanitizer --tool synccheck --error-exitcode 1 $(BIN)/python -m pytest -q -x $(GPU_TESTS) -k "$(SMALL)"

gpu-soak: $(READY)  ## MINUTES=6 of random operations on an index on the GPU, each compared with the CPU's, bit for bit
	$(BIN)/python -m tests.soak --device cuda --minutes $(MINUTES)

bench: $(READY)  ## the pytest-benchmark cases, timed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

# Networks are not compiled here: each takes a minute until it runs, and `kernels` compiles every layer.
gpu-bench: $(READY)  ## on a GPU, for MINUTES=6: search, kernels, networks, the important ones first; benchmarks/results
	$(BIN)/python -m benchmarks hamming-gpu --minutes $(call share,0.5) --output benchmarks/results/hamming-gpu-$(GPU).jsonl
	$(BIN)/python -m benchmarks kernels --minutes $(call share,0.25) --device cuda --seconds 0.5 \
		--layout contiguous --layout channels_last --output benchmarks/results/kernels-$(GPU).jsonl
	$(BIN)/python -m benchmarks kernels --minutes $(call share,0.1) --device cuda --seconds 0.5 --cuda-graphs \
		--output benchmarks/results/kernels-$(GPU)-graphs.jsonl
	$(BIN)/python -m benchmarks model resnet50 resnet18 --minutes $(call share,0.15) --device cuda --steps 20 --no-compile \
		--attention triplet --attention simam --batch 128 --dtype bfloat16 --layout channels_last \
		--output benchmarks/results/model-$(GPU).jsonl
	$(BIN)/python -m benchmarks report

gpu-profile: $(READY)  ## on a GPU: where the time of each op goes, kernel by kernel; traces in build/profile
	for op in simam triplet_attention greedy_sign pack_bits hamming_topk; do \
		$(BIN)/python -m benchmarks profile $$op --device cuda --output build/profile || exit 1; done

gpu-bench-hamming: $(READY)  ## the search alone, for MINUTES=6 at most, the important measurements first
	$(BIN)/python -m benchmarks hamming-gpu --minutes $(MINUTES) --output benchmarks/results/hamming-gpu-$(GPU).jsonl
	$(BIN)/python -m benchmarks report

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove what was built, and the demo; .venv stays, and is filled again by the next target
	rm -rf build dist demo *.egg-info hashengine/_C.*so hashengine/_build.json $(READY)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
