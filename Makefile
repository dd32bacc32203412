# Each target does all of its own set-up in .venv, from a fresh clone.
#
#   make setup | pretrain | test | test-full | test-versions | test-cluster | gpu | gpu-wheels | docs | lint | help
#   make pretrain ARGS="train.exit_interval=40"    ARGS reaches the command behind the target
#   make test ARGS="-k layout"
#   make gpu OUT=DIR BUDGET_MIN=20         docs/operations.md, "On a GPU"
#
# PYTHON           the interpreter that creates .venv (3.10 or newer; default python3)
# OTHER_PYTHON     of `make test-versions` (3.12 or newer: megatron-core from 0.17 on needs it)
# TORCH_INDEX_URL  where torch comes from, if not pip's default index. A machine without a GPU
#                  saves several GB with
#                  make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
OUT ?= benchmarks/gpu
BUDGET_MIN ?= 20
WHEELS ?= build/gpu_wheels

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-complete
DOCS_STAMP := $(VENV)/.docs-setup-complete
TORCH := $(shell sed -n 's/^ *\(torch>=.*\)$$/\1/p' setup.cfg)
# in the order of tests/tiers.py, not the largest file first
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder
TYPED := vqmoe_megatron/registry.py vqmoe_megatron/config vqmoe_megatron/metrics vqmoe_megatron/rundir vqmoe_megatron/plan

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-full test-versions test-cluster gpu gpu-wheels docs lint
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)$$/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## create .venv and install the package with its development tools

# The stamp goes first and returns last, so an interrupted set-up is simply done again.
$(STAMP): setup.cfg pyproject.toml
	@rm -f $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make setup: $(PYTHON) must be Python 3.10 or newer (make setup PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $(STAMP)

pretrain: setup  ## prepare the stdlib corpus (once) and train recipes/quickstart.yaml on two ranks
	$(BIN)/vqmoe prepare stdlib --out data/stdlib
	$(BIN)/vqmoe pretrain recipes/quickstart.yaml --nproc 2 $(ARGS)

test: setup  ## run the fast tier of the tests, minutes; docs/testing.md
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-full: setup  ## run every test; what needs root or Debian packages skips and says so
	$(BIN)/python -m pytest --full $(WORKERS) $(ARGS)

test-versions:  ## the tests of tests/other_versions.txt with the oldest torch and the newest megatron-core
	tests/other_versions.sh $(OTHER_PYTHON)

test-cluster: setup  ## install Slurm and buildah (Debian, root), test jobs and the image for real
	slurm/cluster/test.sh $(BIN)/python $(ARGS)

# A GPU machine without a network has a torch of its own: then nothing is set up. (A recipe with make's
# own variable in it would run under make -n, too.)
SET_UP := $(MAKE) --no-print-directory setup
gpu:  ## settle on one GPU, within BUDGET_MIN minutes, what the CPU cannot show; results in OUT
	@if [ ! -f $(STAMP) ] && $(PYTHON) -c 'import torch' 2>/dev/null; then python="$(PYTHON)"; \
	else $(SET_UP) && python="$(BIN)/python"; fi && \
	exec "$$python" -m vqmoe_megatron.gpu_proof --out "$(OUT)" --budget-min "$(BUDGET_MIN)" $(ARGS)

gpu-wheels: setup  ## download what a GPU machine without a network lacks into WHEELS, for --wheels
	$(BIN)/python -m vqmoe_megatron.gpu_proof.wheels --out "$(WHEELS)"

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -e ".[docs]"
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)  ## build the documentation site into build/docs; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "read it: $(BIN)/python -m http.server -d build/docs 8000, then http://127.0.0.1:8000"

lint: setup  ## ruff check, ruff format --check, and mypy on the torch-free files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
