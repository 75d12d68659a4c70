# `make quickstart` and `make test` do everything on a fresh clone; a second run reuses what is there.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.14.1

BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
SOURCES := sam_kernels python benches tests examples setup.py csrc
CPP := $(shell find csrc tests/cuda_shim -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: quickstart test test-gpu sanitize bench gpu-evidence lint format wheel test-wheel clean

# Once everything is built, with that; before, with what it needs itself, which is there in a minute.
quickstart: $(if $(wildcard $(VENV)/.built),$(VENV)/.built,$(VENV)/.quickstart)
	$(BIN)/python examples/quickstart.py

# A process for each core. Their threads sleep while they wait: spinning, they would take the cores from each other.
test test-wheel: export OMP_WAIT_POLICY := passive
IN_PARALLEL := -n auto

test: $(VENV)/.built
	$(BIN)/python -m pytest $(IN_PARALLEL)

# The tests that need a GPU, with a torch that has CUDA: make test-gpu BIN=/path/to/bin uses another environment.
# Processes share the GPU, because most of the time goes into compiling several hundred Triton kernels; tests marked
# "alone" follow, with the GPU to themselves.
GPU_PROCESSES ?= 8
test-gpu:
	$(BIN)/python -m pytest tests -m "gpu and not alone" -n $(GPU_PROCESSES); shared=$$?; \
	$(BIN)/python -m pytest tests -m "gpu and alone" && exit $$shared

# Looks for invalid accesses, races and wrong barriers in a program that runs every CUDA kernel.
sanitize:
	for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m tests.cuda.sanitize || exit 1; done

# One visit to a GPU in two parts of less than five minutes, the most valuable first; what is known is on disk at once, in
# benches/results/gpu or the folder that OUT names. Where nothing can be installed: make gpu-evidence BIN=/usr/bin
GPU_PART ?= AB
gpu-evidence:
	$(BIN)/python -m benches.gpu --part $(GPU_PART)
	$(BIN)/python -m benches.report

# Results, and docs/performance.md from them.
bench: $(VENV)/.built
	mkdir -p benches/results
	$(BIN)/python -m pytest benches --benchmark-only --benchmark-json=benches/results/cpu.json \
	  --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benches.report

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(CPP)

# Built in isolation, as `pip install` does: without torch.
wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# The tests against the wheel, away from the source tree and under another torch: make test-wheel TORCH=2.11.0
test-wheel: wheel
	$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/pip install --quiet torch==$(TORCH) "$$(ls dist/*.whl)[test]"
	build/torch-$(TORCH)/bin/pip install --quiet --force-reinstall --no-deps dist/*.whl
	rm -rf build/tests-$(TORCH) && mkdir -p build/tests-$(TORCH) && cp -r tests examples build/tests-$(TORCH)/
	cd build/tests-$(TORCH) && ../torch-$(TORCH)/bin/python -m pytest $(IN_PARALLEL) -c $(CURDIR)/pyproject.toml --rootdir . tests

clean:
	rm -rf build dist *.egg-info .venv sam_kernels/*.so

# The CPU's kernels alone: those for GPUs take a minute to compile, and the quickstart runs on the CPU.
$(VENV)/.quickstart: requirements/quickstart.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/quickstart.txt
	SAM_KERNELS_CUDA_ARCHS=none $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.installed: requirements/develop.txt requirements/quickstart.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/develop.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
