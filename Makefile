# Everything runs in .venv, which `make setup` fills; each target sets up first where that is needed.

PYTHON ?= python3
# What to install as torch, in pip's words: TORCH="torch==2.13.0", TORCH="torch torchvision --index-url <address>".
TORCH ?= torch torchvision
# digits, fashion-mnist, cifar10 or a folder of class folders
DATA ?= digits

BIN := .venv/bin
READY := .venv/.ready
SOURCES := pyproject.toml setup.py hashengine/_toolchain.py hashengine/_version.py $(wildcard csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full bench lint clean

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

bench: $(READY)  ## the pytest-benchmark cases, timed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove what was built, and the demo; .venv stays, and is filled again by the next target
	rm -rf build dist demo *.egg-info hashengine/_C.*so hashengine/_build.json $(READY)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
