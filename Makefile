# Everything a newcomer, a developer and CI run. `make` alone prints the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # tests and benchmarks must not compete for the cores

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
CXX ?= g++
BENCH_RESULTS ?= results/benchmarks.json

# Tests and tools see the installed package, never the source folders of the checkout's root.
export PYTHONSAFEPATH := 1
unexport PYTHONPATH

BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
CHECKS := demo test engines mutants lint sanitize bench-record wheel

PYTHON_DIRS := dodoco_ext triton_kernels tests benchmarks setup.py
CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/cpp/*.h tests/cpp/*.cpp)
# Folders count too: their time changes when a file is added or removed.
SOURCES := setup.py pyproject.toml \
  $(shell find csrc dodoco_ext triton_kernels -not -name '__pycache__' -not -name '*.pyc' -not -name '*.so')

.PHONY: help demo test check list-checks engines mutants bench bench-record sanitize wheel clean \
  lint lint-python lint-types lint-imports lint-cpp format

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 to 3.13), TORCH='$(TORCH)' and TRITON='$(TRITON)' (any pip requirement), CXX=$(CXX)"

demo: $(STAMPS)/package ## train a small MoE on real text, record its routing, write results/demo/
	$(BIN)/dodoco observe --preset demo --out results/demo

test: $(STAMPS)/package $(STAMPS)/dev ## all tests without engines (at most 10 minutes, install included)
	$(BIN)/pytest tests --ignore=tests/engines --ignore=tests/mutants

check: $(CHECKS) ## everything that CI runs (at most 60 minutes on 2 cores)

list-checks:
	@echo $(CHECKS)

engines: $(STAMPS)/package $(STAMPS)/dev ## tests against real engines
	$(BIN)/pytest tests/engines

mutants: $(STAMPS)/package $(STAMPS)/dev ## damaged copies of the recorder, each of which the tests must find
	$(BIN)/pytest tests/mutants

lint: lint-python lint-types lint-imports lint-cpp ## ruff, mypy --strict, import-linter, clang-format, clang-tidy

lint-python: $(STAMPS)/dev
	$(BIN)/ruff check $(PYTHON_DIRS)
	$(BIN)/ruff format --check $(PYTHON_DIRS)

# These two run from build/, where only the installed package can be found.
lint-types: $(STAMPS)/package $(STAMPS)/dev
	cd build && ../$(BIN)/mypy --config-file ../pyproject.toml --strict -p dodoco_ext

lint-imports: $(STAMPS)/package $(STAMPS)/dev
	cd build && ../$(BIN)/lint-imports --config ../pyproject.toml --no-cache

lint-cpp: build/compile_commands.json $(STAMPS)/dev
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	printf '%s\n' $(filter csrc/%.cpp,$(CPP_FILES)) | xargs -P 2 -n 1 $(BIN)/clang-tidy -p build --quiet

format: $(STAMPS)/dev ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix-only --quiet $(PYTHON_DIRS)
	$(BIN)/ruff format $(PYTHON_DIRS)
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(STAMPS)/package $(STAMPS)/dev ## benchmarks; fails beyond the limits
	$(BIN)/pytest --benchmark --benchmark-strict --benchmark-results $(BENCH_RESULTS) benchmarks

bench-record: $(STAMPS)/package $(STAMPS)/dev ## benchmarks as CI runs them: records, tolerates noise
	$(BIN)/pytest --benchmark --benchmark-results $(BENCH_RESULTS) benchmarks

# Stress programs of tests/cpp, linked with every file of csrc that is free of Python.
STRESS := $(patsubst tests/cpp/%.cpp,%,$(wildcard tests/cpp/*_stress.cpp))
CORE := $(shell grep -L pybind11 $(filter-out csrc/module.cpp csrc/bind_%,$(wildcard csrc/*.cpp)) /dev/null | grep -v /dev/null)
SANITIZED := $(foreach program,$(STRESS),build/sanitize/$(program).address build/sanitize/$(program).thread)
SANITIZE_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread -Icsrc \
  -DDODOCO_HAS_CUDA=0 -DDODOCO_CUDA_ARCHS='""' -DDODOCO_VERSION='"sanitize"'

build/sanitize/%.address: tests/cpp/%.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all $< $(CORE) -ldl -o $@

build/sanitize/%.thread: tests/cpp/%.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -fsanitize=thread $< $(CORE) -ldl -o $@

# ThreadSanitizer of older compilers refuses the widest address randomisation: setarch turns it off.
sanitize: $(SANITIZED) ## C++ stress programs under address, undefined-behaviour and thread sanitizers
	@test -n "$(SANITIZED)" || { echo "sanitize: tests/cpp holds no *_stress.cpp"; exit 1; }
	@launch="setarch -R"; $$launch true 2>/dev/null || launch=""; \
	for program in $(SANITIZED); do echo "$$program"; TSAN_OPTIONS=halt_on_error=1 $$launch $$program; done

wheel: $(STAMPS)/dev ## sdist, wheel built from it (manylinux), and a trial in an empty environment
	rm -rf dist build/wheel-env
	$(BIN)/pyproject-build --no-isolation --outdir dist . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/python -m venv build/wheel-env
	build/wheel-env/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt dist/*.whl
	cd / && "$(CURDIR)/build/wheel-env/bin/dodoco" --help > /dev/null
	cd / && "$(CURDIR)/build/wheel-env/bin/python" -c "import dodoco_ext._C as c; print('wheel works:', c.__name__)"
	@ls -l dist

clean: ## remove builds and caches; .venv and results/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/package
	find csrc dodoco_ext triton_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment: each step leaves a stamp, so a second run installs nothing -----------------

define SUPPORTED
import sys
found = ".".join(map(str, sys.version_info[:3]))
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("make: $(PYTHON) is Python " + found + ", and DODOCO needs 3.11 to 3.13: name one, as in make PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("make: $(PYTHON) has no venv module: install it (Debian and Ubuntu: python3-venv)")
endef
export SUPPORTED

$(STAMPS)/venv:
	@command -v $(PYTHON) > /dev/null || { echo "make: no command $(PYTHON): install Python 3.11 to 3.13, or name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "$$SUPPORTED"
	@echo "creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@mkdir -p $(STAMPS) && touch $@

# Torch first and by itself: it is the user's own choice, and nothing installed later may replace it.
TORCH_STAMP := $(STAMPS)/$(subst /,_,$(subst =,-,$(firstword $(TORCH))))
$(TORCH_STAMP): $(STAMPS)/venv
	@echo "installing $(TORCH) (once)"
	@rm -f $(STAMPS)/torch*
	@$(PIP) $(TORCH)
	@touch $@

# Prints what pyproject.toml lists: build requirements, dependencies, and the extras named.
define REQUIREMENTS
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
for extra in sys.argv[1:]:
    wanted += project["project"]["optional-dependencies"][extra]
print(*wanted, sep="\n")
endef
export REQUIREMENTS

$(STAMPS)/runtime: $(TORCH_STAMP) pyproject.toml constraints.txt
	@echo "installing what building and the demo need"
	@$(PIP) -r <($(BIN)/python -c "$$REQUIREMENTS" transformers report) wheel
	@touch $@

$(STAMPS)/dev: $(STAMPS)/runtime
	@echo "installing test and lint tools"
	@$(PIP) -r <($(BIN)/python -c "$$REQUIREMENTS" transformers report prometheus top trace dev)
	@$(PIP) $(TRITON)
	@touch $@

$(STAMPS)/package: $(STAMPS)/runtime $(SOURCES)
	@echo "building and installing dodoco_ext"
	@$(PIP) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

build/compile_commands.json: $(STAMPS)/package
	@$(BIN)/ninja -f "$$(ls -td build/temp.*/ | head -n 1)build.ninja" -t compdb cxx > $@
