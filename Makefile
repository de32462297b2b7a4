# Two commands serve a newcomer: `make tune` does the main job, `make test` proves the house stands.
PYTHON ?= python3.11
# The plain index build of torch may carry gigabytes of CUDA; a machine's own index decides. Name another build with TORCH=...
TORCH ?= torch==2.13.0
# A folder of wheels to install from instead of an index: what `make wheelhouse` filled where there is one.
WHEELHOUSE ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
MARKS ?= not slow and not slurm and not gpu

.PHONY: help setup wheelhouse tune test lint clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup   a virtual environment in .venv with everything dstrain needs (done once)
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	@echo "installing PyTorch, DeepSpeed, Ray and MLflow into $(VENV): about 2 GB, some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable .
	@echo "compiling DeepSpeed's communication operator: one to three minutes, once"
	$(BIN)/python -m dstrain.engine
	@touch $@

# What only tests need: linters, the peers that benchmarks compare with, triton's interpreter.
$(VENV)/tested: $(VENV)/ready
	$(INSTALL) --editable ".[test,peers]"
	@touch $@

## make wheelhouse   wheels for a machine without internet, in wheelhouse/; there: make setup WHEELHOUSE=wheelhouse
wheelhouse: WHEELS = $(or $(WHEELHOUSE),wheelhouse)
wheelhouse:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip wheel --quiet --wheel-dir $(WHEELS) pip setuptools $(TORCH)
	$(BIN)/pip wheel --quiet --wheel-dir $(WHEELS) --find-links $(WHEELS) $(firstword $(TORCH)) ".[test,peers]"
	rm -f $(WHEELS)/dstrain-*.whl
	@echo "$(WHEELS): $$(ls $(WHEELS) | wc -l) wheels; on the other machine: make setup WHEELHOUSE=$(WHEELS)"

## make tune    sets up and runs the LSH search on text that is already on this machine
tune: setup
	$(BIN)/python -m dstrain.tune search_spaces/lsh.yaml

## make test    sets up and runs the tests that take seconds (MARKS="slow or slurm" for others)
test: lint
	$(BIN)/python -m pytest -m "$(MARKS)" $(PYTEST_ARGS)

## make lint    ruff and mypy
lint: $(VENV)/tested
	$(BIN)/ruff check dstrain cluster tests benchmarks
	$(BIN)/mypy --no-error-summary

## make clean   removes the virtual environment and what tools left behind (never runs/)
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage*
