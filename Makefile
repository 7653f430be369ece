# Two commands from a fresh clone: `make demo` and `make test`. Everything lives in $(VENV) and build/; nothing else is touched.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2
CONSTRAINTS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 1

BIN := $(VENV)/bin
# What builds the wheel has an environment of its own: it needs the oldest supported jaxlib, the tests the newest. It stays,
# and so does the build directory of CMake beside it, so that only what changed is compiled again.
TOOLS := $(VENV)/tools
PIP := -m pip --disable-pip-version-check
# embax beside the released reference, in an environment of their own: embax does not depend on it, and its wheels need
# Python 3.12.
REFERENCE := build/venv-reference
REFERENCE_VERSION := 0.2.0
# The compiler for NVIDIA GPUs, which needs none to compile, in an environment of its own: it takes one version of JAX.
GPU := build/venv-gpu
GPU_VERSIONS := .ci/gpu.txt
# The compiler for TPUs likewise, and JAX of the same release.
TPU := build/venv-tpu
TPU_VERSIONS := .ci/tpu.txt
# The peers of the benchmarks, in environments of their own: they need different releases of PyTorch, and none is a dependency.
TORCH := build/venv-torch
TORCH_VERSIONS := torch==2.13.0 numpy
# Its dependencies are for GPUs and for distributed training.
FBGEMM_VERSION := fbgemm-gpu-cpu==1.8.0
IPEX := build/venv-ipex
IPEX_VERSIONS := torch==2.8.0 intel-extension-for-pytorch==2.8.0 numpy psutil packaging
# Directories too: their time changes when a file is added or removed.
SOURCES := pyproject.toml CMakeLists.txt LICENSE $(wildcard README.md) \
  $(shell find src csrc -name __pycache__ -prune -o -path csrc/tests -prune -o -print)

.DELETE_ON_ERROR:
.PHONY: help demo examples test test-versions test-native test-reference reference test-gpu test-tpu fuzz bench bench-peers bench-models bench-packing bench-scale bench-prefetch prove-in-place lint format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: $(VENV)/.embax $(VENV)/.demo ## Train the click-through example and write its report to demo_output/
	$(BIN)/python -m examples.ctr --out demo_output

examples: $(VENV)/.embax $(VENV)/.demo ## Train the retrieval and the next-word example
	$(BIN)/python -m examples.retrieval
	$(BIN)/python -m examples.next_word

test: $(VENV)/.embax $(VENV)/.test ## Run all tests against the installed wheel (PYTEST_ARGS="-k name" WORKERS=2)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

test-versions: ## Run all tests with the oldest and with the newest supported Python and JAX
	$(MAKE) test VENV=build/venv-oldest PYTHON="$$(.ci/find-python oldest)" CONSTRAINTS=.ci/oldest.txt
	$(MAKE) test VENV=build/venv-newest PYTHON="$$(.ci/find-python newest)"

test-reference: reference ## Compare stacking and packing with the released reference, jax-tpu-embedding, bit for bit
	$(REFERENCE)/bin/python -m pytest tests/test_against_reference.py $(PYTEST_ARGS)

test-gpu: ## Compile training steps for an NVIDIA H100, on any machine, and check what they hold
	$(MAKE) $(GPU)/.gpu VENV=$(GPU) CONSTRAINTS=$(GPU_VERSIONS)
	$(GPU)/bin/python -m pytest tests/gpu $(PYTEST_ARGS)

test-tpu: ## Compile training steps for TPUs v5p and v6e, on any machine, and check their memory
	$(MAKE) $(TPU)/.tpu VENV=$(TPU) CONSTRAINTS=$(TPU_VERSIONS)
	$(TPU)/bin/python -m pytest tests/tpu $(PYTEST_ARGS)

test-native: $(TOOLS)/.tools ## Run the C++ tests under the address, undefined-behaviour and thread sanitizers
	$(call native_tests,asan,address$(,)undefined)
	$(call native_tests,tsan,thread)

fuzz: $(TOOLS)/.tools ## Fuzz packing under the sanitizers (FUZZ_SECONDS=60 FUZZ_SEED=1)
	$(call native_build,fuzz,address$(,)undefined,embax_fuzzers,-DEMBAX_FUZZER=ON)
	cd build/fuzz && csrc/tests/pack_fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

bench: $(VENV)/.embax $(VENV)/.test ## Measure steps, kernels and memory (BENCH_ARGS="--sections ceiling --write")
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-peers: $(VENV)/.embax $(VENV)/.test $(TORCH)/.torch $(IPEX)/.ipex ## Time steps beside torch, FBGEMM, IPEX and plain JAX
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

