# Every target works on a fresh clone: what it needs is installed into .venv first, in the
# versions of constraints.txt.
#
#   make demo                 show what the op does, on a real text
#   make test                 static checks and all tests
#   make fuzz SECONDS=600     random calls against every backend
#   make lock                 refresh constraints.txt and show what changed
#   make versions             the tests with other versions of torch, transformers, onnx, ...
#   make versions CELL='triton-3.6 transformers-*'     some of them
#   make pages                the pages of docs/ that are made from the code
#   make cpp                  the C++ kernels, which installing gdn_ops builds where it can
#   make sanitize             the C++ kernels under the address and undefined-behaviour sanitizers (GCC)
#   make gpu-kit              one archive for a GPU machine without a network (docs/gpu-todo.md)
#   make native               the custom-op library for onnxruntime (ORT_INCLUDE=<its headers>)
#
# torch is installed first and once, if none is there. Which build is up to you:
#   make venv TORCH="torch==2.13.0 --index-url <the index of your CUDA or CPU build>"

LOCK := constraints.txt
ifeq ($(strip $(TORCH)),)
TORCH := $(shell grep '^torch==' $(LOCK))
endif
PYTHON ?= python3
VENV ?= .venv
SECONDS ?= 600
# Processes that tests run in; on small tensors a second thread only waits for the first.
WORKERS ?= 2
# What is reported of the lines that tests run; `make test COVERAGE=` is a quarter faster.
COVERAGE ?= --cov --cov-report=term
BENCH ?=
ORT_INCLUDE ?=
KIT ?=
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1
# Cells of `make versions`, names or patterns; how many run at once, by cores and memory without;
# RECORD=1 puts the result of a few cells into docs/versions.md.
CELL ?=
JOBS ?=
RECORD ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := $(VENV)/constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet
# What the C++ kernels are built from: a change installs gdn_ops again, which builds them.
KERNELS := setup.py backends/cpp/build.py $(wildcard backends/cpp/src/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv lock test check static pytest versions demo fuzz bench docs pages cpp sanitize gpu-kit native wheel clean distclean

venv: $(STAMP)

# What builds gdn_ops is locked too, hence no isolation; torch may refuse lines of the lock.
$(STAMP): pyproject.toml $(LOCK) $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) $(TORCH)
	PYTHONPATH=tests $(BIN)/python -m versions.lock $(LOCK) > $(CONSTRAINTS)
	$(INSTALL) --constraint $(CONSTRAINTS) setuptools wheel
	$(INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation --editable ".[dev]"
	touch $@

lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHONPATH=tests $(BIN)/python -m versions.lock $(LOCK) "$(TORCH)"

test: check

check: static pytest docs

static: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy gdn_ops
	$(BIN)/lint-imports --no-logo

pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(COVERAGE)

versions: $(STAMP)
	$(BIN)/python tests/versions $(foreach cell,$(CELL),'$(cell)') \
		$(if $(JOBS),--jobs $(JOBS)) $(if $(RECORD),--record)

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

pages: $(STAMP)
	$(BIN)/python docs/generate.py

demo: $(STAMP)
	$(BIN)/gdn-ops demo

fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m gdn_ops.testing.fuzz --seconds $(SECONDS)

bench: $(STAMP)
	$(BIN)/gdn-ops bench $(BENCH)

cpp: $(STAMP)
	$(BIN)/gdn-ops build

# The tests of the kernels and drawn calls, for SECONDS; the library is built anew behind them.
sanitize: $(STAMP)
	CXXFLAGS="$(SANITIZE)" $(BIN)/gdn-ops build
	export LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 GDN_OPS_CACHE=$$(mktemp -d); \
	$(BIN)/python -m pytest -n 0 \
		tests/backends/cpp/test_backend.py tests/backends/cpp/test_layers.py \
		tests/backends/cpp/test_subnormal.py && \
		$(BIN)/gdn-ops check --backend cpp --seconds $(SECONDS); \
	status=$$?; unset LD_PRELOAD; $(BIN)/gdn-ops build && exit $$status

# KIT takes options, such as KIT='--tune qwen-16-64-8192 --limit 58'.
gpu-kit: $(STAMP)
	$(BIN)/python benchmarks/gpu_kit/pack.py $(KIT)

# Needs a C++ compiler, onnxruntime's headers and any Python, with no package.
native:
	$(PYTHON) native/build.py $(ORT_INCLUDE)

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

# Keeps what was installed: .venv, and the cells of `make versions`. The next target that needs
# .venv brings it up to date, which builds the C++ kernels again.
clean:
	rm -f $(STAMP) backends/cpp/*.so
	rm -rf build dist site native/build .coverage .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
	find . -path ./$(VENV) -prune -o -path ./.versions -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .versions
