# Everything runs in a virtual environment that these rules make: nothing is installed outside this folder.
#
#   make serve ARGS="--port 8080"        options of `aiexport-edge serve`
#   make test ARGS="tests/shim -x"       options of pytest
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                        PyTorch without CUDA: a far smaller download for machines without a GPU
#   make serve PYTHON=python3.12         which Python (3.11, 3.12 or 3.13) makes the environment

VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && { echo $$p; break; }; done)

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input $(PIP_ARGS)
# Where root runs make (containers), pip's warning about it helps nobody: the environment is a folder of this project.
export PIP_ROOT_USER_ACTION = ignore

.DEFAULT_GOAL := help
.PHONY: help serve test prove lint format bench load clean

help:
	@echo 'make serve    start the server with the demo model; prints an address, a key and a curl line to paste'
	@echo 'make test     run all tests'
	@echo 'make prove    the full proof of the GPU kernels without a GPU: interpreted, and compiled for six architectures'
	@echo 'make lint     ruff, mypy, and whether the gRPC stubs are current'
	@echo 'make format   let ruff format the code'
	@echo 'make bench    measure this machine: first token, tokens per second'
	@echo 'make load     a fresh server under load for a minute; 0 where its targets are met; a report to look at'
	@echo 'make clean    remove the virtual environment and all caches'
	@echo 'Options: the first lines of the Makefile.'

serve: $(VENV)/.warm
	@exec $(BIN)/aiexport-edge serve $(ARGS)

test: $(VENV)/.dev $(VENV)/.warm
	@$(BIN)/python -m pytest $(ARGS)

# In processes of their own: what Triton interprets it cannot compile.
prove: $(VENV)/.dev
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'prove or not prove' tests/kernels/gpu
	@$(BIN)/python -m aiexport_edge.kernels.gpu.aot $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy aiexport_edge/engine aiexport_edge/kernels aiexport_edge/proto aiexport_edge/shim tests benchmarks
	@$(BIN)/python -m aiexport_edge.proto.generate --check

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev $(VENV)/.warm
	@$(BIN)/python -m benchmarks.quick $(ARGS)

load: $(VENV)/.load $(VENV)/.warm
	@$(BIN)/python -m benchmarks.locust $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11, 3.12 or 3.13 found: install one, or name it with PYTHON=/path/to/python3.12.' >&2; exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo '$(PYTHON) is not Python 3.11, 3.12 or 3.13: name another with PYTHON=/path/to/python3.12.' >&2; exit 1; }
	@echo 'Making a virtual environment in $(VENV).' >&2
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'Python could not make it: on Debian and Ubuntu, apt install python3-venv.' >&2; exit 1; }

# What serving needs; again whenever pyproject.toml changes.
$(VENV)/.engine: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing what serving needs (PyTorch is large: the first time takes a few minutes).' >&2
	@$(PIP) --editable '.[engine]'
	@touch $@

# That and what the tests need.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing what serving and the tests need (the first time takes a few minutes).' >&2
	@$(PIP) --editable '.[dev]'
	@touch $(VENV)/.engine $@

# What serving needs and the load tests.
$(VENV)/.load: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing what serving and the load tests need (the first time takes a few minutes).' >&2
	@$(PIP) --editable '.[engine,load]'
	@touch $(VENV)/.engine $@

# The processor's kernels as machine code; again whenever they change. Without it the first start would do this.
$(VENV)/.warm: $(VENV)/.engine $(wildcard kernels/cpu/*.py)
	@echo 'Compiling the kernels for this processor (about half a minute).' >&2
	@$(BIN)/python -m aiexport_edge.kernels.warm
	@touch $@
