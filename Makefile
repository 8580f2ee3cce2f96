# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
#
#   make demo                        train two DisTrO replicas on the Python standard library
#   make demo ARGS="--max-steps 40"  ARGS is passed on, here and in test and bench
#   make setup PYTHON=python3.12     choose the Python that .venv is made with

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs sweep lint format bench kernels on-cuda-tensors lab floor newest uv-lock

# Left empty, the first of these that is new enough is taken.
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
BIN := .venv/bin
STAMP := .venv/set-up
ARGS ?=

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install psyche-fast with its development tools

# torch goes first and alone: on a machine with a GPU the pin takes the CUDA build, and where pip is
# told to prefer another build (a CPU one, say), the rest is then fitted to it rather than against
# it. pip is brought up to date because dependency groups need 25.1.
$(STAMP): pyproject.toml constraints.txt
	@if $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	for python in $(or $(PYTHON),$(CANDIDATES)); do \
	  if "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	    echo "making .venv with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "psyche-fast needs Python 3.11 or newer; looked for: $(or $(PYTHON),$(CANDIDATES))." \
	  "Name one with: make setup PYTHON=/path/to/python3" >&2; \
	exit 1
	@echo "installing torch (the CUDA build is a large download)"
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --constraint constraints.txt torch
	@echo "installing psyche-fast and its development tools"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	@touch $@

demo: setup ## train two DisTrO replicas on text of this machine, with a sample and plots
	$(BIN)/psyche-fast demo $(ARGS)

test: setup ## run the tests, two at a time
	$(BIN)/python -m pytest -n 2 $(ARGS)

docs: setup ## build the site of documentation into site/
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.5,<10'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

sweep: setup ## try every causal model of Transformers; writes docs/models.md
	PSYCHE_FAST_SWEEP=1 $(BIN)/python -m pytest -q tests/models/test_sweep.py $(ARGS)

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## run the benchmarks
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o timeout=0 $(ARGS)

kernels: setup ## compile the Triton kernels for all GPUs and print what they cost
	$(BIN)/python -m tools.kernel_guard $(ARGS)

# Each kernel and each way of launching it; the rest of tests/kernels is about numbers.
ON_CUDA_TENSORS := tools/kernel_guard/tests/cuda_tensor_cases.py \
  $(patsubst %,tests/kernels/test_%.py,launch gpu accumulate codec) \
  $(addprefix tests/kernels/test_encode.py::test_,dtypes empty_members class_without_elements \
    gradients_of_none_and_parameters_without_elements gradients_of_several_dtypes_and_layouts \
    own_results_with_repeated_entries rates_as_tensors_are_rates_as_numbers \
    scale_that_is_not_finite_leaves_gradients_out) \
  $(addprefix tests/kernels/test_apply.py::test_,empty_members kinds_of_look_ahead \
    no_peers rates_as_tensors_are_rates_as_numbers)

on-cuda-tensors: setup
	$(BIN)/python -m pytest -n 2 -p tools.kernel_guard.on_cuda_tensors $(ON_CUDA_TENSORS)

lab: on-cuda-tensors ## prove without a GPU that kernels launch and compile as tests use them
	$(BIN)/python -m pytest -n 2 -p tools.kernel_guard.compile_launches \
	  --compile-until cubin tests/kernels $(ARGS)

floor: setup ## run the tests with the lowest supported versions, in .venv-lowest
	.ci/versions lowest $(ARGS)

newest: setup ## run the tests with the newest supported versions, in .venv-newest
	.ci/versions newest $(ARGS)

uv-lock: setup ## write uv.lock anew; wants uv, which it installs into .venv
	$(BIN)/python -m pip install --quiet uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/uv_lock.py
