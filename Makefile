# Every target works on a fresh clone: what it needs is installed into .venv first.
#
#   make demo                 show what the op does, on a real text
#   make test                 static checks and all tests
#   make fuzz SECONDS=600     random calls against every backend
#   make native               the custom-op library for onnxruntime (ORT_INCLUDE=<its headers>)
#
# torch is installed first and once, if none is there. Which build is up to you:
#   make venv TORCH="torch==2.13.0 --index-url <the index of your CUDA or CPU build>"

TORCH ?= torch==2.13.0
PYTHON ?= python3
SECONDS ?= 600
# Processes that tests run in; on small tensors a second thread only waits for the first.
WORKERS ?= 2
BENCH ?=
ORT_INCLUDE ?=

BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv test check static pytest demo fuzz bench docs native wheel clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

test: check

check: static pytest docs

static: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy gdn_ops
	$(BIN)/lint-imports --no-logo

pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

demo: $(STAMP)
	$(BIN)/gdn-ops demo

fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m gdn_ops.testing.fuzz --seconds $(SECONDS)

bench: $(STAMP)
	$(BIN)/gdn-ops bench $(BENCH)

# Needs a C++ compiler and onnxruntime's headers, and nothing of Python.
native:
	native/build.sh $(ORT_INCLUDE)

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv build dist site native/build .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
