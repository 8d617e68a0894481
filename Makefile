# Each target sets up what it needs in .venv, once.
#
#   make demo        pretrain SimCLR and MAE on embedded images, then compare them on few labels with training from scratch
#   make test        the tests, without those marked exhaustive
#   make test-fast   the tests, without those marked slow or exhaustive: minutes
#   make test-all    every test: all kernel configurations, long kills, long learning runs
#   make test-learning  methods still learn (but iGPT): two thirds of the least lift over the seeds, no new warning
#   make lint        format, style and types
#   make docs        the documentation as a site, build/docs/index.html; every warning is an error
#   make bench       time each op beside its baselines; writes benchmarks/results and the tables of the documentation
#   make bench-step  the same for whole training steps
#   make sanitize    the native kernels under AddressSanitizer and UBSan
#   make static      every configuration of every GPU kernel compiled, no GPU needed
#   make install     set up .venv alone
#   make clean       remove .venv and what was built
#
# PYTHON=python3.12 make …       another interpreter (3.10 or later)
# FASTSSL_BUILD=none make …      without a C++ compiler: every op runs in plain torch
# PROCESSES=8 make test          processes that share the tests, 2 by default, each with a core of its own and up to 4 GB

PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q -c .ci/constraints.txt
, := ,
DEMO_DATA := patterns
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal
SOURCES := pyproject.toml setup.py .ci/constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-fast test-all test-learning lint docs bench bench-step sanitize static install clean
.DELETE_ON_ERROR:

install: .venv/installed

.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastssl needs Python 3.10 or later; name one: make PYTHON=python3.12 …"; exit 1; }
	@test "$(FASTSSL_BUILD)" = none || command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || \
	  command -v clang++ >/dev/null || { echo "no C++ compiler found: install g++ (Debian: apt-get install g++), or go on" \
	  "without native kernels: FASTSSL_BUILD=none make …"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { echo "Python has no venv module: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "setting up .venv: torch and the other packages of pyproject.toml, several GB the first time"
	$(PIP) setuptools wheel ninja pybind11 torch torchvision
	$(PIP) --no-build-isolation -e '.[dev$(,)docs]'
	@touch $@

demo: .venv/installed
	rm -rf runs/demo-simclr runs/demo-mae
	$(BIN)/fastssl pretrain simclr_v1 --data $(DEMO_DATA) --folder runs/demo-simclr
	$(BIN)/fastssl pretrain mae --data $(DEMO_DATA) --epochs 24 --folder runs/demo-mae
	@$(BIN)/fastssl eval few-labels runs/demo-simclr --draws 2
	@$(BIN)/fastssl eval few-labels runs/demo-mae --draws 2
	@echo "The page with tables, curves and pictures of both:"
	@$(BIN)/fastssl report runs/demo-simclr runs/demo-mae --to runs/demo.html

test: .venv/installed
	$(PYTEST) -m "not exhaustive"

test-fast: .venv/installed
	$(PYTEST) -m "not slow and not exhaustive"

test-all: .venv/installed
	$(BIN)/python -m pytest

test-learning: .venv/installed
	$(BIN)/python -m benchmarks.learning check --processes $(PROCESSES)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/kernels/*.h tests/kernels/*.cpp

docs: .venv/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "wrote build/docs/index.html"

bench: .venv/installed
	@mkdir -p build
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/tests --benchmark-json=build/benchmark.json
	$(BIN)/python -m pytest benchmarks/test_masking.py benchmarks/test_patches.py --default-allocation \
	  --benchmark-json=build/benchmark-default.json
	$(BIN)/python -m benchmarks.table build/benchmark.json --default-allocation build/benchmark-default.json

bench-step: .venv/installed
	$(BIN)/python -m benchmarks.step

sanitize: .venv/installed
	$(BIN)/python -m tests.sanitize

static: .venv/installed
	$(BIN)/python -m benchmarks.static --all --check

clean:
	rm -rf .venv build dist *.egg-info fastssl/*.so
