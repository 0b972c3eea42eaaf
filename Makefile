# One command for each task; CONTRIBUTING.md lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DIST ?= dist
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
ARGS ?=

# Three steps, each said before it is taken.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
, := ,
define install
@echo "1 of 3: virtual environment in $(VENV), and PyTorch (a large download where pip has not cached it)"
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
@$(PIP) torch
@echo "2 of 3: the C++ kernels (about half a minute on two cores)"
@$(PIP) --no-deps -e .
@echo "3 of 3: what is required for: $(1)"
@$(PIP) "rewardops[$(1)]"
endef

.PHONY: venv demo test quick check thorough integrations lint docs linkcheck bench gpu gpu-dry wheel clean

venv: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	$(call install,test$(,)lint)
	touch $@

# The demo needs neither the tests' requirements nor Triton.
demo: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.demo)
	$(BIN)/python -m rewardops.demo $(ARGS)

$(VENV)/.demo: $(SOURCES)
	$(call install,demo)
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell $(shell git ls-files)
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# All tests except those marked slow: builds of wheels and sanitizers, compilers, planted faults, other instruction sets.
quick: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow" $(ARGS)

# One family in seconds, without lint: make check FAMILY=kl [BACKEND=cpp].
check: venv
	$(if $(FAMILY),,$(error FAMILY: got none, want one of rewardops/core/families.py))
	$(BIN)/python -m pytest -q $(wildcard tests/ops/test_$(FAMILY).py tests/ops/test_$(FAMILY)_*.py) $(if $(BACKEND),-k $(BACKEND)) $(ARGS)

# All tests, with checks that take too long for every change: more Triton targets, more sanitizers, 10,000 fuzzed calls.
thorough: export REWARDOPS_THOROUGH = 1
thorough: test

# Tests inside the training frameworks, whose packages are installed first: see benchmarks/requirements-peers.txt.
integrations: $(VENV)/.peers
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope tests/integrations $(ARGS)

$(VENV)/.peers: $(INSTALLED) benchmarks/requirements-peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements-peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1
	touch $@

# The documentation site, in build/docs. A warning, such as a link to nothing, is an error.
docs: venv
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs $(ARGS)

# Links to other sites. It needs the network, so it is no part of CI.
linkcheck: venv
	$(BIN)/python -m sphinx -q -d build/doctrees -b linkcheck docs build/linkcheck $(ARGS)

bench: venv
	$(BIN)/python -m benchmarks $(ARGS)

# The script for a GPU. It needs python3 with torch, Triton, pybind11 and pytest, cmake and ninja; no network and no
# virtual environment.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# The same script on tiny shapes, without a GPU.
gpu-dry: venv
	$(BIN)/python -m benchmarks.gpu --dry $(ARGS)

# A wheel for every Linux with glibc 2.28 or newer, and the sdist from which it was built: dist/ holds what is released.
# auditwheel refuses a module that needs more of the system. All Pythons and machines: cibuildwheel (pyproject.toml).
wheel: venv
	rm -rf $(DIST)/build $(DIST)/rewardops-*
	REWARDOPS_CUDA=0 REWARDOPS_MANYLINUX=1 $(BIN)/python -m build --outdir $(DIST)/build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --strip --only-plat \
		--plat manylinux_2_28_$$(uname -m) --wheel-dir $(DIST) $(DIST)/build/*.whl
	mv $(DIST)/build/*.tar.gz $(DIST)
	rm -rf $(DIST)/build

clean:
	rm -rf build dist $(VENV) *.egg-info rewardops/_C.*.so
