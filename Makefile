# make demo   trains, prunes, converts and saves a small network (about two minutes once installed)
# make test   runs the tests           make lint   ruff and mypy
# make cuda   compiles the CUDA kernels for every architecture (needs nvcc), and says what registers they use
# make wheel  a wheel in dist/         make clean  removes what these made, but for .venv (make distclean: that too)
#
# Everything happens in .venv, which is made on the first run. On the command line or in the environment:
#   PYTHON=python3.12           the Python to make .venv with (3.10 or newer)
#   TORCH_VERSION=2.13.0        the torch to test with
#   TORCH_INDEX=URL             an extra package index, such as PyTorch's own for CPUs: torch without CUDA, a tenth of the size

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
BUILT_FROM := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
# An editable install reads sparseprune/ in place, so only a file that comes or goes asks for another.
FILES := $(shell find sparseprune -name '*.py*' -not -path '*/__pycache__/*' | sort | cksum | cut -d ' ' -f 1)

.DELETE_ON_ERROR:
.PHONY: demo test test-environment lint cuda wheel clean distclean tools

demo: $(VENV)/.installed-$(FILES)
	$(RUN) examples/demo.py

test: test-environment
	$(RUN) -m pytest

test-environment: $(VENV)/.installed-$(FILES)

lint: $(VENV)/.installed-$(FILES)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

cuda:
	cmake -S . -B build/cuda -DSPARSEPRUNE_CUDA=ON -DSPARSEPRUNE_PYTHON=OFF
	cmake --build build/cuda --target sparseprune_cuda --clean-first > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	$(PYTHON) csrc/cuda/resources.py --markdown < build/cuda.log

wheel: $(VENV)/.made
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo_out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)/.installed-*
	find sparseprune tests examples bench -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(VENV)/.installed-$(FILES): $(VENV)/.torch-$(TORCH_VERSION) $(BUILT_FROM)
	$(PIP) install --editable '.[torch,dev]' 'torch==$(TORCH_VERSION)'
	rm -f $(VENV)/.installed-*
	touch $@

# torch comes first and pinned, so that nothing below picks another one.
$(VENV)/.torch-$(TORCH_VERSION): $(VENV)/.made
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') 'torch==$(TORCH_VERSION)'
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.made:
	@$(MAKE) --no-print-directory tools
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	touch $@

# What pip cannot bring along. $(call need,COMMAND,WHAT,DEBIAN PACKAGE,FEDORA PACKAGE)
define need
@$(1) >/dev/null 2>&1 || { echo "make: $(2) is missing. Debian, Ubuntu: sudo apt-get install $(3)." \
	"Fedora: sudo dnf install $(4)." >&2; exit 1; }
endef
COMPILER := $(if $(filter default undefined,$(origin CXX)),c++,$(CXX))

tools:
	$(call need,command -v '$(PYTHON)',Python ($(PYTHON)),python3,python3)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $$($(PYTHON) --version) is too old, 3.10 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(call need,$(PYTHON) -c 'import ensurepip$(comma) venv',the venv module of $(PYTHON),python3-venv,python3-pip)
	$(call need,test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",Python.h of \
		$(PYTHON),python3-dev,python3-devel)
	$(call need,echo 'inline constexpr int x = 0;' | $(COMPILER) -std=c++17 -Werror -x c++ -fsyntax-only -,a C++17 \
		compiler ($(COMPILER)),g++,gcc-c++)

comma := ,