bench-packing: reference ## Time packing beside the released reference
	$(REFERENCE)/bin/python -m benchmarks.packing $(BENCH_ARGS)

bench-models: $(VENV)/.embax $(VENV)/.test $(TORCH)/.torch ## Time whole models beside torch with FBGEMM
	$(BIN)/python -m benchmarks.models $(BENCH_ARGS)

bench-scale: $(VENV)/.embax $(VENV)/.test ## Compute what steps on up to 1,024 devices exchange and hold
	$(BIN)/python -m benchmarks.scale

bench-prefetch: $(VENV)/.embax $(VENV)/.test ## Time training loops that pack ahead in a thread
	$(BIN)/python -m benchmarks.prefetching

prove-in-place: $(VENV)/.embax $(VENV)/.test ## Prove that a step's memory does not depend on the vocabulary
	$(BIN)/python benchmarks/prove_in_place.py

lint: $(VENV)/.embax $(VENV)/.test $(VENV)/.lint ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.lint ## Format the Python code and apply the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove everything that was built
	rm -rf $(VENV) build dist demo_output .pytest_cache .ruff_cache .hypothesis

, := ,
define native_build
	@cd $(CURDIR) && PATH="$(abspath $(TOOLS))/bin:$$PATH" && set -x && \
	  cmake -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEMBAX_TESTS=ON -DEMBAX_SANITIZE=$(2) $(4) && \
	  cmake --build build/$(1) --target $(3)
endef
define native_tests
	$(call native_build,$(1),$(2),embax_tests)
	@cd $(CURDIR) && PATH="$(abspath $(TOOLS))/bin:$$PATH" && \
	  ctest --test-dir build/$(1) --output-on-failure --no-tests=error --parallel $(WORKERS)
endef

reference:
	$(MAKE) $(REFERENCE)/.reference VENV=$(REFERENCE) PYTHON="$$(.ci/find-python newest)"

$(VENV)/.reference: Makefile | $(VENV)/.embax $(VENV)/.test
	$(BIN)/python $(PIP) install --quiet jax-tpu-embedding==$(REFERENCE_VERSION)
	@touch $@

$(VENV)/.gpu: $(GPU_VERSIONS) | $(VENV)/.embax $(VENV)/.test
	$(BIN)/python $(PIP) install --quiet --no-deps --requirement $(GPU_VERSIONS)
	@touch $@

$(VENV)/.tpu: $(TPU_VERSIONS) | $(VENV)/.embax $(VENV)/.test
	$(BIN)/python $(PIP) install --quiet --requirement $(TPU_VERSIONS)
	@touch $@

$(TORCH)/.torch: Makefile
	$(MAKE) $(TORCH)/.created VENV=$(TORCH) PYTHON="$$(.ci/find-python oldest)"
	$(TORCH)/bin/python $(PIP) install --quiet $(TORCH_VERSIONS)
	$(TORCH)/bin/python $(PIP) install --quiet --no-deps $(FBGEMM_VERSION)
	@touch $@

$(IPEX)/.ipex: Makefile
	$(MAKE) $(IPEX)/.created VENV=$(IPEX) PYTHON="$$(.ci/find-python oldest)"
	$(IPEX)/bin/python $(PIP) install --quiet $(IPEX_VERSIONS)
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("embax needs Python 3.11 or newer: set PYTHON=python3.11 or the like.")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TOOLS)/.tools: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
	  > $(TOOLS)/requirements.txt
	$(TOOLS)/bin/python $(PIP) install --quiet --requirement $(TOOLS)/requirements.txt cmake ninja
	@touch $@

$(VENV)/.embax: $(SOURCES) $(TOOLS)/.tools
	rm -rf $(VENV)/wheel
	PATH="$(abspath $(TOOLS))/bin:$$PATH" \
	  $(TOOLS)/bin/python $(PIP) wheel --quiet --no-deps --no-build-isolation \
	  --config-settings=build-dir=$(VENV)/build --wheel-dir $(VENV)/wheel .
	$(BIN)/python $(PIP) install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	@touch $@

# The extras of that wheel: installed anew only when pyproject.toml changes.
$(VENV)/.demo $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.embax
	$(BIN)/python $(PIP) install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) "$$(ls $(VENV)/wheel/*.whl)[$*]"
	@touch $@
