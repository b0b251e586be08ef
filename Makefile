# What there is to make. `make demo` and `make test` need Python 3.10, make and a C compiler, and nothing else.
#
#   demo      a story from the bundled model             lint      ruff and mypy
#   test      the whole test suite                       sanitize  tests on an ASan + UBSan build of the libraries
#   native    the libraries, into engine/_native         wheel     sdist and wheel, into dist/
#   emulated  tests of AVX-512 and AMX, on AVX2          clean     removes what was built (not .venv)
#   ci        all of it, and the wheel outside the tree
#   cuda      kernels for GPUs, where nvcc is found      cuda-bench  tests and measures them on a GPU: docs/cuda.md
#
#   make PYTHON=python3.12 CC=clang CFLAGS=... USE_FLASH_ATTENTION=0 native      (native/build.mk has the rest)
PYTHON ?= python3
VENV ?= .venv
CC ?= cc

export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest

.PHONY: demo test native cuda cuda-bench lint tune sanitize emulated wheel wheel-check no-flash ci clean

demo: native $(VENV)/rill-demo
	$(RUN) -m demo.infer --raw -p "Once upon a time"

test: native $(VENV)/rill-dev
	$(PYTEST)

native:
	@$(MAKE) --no-print-directory -f native/build.mk $(if $(findstring -j,$(MAKEFLAGS)),,-j2)

# Kernels for GPUs: native/cuda/build.mk has the rest.
cuda:
	@$(MAKE) --no-print-directory -f native/cuda/build.mk cuda

# On a machine with a GPU: everything that is tested and measured there. Results go to docs/results.
cuda-bench: native cuda $(VENV)/rill-dev
	$(RUN) -m pip install --quiet --editable '.[dev,cuda]'
	$(PYTEST) -m cuda
	$(RUN) -m tools.cuda_bench docs/results

# What is installed, made again when pyproject.toml changes. The libraries are built first: pip finds them up to date.
$(VENV)/rill-demo $(VENV)/rill-dev: pyproject.toml setup.py | $(RUN) native
	$(RUN) -m pip install --quiet --editable '.$(if $(findstring dev,$@),[dev])'
	@touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Rill needs Python 3.10 or newer. Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

lint: $(VENV)/rill-dev
	$(RUN) -m ruff check
	$(RUN) -m mypy

# The tests that reach native code or read untrusted files: one an op, the device, the plan, the loader.
SANITIZED := build/sanitized
NATIVE_TESTS := $(wildcard $(patsubst engine/ops/%.py,test/test_%.py,$(wildcard engine/ops/*.py)) \
                  $(foreach name,sanitizer cpu_device meeting kvcache plan checkpoint bad_safetensors process quantised packed_cache bad_gguf shares gated,test/test_$(name).py))

sanitize: $(VENV)/rill-dev
	@$(MAKE) native SANITIZE=1 LIBRARIES=$(SANITIZED)
	RILL_LIBRARIES=$(CURDIR)/$(SANITIZED) LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(PYTEST) $(NATIVE_TESTS)

# The libraries for AVX-512 and AMX on a CPU without them, every instruction by a function for AVX2.
EMULATED := build/emulated
EMULATED_TESTS := $(foreach name,avx512 matmul quantised attention gated logits kv_store llm,test/test_$(name).py)
EMULATED_ONLY := not baseline and not numpy and not (test_attention and (float32 or float16 or auto))

emulated: $(VENV)/rill-dev
	@$(MAKE) native EMULATED=1 LIBRARIES=$(EMULATED)
	RILL_LIBRARIES=$(CURDIR)/$(EMULATED) $(PYTEST) -k "$(EMULATED_ONLY)" $(EMULATED_TESTS)

# Built without the flash attention kernel, the rest must still be right.
no-flash: $(VENV)/rill-dev
	@$(MAKE) native USE_FLASH_ATTENTION=0 LIBRARIES=build/no-flash
	RILL_LIBRARIES=$(CURDIR)/build/no-flash $(PYTEST) $(wildcard test/test_attention.py test/test_golden.py)

# Measures the blocks and kinds of attention that suit this machine: engine/attention_table.json, to be committed.
tune: native $(VENV)/rill-dev
	$(RUN) -m tools.tune_attention

wheel: $(VENV)/rill-dev
	rm -rf dist
	$(RUN) -m build --outdir dist

wheel-check: wheel
	$(RUN) -m tools.check_wheel dist

ci:
	$(MAKE) cuda
	$(MAKE) test WERROR=1
	$(MAKE) lint
	$(MAKE) sanitize WERROR=1
	$(MAKE) emulated WERROR=1
	$(MAKE) no-flash WERROR=1
	$(MAKE) wheel-check WERROR=1

clean:
	rm -rf build dist *.egg-info engine/_native
