# Everything a user or a developer runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV := .venv
NEXT_VENV := .venv-next
NEXT_JAX := 0.12.*
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed.stamp
# Extra arguments for pytest, e.g. make test ARGS='-k pool -x'
ARGS :=
WORKERS := 2

MIN_PYTHON := 3.12
# The first of these that runs and is new enough; a version manager's shim may exist and still refuse to run.
PYTHONS := $(PYTHON) python3.12 python3 python3.13 python3.14 python
IS_NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 12))
FIND_PYTHON = for python in $(PYTHONS); do \
    if "$$python" -c '$(IS_NEW_ENOUGH)' >/dev/null 2>&1; then command -v "$$python"; break; fi; done
FOUND_PYTHON = $(shell python3 -c 'import sys; print("Python %d.%d.%d at %s" % (sys.version_info[:3] + (sys.executable,)))' \
    2>/dev/null || echo none)
TOO_OLD = jaxinfer needs Python $(MIN_PYTHON) or newer, found: $(FOUND_PYTHON). Install Python $(MIN_PYTHON), or name one: \
make setup PYTHON=/path/to/python$(MIN_PYTHON)

# Settings of the surrounding shell that would send packages elsewhere than into the environment.
CLEAN := env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_CONSTRAINT PIP_USER=0 \
    PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1
# One line a package; errors and warnings go to the terminal unfiltered.
SHOW := awk '$$1 == "Collecting" || $$1 == "Downloading" {print "  " tolower($$1) " " $$2; fflush()} \
    $$1 == "Installing" {print "  installing"; fflush()}'

.PHONY: help setup aot-packages aot test soak smoke lint demo smg-demo bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with everything in it (Python 3.12 or newer)
	@echo "ready: $(VENV) ($$($(PY) --version))"

# Expanded only when an environment has to be made; without a usable Python make stops with this one line.
python = $(or $(shell $(FIND_PYTHON)),$(error $(TOO_OLD)))

%/bin/python:
	@echo "making $* with $(python)"
	@rm -rf $*
	@$(CLEAN) "$(python)" -m venv $*

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@$(PY) -c '$(IS_NEW_ENOUGH)' || { echo "$(VENV) has $$($(PY) --version): make clean, then again" >&2; exit 1; }
	@echo "installing jaxinfer and what it needs into $(VENV)"
	@$(CLEAN) $(PY) -m pip install -c constraints.txt -e '.[dev]' | $(SHOW)
	@touch $@

# Compilers for TPUs and Hopper that run on any CPU. In folders of their own: beside jax they would change what every
# process finds. Versions as jaxlib in constraints.txt wants them.
AOT := .aot
AOT_TPU := 'libtpu==0.0.48.*'
AOT_CUDA := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc==13.* nvidia-nvvm==13.* \
    nvidia-cuda-crt==13.* nvidia-cuda-runtime==13.*
AOT_INSTALL = $(CLEAN) $(PY) -m pip install --no-deps --only-binary :all: --target
AOT_FAILED = { echo "the compilers for $@ could not be installed; pip says why above" >&2; exit 1; }

aot-packages: $(AOT)/tpu/libtpu $(AOT)/cuda/jax_plugins ## the compilers for TPU and Hopper (1.4 GB) into .aot

$(AOT)/tpu/libtpu: | $(STAMP)
	@rm -rf $(AOT)/tpu
	@$(AOT_INSTALL) $(AOT)/tpu.part $(AOT_TPU) | $(SHOW) || $(AOT_FAILED)
	@mv $(AOT)/tpu.part $(AOT)/tpu

$(AOT)/cuda/jax_plugins: | $(STAMP)
	@rm -rf $(AOT)/cuda
	@$(AOT_INSTALL) $(AOT)/cuda.part $(AOT_CUDA) | $(SHOW) || $(AOT_FAILED)
	@mv $(AOT)/cuda.part $(AOT)/cuda

aot: $(AOT)/tpu/libtpu $(AOT)/cuda/jax_plugins ## every kernel, and whole steps of 8B and 70B models, compiled for TPUs and Hopper, checked (ARGS='8b- v6e')
	@$(PY) -m benchmarks.aot $(ARGS)

test: $(STAMP) ## the whole test suite
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

soak: $(STAMP) ## the soak loops behind serve/FAULTS.md with their full counts, about two hours (ARGS='-k flood')
	$(PY) -m pytest tests/soak --soak -s -v $(ARGS)

# The same package with the pins of jax lifted: tells early when the next minor version breaks us.
smoke: $(NEXT_VENV)/installed.stamp ## the smoke part of the suite on the next jax, in .venv-next
	@echo "jax $$($(NEXT_VENV)/bin/python -c 'import jax; print(jax.__version__)')"
	$(NEXT_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m smoke $(ARGS)

$(NEXT_VENV)/installed.stamp: pyproject.toml constraints.txt | $(NEXT_VENV)/bin/python
	@echo "installing jaxinfer with jax $(NEXT_JAX) into $(NEXT_VENV)"
	@grep -v -E '^(jax|jaxlib)==' constraints.txt > $(NEXT_VENV)/constraints.txt
	@$(CLEAN) $(NEXT_VENV)/bin/python -m pip install -c $(NEXT_VENV)/constraints.txt 'jax==$(NEXT_JAX)' -e '.[dev]' | $(SHOW)
	@touch $@

lint: $(STAMP) ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

demo: $(STAMP) ## serve the shipped model, send it eight prompts, show the streams and a table
	@$(PY) -m serve.demo

smg-demo: $(STAMP) ## serve the shipped model twice behind the gateway smg: the OpenAI API, a server killed under load
	@$(PY) -m serve.smg_demo

bench: $(STAMP) ## every benchmark; fails when a number is under its floor
	@$(PY) -m benchmarks $(ARGS)

clean: ## remove the environments and caches
	rm -rf $(AOT) $(VENV) $(NEXT_VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
